"""What happened, as frozen facts. Work emits events; screens, logs and trackers consume them and nothing else.

Every event becomes one line of `events.jsonl`. A resumed run repeats the steps after its checkpoint, so lines carry
an attempt number and readers keep the last line per step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class PlanMade(Event):
    """The plan is decided and saved; `plan` is its JSON form."""

    plan: dict[str, Any]


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know that is no error. `level` is "info" or "warning"."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class ClipJudged(Event):
    """A clip's verdict: "ok", "rejected" (counts against max_rejected) or "dropped" (by the recipe's own limits)."""

    path: str
    verdict: str
    reason: str = ""
    warnings: tuple[str, ...] = ()
    samples: int = 0
    dataset: str = ""


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase with a known amount of work: "scan", "prompts", "latents", "quantise", "train", "validate"."""

    phase: str
    total: int
    detail: str = ""


@dataclass(frozen=True)
class PhaseAdvanced(Event):
    """`done` of the phase's total is finished."""

    phase: str
    done: int
    detail: str = ""


@dataclass(frozen=True)
class PhaseEnded(Event):
    """The phase is over, after `seconds` of wall time."""

    phase: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class LoraInjected(Event):
    """What the adapter matched; `report` is the JSON form of `lora.inject.LoraReport`."""

    report: dict[str, Any]


@dataclass(frozen=True)
class BaseQuantised(Event):
    """What became of the base's linear layers; `report` is the JSON form of `quant.report.BaseReport`."""

    report: dict[str, Any]


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on from a checkpoint. `refused` names newer checkpoints that were damaged, with the reason."""

    step: int
    checkpoint: str
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class DryRunDone(Event):
    """The largest micro-batch was tried: its clips' `shape`, how many `samples`. `measured_bytes` is the device's
    peak, 0 where the device does not count; the estimate beside it leaves out moments that are not made yet.
    """

    shape: str
    samples: int
    seconds: float
    measured_bytes: int = 0
    estimated_bytes: int = 0
    measured: dict[str, int] = field(default_factory=dict)
    estimated: dict[str, int] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """The share by which the measured peak is above the estimate; 0 where there is none."""
        return self.measured_bytes / self.estimated_bytes - 1 if self.measured_bytes and self.estimated_bytes else 0.0


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser update. `loss` is the step's unweighted flow loss of the video, or of the sound where that is
    trained alone; `audio_loss` that of the sound, None in steps without any. `seconds` is the wall time by part; on a
    GPU forward and backward are the time until their work is queued.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    epoch: float
    sigma: tuple[float, ...] = ()
    loss_by_sample: tuple[float, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_device_bytes: int = 0
    audio_loss: float | None = None
    audio_sigma: tuple[float, ...] = ()
    audio_loss_by_sample: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is whole on disk."""

    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class SampleReady(Event):
    """A validation sample was written: an mp4 and a PNG contact sheet."""

    step: int
    name: str
    video: str
    contact_sheet: str
    seconds: float


@dataclass(frozen=True)
class LoraExported(Event):
    """The LoRA file that other programs load was written."""

    path: str
    bytes: int
    step: int


@dataclass(frozen=True)
class RunEnded(Event):
    """The run is over. `outcome` is "finished" or "stopped"."""

    outcome: str
    step: int
    seconds: float


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Takes events that nobody needs."""


def to_json(event: Event) -> dict[str, Any]:
    """The event as JSON-ready data with its type's name first. Non-finite numbers become strings ("nan", "inf")."""
    return {"event": type(event).__name__, **_plain(dataclasses.asdict(event))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
