"""The JSON Schema of recipes, as TOML editors (taplo, Even Better TOML) read it: completion, hover texts, checks.

Says what JSON Schema can say: keys, types, ranges, choices, defaults. The rest is `ltxforge check`'s.
"""

from __future__ import annotations

from typing import Any

from ltxforge.recipe.schema import Recipe

DIALECT = "http://json-schema.org/draft-07/schema#"
"""What taplo supports; pydantic's output uses nothing newer once `$defs` is called `definitions`."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe, without `null` (TOML has none) and without defaults of whole sections."""
    schema = _for_editors(Recipe.model_json_schema(ref_template="#/definitions/{model}"))
    schema["definitions"] = schema.pop("$defs")
    return {"$schema": DIALECT, **schema}


def _for_editors(node: Any) -> Any:
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    useless = "default" in node and ("$ref" in node or node["default"] is None)
    node = {key: _for_editors(item) for key, item in node.items() if not (key == "default" and useless)}
    if "anyOf" in node:
        kept = [branch for branch in node["anyOf"] if branch != {"type": "null"}]
        node["anyOf"] = kept
        if len(kept) == 1:
            del node["anyOf"]
            node = {**kept[0], **node}
    return node
