"""Problems with their places, rendered as a compiler prints them. Plain text: whoever prints it may add colour.

Nothing from a user's file reaches the terminal raw: control characters and invisible marks are shown as escapes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ltxforge.printable import printable

WIDEST = 96
"""Longest excerpt of a line, in terminal cells; longer lines are cut around the carets."""
LONGEST = 300
"""Longest message or hint, in characters."""
TAB = "    "


@dataclass(frozen=True)
class Problem:
    """One mistake and its place.

    Args:
        where: the file's name as the user gave it, or `--set key=value`.
        what: what is wrong.
        line: from 1; 0 where lines mean nothing (no such file; an override).
        column: from 1, in characters of `text`.
        length: how many characters the carets cover.
        text: the source line, or the override.
        hint: what is legal, or the nearest legal thing.
        key: the dotted key.
        level: "error" or "warning".
    """

    where: str
    what: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""
    hint: str = ""
    key: str = ""
    level: str = "error"


def render(problems: Sequence[Problem]) -> str:
    """The whole report: every problem in its order, then how many there are."""
    return "\n".join([*(render_one(problem) for problem in problems), summary(problems)])


def render_one(problem: Problem) -> str:
    """One problem: `file:line:column  what`, the line, carets and the hint."""
    warning = "warning: " if problem.level == "warning" else ""
    head = f"{_place(problem)}  {warning}{_told(problem.what)}"
    if not problem.column:
        return f"{head}\n        {_told(problem.hint)}" if problem.hint else head
    excerpt, before, under = _excerpt(problem.text, problem.column - 1, problem.length)
    number = str(problem.line) if problem.line else ""
    carets = f"{' ' * before}{'^' * under} {_told(problem.hint)}".rstrip()
    return f"{head}\n{number:>5} | {excerpt}".rstrip() + f"\n{'':>5} | {carets}"


def one_line(problem: Problem) -> str:
    """One problem in a line, for lists and logs: `file:line:column  what (hint)`."""
    hint = f" ({_told(problem.hint)})" if problem.hint else ""
    return f"{_place(problem)}  {_told(problem.what)}{hint}"


def summary(problems: Sequence[Problem]) -> str:
    """`2 errors, nothing was started.`; warnings alone stop nothing."""
    errors = sum(problem.level == "error" for problem in problems)
    counts = [_count(errors, "error"), _count(len(problems) - errors, "warning")]
    told = ", ".join(count for count in counts if count)
    return f"{told}, nothing was started." if errors else f"{told}."


def shorten(text: str, longest: int) -> str:
    """`text` with its middle left out if it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def cells(shown: str) -> int:
    """Width on a terminal: East Asian wide characters take two cells, combining marks none."""
    return sum(_cells(character) for character in shown)


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _told(message: str) -> str:
    return printable(shorten(message, LONGEST))


def _place(problem: Problem) -> str:
    place = printable(shorten(problem.where, 120))
    return f"{place}:{problem.line}:{problem.column}" if problem.line else place


def _excerpt(line: str, start: int, length: int) -> tuple[str, int, int]:
    """The line as shown, and in cells: the space before the carets and their number."""
    line, start = _window(line, start)
    shown = [TAB if character == "\t" else printable(character) for character in line]
    widths = [cells(character) for character in shown]
    room = max(1, WIDEST - sum(widths[:start]))
    return "".join(shown), sum(widths[:start]), max(1, min(sum(widths[start : start + length]), room))


def _window(line: str, start: int) -> tuple[str, int]:
    """Cut a long line to what fits around `start`, marking what was left out by `…`."""
    widths = [len(TAB) if character == "\t" else cells(printable(character)) for character in line[: start + WIDEST]]
    if len(line) <= WIDEST and sum(widths) <= WIDEST:
        return line, start
    first = start
    before = 0
    while first > 0 and before + widths[first - 1] <= WIDEST // 3:
        first -= 1
        before += widths[first]
    last, used = start, before
    while last < len(widths) and used + widths[last] <= WIDEST:
        used += widths[last]
        last += 1
    head, tail = ("…" if first else ""), ("…" if last < len(line) else "")
    return f"{head}{line[first:last]}{tail}", start - first + len(head)


def _count(number: int, word: str) -> str:
    return "" if number == 0 else f"{number} {word}{'' if number == 1 else 's'}"
