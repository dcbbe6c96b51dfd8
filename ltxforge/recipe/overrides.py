"""`--set key=value`: changes to a recipe's data before it is judged.

    --set run.steps=20                       a value is TOML; what is no TOML is text
    --set model.base=tiny/ltx-video
    --set dataset.path=clips                 the only dataset
    --set dataset.1.repeats=4                by number, from 0
    --set dataset.faces.enabled=false        by id (prompts: by name)
    --set run.epochs=                        takes a key out, back to its default

Changes the data and the places, so that whatever is wrong is located in the argument. Judges nothing but the way to
the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_origin

import tomli

from ltxforge.recipe.faults import Fault, Key, dotted
from ltxforge.recipe.keys import branches, field_at, table_at, table_in
from ltxforge.recipe.locate import Place, Source, Span, locate_value
from ltxforge.recipe.report import shorten

_WAY = re.compile(r"""\s*(?:"(?P<quoted>[^"]*)"|'(?P<literal>[^']*)'|(?P<bare>[^\s.="']+))\s*(?P<end>[.=]|$)""")


@dataclass(frozen=True)
class Override:
    """One argument, taken apart: the names on the way to the key, and where its value begins."""

    source: Source
    names: tuple[tuple[str, Span], ...]
    start: int

    @property
    def value_text(self) -> str:
        """What stands behind the `=`."""
        return self.source.text[self.start :]


class BadOverride(Exception):
    """The argument cannot be applied. Its fault is located by `span`."""

    def __init__(self, span: Span, what: str, hint: str) -> None:
        self.span, self.fault = span, Fault((), what, hint)
        super().__init__(what)


def take_apart(argument: str) -> Override:
    """Read `key=value`. Raises BadOverride if it has no such form."""
    source = Source(f"--set {argument}", argument, lines_counted=False)
    names: list[tuple[str, Span]] = []
    pos = 0
    while True:
        match = _WAY.match(argument, pos)
        if not match or not match["end"]:
            raise BadOverride(_from(argument, pos), "an override is written key=value", "for example run.steps=100")
        form = next(form for form in ("quoted", "literal", "bare") if match[form] is not None)
        names.append((match[form], Span(*match.span(form))))
        pos = match.end()
        if match["end"] == "=":
            return Override(source, tuple(names), pos)


def apply(override: Override, data: dict[str, Any], places: dict[Key, Place]) -> None:
    """Change `data` and `places`. Raises BadOverride if the way to the key does not exist."""
    key, spans = _way(override, data)
    parent = _parent(data, key, spans)
    for known in [known for known in places if known[: len(key)] == key]:
        del places[known]
    if not override.value_text.strip():
        _take_out(parent, key, places)
        return
    value, is_toml = _value(override.value_text, key, override.start)
    if isinstance(parent, list) and key[-1] == len(parent):
        parent.append(value)
    else:
        parent[key[-1]] = value
    start = override.start + len(override.value_text) - len(override.value_text.lstrip())
    whole = Span(start, max(start + 1, len(override.source.text.rstrip())))
    for depth in range(1, len(key)):
        places.setdefault(key[:depth], Place(override.source, spans[depth - 1], None))
    places[key] = Place(override.source, spans[-1], whole)
    if is_toml:
        inside = locate_value(override.source, start, key)
        places.update({inner: place for inner, place in inside.items() if inner != key})


def _way(override: Override, data: dict[str, Any]) -> tuple[Key, list[Span]]:
    """The full key, list numbers filled in, and the span of each of its parts."""
    key: Key = ()
    spans: list[Span] = []
    names = list(override.names)
    while names:
        name, span = names.pop(0)
        key, spans = (*key, name), [*spans, span]
        item = field_at(key)
        if names and item is not None and table_in(item.annotation)[1]:
            number, used = _which(key, names[0][0], data, names[0][1])
            key, spans = (*key, number), [*spans, names[0][1] if used else span]
            names = names[1:] if used else names
            if not names:
                break
        elif names and item is not None and names[0][0].isdigit() and table_at(key) is None:
            key, spans = (*key, int(names[0][0])), [*spans, names[0][1]]
            names = names[1:]
    return key, spans


