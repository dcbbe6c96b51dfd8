"""Running losses, seconds per step and time left, from the stream of `StepDone` events.

For displays only; torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ltxforge.events import StepDone
from ltxforge.ui.smoothing import RunningMean
from ltxforge.ui.text import duration

LOSS_STEPS = 50
SPEED_STEPS = 20


class Pace:
    """`loss` is the running mean over about 50 steps, `audio_loss` over those that had sound beside the video,
    `seconds_per_step` over about 20; all nan before a step.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last_seen = clock, math.nan
        self._loss, self._audio_loss = RunningMean(LOSS_STEPS), RunningMean(LOSS_STEPS)
        self._seconds = RunningMean(SPEED_STEPS)
        self.loss = self.audio_loss = self.seconds_per_step = self.seconds_left = math.nan

    def __call__(self, event: StepDone) -> None:
        """Take one step in. A loss that is no number is left out of the mean."""
        if math.isfinite(event.loss):
            self.loss = self._loss(event.loss)
        if (beside := sound_beside(event)) is not None and math.isfinite(beside):
            self.audio_loss = self._audio_loss(beside)
        now = self._clock()
        # The step's own time excludes saving and sampling; without it the clock has to do.
        seconds = event.seconds.get("step", now - self._last_seen)
        self._last_seen = now
        if math.isfinite(seconds):
            self.seconds_per_step = self._seconds(seconds)
        self.seconds_left = max(0, event.steps - event.step) * self.seconds_per_step

    @property
    def speed(self) -> str:
        """Seconds per step, or steps per second when there are several."""
        if not math.isfinite(self.seconds_per_step):
            return "? s/step"
        if 0 < self.seconds_per_step < 0.1:
            return f"{1 / self.seconds_per_step:.0f} steps/s"
        return f"{duration(self.seconds_per_step)}/step"


def sound_beside(event: StepDone) -> float | None:
    """The sound's loss beside the video's; None in steps without sound, and where `loss` is the sound's itself."""
    return None if event.audio_sigma == event.sigma and event.audio_loss == event.loss else event.audio_loss
