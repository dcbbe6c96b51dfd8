"""What was measured: which implementation of an op was the fastest, by (arch, dtype, width) and number of tokens.

`choice.py` reads the table, so that an op which is slower than its fallback on a shape is not used there. It changes by
a commit alone, from a result of `ltxforge bench kernels`; nothing is timed while a plan is made, and nothing at import.

The table is EMPTY today: no GPU has measured these kernels yet.

    python -m ltxforge_kernels.profiles bench/results/<device>/kernels.json    prints a result's rows, to be pasted here
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

# A kernel that needs up to 1 / 0.95 of the best fallback's time is not called slower: measurements vary by as much.
NOT_SLOWER = 0.95
FALLBACKS = ("compile", "eager")


@dataclass(frozen=True)
class Measured:
    """One row: from `least` to `most` tokens (None: without end) this implementation was the fastest.

    Tokens are all rows of a tensor: T of each sample, times the samples of a micro-batch. Of a convolution they are the
    pixels that it reads, B·T·H·W, and the width is their channels. `arch` is as in
    `choice.Machine`, `source` the bench result that says so.
    """

    op: str
    arch: int | str
    dtype: str
    width: int
    least: int
    most: int | None
    implementation: str
    source: str

    def __str__(self) -> str:
        values = ", ".join(f"{item.name}={getattr(self, item.name)!r}" for item in fields(self))
        return f"Measured({values}),"


TABLE: tuple[Measured, ...] = ()


def rows_of(result: Mapping[str, Any], ops: Iterable[str], source: str) -> tuple[Measured, ...]:
    """The rows that follow from one result of `ltxforge bench kernels`.

    Each of its `cases` has op, arch ("sm_90"), dtype, width, tokens (of each sample, or None where an op has none),
    medians (implementation → seconds), and in `case` its batch where that is not 1. Cases of one op at one shape
    (forward and both ways, other ranks or outputs) count together, by the sum of their seconds. Rows cover all token
    counts: the smallest and the largest measured one speak for all beyond them; between two that differ the fallback
    holds, because our kernel was not seen to win there.

    Args:
        ops: their folder names. The bench calls parts of an op "flow_matching_loss"; what is none of them is left out.
    """
    known = tuple(ops)
    measured: dict[tuple[str, int | str, str, int], dict[int, list[Mapping[str, float]]]] = {}
    for case in result["cases"]:
        op = _op_of(case["op"], known)
        if op and case["medians"] and case["width"]:
            place = op, _arch(case["arch"]), case["dtype"], case["width"]
            measured.setdefault(place, {}).setdefault(_tokens(case), []).append(case["medians"])
    return tuple(
        Measured(*place, least, most, winner, source)
        for place, cases in measured.items()
        for least, most, winner in _ranges(_winners(cases))
    )


def _op_of(name: str, ops: Iterable[str]) -> str | None:
    """The op that a part belongs to: the longest name that it begins with."""
    found = [op for op in ops if name == op or name.startswith(f"{op}_")]
    return max(found, key=len, default=None)


def _tokens(case: Mapping[str, Any]) -> int:
    """B·T; 0 for an op that has no tokens."""
    return (case["tokens"] or 0) * case.get("case", {}).get("batch", 1)


def _arch(name: str) -> int | str:
    """90 of "sm_90"; others as they are."""
    number = name.removeprefix("sm_")
    return int(number) if number.isdecimal() else name


def _winners(cases: Mapping[int, list[Mapping[str, float]]]) -> list[tuple[int, str]]:
    """(tokens, the fastest), ascending; where triton or every fallback lacks a time, nothing is decided."""
    found = []
    for tokens in sorted(cases):
        names = set.intersection(*(set(medians) for medians in cases[tokens]))
        seconds = {name: sum(medians[name] for medians in cases[tokens]) for name in names}
        fallbacks = [name for name in FALLBACKS if name in seconds]
        if "triton" in seconds and fallbacks:
            best = min(fallbacks, key=seconds.__getitem__)
            is_slower = seconds[best] < NOT_SLOWER * seconds["triton"]
            found.append((tokens, best if is_slower else "triton"))
    return found


def _ranges(winners: list[tuple[int, str]]) -> Iterator[tuple[int, int | None, str]]:
    """(least, most, winner), without gaps from 0 to all there are."""
    runs = [list(run) for _, run in groupby(winners, key=lambda point: point[1])]
    # A run ends where ours was last seen to win, or right before the next one begins.
    ends = [run[-1][0] if run[0][1] == "triton" else following[0][0] - 1 for run, following in pairwise(runs)]
    for least, most, run in zip([0, *(end + 1 for end in ends)], [*ends, None], runs, strict=False):
        yield least, most, run[0][1]


def of_machine(op: str, arch: int | str | None, dtype: str, rows: Iterable[Measured]) -> tuple[Measured, ...]:
    """The rows that speak of this op on this chip."""
    return tuple(row for row in rows if (row.op, row.arch, row.dtype) == (op, arch, dtype))


def main(paths: Iterable[str]) -> None:
    """Print the rows of results as they stand in `TABLE`; an op is whatever has a folder here."""
    ops = [path.parent.name for path in Path(__file__).parent.glob("*/__init__.py")]
    for path in map(Path, paths):
        result = json.loads(path.read_text(encoding="utf-8"))
        sys.stdout.writelines(f"    {row}\n" for row in rows_of(result, ops, f"{path.parent.name}/{path.name}"))


if __name__ == "__main__":
    main(sys.argv[1:])
