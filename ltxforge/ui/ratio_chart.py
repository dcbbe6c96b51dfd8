"""The ratios of a results file as an SVG: one bar for each peer of each case, and the floors it must reach.

Drawn by hand, without a plotting package; the axis is logarithmic, so that twice as fast and half as fast look alike.
Colours hold on light and dark pages. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from ltxforge.printable import printable

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 190, 70, 84, 44
BAR, GAP, NAME = 18, 10, 20
STYLE = """
 text { font: 13px system-ui, sans-serif; fill: #808890; }
 .title { font-size: 17px; font-weight: 600; }
 .name { font-weight: 600; }
 .grid { stroke: #808890; stroke-opacity: 0.22; }
 .even { stroke: #808890; stroke-width: 1.4; }
 .faster { fill: #3fa66b; fill-opacity: 0.8; }
 .slower { fill: #d0603a; fill-opacity: 0.8; }
 .floor { stroke: #d08a2e; stroke-width: 2.6; }
"""


def ratio_chart_svg(head: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str | None:
    """The picture of every measured ratio, in the file's order; None where there is none."""
    cases = [entry for entry in entries if entry["outcome"] == "measured" and entry["ratios"]]
    if not cases:
        return None
    ratios = [ratio for entry in cases for ratio in entry["ratios"].values()]
    floors = [floor for entry in cases for floor in entry["case"].get("floors", {}).values()]
    low, high = _range([*ratios, *floors])
    bars, height = [], TOP
    for entry in cases:
        ours = entry.get("ours", "triton")
        bars.append(
            _text(12, height + 14, entry["name"] + ("" if ours == "triton" else f", ours: {ours}"), kind="name")
        )
        height += NAME
        for peer, ratio in entry["ratios"].items():
            bars += _bar(peer, ratio, entry["case"].get("floors", {}).get(peer), height, low, high)
            height += BAR + 3
        height += GAP
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + BOTTOM}" width="{WIDTH}" '
            f'height="{height + BOTTOM}">',
            f"<title>{escape(printable(_title(head)))}</title>",
            f"<style>{STYLE}</style>",
            _text(12, 26, _title(head), kind="title"),
            _text(12, 48, "how many times our time each peer takes; above 1 ours is faster; amber: the floor to reach"),
            *(_grid(value, height, low, high) for value in _ticks(low, high)),
            *bars,
            "</svg>\n",
        )
    )


def _title(head: Mapping[str, Any]) -> str:
    without = ", no GPU" if head["device"]["kind"] == "cpu" else ""
    return f"{head['suite']} on {head['device']['name']}{without}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little beyond all values, with 1 inside."""
    return min(0.5, *(value / 1.3 for value in values)), max(2.0, *(value * 1.3 for value in values))


def _at(value: float, low: float, high: float) -> float:
    """The pixel of a ratio."""
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    """1, and powers of two or ten around it, at most about a dozen."""
    base = 2.0 if high / low < 2**10 else 10.0
    return [base**power for power in range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)]


def _bar(peer: str, ratio: float, floor: float | None, top: float, low: float, high: float) -> list[str]:
    first, last = sorted((_at(1.0, low, high), _at(ratio, low, high)))
    kind = "faster" if ratio >= 1 else "slower"
    middle = top + BAR - 5
    parts = [
        f'<rect class="{kind}" x="{first:.2f}" y="{top}" width="{max(last - first, 0.5):.2f}" height="{BAR}" rx="2"/>',
        _text(LEFT - 10, middle, peer, anchor="end"),
        _text(last + 6, middle, f"{ratio:.2f}"),
    ]
    if floor is not None:
        x = _at(floor, low, high)
        parts.append(f'<line class="floor" x1="{x:.2f}" y1="{top - 1}" x2="{x:.2f}" y2="{top + BAR + 1}"/>')
    return parts


def _grid(value: float, bottom: float, low: float, high: float) -> str:
    x = _at(value, low, high)
    kind = "even" if value == 1 else "grid"
    line = f'<line class="{kind}" x1="{x:.2f}" y1="{TOP - 12}" x2="{x:.2f}" y2="{bottom}"/>'
    return line + _text(x, bottom + 20, f"{value:g}", anchor="middle")


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{style}>{escape(printable(text))}</text>'
