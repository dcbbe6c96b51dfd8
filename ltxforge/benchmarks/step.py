"""The suite `step`: one training step at full size, ours through the trainer's own loop, against diffusers with PEFT.

Decides what is timed: whole steps between two synchronisations with the device, after warm-up, in turns with the peers
over the same weights; reading the cache is left out, all else is what `run` does. Quality comes first: a red gate
reports no speed. Loads and writes no file.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from ltxforge_kernels.choice import EAGER
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ltxforge.benchmarks import quality, timing
from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.benchmarks.step_peers import StockStep, bitsandbytes_nf4, on_device
from ltxforge.benchmarks.step_watch import StepWatch, train_watched
from ltxforge.benchmarks.synthetic import model_tokens, plan_of, synthetic_batch, tokens_of, tokens_told
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError, Stopped
from ltxforge.events import ignore
from ltxforge.hardware import (
    Hardware,
    is_out_of_memory,
    peak_bytes,
    reserved_peak_bytes,
    reset_peak,
    reset_resident_peak,
    resident_peak_bytes,
    synchronize,
    torch_device,
    torch_dtype,
)
from ltxforge.lora.targets import match
from ltxforge.models.interface import Noisy, NoisyTokens
from ltxforge.models.parts import release_memory
from ltxforge.models.random_weights import empty_transformer, random_model
from ltxforge.plan import MemoryPlan, Plan
from ltxforge.session import judge_products, make_trainable
from ltxforge.signals import StopRequest
from ltxforge.suites.case import Gate
from ltxforge.suites.step import COMPILED_PEER, NF4_PEER, PeerStep, StepCase, StepResult, TrainingCase

META = torch.device("meta")
ROUNDS = 4
"""Turns that ours and the peers take; each begins with a step that is not timed. Alone, ours takes one."""
HOW = {
    "step_seconds": "whole steps of the trainer's own loop after warm-up, from one synchronisation with the device to"
    " the next; latents and prompts are synthetic and already in the host's memory, weights random",
    "phase_seconds": "medians; backward holds the loss, what checkpointing recomputes, and clipping",
    "peak_bytes": "allocated and reserved by PyTorch on the device while training, weights included, and before any"
    " peer is built; resident: of the whole process on the host",
    "model_flops": "per step: 2 for each multiply-add of every matrix product in forward and backward, attention"
    " included, without gradients of frozen weights and without what checkpointing recomputes",
    "tflops_per_second": "model_flops / the median step",
    "launches": "kernels that one step starts, as the profiler counts them; on a GPU alone",
    "gates": "checked before anything is timed, against diffusers' transformer with PEFT's LoRA in float32 on the same"
    " weights, draws and adapter; eager_error is that of diffusers and PEFT in the case's own precision",
    "peers": "diffusers' transformer with PEFT's own LoRA over the same weights, gradient checkpointing of every block,"
    " a timestep per token, AdamW; compiled: with compile_repeated_blocks(); peaks without what ours holds beside the"
    " weights",
    "ratios": "the peer's median / our median",
}


def begin(cases: Sequence[StepCase], hardware: Hardware, told: Told, stop: StopRequest) -> Bench:
    """Ready to measure steps.

    Raises:
        PlanError: a case's targets match nothing, or it asks for kernels that cannot run here.
    """
    for case in cases:
        match(case.targets, case.spec, case.trained, case.trained)
        plan_of(case, hardware)
    return Bench(lambda case: measure(case, hardware, told, stop), HOW)


def measure(case: StepCase, hardware: Hardware, told: Told, stop: StopRequest) -> StepResult:
    """Check the step, build the case's model, train it and say what it took. Too little memory is a result, no error.

    Args:
        told: takes lines about what goes on.
    """
    if reason := why_skipped(case, hardware):
        return _unmeasured(case, "skipped", reason)
    device, plan = torch_device(hardware.kind), plan_of(case, hardware)
    torch.compiler.reset()  # what is compiled is compiled for this case's shapes alone
    reset_peak(device)
    try:
        gates = _gates(case, plan, hardware, told, stop)
        if reason := quality.red(gates):
            return _unmeasured(case, "gate failed", reason, gates=tuple(gates))
        release_memory(device)
        reset_peak(device)
        return _measured(case, plan, hardware, told, stop, gates)
    except NonFiniteError as error:
        return _unmeasured(case, "not finite", error.what, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _unmeasured(case, "out of memory", str(error).splitlines()[0], device)
    finally:
        release_memory(device)


def why_skipped(case: TrainingCase, hardware: Hardware) -> str:
    """Why this machine does not even begin with the case, or ""."""
    at_full_size = hardware.kind == "cpu" and not case.spec.tiny
    return f"{case.model} at full size needs a GPU, and this machine has none" if at_full_size else ""


def _unmeasured(
    case: StepCase, outcome: Any, reason: str, device: torch.device | None = None, **found: Any
) -> StepResult:
    peak = peaks(device) if device else {}
    return StepResult(case.name, outcome, case.settings(), reason=reason, peak_bytes=peak, **found)


def _gates(case: StepCase, plan: Plan, hardware: Hardware, told: Told, stop: StopRequest) -> list[Gate]:
    """Quality: one step, then the overfit curve if that is right."""
    told(f"{case.name}: is one step right?")
    gates = quality.step_gates(case, plan, hardware)
    if not quality.red(gates) and case.overfit_steps:
        told(f"{case.name}: does it learn as diffusers with PEFT does, over {case.overfit_steps} steps?")
        gates += quality.overfit_gates(case, plan, hardware, stop)
    _leave_if_stopped(case, stop)
    return gates


def _leave_if_stopped(case: TrainingCase, stop: StopRequest) -> None:
    if stop.requested:
        raise Stopped(stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")


class Contender(Protocol):
    """Something that trains, a few steps at a time, and goes on where it stopped."""

    def run(self, steps: int) -> list[float]:
        """The seconds of each of the next so many steps."""
        ...


class Ours:
    """Our step: the trainer's own loop over one synthetic batch."""

    def __init__(self, case: TrainingCase, plan: Plan, device: torch.device, stop: StopRequest) -> None:
        self.plan, self.device, self.stop = plan, device, stop
        self.model = random_model(case.spec, device, torch_dtype(case.precision), case.trained)
        self.optimizer = make_trainable(plan, self.model, ignore)
        self.batch = synthetic_batch(case, self.model)
        judge_products(plan, self.model, lambda: self.batch, ignore)
        self.watch = StepWatch(device)
        self.losses: list[float] = []

    def run(self, steps: int) -> list[float]:
        start = len(self.losses)
        plan = dataclasses.replace(self.plan, steps=start + steps)
        self.losses += train_watched(plan, self.model, self.batch, self.optimizer, self.watch, self.stop, start)
        return self.watch.step_seconds[start:]


