"""What `bench` measured, as tables: one line for each case, on the screen and in Markdown.

Decides wording and units. A row is a mapping from titles to cells, made by the function of its kind of suite from a
result's entry in the results file, so that a table can be made again from the file alone. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ltxforge.printable import printable
from ltxforge.suites.memory import OURS
from ltxforge.ui.text import duration, size

Entry = Mapping[str, Any]
Row = dict[str, str]


def results_table(suite: str, entries: Sequence[Entry]) -> RenderableType:
    """The measured cases as a table as wide as the screen allows; below it what became of the others, and faults."""
    rows = [ROWS[suite](entry) for entry in entries if entry["outcome"] == "measured"]
    ratios = [f"  {row['case']}: {row[RATIOS]}" for row in rows if row.get(RATIOS)]
    narrow = [{title: cell for title, cell in row.items() if title != RATIOS} for row in rows]
    lines = [*([f"{RATIOS}:"] if ratios else []), *ratios, *_remarks(entries)]
    return Group(*([Fitting(narrow)] if rows else []), *(Text(printable(line)) for line in lines))


def markdown(head: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """The same as a Markdown page, with the command, the device and the versions."""
    device = head["device"]
    lines = [
        f"# `{head['suite']}` on {device['name']}",
        "",
        f"`{head['command']}`, {head['date']}" + (", without a GPU" if device["kind"] == "cpu" else ""),
        "",
        ", ".join(f"{name} {version}" for name, version in head["versions"].items()),
        "",
    ]
    for title, facts in head.items():
        if title in FACTS and facts:
            lines += [f"{title.capitalize()}: {FACTS[title](facts)}", ""]
    lines += _lines([ROWS[head["suite"]](entry) for entry in entries if entry["outcome"] == "measured"])
    lines += [f"- {printable(line)}" for line in _remarks(entries)]
    if records := head.get("resources"):
        lines += ["", "## Compiled, not run", "", COMPILED, ""]
        lines += _lines([resources_row(record) for record in records])
    return "\n".join(lines).rstrip() + "\n"


def step_row(entry: Entry) -> Row:
    """Seconds per step, their parts, memory and rate."""
    phases, rate = entry["phase_seconds"], entry["tflops_per_second"]
    peaks = entry["peak_bytes"]
    return {
        "case": entry["name"],
        "step": brief(entry["step_seconds_median"]),
        **{name: duration(phases[key]) for name, key in PHASES.items()},
        "peak": size(peaks.get("allocated", peaks.get("resident", 0))),
        "weights": size(entry["weights_bytes"] or 0),
        "tokens": " + ".join(f"{count}" for name, count in entry["tokens"].items() if name != "prompt"),
        "TFLOP/s": "" if rate is None else f"{rate:.3g}",
        **({"launches": f"{entry['launches']}"} if entry.get("launches") else {}),
        **ratio_cells(entry),
    }


PHASES = {"forward": "forward", "backward": "backward", "update": "optimizer"}


def ratio_cells(entry: Entry) -> Row:
    """How many times our time each peer took, in one cell."""
    return {RATIOS: "; ".join(f"{peer} {ratio:.2f}" for peer, ratio in entry["ratios"].items())}


def encode_row(entry: Entry) -> Row:
    """Seconds of a clip by ours, memory beside the weights, every ratio, and which peers compute something else."""
    ours, peaks = entry["times"]["ltxforge"], entry["peak_bytes"]
    return {
        "case": entry["name"],
        "clip": brief(ours["median"]),
        "p20": brief(ours["p20"]),
        "p80": brief(ours["p80"]),
        "frames/s": f"{entry['frames_per_second']['ltxforge']:.3g}",
        "weights": size(entry["weights_bytes"] or 0),
        "above them": size(peaks["ltxforge"]) if "ltxforge" in peaks else "",
        "another function": "; ".join(f"{name} by {apart:.2g}" for name, apart in entry["deviations"].items()),
        **ratio_cells(entry),
    }


def memory_row(entry: Entry) -> Row:
    """What was trained in which precision, what ours and the peers took of card and host under the cap, their steps."""
    cap, case, planned = entry["cap_bytes"], entry["case"], entry.get("estimated_bytes")
    base = case.get("base_precision", "bf16")
    cells = {
        "case": entry["name"],
        "clip": case["size"],
        "base": case["precision"] if base == "bf16" else base,
        "cap": "none" if cap is None else size(cap),
    }
    for name, median in entry["medians"].items():
        peaks = entry["peak_bytes"][name]  # a card must hold what is reserved
        cells[f"peak, {name}"] = size(peaks.get("reserved", peaks.get("resident", 0)))
        if name == OURS and "allocated" in peaks:
            cells["tensors"] = size(peaks["allocated"])
            cells["planned"] = "" if planned is None else size(planned)
        if "reserved" in peaks and "resident" in peaks:
            cells[f"RAM, {name}"] = size(peaks["resident"])
        cells[f"step, {name}"] = brief(median)
    return cells


def kernels_row(entry: Entry) -> Row:
    """Our time, its spread and the host's, the share of the ceiling, launches, the worst gate, and every ratio."""
    times, ours = entry["times"][entry["ours"]], entry["ours"]
    errors = [gate["error"] for gate in entry["gates"] if gate["implementation"] == ours and gate["error"] is not None]
    shares = [f"{share:.0%} {name.split()[0]}" for name, share in entry["shares"].items()]
    return {
        "case": entry["name"],
        "ours": ours,
        "median": brief(times["median"]) + (LATE if times.get("is_late") else ""),
        "p20": brief(times["p20"]),
        "p80": brief(times["p80"]),
        "host": "" if times.get("host") is None else brief(times["host"]),
        "graph": "" if times["graph"] is None else brief(times["graph"]),
        "of ceiling": ", ".join(shares),
        "launches": "" if times["launches"] is None else str(times["launches"]),
        "peak": "" if times["peak_bytes"] is None else size(times["peak_bytes"]),
        "error": f"{max(errors):.1e}" if errors else "same bits",
        **ratio_cells(entry),
    }


