"""The suite `step`: one training step at full size, the trainer's own loop over synthetic latents and random weights.

Decides what is timed: whole steps between two synchronisations with the device, after warm-up; reading the cache is
left out, all else is what `run` does. Loads and writes no file.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ltxforge import trainer
from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError, Stopped
from ltxforge.events import Event, StepDone
from ltxforge.hardware import (
    Hardware,
    Moment,
    is_out_of_memory,
    moment,
    peak_bytes,
    reserved_peak_bytes,
    reset_peak,
    reset_resident_peak,
    resident_peak_bytes,
    seconds_between,
    synchronize,
    torch_device,
    torch_dtype,
)
from ltxforge.lora.targets import match
from ltxforge.modalities import Streams, has
from ltxforge.models.interface import Noisy, NoisyTokens, VideoModel, to_tokens
from ltxforge.models.parts import release_memory
from ltxforge.models.random_weights import random_model, random_prompt
from ltxforge.optim import Optimizer
from ltxforge.plan import (
    AudioPlan,
    CachePlan,
    CheckpointPlan,
    ConditioningPlan,
    DataPlan,
    DevicePlan,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.randomness import address
from ltxforge.session import make_trainable
from ltxforge.signals import StopRequest
from ltxforge.suites.step import StepCase, StepResult

SEED = 0
META = torch.device("meta")
HOW = {
    "step_seconds": "whole steps of the trainer's own loop after warm-up, from one synchronisation with the device to"
    " the next; latents and prompts are synthetic and already in the host's memory, weights random",
    "phase_seconds": "medians; backward holds the loss, what checkpointing recomputes, and clipping",
    "peak_bytes": "allocated and reserved by PyTorch on the device while training, weights included; resident: of the"
    " whole process on the host",
    "model_flops": "per step: 2 for each multiply-add of every matrix product in forward and backward, attention"
    " included, without gradients of frozen weights and without what checkpointing recomputes",
    "tflops_per_second": "model_flops / the median step",
}


def begin(cases: Sequence[StepCase], hardware: Hardware, told: Told, stop: StopRequest) -> Bench:
    """Ready to measure steps.

    Raises:
        PlanError: a case's targets match nothing.
    """
    for case in cases:
        match(case.targets, case.spec, case.trained, case.trained)
    return Bench(lambda case: measure(case, hardware, told, stop), HOW)


def measure(case: StepCase, hardware: Hardware, told: Told, stop: StopRequest) -> StepResult:
    """Build the case's model, train it and say what it took. Too little memory is a result, not an error.

    Args:
        told: takes lines about what goes on.
    """
    if hardware.kind == "cpu" and not case.spec.tiny:
        return _unmeasured(case, "skipped", f"{case.model} at full size needs a GPU, and this machine has none")
    device = torch_device(hardware.kind)
    reset_peak(device)
    try:
        return _measured(case, hardware, told, stop)
    except NonFiniteError as error:
        return _unmeasured(case, "not finite", error.what, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _unmeasured(case, "out of memory", str(error).splitlines()[0], device)
    finally:
        release_memory(device)


def _unmeasured(case: StepCase, outcome: Any, reason: str, device: torch.device | None = None) -> StepResult:
    peak = peaks(device) if device else {}
    return StepResult(case.name, outcome, case.settings(), reason=reason, peak_bytes=peak)


def _measured(case: StepCase, hardware: Hardware, told: Told, stop: StopRequest) -> StepResult:
    device, plan = torch_device(hardware.kind), plan_of(case, hardware)
    told(f"{case.name}: building {case.model} with random weights")
    reset_resident_peak()
    began = time.perf_counter()
    model = random_model(case.spec, device, torch_dtype(case.precision), case.trained)
    optimizer = make_trainable(plan, model, _ignore)
    synchronize(device)
    build_seconds, build_peak = time.perf_counter() - began, peaks(device)
    reset_resident_peak()
    batch = synthetic_batch(case, model)
    told(f"{case.name}: {case.warmup_steps} + {case.steps} steps of {_tokens_told(batch)}")
    watch = StepWatch(device)
    losses = train_watched(plan, model, batch, optimizer, watch, stop)
    if stop.requested:
        raise Stopped(stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")
    timed = slice(case.warmup_steps, None)
    base = [p for name, p in model.transformer.named_parameters() if "lora_" not in name]
    return StepResult(
        name=case.name,
        outcome="measured",
        case=case.settings(),
        parameters=sum(p.numel() for p in base),
        trained_parameters=sum(p.numel() for p in optimizer.parameters.values()),
        weights_bytes=sum(p.nbytes for p in base),
        tokens=tokens_of(batch),
        build_seconds=build_seconds,
        build_peak_bytes=build_peak,
        step_seconds=tuple(watch.step_seconds[timed]),
        phase_seconds=medians(watch.phase_seconds[timed]),
        peak_bytes=peaks(device),
        model_flops=count_flops(case, plan),
        losses=tuple(losses),
    )


def _ignore(_event: Event) -> None:
    """Takes events that nobody needs."""


def train_watched(
    plan: Plan, model: VideoModel, batch: Batch, optimizer: Optimizer, watch: StepWatch, stop: StopRequest
) -> list[float]:
    """The trainer's own loop, watched; each step's loss."""
    losses = []

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    data = SyntheticData(plan, batch, watch)
    watched: Any = _Watched(model, "predict", watch.forward_done)
    updates: Any = _Watched(optimizer, "step", watch.update_begins, before=True)
    watch.start()
    trainer.train(plan, watched, data, updates, 0, emit, stop, lambda _step: watch.step_done())
    return losses


def plan_of(case: StepCase, hardware: Hardware) -> Plan:
    """What the planner would decide for such a run, as far as a step depends on it."""
    spec, steps = case.spec, case.warmup_steps + case.steps
    return Plan(
        name=case.name,
        seed=SEED,
        steps=steps,
        steps_per_epoch=1.0,
        model=ModelPlan(case.model, spec.version, spec.rope, {}),
        device=DevicePlan(
            case.precision, case.precision, hardware.kind, "PyTorch SDPA", "statistical", "a measurement", hardware.name
        ),
        data=DataPlan((), ()),
        cache=CachePlan(""),
        flow=FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=ConditioningPlan(0.0, 0.0, spec.default_prompt_tokens),
        lora=LoraPlan(case.rank, float(case.rank), 0.0, False, tuple(case.targets), modalities=case.trained),
        optimizer=OptimizerPlan("adamw", 1e-4, (0.9, 0.999), 1e-8, 0.0, "constant", 0, steps, 0.0, 2.0),
        training=TrainingPlan(case.batch_size, case.accumulate, 1.0, None, case.trained),
        memory=MemoryPlan(case.checkpointing),
        checkpoint=CheckpointPlan(steps, 2),
        validation=ValidationPlan(0, False),
        directory="",
        audio=AudioPlan("independent", 1.0) if has(case.trained, "audio") else None,
    )


def synthetic_batch(case: StepCase, model: VideoModel) -> Batch:
    """A micro-batch as the cache would give it: standard normal latents, whole captions, every clip with sound.

    L, the sound's latents, is what the model says belongs to the clip's duration.
    """
    spec, size = case.spec, case.batch_size
    shape = case.shape.latent(spec.spatial_factor, spec.temporal_factor)
    generator = torch.Generator().manual_seed(address(SEED, "synthetic-latents"))
    video = audio = None
    if has(case.trained, "video"):
        video = torch.randn(
            size, spec.latent_channels, shape.frames, shape.height, shape.width, generator=generator
        )  # fmt: skip
    if has(case.trained, "audio"):
        length = model.sound_length(case.shape.frames / case.rate)
        audio = torch.randn(size, length, spec.transformer_config["audio_in_channels"], generator=generator)
    prompt = random_prompt(spec, spec.default_prompt_tokens, case.trained, torch_dtype(case.precision))
    return Batch(
        latents=Streams(video, audio),
        present=None if audio is None else torch.ones(size, dtype=torch.bool),
        prompts=[prompt] * size,
        clean=torch.zeros(size, shape.tokens, dtype=torch.bool),
        shape=shape,
        fps=case.rate,
        samples=(),
        first_index=0,
    )


def tokens_of(batch: Batch) -> dict[str, int]:
    """Sequence lengths of one sample: T of the video, L of the sound, P of the prompt."""
    streams = {name: each.shape[1] for name, each in model_tokens(batch).items()}
    return {**streams, "prompt": batch.prompts[0].tokens}


def model_tokens(batch: Batch) -> Streams[torch.Tensor]:
    """Each modality's tokens, [B, T, C] and [B, L, C]."""
    video = batch.latents.video
    return Streams(None if video is None else to_tokens(video), batch.latents.audio)


