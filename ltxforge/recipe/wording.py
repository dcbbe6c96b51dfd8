"""Values and types in the words of a message. Knows how TOML writes things; judges nothing."""

from __future__ import annotations

import datetime
import math
import typing
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel

from ltxforge.recipe.keys import branches
from ltxforge.recipe.report import shorten
from ltxforge.recipe.schema import Meaning


def expected(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What a value must be, in words: `a whole number from 1 to 1024`, `"auto" or a number above 0`."""
    told = [_expected(kind, limits) for kind, limits in branches(annotation, metadata)]
    if len(told) > 1:
        told = [text.removeprefix("one of ") for text in told]
    return " or ".join(told)


def _expected(kind: Any, limits: list[Any]) -> str:
    if typing.get_origin(kind) is Literal:
        words = [f'"{word}"' for word in typing.get_args(kind)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if typing.get_origin(kind) is list:
        return f"a list{_items(limits)}, each item {expected(typing.get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a table"
    if meaning := next((limit.words for limit in limits if isinstance(limit, Meaning)), ""):
        return meaning
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
    return names[kind] + _range(limits)


def _range(limits: list[Any]) -> str:
    told = {type(limit): limit for limit in limits}
    if step := told.get(annotated_types.MultipleOf):
        return f"{_range([limit for limit in limits if limit is not step])}, a multiple of {number(step.multiple_of)}"
    low, high = told.get(annotated_types.Ge), told.get(annotated_types.Le)
    above, below = told.get(annotated_types.Gt), told.get(annotated_types.Lt)
    if low and high:
        return f" from {number(low.ge)} to {number(high.le)}"
    parts = [
        *([f"at least {number(low.ge)}"] if low else []),
        *([f"above {number(above.gt)}"] if above else []),
        *([f"at most {number(high.le)}"] if high else []),
        *([f"below {number(below.lt)}"] if below else []),
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _items(limits: list[Any]) -> str:
    told = {type(limit): limit for limit in limits}
    low, high = told.get(annotated_types.MinLen), told.get(annotated_types.MaxLen)
    if low and high and low.min_length == high.max_length:
        return f" of {low.min_length}"
    return ""


def number(value: Any) -> str:
    """A limit as one would write it: 2**63 stays a power."""
    return "2^63" if value == 2**63 else f"{value:g}" if isinstance(value, float) else str(value)


def kind_of(value: Any) -> str:
    """What a TOML value is, in words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value}" if not math.isfinite(value) else "a number with a fraction"
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (int, "a whole number"), (str, "text"), (list, "a list"), (dict, "a table"),
        ((datetime.date, datetime.time), "a date or time"),
    ]  # fmt: skip
    return next(name for kind, name in kinds if isinstance(value, kind))


def toml(value: Any) -> str:
    """A value as TOML writes it, shortened to fit a message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{shorten(value, 48)}"'
    if isinstance(value, int) and abs(value) >= 10**48:
        return f"{str(value)[:24]}…" if abs(value) < 10**4000 else "a huge number"
    if isinstance(value, (list, dict)):
        return kind_of(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return shorten(str(value), 48)
