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
from itertools import groupby
from pathlib import Path
from typing import Any

# A kernel that needs up to 1 / 0.95 of the best fallback's time is not called slower: measurements vary by as much.
NOT_SLOWER = 0.95


@dataclass(frozen=True)
class Measured:
    """One row: from `least` to `most` tokens (None: without end) this implementation was the fastest.

    Attributes:
        arch: as in `choice.Machine`.
        tokens are all rows of a tensor: T of each sample, times the samples of a micro-batch.
        source: the bench result that says so.
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


def rows_of(result: Mapping[str, Any], source: str) -> tuple[Measured, ...]:
    """The rows that follow from one result of `ltxforge bench kernels`.

    Its `cases` have op, arch, dtype, width, tokens and medians (implementation → seconds). Cases without a time for
    triton or without one for a fallback decide nothing and are left out. Rows cover all token counts: the smallest and
    the largest measured one speak for all beyond them; between two that differ the fallback holds, because there our
    kernel was not seen to win.
    """
    cases = [case for case in result["cases"] if _fastest(case["medians"])]

    def group(case: Mapping[str, Any]) -> tuple[str, str, str, int]:
        return case["op"], str(case["arch"]), case["dtype"], case["width"]

    found: list[Measured] = []
    for _, group_cases in groupby(sorted(cases, key=group), group):
        of_shape = list(group_cases)
        first = of_shape[0]
        winners = {case["tokens"]: case for case in of_shape}
        points = [(tokens, _fastest(winners[tokens]["medians"])) for tokens in sorted(winners)]
        found += [
            Measured(first["op"], first["arch"], first["dtype"], first["width"], least, most, winner, source)
            for least, most, winner in _ranges(points)
        ]
    return tuple(found)


def _fastest(medians: Mapping[str, float | None]) -> str | None:
    """triton unless a fallback is faster beyond `NOT_SLOWER`; None where there is nothing to compare."""
    ours = medians.get("triton")
    fallbacks = {name: seconds for name, seconds in medians.items() if name in ("compile", "eager") and seconds}
    if not ours or not fallbacks:
        return None
    best = min(fallbacks, key=fallbacks.__getitem__)
    return "triton" if fallbacks[best] / ours >= NOT_SLOWER else best


def _ranges(points: list[tuple[int, str]]) -> Iterator[tuple[int, int | None, str]]:
    """(least, most, winner) without gaps, from winners at single token counts in ascending order."""
    runs = [list(run) for _, run in groupby(points, key=lambda point: point[1])]
    least = 0
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        winner = run[0][1]
        if following is None:
            yield least, None, winner
            return
        # Between the last of these and the first of those: whoever is the fallback; of two, the lower one.
        most = run[-1][0] if winner == "triton" else following[0][0] - 1
        yield least, most, winner
        least = most + 1


def of_machine(op: str, arch: int | str | None, dtype: str, rows: Iterable[Measured]) -> tuple[Measured, ...]:
    """The rows that speak of this op on this chip."""
    return tuple(row for row in rows if (row.op, row.arch, row.dtype) == (op, arch, dtype))


def main(arguments: list[str]) -> None:
    """Print the rows of a result as they stand in `TABLE`."""
    for name in arguments:
        path = Path(name)
        result = json.loads(path.read_text(encoding="utf-8"))
        sys.stdout.writelines(f"    {row}\n" for row in rows_of(result, f"{path.parent.name}/{path.name}"))


if __name__ == "__main__":
    main(sys.argv[1:])
