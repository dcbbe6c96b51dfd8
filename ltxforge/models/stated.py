"""What weights say of themselves, in a folder's `config.json` or a file's metadata, in the types that it must have.

A description is another program's text: what it says is checked before it is used, and a wrong word is refused with
its place. Decides which types and words are right; knows no part. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ltxforge.errors import WeightsError
from ltxforge.models.weights import Header

# Settings that are one of a few words, by diffusers' names.
WORDS = {
    "rope_type": ("split", "interleaved"),
    "frequencies_precision": ("float64", "float32"),
    "norm_type": ("pixel", "group"),
    "causality_axis": ("height", "width", "width-compatibility", "none"),
}
# null means something here: none, or as the module itself has it.
_NULLABLE = ("attn_resolutions", "caption_channels", "final_act_fn", "bwe_final_act_fn", "mel_bins", "highest_hz")
_MAY_BE_ZERO = ("causal_offset", "dropout", "lowest_hz", "leaky_relu_negative_slope", "bwe_leaky_relu_negative_slope")
_REMEDY = "Its description is damaged or of another model; download it again or name another."
SMALLEST, LARGEST = 1e-30, 1e15
# Characters of a wrong value in a message.
_SHOWN = 60


@dataclass(frozen=True)
class Stated:
    """One table of a description. `place` is where it stands in it, `where` the file, both for messages."""

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    place: str = "config.json: "

    @staticmethod
    def of(header: Header, folder: Mapping[str, Any], part: str, where: str) -> Stated:
        """What a folder's `config.json` says of its part, or a single file's metadata under the part's name."""
        return Stated(folder, where) if folder else Stated.in_metadata(header, where).table(part)

    @staticmethod
    def in_metadata(header: Header, where: str) -> Stated:
        """The table that a single file's metadata has under `config`; empty if it has none."""
        try:
            config = json.loads(header.metadata.get("config", "{}"))
        except ValueError as error:
            raise WeightsError("`config` in its metadata is no JSON", where=where, remedy=_REMEDY) from error
        return Stated({"config": config}, where, "metadata ").table("config")

    def __bool__(self) -> bool:
        return bool(self.values)

    def table(self, name: str) -> Stated:
        """A table in this one; empty if there is none."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self._refused(name, value, "a table")
        dot = "" if self.place.endswith(" ") else "."
        return Stated(value, self.where, f"{self.place}{dot}{name}")

    def settings(self, names: Mapping[str, str], like: Mapping[str, Any]) -> dict[str, Any]:
        """What is said of some settings, by our names.

        Args:
            names: the description's name → ours.
            like: our name → a value of the type it must have.
        """
        return {ours: self.value(theirs, like[ours], ours) for theirs, ours in names.items() if theirs in self.values}

    def value(self, name: str, like: Any, ours: str = "") -> Any:
        """A setting that is said, in the type of `like`; whole numbers may be written as floats, lists for tuples."""
        value, ours = self.values[name], ours or name
        if value is None and ours in _NULLABLE:
            return None
        if ours in WORDS and value not in WORDS[ours]:
            raise self._refused(name, value, f"one of {', '.join(WORDS[ours])}")
        try:
            return _typed(value, like, 0 if ours in _MAY_BE_ZERO else SMALLEST)
        except TypeError as error:
            raise self._refused(name, value, str(error)) from None

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        """A list of so many whole numbers that is said."""
        found = self.value(name, (1,))
        if len(found) != count:
            raise self._refused(name, self.values[name], f"a list of {count}")
        return found

    def _refused(self, name: str, value: Any, wanted: str) -> WeightsError:
        text = json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        dot = "" if self.place.endswith(" ") else "."
        return WeightsError(
            f"{self.place}{dot}{name} is {shown}, and must be {wanted}", where=self.where, remedy=_REMEDY
        )


def _typed(value: Any, like: Any, least: float) -> Any:
    """The value in the type of `like`. Raises TypeError that says what it must be."""
    match like:
        case None:
            return value
        case bool():
            return _require(value, isinstance(value, bool), "true or false")
        case int():
            return int(_require(value, _is_number(value, least) and value == int(value), "a whole number above 0"))
        case float():
            return float(_require(value, _is_number(value, least), "a number" + (" above 0" if least else "")))
        case str():
            return _require(value, isinstance(value, str), "a word")
        case tuple() | list():
            _require(value, isinstance(value, list | tuple) and bool(value), "a list")
            return type(like)(_typed(each, like[0], least) for each in value)
    raise AssertionError(f"no setting is like {like!r}")


def _require(value: Any, holds: bool, wanted: str) -> Any:
    if not holds:
        raise TypeError(wanted)
    return value


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= LARGEST