class Peer:
    """The stock step, eager or compiled, on one synthetic batch."""

    def __init__(self, name: str, step: StockStep, batch: Batch) -> None:
        self.step, self.batches = step, [batch] * step.plan.training.accumulate
        if name == COMPILED_PEER:
            step.compile_blocks()

    def run(self, steps: int) -> list[float]:
        seconds, _ = self.step.run(self.batches, on_device(self.step.device), range(steps))
        return seconds


def _measured(
    case: StepCase, plan: Plan, hardware: Hardware, told: Told, stop: StopRequest, gates: Sequence[Gate]
) -> StepResult:  # fmt: skip
    device = torch_device(hardware.kind)
    told(f"{case.name}: building {case.model} with random weights")
    reset_resident_peak()
    began = time.perf_counter()
    ours = Ours(case, plan, device, stop)
    synchronize(device)
    build_seconds, build_peak = time.perf_counter() - began, peaks(device)
    reset_resident_peak()
    told(f"{case.name}: {case.warmup_steps} + {case.steps} steps of {tokens_told(ours.batch)}")
    rounds = Rounds(case, ours, told)
    rounds.run()
    _leave_if_stopped(case, stop)
    return StepResult(
        name=case.name,
        outcome="measured",
        case=case.settings(),
        ratios=rounds.ratios(),
        parameters=sum(p.numel() for p in empty_transformer(case.spec).parameters()),
        trained_parameters=sum(p.numel() for p in ours.optimizer.parameters.values()),
        weights_bytes=sum(each.nbytes for each in resident_weights(ours.model.transformer)),
        tokens=tokens_of(ours.batch),
        build_seconds=build_seconds,
        build_peak_bytes=build_peak,
        step_seconds=tuple(rounds.seconds[OURS]),
        phase_seconds=medians([ours.watch.phase_seconds[number] for number in rounds.timed]),
        peak_bytes=rounds.peaks[OURS],
        model_flops=count_flops(case, plan),
        losses=tuple(ours.losses),
        launches=rounds.launches(OURS),
        gates=tuple(gates),
        peers={name: rounds.peer(name) for name in case.peers if name in rounds.contenders},
        unavailable=rounds.unavailable,
        kernels={choice.op: choice.implementation for choice in plan.kernels.choices},
    )


def nf4_step(case: TrainingCase, plan: Plan, device: torch.device) -> StockStep:
    """The stock step over bitsandbytes' NF4, with random weights of its own."""
    transformer = bitsandbytes_nf4(empty_transformer(case.spec), device, torch_dtype(case.precision))
    layers = match(case.targets, case.spec, case.trained, case.trained).layers
    return StockStep(transformer.requires_grad_(False), case.spec, layers, plan, device)