LATE = " *"
"""Behind a median that the host's time is a part of."""
RATIOS = "times our time"
"""The title of a cell with all ratios, where peers differ from case to case; on a screen they stand below the table."""


def brief(seconds: float) -> str:
    """A short time: "12.3 µs", "4.56 ms", "1.23 s"."""
    for unit, length in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return duration(seconds)


def resources_table(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What the compiler says of each kernel; no figure of speed."""
    chips = ", ".join(dict.fromkeys(record["chip"] for record in records))
    rows = [resources_row(record) for record in records]
    # As many of them as a screen has room for; the results file has them all.
    narrow = [{title: row[title] for title in row if title not in ("variants", "chip", "TMA")} for row in rows]
    return Group(Text(f"compiled for {chips}, which is not here; nothing was run:"), _table(narrow))


def resources_row(record: Mapping[str, Any]) -> Row:
    """Of one kernel, the worst of its variants: what it takes of a chip, and the instructions of a good one."""
    return {
        "launch": record["launch"].replace("bfloat", "bf").replace("float", "fp"),
        "kernel": record["kernel"],
        "variants": str(record["variants"]),
        "chip": record["chip"],
        "registers": str(record["registers"]),
        "spilled": f"{record['spilled_bytes']} B",
        "shared": f"{record['shared_bytes'] / 1024:.3g} KiB",
        "dots": str(record["tensor_core"]),
        "TMA": str(record["bulk_copies"]),
        "load, store": f"{record['widest_load']}, {record['widest_store']} B",
    }


def rates(ceilings: Mapping[str, float]) -> str:
    """Ceilings in words: bytes or operations a second."""
    return ", ".join(
        f"{name} {value / 1e12:.3g} {'TB/s' if 'bandwidth' in name else 'TFLOP/s'}" for name, value in ceilings.items()
    )


ROWS: dict[str, Callable[[Entry], Row]] = {
    "kernels": kernels_row,
    "step": step_row,
    "encode": encode_row,
    "memory": memory_row,
}
"""Kind of suite → what makes a row of a measured case's entry."""
COMPILED = (
    "Our kernels for chips that were not there, the worst of each kernel's variants; no figure of speed. `dots`: how"
    " many tensor-core instructions; `load, store`: the widest access of one thread to global memory."
)
FACTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ceilings": rates,
    "clocks": lambda clocks: ", ".join(f"{name} {value}" for name, value in clocks.items()),
}
"""Fact in a results file's head → a sentence of it, for Markdown."""


