"""Watches the trainer's own loop from outside: when each step and its phases began and ended, and each step's loss.

Decides what a step's seconds are: host time from one synchronisation with the device to the next. The loop itself knows
no clock of a device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.events import Event, StepDone
from ltxforge.hardware import Moment, moment, seconds_between, synchronize
from ltxforge.modalities import Streams
from ltxforge.models.interface import VideoModel
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan
from ltxforge.signals import StopRequest


def train_watched(
    plan: Plan, model: VideoModel, batch: Batch, optimizer: Optimizer, watch: StepWatch, stop: StopRequest,
    start: int = 0,
) -> list[float]:  # fmt: skip
    """The trainer's own loop from update `start` + 1 to the plan's end, watched; each step's loss."""
    losses = []

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    data = SyntheticData(plan, batch, watch)
    watched: Any = _Watched(model, "predict", watch.forward_done)
    updates: Any = _Watched(optimizer, "step", watch.update_begins, before=True)
    watch.start()
    trainer.train(plan, watched, data, updates, start, emit, stop, lambda _step: watch.step_done())
    return losses


class StepWatch:
    """When each step and each of its phases began and ended.

    A step is host time from synchronisation to synchronisation. Its phases follow each other without a gap: "data",
    "forward" (noising included), "backward" (with the loss, what checkpointing recomputes, and clipping), "optimizer".
    """

    def __init__(self, device: torch.device) -> None:
        self.step_seconds: list[float] = []
        self.phase_seconds: list[dict[str, float]] = []
        self._device = device
        self._marks: list[tuple[str, Moment]] = []
        self._began = 0.0

    def start(self) -> None:
        """The first step begins."""
        synchronize(self._device)
        self._began = time.perf_counter()

    def begins(self, phase: str) -> None:
        """A phase begins, and the one before it is over."""
        self._marks.append((phase, moment(self._device)))

    def forward_done(self) -> None:
        """The backward phase begins."""
        self.begins("backward")

    def update_begins(self) -> None:
        """The optimiser's phase begins."""
        self.begins("optimizer")

    def step_done(self) -> None:
        """A step is over, and the next one begins."""
        self.begins("")
        synchronize(self._device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._began)
        phases: dict[str, float] = {}
        for (phase, first), (_, last) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] = phases.get(phase, 0.0) + seconds_between(first, last)
        self.phase_seconds.append(phases)
        self._marks.clear()
        self._began = time.perf_counter()


class _Watched:
    """Something whose one method tells when it is called, or has returned; all else is its own."""

    def __init__(self, inner: Any, method: str, tell: Callable[[], None], before: bool = False) -> None:
        self._inner, self._method, self._tell, self._before = inner, method, tell, before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._told(found) if name == self._method else found

    def _told(self, method: Callable) -> Callable:
        def called(*arguments: Any) -> Any:
            if self._before:
                self._tell()
            result = method(*arguments)
            if not self._before:
                self._tell()
            return result

        return called


class SyntheticData:
    """The batches of a measurement: the same one in every step. See `trainer.StepData`."""

    def __init__(self, plan: Plan, batch: Batch, watch: StepWatch) -> None:
        self._plan, self._batch, self._watch = plan, batch, watch

    def load(self, _step: int, micro: int) -> Batch:
        self._watch.begins("data")
        batch = dataclasses.replace(self._batch, first_index=micro * self._plan.training.batch_size)
        self._watch.begins("forward")
        return batch

    def count_at(self, _step: int) -> Streams[int]:
        return self._batch.latents.map(lambda each: len(each) * self._plan.training.accumulate)

    def epoch_at(self, step: int) -> float:
        return float(step)
