"""A run ready to train: restores, saves, samples and hands over around the trainer's loop.

Holds transformer and adapter, batches, optimiser and directory together; when it does what is the plan's to say.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxforge import __version__
from ltxforge.checkpoint import Checkpoint, Checkpoints
from ltxforge.dataset.batches import Batch, Batches
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.cached import CachedData, read_prompt, validation_prompts
from ltxforge.dry_run import dry_run
from ltxforge.errors import RunError, Stopped
from ltxforge.events import (
    CheckpointSaved,
    Emit,
    LoraExported,
    LoraInjected,
    Note,
    PhaseEnded,
    PhaseStarted,
    Resumed,
    RunEnded,
)
from ltxforge.lora.files import export, provenance, read
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject, load_adapter
from ltxforge.lora.targets import match
from ltxforge.memory.strategy import Strategy
from ltxforge.models.interface import VideoModel
from ltxforge.models.parts import release_memory
from ltxforge.models.vae_tiles import DecodeTiling
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.guard import ActivationVerdict, judge_activations, use_weight_only, weight_only
from ltxforge.run_directory import RunDirectory
from ltxforge.signals import StopRequest
from ltxforge.trainer import forward, train
from ltxforge.ui.loss_curve import draw
from ltxforge.ui.text import counted
from ltxforge.validation.sample import validate


def open_session(
    plan: Plan, model: VideoModel, cache: Cache, data: CachedData, attempt: int, emit: Emit, stop: StopRequest
) -> Session:
    """Load the transformer, put the adapter in and go back to the newest checkpoint. To be closed."""
    strategy = Strategy(plan, model.device)
    optimizer = make_trainable(plan, model, emit, strategy)
    session = Session(plan, model, cache, Batches(plan, data, cache), optimizer, attempt, emit, stop, strategy)
    session.restore()
    return session


def make_trainable(plan: Plan, model: VideoModel, emit: Emit, strategy: Strategy | None = None) -> Optimizer:
    """Load the transformer, put a fresh adapter in and give its optimiser; see `adapt`."""
    adapt(plan, model, emit, strategy)
    model.transformer.train()
    return Optimizer(plan.optimizer, adapter_parameters(model.transformer))


def adapt(plan: Plan, model: VideoModel, emit: Emit, strategy: Strategy | None = None) -> None:
    """Load the transformer and put a fresh adapter in; both are kept and compute as the plan says.

    Args:
        strategy: the plan's own, of whoever will close it; else it goes with the model.
    """
    strategy = strategy or Strategy(plan, model.device)
    model.keep = strategy.keep(model.dtype, emit)
    model.load_transformer()
    matched = match(plan.lora.targets, model.spec, plan.lora.modalities, plan.training.modalities)
    report = inject(model.transformer, plan.lora, matched, plan.seed, plan.kernels, model.device)
    release_memory(model.device)  # of weights that now stand beside a copy of B
    emit(LoraInjected(dataclasses.asdict(report)))
    model.kernels = plan.kernels
    strategy.apply(model)
    for note in strategy.notes:
        emit(Note(note, "warning"))
    model.decode_tiling = DecodeTiling(plan.memory.decode_tile, plan.memory.decode_frames)


def judge_products(plan: Plan, model: VideoModel, first: Callable[[], Batch], emit: Emit) -> bool:
    """Of a base that multiplies in 8 bits, have the layers that lose too much by it on a run's first batch keep their
    activations whole.

    Returns:
        Whether any product was judged: there is nothing to judge in other formats, nor where a device makes weights
        whole instead.
    """
    format = FORMATS.get(plan.memory.base_precision)
    if format is None or not format.quantises_activations:
        return False
    verdicts = judge_activations(model.transformer, lambda: forward(plan, model, first(), 1, 0))
    if verdicts and all(each.sqnr == math.inf for each in verdicts):
        emit(Note(f"this device makes weights in {format.name} whole for each product: they save memory alone"))
        return False
    told = f"{sum(each.quantised for each in verdicts)} of {len(verdicts)} layers multiply in 8 bits"
    if spared := [each for each in verdicts if not each.quantised]:
        worst = min(spared, key=_left)
        told += f"; the others would lose too much, {worst.layer} most of all ({_left(worst):.1f} dB left)"
    emit(Note(told))
    return any(math.isfinite(each.sqnr) for each in verdicts)


def _left(verdict: ActivationVerdict) -> float:
    return min(verdict.sqnr, verdict.differing)


@dataclass
class Session:
    """A run that is ready to train: saves, samples and finishes where the plan says so."""

    plan: Plan
    model: VideoModel
    cache: Cache
    batches: Batches
    optimizer: Optimizer
    attempt: int
    emit: Emit
    stop: StopRequest
    strategy: Strategy
    start: int = 0
    saved: int = 0
    judged: bool = False

    def __post_init__(self) -> None:
        self.home = RunDirectory(Path(self.plan.directory))
        self.checkpoints = Checkpoints(self.home.path, self.plan.checkpoint.keep)

    def begin(self) -> None:
        """Take A and B from the LoRA file that the plan names, if it names one; layers that it lacks stay fresh."""
        lora, transformer = self.plan.lora, self.model.transformer
        if not lora.init_from:
            return
        found = read(Path(lora.init_from), lora.init_digest, adapter_scaling(transformer))
        load_adapter(transformer, {**adapter_parameters(transformer), **found})
        self.emit(Note(f"A and B of {len(found) // 2} layers start from {lora.init_from}"))

    def restore(self) -> None:
        """Take weights, moments and step from the newest checkpoint that verifies; without any, begin."""
        saved = self.checkpoints.newest()
        if saved is None:
            self.begin()
        else:
            self.go_on(saved)
        if not self.judged:  # nor was it, on a device that multiplies no fp8
            self.judged = judge_products(self.plan, self.model, lambda: self.batches.load(1, 0), self.emit)

    def go_on(self, saved: Checkpoint) -> None:
        """Take weights, moments, step and the verdicts on products from a checkpoint of this run."""
        if saved.facts.get("plan") != self.plan.identity_digest():
            raise RunError(
                "this checkpoint was saved by another run", where=str(saved.path),
                remedy="Move it away, or give this run another directory with --out.",
            )  # fmt: skip
        load_adapter(self.model.transformer, saved.adapter)
        self.optimizer.load_state(saved.optimizer)
        use_weight_only(self.model.transformer, saved.facts.get("weight_only", ()))
        self.judged = saved.facts.get("judged", False)
        self.start = self.saved = saved.step
        self.emit(Resumed(saved.step, str(saved.path), saved.refused))

    def close(self) -> None:
        """Let go of the weights that wait outside of the device."""
        self.strategy.close()

    def train(self) -> None:
        """Train to the plan's end, or to a stop, which saves and raises Stopped."""
        began = time.monotonic()
        if self.plan.memory.dry_run and self.start < self.plan.steps and not self.stop.requested:
            dry_run(self.plan, self.model, self.batches, self.optimizer, self.emit)
        self.sample(self.start)
        step = self.start
        if step >= self.plan.steps:
            self.emit(Note(f"done after {counted(step, 'step')}; raise run.steps to go on"))
            self.hand_over(step)
        elif not self.stop.requested:
            self.emit(PhaseStarted("train", self.plan.steps, f"from step {step}"))
            step = train(
                self.plan, self.model, self.batches, self.optimizer, step, self.emit, self.stop, self.after_step
            )
            self.emit(PhaseEnded("train", time.monotonic() - began))
        outcome = "stopped" if step < self.plan.steps else "finished"
        self.report_sound(step)
        if step > self.saved:
            self.save(step)
        if step > self.start or not self.home.loss_curve.exists():
            draw(self.home.events, self.home.loss_curve)
        self.emit(RunEnded(outcome, step, time.monotonic() - began))
        if self.stop.requested:
            raise Stopped(
                self.stop.signal_number, f"{outcome} at step {step} of {self.plan.steps}",
                remedy="Start the same command again to continue." if outcome == "stopped" else "",
            )  # fmt: skip

    def report_sound(self, step: int) -> None:
        """How many steps until now had sound to train on, or as context, where sound is computed."""
        if self.plan.audio is not None and step:
            heard = self.batches.steps_with_sound(1, step)
            told = f"{heard} of {counted(step, 'step')} trained sound"
            if self.plan.audio.loss_weight == 0:
                told = f"{heard} of {counted(step, 'step')} had sound, as context only: audio.loss_weight is 0"
            self.emit(Note(told, "info" if heard else "warning"))

    def after_step(self, step: int) -> None:
        """What follows an update: saving first, so that a fault in sampling costs nothing."""
        if self.plan.saves_at(step):
            self.save(step)
            draw(self.home.events, self.home.loss_curve)
        if step == self.plan.steps:
            self.hand_over(step)
        self.sample(step)

    def hand_over(self, step: int) -> None:
        """The run's result: the LoRA file that other programs load."""
        self.emit(LoraExported(str(self.home.lora), self.export(self.home.lora, step), step))

    def save(self, step: int) -> None:
        """A checkpoint of this step; a step that is saved already stays as it is."""
        began = time.monotonic()
        facts: dict[str, Any] = {"plan": self.plan.identity_digest(), "attempt": self.attempt, "ltxforge": __version__}
        facts |= {"weight_only": sorted(weight_only(self.model.transformer)), "judged": self.judged}
        adapter = adapter_parameters(self.model.transformer)
        path = self.checkpoints.save(
            step, adapter, self.optimizer.state(), lambda target: self.export(target, step), facts
        )
        size = sum(file.stat().st_size for file in path.iterdir())
        self.saved = step
        self.emit(CheckpointSaved(step, str(path), size, time.monotonic() - began))

    def export(self, path: Path, step: int) -> int:
        """The LoRA file of the adapter as it is now; returns its size in bytes."""
        plan, lora = self.plan, self.plan.lora
        facts = provenance(
            {
                "name": plan.name, "base": plan.model.base, "version": plan.model.version, "step": step,
                "rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "alpha_folded": True,
                "targets": lora.targets, "modalities": lora.modalities, "trained": plan.training.modalities,
                "init_from": lora.init_digest,
                "plan": plan.identity_digest(), "ltxforge": __version__,
                "shapes": [str(bucket.shape) for bucket in plan.data.buckets],
            }
        )  # fmt: skip
        transformer = self.model.transformer
        scaling = adapter_scaling(transformer)
        return export(path, adapter_parameters(transformer), scaling, lora.save_precision, facts)

    def sample(self, step: int) -> None:
        """Validation samples, if this step has some that are not there yet."""
        folder = self.home.samples / f"step-{step:06d}"
        due = [prompt for prompt in self.plan.validation.prompts if not (folder / f"{prompt.name}.png").exists()]
        if not due or not self.plan.validates_at(step) or self.stop.requested:
            return
        plan = dataclasses.replace(self.plan, validation=dataclasses.replace(self.plan.validation, prompts=tuple(due)))
        dtype = self.model.text_dtype
        prompts = {wanted.text: read_prompt(plan, self.cache, wanted, dtype) for wanted in validation_prompts(plan)}
        validate(plan, self.model, prompts, step, self.home.samples, self.emit, self.stop)
