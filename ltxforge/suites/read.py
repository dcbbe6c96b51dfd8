"""Reads a suite's file: which kind it is, its cases, and every mistake at once, told as recipes' are. Torch-free.

Measures nothing; what a case may say stands beside this file, one module for each kind.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ltxforge.errors import PlanError
from ltxforge.recipe.faults import Fault, Key, short
from ltxforge.recipe.keys import branches
from ltxforge.recipe.locate import Source
from ltxforge.recipe.parse import located, refusal, text_of
from ltxforge.recipe.suggest import nearest
from ltxforge.recipe.syntax import NotToml, read_toml
from ltxforge.recipe.wording import expected, toml
from ltxforge.suites.case import Case, Section
from ltxforge.suites.encode import EncodeCase
from ltxforge.suites.kernels import KernelCase
from ltxforge.suites.memory import MemoryCase
from ltxforge.suites.step import StepCase

SuiteName = Literal["kernels", "step", "encode", "memory"]
SOURCE_TREE = Path(__file__).resolve().parent.parent.parent


class Suite(Section):
    """A file of cases. `suite` says which kind of measurement they are."""

    suite: SuiteName
    case: Annotated[list[Case], Field(min_length=1)]


class KernelSuite(Suite):
    """Cases of `benchmarks/kernels.py`."""

    case: Annotated[list[KernelCase], Field(min_length=1)]  # type: ignore[assignment]


class StepSuite(Suite):
    """Cases of `benchmarks/step.py`."""

    case: Annotated[list[StepCase], Field(min_length=1)]  # type: ignore[assignment]


class EncodeSuite(Suite):
    """Cases of `benchmarks/encode.py`."""

    case: Annotated[list[EncodeCase], Field(min_length=1)]  # type: ignore[assignment]


class MemorySuite(Suite):
    """Cases of `benchmarks/memory.py`."""

    case: Annotated[list[MemoryCase], Field(min_length=1)]  # type: ignore[assignment]


SUITES: dict[str, type[Suite]] = {
    "kernels": KernelSuite,
    "step": StepSuite,
    "encode": EncodeSuite,
    "memory": MemorySuite,
}


def find(word: str) -> Path:
    """The file of a suite: one of ltxforge's own by its name, from the source tree, or the path itself.

    Raises:
        PlanError: ltxforge is installed without its source tree, where the suites lie.
    """
    if word not in SUITES:
        return Path(word)
    path = SOURCE_TREE / "bench" / f"{word}.toml"
    if not path.exists():
        remedy = f"Clone ltxforge's repository and name the file: ltxforge bench path/to/bench/{word}.toml"
        raise PlanError("ltxforge's own suites are not part of an installed package", where=str(path), remedy=remedy)
    return path


def load(path: Path, names: Sequence[str] = ()) -> Suite:
    """Read a suite, or those of its cases that are named.

    Raises:
        RecipeError: with every mistake in the file, located.
        PlanError: no such file, or a name that no case has.
    """
    if not path.exists():
        remedy = f"Write {', '.join(SUITES)}, or a suite's file; ltxforge's own lie in its repository's folder bench/."
        raise PlanError("there is no such suite", where=str(path), remedy=remedy)
    suite = parse(text_of(path), str(path))
    known = [case.name for case in suite.case]
    if strange := [name for name in names if name not in known]:
        near = nearest(strange[0], known)
        raise PlanError(
            f"there is no case {strange[0]!r} in this suite",
            where=str(path),
            remedy=f"Did you mean {near}?" if near else f"Its cases: {', '.join(known)}.",
        )
    return suite.model_copy(update={"case": [case for case in suite.case if not names or case.name in names]})


def parse(text: str, name: str) -> Suite:
    """A suite's text → Suite. `name` is how problems name the file. Raises RecipeError."""
    source = Source(name, text)
    try:
        data, places = read_toml(source)
    except NotToml as error:
        raise refusal([error.problem]) from None
    kind = _kind(data)
    try:
        suite = kind.model_validate(data)
    except ValidationError as error:
        raise refusal(located(_worded(error, kind), places, source)) from None
    if faults := list(_contradictions(suite)):
        raise refusal(located(faults, places, source))
    return suite


