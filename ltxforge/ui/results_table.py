"""What `bench` measured, as a table: one line for each case. Decides wording and units; computes nothing new but rates.

Torch-free.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ltxforge.printable import printable
from ltxforge.suites import StepResult
from ltxforge.ui.text import duration, size


def results_table(results: Sequence[StepResult]) -> RenderableType:
    """Seconds per step, their parts, memory and rate of the measured cases; below it what became of the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    for title in ("step", "forward", "backward", "update", "peak", "weights", "tokens", "TFLOP/s"):
        table.add_column(title, justify="right", no_wrap=True)
    measured = [result for result in results if result.outcome == "measured"]
    for result in measured:
        table.add_row(*_cells(result))
    others = [
        Text(printable(f"{result.name}: {result.outcome}. {result.reason}"))
        for result in results
        if result not in measured
    ]
    return Group(*([table] if measured else []), *others)


def _cells(result: StepResult) -> list[str]:
    median, phases = statistics.median(result.step_seconds), result.phase_seconds
    rate = "" if result.model_flops is None else f"{result.model_flops / median / 1e12:.3g}"
    return [
        result.name,
        duration(median),
        *(duration(phases[name]) for name in ("forward", "backward", "optimizer")),
        size(_peak(result)),
        size(result.weights_bytes or 0),
        " + ".join(f"{count}" for name, count in result.tokens.items() if name != "prompt"),
        rate,
    ]


def _peak(result: StepResult) -> int:
    """On the device, or where that is not counted the process's."""
    return result.peak_bytes.get("allocated", result.peak_bytes.get("resident", 0))
