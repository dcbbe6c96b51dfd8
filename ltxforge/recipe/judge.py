"""TOML data → a Recipe, or every fault in it, in our words.

pydantic finds; this file words what it found, and goes on: faulty values are replaced by defaults and missing ones by
the schema's examples until a Recipe stands, so that the rules between the other keys can still be judged. `unjudged`
names what is not the user's and must not be judged by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ltxforge.recipe.faults import Fault, Key, dotted, short
from ltxforge.recipe.keys import branches, field_at, header, not_yet, suggestion, table_at, table_in
from ltxforge.recipe.schema import Recipe
from ltxforge.recipe.suggest import nearest
from ltxforge.recipe.wording import expected, kind_of, number, toml

MOST_FAULTS = 100
"""More faults than this are not worded: such a file is no recipe."""


@dataclass
class Verdict:
    """What was found.

    Args:
        recipe: the recipe; where there are faults, one with stand-ins in their place, good for the rules only.
        faults: what is wrong.
        unjudged: keys whose value in `recipe` is not what the user said or meant.
    """

    recipe: Recipe
    faults: list[Fault] = field(default_factory=list)
    unjudged: set[Key] = field(default_factory=set)


def judge(data: dict[str, Any]) -> Verdict:
    """Validate a recipe's data. `data` is used up: faulty parts are taken out of it."""
    faults = [
        Fault(key, f"`{dotted(key)}` is refused: {reason}", "leave it out", "key") for key, reason in not_yet(data)
    ]
    for fault in faults:
        _take_out(data, fault.key)
    found: dict[Key, list[dict[str, Any]]] = {}
    try:
        return Verdict(Recipe.model_validate(data), faults)
    except ValidationError as error:
        found = _by_key(error)
    verdict = Verdict(Recipe.model_construct(), faults)
    worded = list(found.items())[:MOST_FAULTS]
    unknown = {key for key, errors in found.items() if errors[0]["type"] == "extra_forbidden"}
    verdict.faults += [_unknown(key, errors[0]["input"], verdict.unjudged) for key, errors in worded if key in unknown]
    for key, errors in worded:
        is_missing = errors[0]["type"] == "missing"
        if key not in unknown and not (is_missing and key in verdict.unjudged):
            verdict.faults.append(_missing(key) if is_missing else _refused(key, errors))
    verdict.unjudged |= found.keys() - unknown
    verdict.recipe = _with_stand_ins(data, found)
    return verdict