def _kind(data: Mapping[str, Any]) -> type[Suite]:
    """By the file's own word; where that is wrong or missing, the kind whose cases know most of the keys."""
    if data.get("suite") in SUITES:
        return SUITES[data["suite"]]
    cases = data.get("case")
    keys = [key for case in cases if isinstance(case, dict) for key in case] if isinstance(cases, list) else []
    return max(SUITES.values(), key=lambda kind: sum(key in _case_of(kind).model_fields for key in keys))


def _case_of(kind: type[Suite]) -> type[Case]:
    """What the items of its `case` are."""
    return typing.get_args(kind.model_fields["case"].annotation)[0]


def _contradictions(suite: Suite) -> Iterator[Fault]:
    """What no single key can know."""
    first: dict[str, int] = {}
    for number, case in enumerate(suite.case):
        key = ("case", number)
        if case.name in first:
            other = ("case", first[case.name], "name")
            yield Fault((*key, "name"), f'two cases are called "{case.name}"', "rename one of them", other=other)
        first.setdefault(case.name, number)
        yield from (Fault((*key, name), what, hint) for name, what, hint in case.contradictions())


def _worded(error: ValidationError, kind: type[Suite]) -> Iterator[Fault]:
    """pydantic's errors in our words, one for each key."""
    seen = set()
    for item in error.errors(include_url=False):
        key = _key(item["loc"])
        if key not in seen:
            seen.add(key)
            yield _fault(key, item, kind)


def _key(location: tuple[int | str, ...]) -> Key:
    """Without the names of union alternatives that pydantic puts behind a key."""
    deepest = 3 if location[:1] == ("case",) else 1
    return tuple(location[:deepest])


def _fault(key: Key, error: Mapping[str, Any], kind: type[Suite]) -> Fault:
    table = _case_of(kind) if len(key) == 3 else kind
    name, where = short(key), "[[case]]" if len(key) == 3 else "this file"
    if error["type"] == "extra_forbidden":
        near = nearest(str(key[-1]), table.model_fields)
        hint = f"did you mean `{near}`?" if near else f"legal here: {', '.join(table.model_fields)}"
        return Fault(key, f"unknown key `{name}` in {where}", hint, "key")
    if error["type"] == "missing":
        examples = {**_EXAMPLES, **_case_of(kind).examples}
        return Fault(key, f"`{name}` is missing in {where}", examples.get(str(key[-1]), ""), "key")
    if key[0] == "case" and len(key) < 3:
        return Fault(key, "cases are tables, at least one", "write [[case]] and its keys below it", "key")
    value, item = error["input"], table.model_fields[str(key[-1])]
    if error["type"] == "value_error":
        what, _, hint = str(error["ctx"]["error"]).partition("; ")
        return Fault(key, f"{name} = {toml(value)} {what}", hint)
    if error["type"] == "too_short":
        return Fault(key, f"{name} is empty", "at least one, or leave it out for the default")
    if typing.get_origin(item.annotation) is dict:
        return Fault(key, f"{name} is a table of positive numbers", "for example floors = { eager = 2.0 }")
    near = nearest(value, _words(item.annotation)) if isinstance(value, str) else None
    told = expected(item.annotation, item.metadata)
    return Fault(key, f"{name} must be {told}, not {toml(value)}", f'did you mean "{near}"?' if near else "")


def _words(annotation: Any) -> list[str]:
    """The words that a key takes, if it takes words of a fixed list."""
    literals = [kind for kind, _ in branches(annotation) if typing.get_origin(kind) is Literal]
    return [word for literal in literals for word in typing.get_args(literal)]


_EXAMPLES = {"suite": 'write suite = "step"', "case": "write [[case]] and its keys below it"}
