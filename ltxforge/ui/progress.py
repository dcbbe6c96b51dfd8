"""The live display of a terminal: a bar for each phase under way, the state of training below its bar.

Decides what stays in the scrollback (finished phases, notes, verdicts, outputs) and what only passes by (bars, losses,
checkpoints). Fed by events alone; keeps nothing that a log would need. Torch-free.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ltxforge.events import (
    CheckpointSaved,
    ClipJudged,
    Event,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PlanMade,
    RunEnded,
    SampleReady,
    StepDone,
)
from ltxforge.printable import printable
from ltxforge.ui.lines import LABEL_WIDTH, line, sound_text
from ltxforge.ui.pace import Pace
from ltxforge.ui.text import loss, time_left
from ltxforge.ui.verdicts import Verdicts, verdict_table

REFRESHES_PER_SECOND = 4
PASSING = (PlanMade, ClipJudged, PhaseStarted, PhaseAdvanced, StepDone, CheckpointSaved)
LABEL_STYLES = {"warning": "yellow", "rejected": "red", "finished": "green", "stopped": "yellow"}


@dataclass
class _Phase:
    total: int
    detail: str
    started: float
    done: int = 0


class Progress:
    """A consumer of events that draws on `console`. Use as a context manager; leaving it restores the cursor."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._lock = threading.RLock()  # the display draws itself from a thread of its own
        self._phases: dict[str, _Phase] = {}
        self._pace, self._verdicts = Pace(clock), Verdicts()
        self._step: StepDone | None = None
        self._saved = self._sampled = ""
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            unfinished = self._render() if self._phases else None
        self._live.stop()
        if unfinished is not None:  # what was under way when an error or a signal came
            self._console.print(unfinished)

    def __call__(self, event: Event) -> None:
        """Take in one event; the screen follows at its own rate."""
        with self._lock:
            self._verdicts(event)
            self._follow(event)
        if not isinstance(event, PASSING) and not (isinstance(event, PhaseEnded) and event.phase == "validate"):
            self._keep(event)

    def show(self, renderable: RenderableType) -> None:
        """Print a table above the display."""
        self._console.print(renderable)

    def _follow(self, event: Event) -> None:
        """Bring the passing part of the screen up to date."""
        match event:
            case PhaseStarted():
                self._phases[event.phase] = _Phase(event.total, event.detail, self._clock())
            case PhaseAdvanced() if event.phase in self._phases:
                self._phases[event.phase].done = event.done
                self._phases[event.phase].detail = event.detail
            case PhaseEnded():
                self._phases.pop(event.phase, None)
            case StepDone():
                self._step = event
                self._pace(event)
                train = self._phases.setdefault("train", _Phase(event.steps, "", self._clock()))
                train.done, train.total = event.step, event.steps
            case CheckpointSaved():
                self._saved = f"step {event.step}"
            case SampleReady():
                self._sampled = f"step {event.step} {event.name}"

    def _keep(self, event: Event) -> None:
        """Print the event's line, and the verdicts where they belong, above the display."""
        if isinstance(event, RunEnded) and self._verdicts:
            self.show(verdict_table(self._verdicts.judged, list_ok=0))
        if found := line(event):
            label, text = found
            row = Table.grid(padding=(0, 1))
            row.add_column(width=LABEL_WIDTH, no_wrap=True)
            row.add_column(overflow="fold")
            row.add_row(Text(label, LABEL_STYLES.get(label, "cyan")), Text(text))
            self._console.print(row)
        if isinstance(event, PhaseEnded) and event.phase == "scan" and self._verdicts:
            self.show(verdict_table(self._verdicts.judged))

    def _render(self) -> RenderableType:
        with self._lock:
            rows: list[RenderableType] = []
            for name, phase in self._phases.items():
                rows.append(self._bar(name, phase))
                if name == "train" and self._step is not None:
                    rows += self._training(self._step)
            return Group(*rows)

    def _bar(self, name: str, phase: _Phase) -> RenderableType:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(width=LABEL_WIDTH, no_wrap=True)
        row.add_column(ratio=1, min_width=8)
        for _ in range(2):
            row.add_column(justify="right", no_wrap=True)
        row.add_column(justify="right", no_wrap=True, width=16)
        total = max(1, phase.total)
        row.add_row(
            Text(name, "bold cyan"),
            ProgressBar(total=total, completed=min(phase.done, total)),
            f"{phase.done:>{len(str(phase.total))}}/{phase.total}",
            f"{min(100, 100 * phase.done // total):3} %",
            Text(self._time_left(name, phase), "dim"),
        )
        if not phase.detail or name == "train":
            return row
        return Group(row, self._facts(("", phase.detail)))

    def _time_left(self, name: str, phase: _Phase) -> str:
        if name == "train" and self._step is not None:
            return time_left(self._pace.seconds_left)
        elapsed = self._clock() - phase.started
        if phase.done and phase.done < phase.total and elapsed > 2:
            return time_left(elapsed / phase.done * (phase.total - phase.done))
        return f"{elapsed:.0f} s" if elapsed > 2 else ""

    def _training(self, step: StepDone) -> list[RenderableType]:
        numbers = [
            ("loss", loss(step.loss)),
            ("mean", loss(self._pace.loss)),
            ("lr", f"{step.learning_rate:.2e}"),
            ("", self._pace.speed),
            ("epoch", f"{step.epoch:.2f}"),
        ]
        outputs = [("checkpoint", self._saved or "none yet")]
        if self._sampled:
            outputs.append(("sample", self._sampled))
        return [self._facts(*pairs) for pairs in (numbers, self._sound(step), outputs) if pairs]

    def _sound(self, step: StepDone) -> list[tuple[str, str]]:
        """The sound's loss and its mean, once a step had sound beside the video: a line of their own."""
        if not math.isfinite(self._pace.audio_loss):
            return []
        return [("sound", sound_text(step)), ("mean", loss(self._pace.audio_loss))]

    def _facts(self, *pairs: tuple[str, str]) -> Text:
        """A line of dim names and plain values, indented to the bars, cut where the terminal ends."""
        text = Text(" " * (LABEL_WIDTH + 1), no_wrap=True, overflow="ellipsis")
        for position, (name, value) in enumerate(pairs):
            text.append("   " if position else "").append(f"{printable(name)} " if name else "", "dim")
            text.append(printable(value))
        return text
