"""A fault: what is wrong with a key, before anyone looked up where in the text the key stands.

`judge`, `rules` and `overrides` find faults; `parse` locates them and makes `report.Problem`s of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ltxforge.recipe.report import shorten

Key = tuple[str | int, ...]
"""A key's full path: ("dataset", 0, "frames"). List items are numbers."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        key: whose fault it is.
        what: the message, without place.
        hint: what to do, or the nearest legal thing; stands beside the carets.
        at: whether the carets go under the key or under its value.
        other: another key that the message speaks of; the report adds its line.
        level: a warning is shown and starts anyway.
    """

    key: Key
    what: str
    hint: str = ""
    at: Literal["key", "value"] = "value"
    other: Key | None = None
    level: Literal["error", "warning"] = "error"


def dotted(key: Key) -> str:
    """`dataset.0.frames`."""
    return ".".join(map(str, key))


def short(key: Key) -> str:
    """The key as a message names it: the last name, shortened, with the numbers after it: `targets[0]`."""
    names = [place for place, part in enumerate(key) if isinstance(part, str)]
    start = names[-1] if names else 0
    return shorten(str(key[start]), 48) + "".join(f"[{part}]" for part in key[start + 1 :])