def _tokens_told(batch: Batch) -> str:
    return ", ".join(f"{count:,} {name} tokens" for name, count in tokens_of(batch).items())


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


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """The median of each phase over the steps."""
    return {phase: statistics.median(step[phase] for step in steps) for phase in (steps[0] if steps else ())}


def peaks(device: torch.device) -> dict[str, int]:
    """The most memory since the counters were reset; what the device or the system does not count is left out."""
    found = {
        "allocated": peak_bytes(device),
        "reserved": reserved_peak_bytes(device),
        "resident": resident_peak_bytes(),
    }
    return {name: count for name, count in found.items() if count}


def count_flops(case: StepCase, plan: Plan) -> int:
    """Floating-point operations of one step, as PyTorch counts them over the model's own forward and backward.

    Two for each multiply-add of every matrix product, those of attention included, forward and backward as autograd
    needs them: no gradient of a frozen weight. What checkpointing computes again is not counted, nor is anything
    elementwise, noising, loss and optimiser. Counted on the meta device, where nothing is computed.
    """
    model = random_model(case.spec, META, torch_dtype(case.precision), case.trained)
    make_trainable(dataclasses.replace(plan, memory=MemoryPlan(0)), model, _ignore)
    batch = synthetic_batch(case, model)
    timesteps = torch.zeros(case.batch_size, 1, device=META)
    noisy = model_tokens(batch).map(lambda each: NoisyTokens(each.to(META, model.dtype), timesteps, timesteps[:, 0]))
    prompts = model.batch_prompts(batch.prompts, plan.conditioning.prompt_tokens)
    with FlopCounterMode(display=False) as counter:
        velocities = model.predict(Noisy(noisy, batch.shape, batch.fps), prompts)
        sums = [each.float().sum() for _, each in velocities.items()]
        sum(sums[1:], sums[0]).backward()
    return counter.get_total_flops() * case.accumulate
