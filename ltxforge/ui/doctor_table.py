"""The facts that a plan follows from, each with what it allows or rules out: `doctor`'s table. Torch-free.

Decides layout and marks; the facts and their meaning come from `doctor.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ltxforge.printable import printable

NAME_WIDTH, VALUE_WIDTH = 13, 29
MARKS = {"fine": ("+", "green"), "limit": ("-", "yellow"), "missing": ("!", "bold red"), "": (" ", "")}


@dataclass(frozen=True)
class Finding:
    """One fact. `means` is what it allows or rules out; `verdict` "fine", "limit", "missing", or "" for a mere fact."""

    group: str
    name: str
    value: str
    means: str = ""
    verdict: str = ""


def doctor_table(title: str, findings: Iterable[Finding]) -> RenderableType:
    """Groups in their order; each row is a mark, a name, the fact, and what follows from it."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.group, []).append(finding)
    parts: list[RenderableType] = [Text.assemble(("Doctor ", "bold"), (printable(title), "bold cyan"))]
    for name, rows in groups.items():
        parts += [Text(), Text(name, "bold"), _rows(rows)]
    return Group(*parts, Text(), Text("+ works   - works, with less   ! does not", "dim"))


def _rows(findings: Iterable[Finding]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=NAME_WIDTH, no_wrap=True)
    table.add_column(width=VALUE_WIDTH, overflow="fold")
    table.add_column(overflow="fold", max_width=72)
    for finding in findings:
        mark, style = MARKS[finding.verdict]
        texts = Text(printable(finding.value)), Text(printable(finding.means), "dim")
        table.add_row(Text(mark, style), Text(finding.name), *texts)
    return table