def _by_key(error: ValidationError) -> dict[Key, list[dict[str, Any]]]:
    """pydantic's errors by the key that they are about; the alternatives of a union come together."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key(item["loc"], item["type"]), []).append(dict(item))
    return found


def _key(location: tuple[int | str, ...], kind: str) -> Key:
    """Without the names of union alternatives that pydantic puts behind a key."""
    key: Key = ()
    for place, part in enumerate(location):
        last = place == len(location) - 1
        if isinstance(part, str) and field_at((*key, part)) is None and not (last and kind == "extra_forbidden"):
            break
        key = (*key, part)
    return key


def _with_stand_ins(data: dict[str, Any], found: dict[Key, list[dict[str, Any]]]) -> Recipe:
    """Take out what is wrong, put examples where something is missing, and validate again until it holds."""
    for _ in range(8):
        for key, errors in found.items():
            if errors[0]["type"] == "missing":
                _put(data, key, _stand_in(key))
            else:
                _take_out(data, key)
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            found = _by_key(error)
    raise AssertionError(f"the schema's examples do not make a recipe: {sorted(map(dotted, found))}")


def _stand_in(key: Key) -> Any:
    item = field_at(key)
    assert item is not None
    if item.examples:
        return item.examples[0]
    return [{}] if table_in(item.annotation)[1] else {}


def _take_out(data: dict[str, Any], key: Key) -> None:
    """Remove a key; a table in a list is emptied instead, so that its neighbours keep their numbers."""
    while isinstance(key[-1], int) and table_at(key) is None:
        key = key[:-1]
    at: Any = data
    for part in key[:-1]:
        if isinstance(at, dict) and part not in at:
            return
        at = at[part]
    if isinstance(key[-1], int):
        at[key[-1]] = {}
    else:
        at.pop(key[-1], None)


def _put(data: dict[str, Any], key: Key, value: Any) -> None:
    at: Any = data
    for part in key[:-1]:
        at = at[part]
    at[key[-1]] = value


def _unknown(key: Key, value: Any, unjudged: set[Key]) -> Fault:
    """An unknown key; what it was probably meant to be is not judged by its default."""
    hint, meant = suggestion(key)
    if meant:
        unjudged.add(meant)
    if len(key) > 1:
        what = f"unknown key `{short(key)}` in {header(key[:-1])}"
    elif isinstance(value, (dict, list)):
        what = f"unknown section [{short(key)}]"
    else:
        what = f"unknown key `{short(key)}` outside of any section"
    return Fault(key, what, hint, "key")


def _missing(key: Key) -> Fault:
    if len(key) == 1:
        inner = table_at(key)
        assert inner is not None
        needed = next(name for name, item in inner.model_fields.items() if item.is_required())
        example = toml(_stand_in((*key, needed)))
        return Fault(key, f"section {header(key)} is missing", f"add {header(key)} with {needed} = {example}", "key")
    what = f"`{short(key)}` is missing in {header(key[:-1])}"
    return Fault(key, what, f"for example {short(key)} = {toml(_stand_in(key))}", "key")


def _refused(key: Key, errors: list[dict[str, Any]]) -> Fault:
    """A value that its key does not take."""
    value = errors[0]["input"]
    item = field_at(key)
    assert item is not None
    if table_at(key) is not None:
        return _no_table(key, value)
    annotation, limits = _annotation(item, key)
    chosen = _telling(errors, value, annotation)
    if chosen is None:
        what = f"{short(key)} must be {expected(annotation, limits)}, not {kind_of(value)}"
        return Fault(key, what, _retyped(short(key), value, annotation, item))
    said = f"{short(key)} = {toml(value)}"
    if chosen["type"] == "value_error":
        what, _, hint = str(chosen["ctx"]["error"]).partition("; ")
        return Fault(key, f"{said} {what}", hint)
    if chosen["type"] == "literal_error":
        near = nearest(value, _literals(annotation)) if isinstance(value, str) else None
        legal = expected(annotation, limits)
        if near:
            return Fault(key, f"{short(key)} must be {legal}, not {toml(value)}", f'did you mean "{near}"?')
        return Fault(key, f"{short(key)} cannot be {toml(value)}", f"it must be {legal}")
    if chosen["type"] in ("too_short", "too_long"):
        return _wrong_length(key, chosen, annotation, limits)
    if chosen["type"] == "multiple_of":
        what = f"{said} is no multiple of {chosen['ctx']['multiple_of']}"
        return Fault(key, what, f"nearest: {' or '.join(map(str, _nearest_multiples(value, limits)))}")
    return _out_of_range(key, chosen, said, expected(annotation, limits))


def _annotation(item: FieldInfo, key: Key) -> tuple[Any, list[Any]]:
    """A field's type and limits; for an item of its list, the item's."""
    if isinstance(key[-1], int):
        kind = next(kind for kind, _ in branches(item.annotation) if get_origin(kind) is list)
        return get_args(kind)[0], []
    return item.annotation, item.metadata


def _telling(errors: list[dict[str, Any]], value: Any, annotation: Any) -> dict[str, Any] | None:
    """The error that says most, where a key takes several kinds of value: not one about a kind that was never meant.

    A text that is unlike any word which the key takes was meant as what its check takes.
    """
    found = [error for error in errors if not _is_type_error(error, value)]
    if found and found[0]["type"] == "literal_error" and not nearest(value, _literals(annotation)):
        found.sort(key=lambda error: error["type"] != "value_error")
    return found[0] if found else None


def _is_type_error(error: dict[str, Any], value: Any) -> bool:
    """Whether one alternative of a key failed because it takes another kind of value."""
    if error["type"] == "literal_error":
        return not isinstance(value, str)
    if error["type"] == "float_type" and isinstance(value, int) and not isinstance(value, bool):
        return False  # a whole number too large for a float
    return error["type"].endswith("_type")


def _no_table(key: Key, value: Any) -> Fault:
    """A section that is no table, a list of sections that is no list, or the other way round."""
    name = header(tuple(part for part in key if isinstance(part, str)))
    if isinstance(value, list) and not value:
        return Fault(key, f"there must be at least one {name}", f"write {name} and its keys below it")
    if isinstance(value, dict):
        return Fault(key, f"{name} is a list of tables", f"write {name}, with double brackets", "key")
    if isinstance(value, list):
        return Fault(key, f"{name} is one table, not a list", f"write {name}, with single brackets", "key")
    what = f"{short(key)} must be a table, not {kind_of(value)}"
    return Fault(key, what, f"write {name} and its keys below it")


def _wrong_length(key: Key, error: dict[str, Any], annotation: Any, limits: list[Any]) -> Fault:
    count, least, most = error["ctx"]["actual_length"], error["ctx"].get("min_length"), error["ctx"].get("max_length")
    items = f"{count or 'no'} item{'' if count == 1 else 's'}"
    hint = f"at least {least}" if error["type"] == "too_short" else f"at most {most}"
    return Fault(key, f"{short(key)} has {items}: it must be {expected(annotation, limits)}", hint)


def _out_of_range(key: Key, error: dict[str, Any], said: str, legal: str) -> Fault:
    limits = error.get("ctx", {})
    bound = limits.get("ge", limits.get("le"))
    hint = "" if bound is None else f"nearest: {number(bound)}"
    return Fault(key, f"{said} is out of range: it must be {legal}", hint)


def _nearest_multiples(value: int, limits: list[Any]) -> list[int]:
    """The legal numbers on either side of one that is no multiple."""
    told = {type(limit): limit for limit in limits}
    step = told[annotated_types.MultipleOf].multiple_of
    low, high = told[annotated_types.Ge].ge, told[annotated_types.Le].le
    below = value // step * step
    return sorted({min(max(each, low), high) for each in (below, below + step)})


def _literals(annotation: Any) -> list[str]:
    return [word for kind, _ in branches(annotation) if get_origin(kind) is Literal for word in get_args(kind)]


def _retyped(name: str, value: Any, annotation: Any, item: FieldInfo) -> str:
    """How a value of the wrong type was probably meant."""
    kinds = [get_origin(kind) or kind for kind, _ in branches(annotation)]
    if isinstance(value, str):
        if bool in kinds and value.lower() in ("true", "yes", "on", "false", "no", "off"):
            return f"write {name} = {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
        if (int in kinds or float in kinds) and _is_number(value):
            return f"write {name} = {value}, without quotes"
        if kinds == [bool]:
            return f"write {name} = true or {name} = false, without quotes"
    if isinstance(value, float) and int in kinds and math.isfinite(value) and value == int(value):
        return f"write {name} = {int(value)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and str in kinds and item.default is None:
        return f'write {name} = "{toml(value)}", with quotes'
    if list in kinds and not isinstance(value, (dict, list)):
        return f"write {name} = [{toml(value)}]"
    if isinstance(item.default, str) and not isinstance(value, str):
        return f'for example {name} = "{item.default}"'
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
