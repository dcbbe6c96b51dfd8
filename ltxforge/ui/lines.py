"""One event as one line of text, for every screen. Torch-free.

Decides the wording. Which events are shown, and when, is each screen's part; what repeats many times a minute
(`StepDone`, `PhaseAdvanced`) has a line too and it is for the screen to hold it back.
"""

from __future__ import annotations

import math

from ltxforge.events import (
    BaseQuantised,
    CheckpointSaved,
    ClipJudged,
    DryRunDone,
    Event,
    LoraExported,
    LoraInjected,
    Note,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    Resumed,
    RunEnded,
    SampleReady,
    StepDone,
)
from ltxforge.printable import printable
from ltxforge.ui.pace import Pace, sound_beside
from ltxforge.ui.text import counted, duration, loss, size, time_left

LABEL_WIDTH = 11
UNITS = {
    "scan": "clip", "prompts": "text", "latents": "sample", "audio": "sample", "quantise": "layer", "train": "step",
    "validate": "denoising step",
}  # fmt: skip


def line(event: Event) -> tuple[str, str] | None:
    """The event's label and text, without control characters, or None for one that has no line of its own."""
    found = _phase(event) or _progress(event) or _output(event)
    return (found[0], printable(found[1])) if found else None


def step_text(event: StepDone, pace: Pace) -> str:
    """Loss, its running mean, learning rate, speed and time left, as the live lines show them."""
    losses = f"loss {loss(event.loss)}  mean {loss(pace.loss)}"
    if math.isfinite(pace.audio_loss):  # once a step had sound, so that the columns stay
        losses += f"  sound {sound_text(event)}  mean {loss(pace.audio_loss)}"
    return f"{losses}  lr {event.learning_rate:.2e}  {pace.speed}  {time_left(pace.seconds_left)}".rstrip()


def sound_text(event: StepDone) -> str:
    """The sound's loss beside the video's; a dash in steps without sound."""
    beside = sound_beside(event)
    return "-" if beside is None else loss(beside)


def _phase(event: Event) -> tuple[str, str] | None:
    match event:
        case PhaseStarted():
            return event.phase, _joined(counted(event.total, UNITS.get(event.phase, "part")), event.detail)
        case PhaseAdvanced():
            return event.phase, _joined(f"{event.done} done", event.detail)
        case PhaseEnded():
            return event.phase, _joined(f"done in {duration(event.seconds)}", event.detail)
    return None


def _progress(event: Event) -> tuple[str, str] | None:
    match event:
        case Note():
            return ("warning" if event.level == "warning" else "note"), event.text
        case ClipJudged():
            return event.verdict, _joined(event.path, event.reason, *event.warnings)
        case Resumed():
            refused = (f"damaged and passed over: {name}" for name in event.refused)
            return "resumed", _joined(f"after step {event.step}, from {event.checkpoint}", *refused)
        case StepDone():
            sound = "" if sound_beside(event) is None else f"  sound {sound_text(event)}"
            losses = f"loss {loss(event.loss)}{sound}"
            return "step", f"{event.step}/{event.steps}  {losses}  lr {event.learning_rate:.2e}"
    return None


def _output(event: Event) -> tuple[str, str] | None:
    match event:
        case BaseQuantised():
            return "base", base_text(event)
        case LoraInjected():
            return "lora", lora_text(event)
        case DryRunDone():
            return "dry run", dry_run_text(event)
        case CheckpointSaved():
            return "checkpoint", f"step {event.step}, {size(event.bytes)} in {duration(event.seconds)}: {event.path}"
        case SampleReady():
            return "sample", f"step {event.step}, {event.name} in {duration(event.seconds)}: {event.contact_sheet}"
        case LoraExported():
            return "lora", f"saved after step {event.step}, {size(event.bytes)}: {event.path}"
        case RunEnded():
            return event.outcome, f"after step {event.step}, {duration(event.seconds)}"
    return None


QUIET_EXCESS = 0.05
"""By how much of the estimate a measured peak may differ without a word."""


def dry_run_text(event: DryRunDone) -> str:
    """What the largest micro-batch took; the parts only where it differs from the plan by more than `QUIET_EXCESS`."""
    tried = f"{counted(event.samples, 'sample')} of {event.shape} in {duration(event.seconds)}"
    if not event.measured_bytes:
        return f"{tried}: it fits (memory is not counted on this device)"
    told = f"{tried}: peak {size(event.measured_bytes)}"
    if not event.estimated_bytes:
        return told
    told += f" of {size(event.estimated_bytes)} planned"
    if abs(event.excess) <= QUIET_EXCESS:
        return told
    names = dict.fromkeys([*event.estimated, *event.measured])
    parts = (
        f"{name} {size(event.measured.get(name, 0))} of {size(event.estimated.get(name, 0))}"
        for name in names
        if event.measured.get(name) or event.estimated.get(name)
    )
    return _joined(f"{told} ({event.excess:+.0%})", *parts)


def lora_text(event: LoraInjected) -> str:
    """What the adapter matched, in one line; each target with its count."""
    report = event.report
    targets = ", ".join(f"{target} {count}" for target, count in report.get("by_target", {}).items())
    layers = counted(report.get("layers", 0), "layer") + (f" ({targets})" if targets else "")
    unread = report.get("unread") or {}
    return _joined(
        layers,
        f"{report.get('parameters', 0):,} trained parameters",
        f"file {size(report.get('file_bytes', 0))}",
        *(f"{layer} is not read by {why}" for layer, why in unread.items()),
    )


def base_text(event: BaseQuantised) -> str:
    """What the base's layers are kept in, in one line: how many, how small, how noisy the worst is, which not."""
    report = event.report
    quantised, stayed = report.get("quantised", 0), report.get("stayed") or {}
    sizes = f"{size(report.get('bytes_before', 0))} → {size(report.get('bytes_after', 0))}"
    found = report.get("worst")
    worst = f", worst {float(found['sqnr']):.1f} dB of signal to quantisation noise ({found['name']})" if found else ""
    reasons = ", ".join(f"{count:,} {reason}" if len(stayed) > 1 else reason for reason, count in stayed.items())
    source = {"cache": "from the cache", "file": "as the file has them"}.get(report.get("source", ""), "")
    return _joined(
        f"{report.get('format')}: {quantised:,} of {counted(report.get('count', 0), 'layer')}, {sizes}{worst}",
        f"{sum(stayed.values()):,} stay {report.get('whole')}: {reasons}" if stayed else "",
        source,
        *report.get("notes", ()),
    )


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
