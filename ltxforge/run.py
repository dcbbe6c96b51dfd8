"""A whole run, in order: recipe → plan → dataset → model → trainer → LoRA file. The map of the program, in code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ltxforge import __version__
from ltxforge.checkpoint import Checkpoints
from ltxforge.dataset import encode
from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache
from ltxforge.distributed import refuse_several_processes
from ltxforge.durable import faults_told
from ltxforge.errors import DeviceFullError, LtxforgeError, RunError, Stopped
from ltxforge.events import (
    CheckpointSaved,
    Emit,
    LoraExported,
    LoraInjected,
    Note,
    PhaseEnded,
    PhaseStarted,
    PlanMade,
    Resumed,
    RunEnded,
)
from ltxforge.facts import Places, gather, places
from ltxforge.flow_matching import sigma_quantiles
from ltxforge.hardware import torch_device
from ltxforge.lock import RunLock
from ltxforge.lora.files import DTYPES, export, provenance
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject, load_adapter
from ltxforge.lora.targets import match
from ltxforge.models.interface import VideoModel
from ltxforge.models.load import load_model
from ltxforge.models.sources import fetch
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan, to_json
from ltxforge.planner import make_plan
from ltxforge.recipe.parse import Parsed
from ltxforge.run_directory import RunDirectory
from ltxforge.signals import StopRequest
from ltxforge.trackers.jsonl import EventLog, last_per_step, read_events
from ltxforge.trainer import train
from ltxforge.ui.dispatch import Dispatcher
from ltxforge.ui.loss_curve import draw
from ltxforge.ui.plan_table import plan_table
from ltxforge.ui.screen import Screen
from ltxforge.ui.text import duration
from ltxforge.validation.sample import validate


def run(parsed: Parsed, out: Path | None, screen: Screen) -> None:
    """Carry a recipe out, from the beginning or from its newest checkpoint."""
    refuse_several_processes(os.environ)
    where = places(parsed, out)
    with (
        StopRequest() as stop,
        faults_told(where.run),
        RunLock(where.run),
        EventLog(where.run / "events.jsonl") as log,
        Dispatcher([screen, log]) as emit,
        failures_logged(log),
    ):
        plan = settle_plan(parsed, where, screen, emit, stop)
        model = load_model(plan.model, torch_device(plan.device.kind), DTYPES[plan.device.precision])
        cache = Cache(Path(plan.cache.directory), emit)
        cache.sweep()
        data = settle_data(plan, model, cache, emit, stop)
        open_session(plan, model, cache, data, log.attempt, emit, stop).train()


def plan_only(parsed: Parsed, out: Path | None, screen: Screen) -> None:
    """Print the plan of a recipe, or everything that is missing for one; starts and changes nothing."""
    where = places(parsed, out)
    with StopRequest() as stop, faults_told(where.run), Dispatcher([screen]) as emit:
        home = RunDirectory(where.run)
        saved = home.saved_plan()
        plan = make_plan(parsed.recipe, gather(parsed, where, saved, emit, stop))
        show_plan(plan, screen)
        if saved is not None:
            home.require_same_run(saved, plan)
            done = Checkpoints(where.run, keep=2).steps()[-1]
            emit(Note(f"this run is at step {done}; `run` continues it{_time_left(home, plan.steps - done)}"))


def _time_left(home: RunDirectory, steps: int) -> str:
    """How long the remaining steps take at the pace of those that the run has made."""
    seconds = [event["seconds"]["step"] for event in last_per_step(read_events(home.events)).values()]
    if not steps or not seconds:
        return ""
    pace = statistics.median(seconds)
    return f": {steps} steps at {pace:.2f} s as until now take {duration(steps * pace)}, saving and samples apart"


@contextlib.contextmanager
def failures_logged(log: EventLog) -> Iterator[None]:
    """What ends the run stands in its log too; the device's want of memory becomes an error with ways out."""
    try:
        yield
    except Stopped:
        raise
    except LtxforgeError as error:
        log(Note(str(error), "error"))
        raise
    except torch.OutOfMemoryError as error:
        told = DeviceFullError(
            f"the device has too little memory: {str(error).splitlines()[0]}",
            remedy="The last checkpoint is whole. memory.checkpointing = true may be set at any time; in a new run,"
            " lower resolution, frames, batch_size or rank, or leave validation out, help too.",
        )
        log(Note(str(told), "error"))
        raise told from error


def settle_plan(parsed: Parsed, where: Places, screen: Screen, emit: Emit, stop: StopRequest) -> Plan:
    """Gather facts, decide, compare with the run that is there, fetch weights, print and save the plan."""
    home = RunDirectory(where.run)
    home.sweep()
    saved = home.saved_plan()
    if saved is not None and parsed.recipe.run.resume == "never":
        raise RunError(
            'this directory has a run in it, and run.resume = "never" forbids to continue it', where=str(where.run),
            remedy="Start with --out another/directory, or leave run.resume out to continue.",
        )  # fmt: skip
    plan = make_plan(parsed.recipe, gather(parsed, where, saved, emit, stop))
    if saved is not None:
        home.require_same_run(saved, plan)
        if plan.device.exactness_reason != saved.device.exactness_reason:
            emit(Note(f"not bit for bit from here on: {plan.device.exactness_reason}", "warning"))
    show_plan(plan, screen)
    plan = dataclasses.replace(plan, model=fetch(plan.model, emit, stop))
    home.save_plan(plan, parsed.text, parsed.overrides)
    emit(PlanMade(to_json(dataclasses.replace(plan, data=dataclasses.replace(plan.data, samples=())))))
    return plan