OURS = "ltxforge"


class Rounds:
    """Ours and the peers in turns: what each took, at its peak and in each timed step.

    Each is built, warmed up and run alone first, which is when its peak is read; then they alternate. A peer that does
    not fit into memory, or fails, is left out and told.

    Attributes:
        timed: which of our steps, counted from the first, were timed.
    """

    def __init__(self, case: StepCase, ours: Ours, told: Told) -> None:
        self.case, self.ours, self.told = case, ours, told
        self.contenders: dict[str, Contender] = {OURS: ours}
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self.unavailable: dict[str, str] = {}
        self.timed: list[int] = []
        count = min(ROUNDS, case.steps) if case.peers else 1
        self.shares = [case.steps // count + (turn < case.steps % count) for turn in range(count)]

    def run(self) -> None:
        """All rounds."""
        device = self.ours.device
        self._turn(OURS, self.case.warmup_steps, self.shares[0])
        self.peaks[OURS] = peaks(device)
        for name in self.case.peers:
            if not self.ours.stop.requested:
                self._first(name)
        for share in self.shares[1:]:
            for name in self.contenders:
                if not self.ours.stop.requested:
                    self._turn(name, 1, share)

    def _first(self, name: str) -> None:
        """Build a peer and let it take its first turn."""
        device = self.ours.device
        release_memory(device)
        self.told(f"{self.case.name}: building the peer {name}")
        held = allocated(device) - self._weights_on(device)
        reset_peak(device)
        try:
            ours = self.ours
            stock = (
                nf4_step(self.case, ours.plan, device)
                if name == NF4_PEER
                else quality.stock_of(ours.plan, ours.model, self.case.spec, ours.model.dtype)
            )
            self.contenders[name] = Peer(name, stock, ours.batch)
            self._turn(name, self.case.warmup_steps, self.shares[0])
        except (RuntimeError, MemoryError) as error:
            self.contenders.pop(name, None)
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            self.unavailable[name] = f"{what}: {(str(error).splitlines() or [''])[0]}"
        else:
            peak = peak_bytes(device)
            self.peaks[name] = {"allocated": peak - held} if peak else {}
        release_memory(device)

    def _weights_on(self, device: torch.device) -> int:
        return sum(
            each.nbytes for each in resident_weights(self.ours.model.transformer) if each.device.type == device.type
        )

    def _turn(self, name: str, untimed: int, timed: int) -> None:
        contender = self.contenders[name]
        contender.run(untimed)
        if name == OURS:
            first = len(self.ours.losses)
            self.timed += range(first, first + timed)
        self.seconds.setdefault(name, []).extend(contender.run(timed))

    def ratios(self) -> dict[str, float]:
        """How many times our median step each peer's takes."""
        median = statistics.median(self.seconds[OURS])
        return {name: statistics.median(self.seconds[name]) / median for name in self.contenders if name != OURS}

    def launches(self, name: str) -> int | None:
        """Kernels that one step starts; None where there is no GPU."""
        device = self.ours.device
        return timing.launches(lambda: self.contenders[name].run(1), device) if device.type == "cuda" else None

    def peer(self, name: str) -> PeerStep:
        """What a peer's steps took."""
        return PeerStep(tuple(self.seconds[name]), self.peaks[name], self.launches(name))


def resident_weights(transformer: nn.Module) -> list[Tensor]:
    """Frozen weights that are in their modules, quantised ones as they are stored; not what is streamed."""
    parameters = [p for name, p in transformer.named_parameters() if "lora_" not in name]
    return [*parameters, *transformer.buffers()]


def allocated(device: torch.device) -> int:
    """What tensors take on the device now; 0 where the device does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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
    training = dataclasses.replace(plan.training, compile=False)
    make_trainable(dataclasses.replace(plan, memory=MemoryPlan(), kernels=EAGER, training=training), model, ignore)
    batch = synthetic_batch(case, model)
    timesteps = torch.zeros(case.batch_size, 1, device=META)
    noisy = model_tokens(batch).map(lambda each: NoisyTokens(each.to(META, model.dtype), timesteps, timesteps[:, 0]))
    prompts = model.batch_prompts(batch.prompts, plan.conditioning.prompt_tokens)
    with FlopCounterMode(display=False) as counter:
        velocities = model.predict(Noisy(noisy, batch.shape, batch.fps), prompts)
        sums = [each.float().sum() for _, each in velocities.items()]
        sum(sums[1:], sums[0]).backward()
    return counter.get_total_flops() * case.accumulate
