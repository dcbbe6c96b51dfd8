"""How a run's model is made to fit, for the plan's table: what is kept where, why, and what each phase takes.

Decides wording and layout; every number stands in the plan. GB are 2^30 bytes here, as cards are sold. Torch-free.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ltxforge.plan import MemoryPlan, PhasePlan, Plan, StreamPlan, every_nth
from ltxforge.printable import printable
from ltxforge.ui.text import counted

BAR = 8
PARTS_SHOWN = 3
GIB = 2**30
NO_BREAK = "\N{NO-BREAK SPACE}"


def memory_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(label, value, who decided it)."""
    memory, origin = plan.memory, lambda key: plan.origins.get(f"memory.{key}", "")
    if memory.fit:
        yield "fit", _fit(memory), origin("fit")
    yield "base", _base(memory, plan.device.precision), origin("base_precision")
    swapped = "group_offload" if origin("group_offload") in ("recipe", "--set") else "block_swap"
    yield "streamed", streamed(memory.stream), origin(swapped)
    yield "checkpointing", checkpointed(memory.checkpointed, memory.blocks), origin("checkpointing")
    yield "activations", _activations(memory), origin("offload_activations")
    yield "text encoder", _text_encoder(memory), origin("text_encoder_precision")
    yield "decoding", _decoding(memory), origin("decode")
    yield "dry run", "of the largest bucket, before the first step" if memory.dry_run else "none", origin("dry_run")
    for number, words in enumerate(plan.estimates.choices):
        yield "" if number else "why", words, ""


def phases_of(plan: Plan) -> RenderableType:
    """What each phase takes, in what units; or why that is not told."""
    if not plan.estimates.phases:
        return _remark("what each phase takes is counted for models of real size; ask for it here with memory.fit")
    return Group(phases_table(plan), _remark("GB here are 2^30 bytes, as cards are sold"))


def phases_table(plan: Plan) -> Table:
    """What each phase takes at its peak, beside what there is."""
    device, host = plan.memory.budget
    has_device = plan.device.kind in ("cuda", "rocm")
    assumed = bool(set(plan.assumed) & {"weights", "data"})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(width=1)
    table.add_column("phase")
    if has_device:
        table.add_column(_title("device", device), justify="right", no_wrap=True)
    table.add_column(_title("host", host), justify="right", no_wrap=True)
    table.add_column("most of it", overflow="fold")
    if assumed:
        table.add_column("")
    for phase in plan.estimates.phases:
        cells = [Text(_share(phase.device_bytes, device))] if has_device else []
        cells += [Text(_share(phase.host_bytes, host, bar=not has_device)), _Unparted(printable(_parts(phase)))]
        table.add_row("", phase.name, *cells, *([Text("assumed", "dim italic")] if assumed else []))
    return table


def checkpointed(again: tuple[int, ...], blocks: int) -> str:
    """Which of so many blocks are computed again, as a recipe says it where it can."""
    if len(again) in (0, blocks):
        return "every block" if again else "off"
    if len(again) > 1 and again == every_nth(again[1], blocks):
        return f"every {again[1]} blocks"
    return f"{len(again)} of {counted(blocks, 'block')}" if blocks else counted(len(again), "block")


def streamed(stream: StreamPlan | None) -> str:
    """Which blocks come and go, how, and where they wait."""
    if stream is None:
        return "nothing: all weights stay on the device"
    largest = max(map(len, stream.units), default=0)
    how = "layer by layer" if stream.level == "leaf" else "one by one" if largest == 1 else f"{largest} at a time"
    beside = "beside the computation" if stream.overlapped else "in turn with the computation"
    where = f"wait in the folder {stream.disk}" if stream.disk else "wait in host memory"
    return f"{counted(len(stream.blocks), 'block')} {where}, copied {how}, {beside}"


def _remark(words: str) -> Padding:
    return Padding(Text(words, "dim"), (0, 0, 0, 3))


def _fit(memory: MemoryPlan) -> str:
    device, host = memory.budget
    there = [f"{_gb(size)} of {name} memory" for size, name in ((device, "device"), (host, "host")) if size]
    return " ".join(filter(None, (memory.fit, f"({', '.join(there)})" if there else "")))


def _base(memory: MemoryPlan, precision: str) -> str:
    if memory.base_precision == "bf16":
        return f"not quantised, {precision}" + (", double" if memory.double_quant else "")
    double = ", its scales quantised too" if memory.double_quant else ""
    return f"{memory.base_precision}{double}, quantised layer by layer on the {memory.quantise_on}"


def _activations(memory: MemoryPlan) -> str:
    return "wait in host memory for the backward pass" if memory.offload_activations else "stay on the device"


def _text_encoder(memory: MemoryPlan) -> str:
    return "not quantised" if memory.text_encoder_precision == "bf16" else memory.text_encoder_precision


def _decoding(memory: MemoryPlan) -> str:
    if not memory.decode_tile and not memory.decode_frames:
        return "whole"
    return f"in tiles of {memory.decode_tile} pixels and {memory.decode_frames} frames, blended where they meet"


def _title(name: str, size: int) -> str:
    return f"{name}, of {_gb(size)}" if size else name


def _share(count: int, size: int, *, bar: bool = True) -> str:
    """ "█████▌       9.8 GB": a bar where it is known how much there is."""
    told = f"{_gb(count):>8}"
    if not size or not bar:
        return told
    eighths = max(0, min(BAR * 8, round(BAR * 8 * count / size)))
    drawn = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
    return f"{drawn:<{BAR}} {told}"


def _parts(phase: PhasePlan) -> str:
    largest = sorted(phase.parts.items(), key=lambda part: -part[1])[:PARTS_SHOWN]
    return ", ".join(f"{name} {_gb(size)}" for name, size in largest)


class _Unparted:
    """Text that is wrapped where a space follows no digit: numbers stay with their units, which rich would part."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"(?<=\d) ", NO_BREAK, text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = textwrap.wrap(self.text, options.max_width)
        yield Text("\n".join(lines).replace(NO_BREAK, " "), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, self.text.split(" ")))
        return Measurement(longest, len(self.text)).with_maximum(options.max_width)


def _gb(count: int) -> str:
    return f"{count / GIB:.1f} GB" if count >= 0.0995 * GIB else f"{count / 2**20:.0f} MB"