def show_plan(plan: Plan, screen: Screen) -> None:
    """The plan as a table, with the quantiles of the sigma that each bucket trains."""
    quantiles = {str(bucket.shape): sigma_quantiles(plan.flow, bucket.tokens) for bucket in plan.data.buckets}
    screen.show(plan_table(plan, quantiles))


def settle_data(plan: Plan, model: VideoModel, cache: Cache, emit: Emit, stop: StopRequest) -> encode.CachedData:
    """Fill the cache and compare what the run trains on with what it began with."""
    home = RunDirectory(Path(plan.directory))
    data = encode.fill(plan, model, cache, emit, stop)
    changes = home.compare_data(data.to_json())
    if changes.encoded:
        count = len(changes.encoded)
        emit(Note(f"not bit for bit from here on: {count} samples were encoded to other bits", "warning"))
    if changes.late:
        count = len(changes.late)
        emit(Note(f"{count} samples that could not be decoded when this run began stay out of it", "warning"))
        data = data.without(changes.late)
    home.save_data(data.to_json())
    return data


def open_session(
    plan: Plan, model: VideoModel, cache: Cache, data: encode.CachedData, attempt: int, emit: Emit, stop: StopRequest
) -> Session:
    """Load the transformer, put the adapter in and go back to the newest checkpoint."""
    model.load_transformer()
    report = inject(model.transformer, plan.lora, match(plan.lora.targets, model.spec), plan.seed)
    emit(LoraInjected(dataclasses.asdict(report)))
    model.set_checkpointing(plan.memory.checkpointing)
    model.transformer.train()
    optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
    session = Session(plan, model, cache, Batches(plan, data, cache), optimizer, attempt, emit, stop)
    session.restore()
    return session


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
    start: int = 0

    def __post_init__(self) -> None:
        self.home = RunDirectory(Path(self.plan.directory))
        self.checkpoints = Checkpoints(self.home.path, self.plan.checkpoint.keep)

    def restore(self) -> None:
        """Take weights, moments and step from the newest checkpoint that verifies."""
        saved = self.checkpoints.newest()
        if saved is None:
            return
        if saved.facts.get("plan") != self.plan.identity_digest():
            raise RunError("this checkpoint was saved by another run", where=str(saved.path))
        load_adapter(self.model.transformer, saved.adapter)
        self.optimizer.load_state(saved.optimizer)
        self.start = saved.step
        self.emit(Resumed(saved.step, str(saved.path), saved.refused))

    def train(self) -> None:
        """Train to the plan's end, or to a stop, which saves and raises Stopped."""
        began = time.monotonic()
        self.sample(self.start)
        step = self.start
        if step >= self.plan.steps:
            self.emit(Note(f"all {step} steps are done; raise run.steps to go on"))
            self.hand_over(step)
        elif not self.stop.requested:
            self.emit(PhaseStarted("train", self.plan.steps, f"from step {step}"))
            step = train(
                self.plan, self.model, self.batches, self.optimizer, step, self.emit, self.stop, self.after_step
            )
            self.emit(PhaseEnded("train", time.monotonic() - began))
        outcome = "stopped" if step < self.plan.steps else "finished"
        if step > self.start and not self.checkpoints.path(step).exists():
            self.save(step)
        if step > self.start or not self.home.loss_curve.exists():
            draw(self.home.events, self.home.loss_curve)
        self.emit(RunEnded(outcome, step, time.monotonic() - began))
        if self.stop.requested:
            raise Stopped(
                self.stop.signal_number, f"{outcome} at step {step} of {self.plan.steps}",
                remedy="Start the same command again to continue." if outcome == "stopped" else "",
            )  # fmt: skip

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
        facts = {"plan": self.plan.identity_digest(), "attempt": self.attempt, "ltxforge": __version__}
        adapter = adapter_parameters(self.model.transformer)
        path = self.checkpoints.save(
            step, adapter, self.optimizer.state(), lambda target: self.export(target, step), facts
        )
        size = sum(file.stat().st_size for file in path.iterdir())
        self.emit(CheckpointSaved(step, str(path), size, time.monotonic() - began))

    def export(self, path: Path, step: int) -> int:
        """The LoRA file of the adapter as it is now; returns its size in bytes."""
        plan, lora = self.plan, self.plan.lora
        facts = provenance(
            {
                "name": plan.name, "base": plan.model.base, "version": plan.model.version, "step": step,
                "rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "alpha_folded": True,
                "targets": lora.targets, "plan": plan.identity_digest(), "ltxforge": __version__,
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
        captions = encode.validation_captions(plan)
        prompts = {text: encode.read_prompt(plan, self.cache, text, self.model.text_dtype) for text in captions}
        validate(plan, self.model, prompts, step, self.home.samples, self.emit, self.stop)
