"""Plain lines for pipes, CI and `--plain`: no cursor movement, no colour, nothing that the stream cannot encode.

Decides which events are worth a line and how often: the first steps, then at most one line in 5 s and per 1 % of the
work, but never longer than a minute without one, and always the last. Torch-free.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, RenderableType

from ltxforge.events import ClipJudged, Event, PhaseAdvanced, PhaseEnded, PhaseStarted, PlanMade, RunEnded, StepDone
from ltxforge.ui.lines import LABEL_WIDTH, line, step_text
from ltxforge.ui.pace import Pace
from ltxforge.ui.verdicts import Verdicts, verdict_table

FIRST = 3
AT_LEAST_SECONDS = 5.0
AT_MOST_SECONDS = 60.0
WIDTH, LEAST_WIDTH = 100, 40
"""Columns of a table where the environment's COLUMNS does not say them, and the fewest that one is made for."""


class Plain:
    """A consumer of events that writes lines to `stream` and flushes each."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._pace = Pace(clock)
        self._verdicts = Verdicts()
        self._steps = _Limit(clock, FIRST)
        self._phases: dict[str, tuple[int, _Limit]] = {}

    def __call__(self, event: Event) -> None:
        """Write what the event is worth, if anything."""
        self._verdicts(event)
        match event:
            case PlanMade() | ClipJudged():
                return
            case StepDone():
                self._pace(event)
                if self._steps.lets(event.step, event.steps) or event.step == event.steps:
                    self._write("step", f"{event.step}/{event.steps}  {step_text(event, self._pace)}")
                return
            case PhaseAdvanced():
                total, limit = self._phases.get(event.phase, (0, None))
                if limit and event.phase != "train" and limit.lets(event.done, total):
                    self._write(event.phase, f"{event.done}/{total}  {event.detail}".rstrip())
                return
            case PhaseStarted():
                self._phases[event.phase] = event.total, _Limit(self._clock, first=0)
            case RunEnded():
                self._write_verdicts(list_ok=0)
        if found := line(event):
            self._write(*found)
        if isinstance(event, PhaseEnded) and event.phase == "scan":
            self._write_verdicts(list_ok=20)

    def show(self, renderable: RenderableType) -> None:
        """Write a table as plain text."""
        buffer = io.StringIO()
        Console(file=buffer, width=_width(), color_system=None, force_terminal=False, highlight=False).print(renderable)
        for text in buffer.getvalue().splitlines():
            self._put(text.rstrip())

    def _write_verdicts(self, list_ok: int) -> None:
        if self._verdicts:
            self.show(verdict_table(self._verdicts.judged, list_ok))

    def _write(self, label: str, text: str) -> None:
        self._put(f"{label:<{LABEL_WIDTH}} {text}")

    def _put(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "ascii"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()


def _width() -> int:
    said = os.environ.get("COLUMNS", "")
    return max(LEAST_WIDTH, int(said)) if said.isdecimal() and int(said) else WIDTH


class _Limit:
    """Lets the first few through, then what is due by time and progress."""

    def __init__(self, clock: Callable[[], float], first: int) -> None:
        self._clock, self._first = clock, first
        self._shown_at, self._shown_done = clock(), 0

    def lets(self, done: int, total: int) -> bool:
        """Whether a line is due now; one that is let through counts as shown."""
        silent = self._clock() - self._shown_at
        advanced = (done - self._shown_done) * 100 >= total
        if self._first > 0:
            self._first -= 1
        elif not (silent >= AT_MOST_SECONDS or (silent >= AT_LEAST_SECONDS and advanced)):
            return False
        self._shown_at, self._shown_done = self._clock(), done
        return True
