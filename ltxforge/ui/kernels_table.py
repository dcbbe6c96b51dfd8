"""How each op is carried out, in words: rows for the plan's table, and the table of the verb `kernels`.

Decides wording and grouping. What an op computes is told as the recipe's schema tells it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ltxforge_kernels.choice import Choice, Implementation, Kernels, TokenRange
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ltxforge.printable import printable
from ltxforge.recipe.schema import Kernels as Section


@dataclass(frozen=True)
class Calls:
    """How often a forward calls an op on tensors of this many tokens (B·T) and this width, and what carries it out."""

    op: str
    implementation: Implementation
    tokens: int
    width: int
    count: int


def kernel_rows(kernels: Kernels, origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(label, value, who decided it): ops with the same answer share a row; exceptions have one each."""
    rows = []
    for whose in dict.fromkeys(_origin(choice, origins) for choice in kernels.choices):
        of_origin = [choice for choice in kernels.choices if _origin(choice, origins) == whose]
        for (implementation, reason), ops in _grouped(of_origin).items():
            of_ops = "" if len(ops) == len(kernels.choices) else f" for {', '.join(ops)}"
            rows.append((f"{implementation}{of_ops}: {reason}", whose))
    rows += [(f"{op}: {told}", "device") for op, told in _exceptions(kernels.choices)]
    return [("" if position else "kernels", value, whose) for position, (value, whose) in enumerate(rows)]


def _origin(choice: Choice, origins: Mapping[str, str]) -> str:
    return origins.get(f"kernels.{choice.op}", "")


def _grouped(choices: Iterable[Choice]) -> dict[tuple[str, str], list[str]]:
    """(implementation, reason) → ops."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        groups.setdefault((choice.implementation, choice.reason), []).append(choice.op)
    return groups


def _exceptions(choices: Iterable[Choice]) -> Iterator[tuple[str, str]]:
    """(op, what it is where) of each exception."""
    for choice in choices:
        for each in choice.exceptions:
            yield choice.op, f"{each.implementation} {_where(each)}, measured in {each.source}"


def _where(exception: TokenRange) -> str:
    least, most, width = exception.least, exception.most, f"{exception.width:,} wide"
    if most is None:
        return f"from {least:,} tokens on, {width}" if least else width
    return f"at {least:,} to {most:,} tokens, {width}" if least else f"up to {most:,} tokens, {width}"


def kernels_table(kernels: Kernels, where: str) -> RenderableType:
    """Every op with what it computes, then the reasons, then where a measurement says otherwise.

    Args:
        where: the machine and the dtype, in words.
    """
    ops = ((choice.op, choice.implementation, _computes(choice.op)) for choice in kernels.choices)
    reasons = (
        (implementation, reason if len(names) == len(kernels.choices) else f"{reason}: {', '.join(names)}")
        for (implementation, reason), names in _grouped(kernels.choices).items()
    )
    parts = [
        Text.assemble(("Kernels ", "bold"), printable(where)),
        Text(), _grid(ops),
        Text(), Text("Why", "bold"), _grid(reasons),
    ]  # fmt: skip
    if exceptions := list(_exceptions(kernels.choices)):
        parts += [Text(), Text("Except", "bold"), _grid(exceptions)]
    return Group(*parts)


def calls_table(calls: Sequence[Calls], shape: str) -> RenderableType:
    """Which op is called how often in one forward of a clip of this shape, on which tensors."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("op", "as"):
        table.add_column(title, no_wrap=True)
    for title in ("calls", "tokens", "width"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in calls:
        table.add_row(each.op, each.implementation, f"{each.count}", f"{each.tokens:,}", f"{each.width:,}")
    head = Text.assemble(("Ops ", "bold"), printable(f"of one forward over clips of {shape}; each has its backward"))
    return Group(Text(), head, Text(), table)


def _computes(op: str) -> str:
    return Section.model_fields[op].description or ""


def _grid(rows: Iterable[tuple[str, ...]]) -> Table:
    """Rows of equal length, indented; the last column is folded where it does not fit."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    for position, row in enumerate(rows):
        if position == 0:
            for _ in row[:-1]:
                table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
        table.add_row("", *(Text(printable(cell)) for cell in row))
    return table
