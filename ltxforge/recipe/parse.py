"""A recipe file → a Recipe, or every mistake in it at once, located. Torch-free; `check` is this and nothing else.

Decides no number: defaults stay None where the planner decides. Reads the one file it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ltxforge.errors import RecipeError
from ltxforge.recipe.faults import Fault, Key, dotted, short
from ltxforge.recipe.judge import judge
from ltxforge.recipe.locate import Place, Source, Span
from ltxforge.recipe.overrides import BadOverride, apply, take_apart
from ltxforge.recipe.report import Problem, one_line, render, shorten
from ltxforge.recipe.rules import break_rules
from ltxforge.recipe.schema import Recipe
from ltxforge.recipe.suggest import nearest
from ltxforge.recipe.syntax import MAX_BYTES, NotToml, decode, read_toml, unmarked

MOST_SHOWN = 50
"""Problems shown in one report; the others are counted."""


@dataclass(frozen=True)
class Parsed:
    """A correct recipe and what the plan wants to know about its text.

    Args:
        recipe: the recipe, defaults filled in.
        said: dotted keys that the file or an override said, `dataset.0.path`; all others are defaults.
        overridden: those of them that an override said.
        doubts: what is legal but probably not meant, located.
        path: the file as the user named it.
        text: the file's text, without overrides.
        overrides: what was given with --set, as given.
    """

    recipe: Recipe
    said: frozenset[str]
    overridden: frozenset[str]
    doubts: tuple[Problem, ...]
    path: str
    text: str
    overrides: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The doubts, a line each."""
        return tuple(map(one_line, self.doubts))


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Parsed:
    """Read and parse a recipe file. Raises RecipeError with every problem, a file that cannot be read included."""
    return parse(text_of(path), os.fspath(path), overrides)


def text_of(path: str | os.PathLike[str]) -> str:
    """A TOML file's text. Raises RecipeError if it cannot be read."""
    name = os.fspath(path)
    try:
        return decode(_read(Path(path)), name)
    except NotToml as error:
        raise refusal([error.problem]) from None
    except OSError as error:
        raise refusal([_unreadable(Path(path), name, error)]) from None


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Parsed:
    """Parse a recipe's text.

    Args:
        text: the file's text.
        name: how problems name the file.
        overrides: `key=value`, later ones win over earlier ones and over the file.

    Raises:
        RecipeError: with all problems, in the order of the text, those of overrides last.
    """
    source = Source(name, unmarked(text))
    try:
        data, places = read_toml(source)
    except NotToml as error:
        raise refusal([error.problem]) from None
    problems = [problem for argument in overrides for problem in _override(argument, data, places)]
    verdict = judge(data)
    faults = [*verdict.faults, *break_rules(verdict.recipe, verdict.unjudged)]
    problems += located(faults, places, source)
    if any(problem.level == "error" for problem in problems):
        raise refusal(problems)
    said = list(_said(verdict.recipe))
    overridden = [key for key in said if places[key].source is not source]
    return Parsed(
        verdict.recipe, _names(said), _names(overridden), tuple(problems), name, source.text, tuple(overrides)
    )


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _unreadable(path: Path, name: str, error: OSError) -> Problem:
    """A file that cannot be opened. A name that nearly exists is suggested."""
    if path.is_dir():
        return Problem(name, "this is a folder, not a recipe", hint=_recipes_in(path))
    if isinstance(error, FileNotFoundError):
        near = nearest(path.name, [item.name for item in path.parent.glob("*.toml")]) if path.parent.is_dir() else None
        return Problem(name, "there is no such file", hint=f"did you mean {path.with_name(near)}?" if near else "")
    return Problem(name, f"this file cannot be read: {error.strerror or error}")


def _recipes_in(folder: Path) -> str:
    names = sorted(item.name for item in folder.glob("*.toml"))[:5]
    return f"it holds {', '.join(names)}" if names else ""


def _override(argument: str, data: dict[str, Any], places: dict[Key, Place]) -> Iterator[Problem]:
    """Apply one override, or tell why it cannot be."""
    try:
        apply(take_apart(argument), data, places)
    except BadOverride as error:
        source = Source(f"--set {argument}", argument, lines_counted=False)
        yield _problem(error.fault, source, error.span)


def _said(section: BaseModel, prefix: Key = ()) -> Iterator[Key]:
    """The keys that were given a value, those in tables and lists of tables included."""
    for name in section.model_fields_set:
        value, key = getattr(section, name), (*prefix, name)
        if isinstance(value, BaseModel):
            yield from _said(value, key)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for place, item in enumerate(value):
                yield from _said(item, (*key, place))
        else:
            yield key


def _names(keys: Iterable[Key]) -> frozenset[str]:
    return frozenset(map(dotted, keys))


def located(faults: Iterable[Fault], places: dict[Key, Place], source: Source) -> list[Problem]:
    """The faults as problems with their places, in the order of the text."""
    return sorted((_locate(fault, places, source) for fault in faults), key=_order)


def _locate(fault: Fault, places: dict[Key, Place], source: Source) -> Problem:
    """Give a fault its place: the key's, else that of the table around it, else the end of the file."""
    for depth in range(len(fault.key), 0, -1):
        place = places.get(fault.key[:depth])
        if place is None:
            continue
        wanted = place.value if fault.at == "value" and depth == len(fault.key) else place.key
        span = wanted or place.key or place.value
        if span is not None:
            return _problem(fault, place.source, span, _line_of(fault.other, places, source))
    end = len(source.text.rstrip())
    return _problem(fault, source, Span(end, end + 1), _line_of(fault.other, places, source))


def _line_of(other: Key | None, places: dict[Key, Place], source: Source) -> str:
    """Where the other key stands that a message speaks of: `steps is on line 7`."""
    place = places.get(other) if other else None
    if other is None or place is None or not (place.key or place.value):
        return ""
    if place.source is not source:
        return f"{short(other)} comes from {shorten(place.source.name, 60)}"
    return f"{short(other)} is on line {source.line_and_column((place.key or place.value).start)[0]}"


def _problem(fault: Fault, source: Source, span: Span, more: str = "") -> Problem:
    line, column = source.line_and_column(span.start)
    text = source.line(line)
    length = max(1, min(span.end - span.start, len(text) - column + 1))
    hint = "; ".join(part for part in (fault.hint, more) if part)
    shown = line if source.lines_counted else 0
    return Problem(source.name, fault.what, shown, column, length, text, hint, dotted(fault.key), fault.level)


def _order(problem: Problem) -> tuple[bool, int, int]:
    return problem.line == 0, problem.line, problem.column


def refusal(problems: Sequence[Problem]) -> RecipeError:
    """The error that reports these problems, the first fifty in full."""
    shown = list(problems[:MOST_SHOWN])
    report = render(shown)
    if len(problems) > len(shown):
        report += f"\n(only the first {len(shown)} of {len(problems)} or more are shown)"
    return RecipeError(tuple(problems), report)