def _remarks(entries: Sequence[Entry]) -> list[str]:
    """What the table does not show: cases without figures, what could not be measured, and faults."""
    without: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["outcome"] != "measured":
            without.setdefault((entry["outcome"], entry["reason"]), []).append(entry["name"])
    lines = [f"{several(names)}: {outcome}. {reason}" for (outcome, reason), names in without.items()]
    for entry in entries:
        if entry["outcome"] == "measured":
            lines += [f"{entry['name']}: {fault}" for fault in entry.get("faults", ())]
    if late := [entry["name"] for entry in entries if _is_late(entry)]:
        lines.append(f"{several(late)}:{LATE} the GPU waited for the host, whose time is part of the median")
    return lines + _not_measured(entries)


def _is_late(entry: Entry) -> bool:
    return any(times.get("is_late") for times in entry.get("times", {}).values())


def _not_measured(entries: Sequence[Entry]) -> list[str]:
    """Peers that could not take part: why, in which cases, and that their floors say nothing then."""
    missing: dict[tuple[str, str], list[str]] = {}
    unchecked: set[tuple[str, str]] = set()
    for entry in entries:
        for peer, reason in entry.get("unavailable", {}).items():
            missing.setdefault((peer, reason), []).append(entry["name"])
            if peer in entry["case"].get("floors", {}):
                unchecked.add((peer, reason))
    return [
        f"not measured: peer {peer}: {reason} ({several(names)})"
        + (", so that its floor is not checked" if (peer, reason) in unchecked else "")
        for (peer, reason), names in missing.items()
    ]


def several(names: Sequence[str]) -> str:
    """All names, or the first of many and how many more."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more"


def _titles(rows: Sequence[Row]) -> list[str]:
    """Every title that some row has something under, in the order in which they come."""
    return list(dict.fromkeys(title for row in rows for title in row if any(each.get(title) for each in rows)))


def _lines(rows: Sequence[Row]) -> list[str]:
    """A table in Markdown; none where there are no rows."""
    if not rows:
        return []
    titles = _titles(rows)
    body = [_line([row.get(title, "") for title in titles]) for row in rows]
    return [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)]), *body, ""]


@dataclass(frozen=True)
class Fitting:
    """A table of rows that leaves out what there is no room for: a figure is whole or not there."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = self.rows
        for titles in DISPENSABLE:
            if Measurement.get(console, options.update(max_width=WIDE), _table(rows)).maximum <= options.max_width:
                break
            rows = [{name: cell for name, cell in row.items() if name not in titles} for row in rows]
        yield _table(rows)


DISPENSABLE = (
    ("p20", "p80"), ("peak",), ("launches",), ("error",), ("another function",), ("weights",), ("tokens",),
    ("of ceiling",), ("host",), ("frames/s",), ("graph",), ("forward", "backward", "update"), ("ours",),
)  # fmt: skip
"""Columns in the order in which a narrow screen does without them; the results file has them all."""
WIDE = 10_000


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles := _titles(rows)):
        # Names break where there is no room at all; figures never do.
        table.add_column(title, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(printable(row.get(title, "")) for title in titles))
    return table


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def against_table(compared: Sequence[Any]) -> RenderableType:
    """Old and new medians of `benchmarks.against.Compared`, and how many times as fast it is now."""
    if not compared:
        return Text("the baseline has timed none of these cases with these settings")
    return _table(
        [
            {
                "case": each.case,
                "timed": each.what,
                "old": f"{each.old * 1e3:.4g} ms",
                "new": f"{each.new * 1e3:.4g} ms",
                "ratio": f"{each.ratio:.2f}" + (" slower" if each.is_slower else ""),
            }
            for each in compared
        ]
    )