def _which(key: Key, name: str, data: dict[str, Any], span: Span) -> tuple[int, bool]:
    """Which item of a list of tables `name` means, and whether it was used up by that: number, id, or the only one."""
    items = _get(data, key)
    items = items if isinstance(items, list) else []
    called = [str(item.get("id", item.get("name", ""))) if isinstance(item, dict) else "" for item in items]
    if name.isdigit() and int(name) <= len(items):
        return int(name), True
    if name in called and name:
        return called.index(name), True
    table = table_at(key)
    if table is not None and name in table.model_fields and len(items) <= 1:
        return 0, False
    told = ", ".join(f"{place} ({label})" if label else str(place) for place, label in enumerate(called)) or "none"
    if table is not None and name in table.model_fields:
        raise BadOverride(span, f"which {dotted(key)} is meant?", f"{dotted(key)}.NUMBER.{name}; there are {told}")
    if len(items) == 1 and not name.isdigit():
        return 0, False
    raise BadOverride(span, f"there is no {dotted(key)} `{name}`", f"there are {told}")


def _parent(data: dict[str, Any], key: Key, spans: list[Span]) -> Any:
    """The table or list that holds the key; tables that are missing on the way are made."""
    at: Any = data
    for depth, part in enumerate(key[:-1]):
        following = key[depth + 1]
        if isinstance(at, list) and part == len(at):
            at.append({})
        inner = at[part] if isinstance(at, list) else at.get(part, [] if isinstance(following, int) else {})
        into_list = isinstance(inner, list) and isinstance(following, int) and following <= len(inner)
        if not into_list and not (isinstance(inner, dict) and isinstance(following, str)):
            what = f"`{dotted(key[: depth + 1])}` holds no `{following}`"
            raise BadOverride(spans[depth + 1], what, "set the whole of it instead")
        at[part] = inner
        at = inner
    return at


def _value(text: str, key: Key, start: int) -> tuple[Any, bool]:
    """The value, and whether it is TOML. Keys that take only text take bare words and numbers as text."""
    item = field_at(key)
    only_text = item is not None and not isinstance(key[-1], int) and all(
        kind is str or get_origin(kind) is Literal for kind, _ in branches(item.annotation)
    )  # fmt: skip
    if only_text and not text.strip().startswith(('"', "'", "[", "{")):
        return text.strip(), False
    try:
        data = tomli.loads(f"x = {text}")
    except (ValueError, RecursionError):
        if text.strip().startswith(('"', "'", "[", "{")):
            raise _bad_value(text, start) from None
        return text.strip(), False
    return (data["x"], True) if data.keys() == {"x"} else (text.strip(), False)


def _bad_value(text: str, start: int) -> BadOverride:
    closing = {"[": "]", "{": "}"}.get(text.strip()[0], text.strip()[0])
    hint = f"is the closing {closing} missing, or did the shell take the quotes?"
    return BadOverride(Span(start, start + len(text)), f"{shorten(text.strip(), 48)} is no TOML value", hint)


def _take_out(parent: Any, key: Key, places: dict[Key, Place]) -> None:
    """Remove a key; after an item of a list, the items behind it and their places move up by one."""
    part, depth = key[-1], len(key) - 1
    if isinstance(parent, dict):
        parent.pop(part, None)
    elif isinstance(part, int) and part < len(parent):
        del parent[part]
        behind = [known for known in places if known[:depth] == key[:-1] and len(known) > depth]
        for known in sorted(behind, key=lambda known: int(known[depth])):
            if int(known[depth]) > part:
                places[(*known[:depth], int(known[depth]) - 1, *known[depth + 1 :])] = places.pop(known)


def _get(data: Any, key: Key) -> Any:
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _from(text: str, pos: int) -> Span:
    return Span(min(pos, max(0, len(text) - 1)), max(1, len(text)))
