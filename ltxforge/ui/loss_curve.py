"""The loss curve of a run as an SVG, drawn by hand from events.jsonl.

Decides scales, ticks and smoothing, and says the smoothing in the picture. Every step is drawn as it was logged, the
last attempt's where steps were repeated; the sound's loss has lines of its own. A picture with sound names its lines in
a legend above the curves, each with its own numbers. Colours hold on light and dark pages. Torch-free, needs no
plotting package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ltxforge import durable
from ltxforge.printable import printable
from ltxforge.trackers.jsonl import last_per_step, read_events
from ltxforge.ui.smoothing import centred_mean
from ltxforge.ui.text import counted, loss, short

XMLNS = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 960, 520
LEFT, RIGHT, TOP = 72, 36, 64
LOSS_HEIGHT, RATE_HEIGHT, BETWEEN = 300, 70, 34
LEGEND_ROW = 20
MOST_POINTS = 2 * (WIDTH - LEFT - RIGHT)  # more would fall on the same pixels

STYLE = """
 text { font: 13px system-ui, sans-serif; fill: #808890; }
 .title { font-size: 17px; font-weight: 600; }
 .grid { stroke: #808890; stroke-opacity: 0.22; }
 .raw { fill: none; stroke: #4a90d9; stroke-opacity: 0.38; stroke-width: 1; stroke-linejoin: round; }
 .smooth { fill: none; stroke: #3d86d8; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
 .raw-sound { fill: none; stroke: #3fa66b; stroke-opacity: 0.38; stroke-width: 1; stroke-linejoin: round; }
 .smooth-sound { fill: none; stroke: #2f9a5c; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
 .rate { fill: none; stroke: #d08a2e; stroke-width: 1.8; }
 .resume { stroke: #b05fb8; stroke-dasharray: 4 4; }
"""


@dataclass(frozen=True)
class Curve:
    """The losses of one modality by step.

    Args:
        colour: what its lines' classes end in: "" the video's, "-sound" the sound's.
        window: steps in the mean of its thick line.
    """

    points: Sequence[tuple[int, float]]
    window: int
    colour: str = ""
    name: str = ""

    @property
    def means(self) -> list[tuple[int, float]]:
        """The thick line: (step, mean of `window` steps of its own around it)."""
        means = centred_mean([value for _, value in self.points], self.window)
        return [(step, mean) for (step, _), mean in zip(self.points, means, strict=True)]

    def numbers(self) -> str:
        """Where it stands: the last step's loss, the mean there, and the lowest mean."""
        step, value = self.points[-1]
        means = self.means
        lowest_step, lowest = min(means, key=lambda point: point[1])
        return f"step {step:,}: {loss(value)} · mean now {loss(means[-1][1])}, lowest {loss(lowest)} at {lowest_step:,}"


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels: `low` falls on `first`, `high` on `last`."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def draw(events_file: Path, path: Path) -> bool:
    """Draw the run's loss and learning rate into `path`; False, and no file, before the first finished step."""
    events = list(read_events(events_file))
    steps = last_per_step(events)
    points = [(step, _number(event["loss"]), _number(event["learning_rate"])) for step, event in steps.items()]
    points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not points:
        return False
    alone = all(map(_is_sound_alone, steps.values()))
    sound = [] if alone else [(step, _number(event.get("audio_loss"))) for step, event in steps.items()]
    sound = [point for point in sound if math.isfinite(point[1])]
    name = next((str(event["plan"].get("name", "")) for event in events if event["event"] == "PlanMade"), "")
    resumed = sorted({event["step"] for event in events if event["event"] == "Resumed"})
    durable.write_file(path, loss_curve_svg(points, name, resumed, sound, alone))
    return True


def _is_sound_alone(event: Mapping[str, object]) -> bool:
    """Whether the step's `loss` is the sound's itself, so that there is nothing beside it."""
    return all(event.get(f"audio_{name}") == event.get(name) for name in ("loss", "sigma"))


def loss_curve_svg(
    points: Sequence[tuple[int, float, float]],
    name: str = "",
    resumed: Sequence[int] = (),
    sound: Sequence[tuple[int, float]] = (),
    sound_alone: bool = False,
) -> str:
    """The picture of (step, loss, learning rate), in the order of the steps.

    Args:
        resumed: steps after which a later attempt went on; each gets a dashed line.
        sound: (step, the sound's loss beside the video's), of the steps that had sound.
        sound_alone: whether the loss in `points` is the sound's itself.
    """
    steps, losses, rates = (list(column) for column in zip(*points, strict=True))
    window = smoothing_window(len(points))
    curves = _curves(list(zip(steps, losses, strict=True)), sound, sound_alone, window)
    rows = len(curves) if sound or sound_alone else 0
    top = TOP + LEGEND_ROW * rows
    last = max(steps[-1], steps[0] + 1)
    x = Axis(min(steps[0], 1), last, LEFT, WIDTH - RIGHT)
    y = Axis(*_range([*losses, *(value for _, value in sound)]), TOP + LOSS_HEIGHT, top)
    lower = TOP + LOSS_HEIGHT + BETWEEN
    rate = Axis(*_range([0.0, *rates]), lower + RATE_HEIGHT, lower)
    marks = [step for step in resumed if x.low <= step <= x.high]
    bottom = lower + RATE_HEIGHT
    return "\n".join(
        (
            f'<svg xmlns="{XMLNS}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
            f"<title>{escape(_title(name))}</title>",
            f"<style>{STYLE}</style>",
            _text(LEFT, 26, _title(name), "title"),
            _text(LEFT, 46, _subtitle(window, marks, "" if rows else curves[0].numbers())),
            *(part for row in range(rows) for part in _legend(row, curves[row])),
            *_grid(x, y, ticks(y.low, y.high, 8)),
            *_grid(x, rate, [0.0, max(rates)] if max(rates) > 0 else [0.0]),
            _text(LEFT, lower - 8, "learning rate"),
            *(_text(x.at(step), bottom + 22, f"{step:,}", anchor="middle") for step in step_ticks(x.low, x.high)),
            _text((LEFT + WIDTH - RIGHT) / 2, bottom + 44, "step", anchor="middle"),
            *(_line(x.at(step), top, x.at(step), bottom, "resume") for step in marks),
            *(_polyline(f"raw{curve.colour}", _thinned(list(curve.points)), x, y) for curve in curves),
            *(_polyline(f"smooth{curve.colour}", _thinned(curve.means), x, y) for curve in reversed(curves)),
            _polyline("rate", _thinned(list(zip(steps, rates, strict=True))), x, rate),
            "</svg>\n",
        )
    )


def _curves(
    points: Sequence[tuple[int, float]], sound: Sequence[tuple[int, float]], sound_alone: bool, window: int
) -> list[Curve]:  # fmt: skip
    """What is drawn, the video first; the sound's mean is over as many of its own steps."""
    if sound_alone:
        return [Curve(points, window, "-sound", "sound")]
    beside = [Curve(sound, window, "-sound", _sound_name(len(sound), len(points)))] if sound else []
    return [Curve(points, window, name="video"), *beside]


def _legend(row: int, curve: Curve) -> list[str]:
    """Which line is which, and its numbers, in a band of its own above the curves."""
    height = TOP + 4 + LEGEND_ROW * row
    return [
        _line(LEFT, height - 4, LEFT + 26, height - 4, f"smooth{curve.colour}"),
        _text(LEFT + 34, height, f"{curve.name} · {curve.numbers()}"),
    ]


def _sound_name(with_sound: int, steps: int) -> str:
    return "sound" if with_sound == steps else f"sound, in {with_sound:,} of {steps:,} steps"


def smoothing_window(count: int) -> int:
    """Steps in the smoothed line's mean: odd, a twentieth of the run, between 9 and 501."""
    return min(501, max(9, count // 20)) | 1


def ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `most` of them."""
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [index * spacing for index in range(first, last + 1)]


def step_ticks(low: float, high: float) -> list[int]:
    """The steps that are named below the picture: round ones, and the first."""
    round_ones = [round(tick) for tick in ticks(low, high, 9) if abs(tick - round(tick)) < 1e-6]
    near = (high - low) / 20
    return [int(low)] + [tick for tick in round_ones if tick - low > near]


def _number(value: object) -> float:
    """A logged number; non-finite ones were written as text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values' range, down to 0 when they come near it; never empty."""
    low, high = min(values), max(values)
    if 0 <= low < 0.35 * high or low == high == 0:
        low = 0.0
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def _title(name: str) -> str:
    return f"Loss of {printable(name)}" if name else "Loss"


def _subtitle(window: int, resumed: Sequence[int], numbers: str) -> str:
    parts = [*filter(None, [numbers]), f"thick line: mean of {window} steps around each"]
    if resumed:
        parts.append(f"{counted(len(resumed), 'resume')} (dashed)")
    return " · ".join(parts)


def _grid(x: Axis, y: Axis, values: Sequence[float]) -> list[str]:
    lines = []
    for value in values:
        height = y.at(value)
        lines.append(_line(x.first, height, x.last, height, "grid"))
        lines.append(_text(x.first - 8, height + 4, short(value), anchor="end"))
    return lines


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """All points, or the lowest and highest of each pixel's worth, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        extremes = {min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _polyline(kind: str, points: Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    if len(points) == 1:  # a line of one point shows nothing
        [(step, value)] = points
        return f'<circle class="{kind}" cx="{x.at(step):.2f}" cy="{y.at(value):.2f}" r="3"/>'
    listed = " ".join(f"{x.at(step):.2f},{y.at(value):.2f}" for step, value in points)
    return f'<polyline class="{kind}" points="{listed}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
