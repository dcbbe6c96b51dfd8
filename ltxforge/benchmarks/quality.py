"""Whether a step is right, asked before how fast it is: against diffusers' and PEFT's own step, on the same draws.

Two questions. One step: loss and LoRA gradient against the stock step in float32 over the same weights, with as many of
the model's blocks as fit on the device beside ours. Many steps: the loss while one batch is overfitted, against the
stock step trained likewise; few blocks and a small clip, so that it takes seconds. A red answer reports no speed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltxforge import trainer
from ltxforge.benchmarks.step_peers import StockStep, as_ours, base_weights, stock_transformer
from ltxforge.benchmarks.step_watch import StepWatch, SyntheticData, train_watched
from ltxforge.benchmarks.synthetic import SEED, plan_of, synthetic_batch
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError
from ltxforge.events import ignore
from ltxforge.hardware import Hardware, torch_device, torch_dtype
from ltxforge.lora.inject import adapter_parameters, load_adapter
from ltxforge.models.interface import VideoModel
from ltxforge.models.parts import release_memory
from ltxforge.models.random_weights import empty_transformer, random_model
from ltxforge.optim import Optimizer
from ltxforge.plan import MemoryPlan, Plan
from ltxforge.randomness import address
from ltxforge.session import judge_products, make_trainable
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import ModelSpec
from ltxforge.suites.case import Gate
from ltxforge.suites.step import StepCase, TrainingCase

LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3, "int8": 5e-3, "int8-w8a8": 1e-2, "fp8": 1e-2, "nf4": 2e-2}
"""The largest relative error of the loss, by what the base is computed in."""
LEAST_COSINE = {"fp32": 1 - 1e-9, "bf16": 0.9999, "int8": 0.9995, "int8-w8a8": 0.999, "fp8": 0.999, "nf4": 0.99}
"""Between our LoRA gradient and the reference's."""
LARGEST_DEVIATION = 0.02
"""Of the overfit curve from the stock step's, in the means of windows."""
WINDOW = 20
LEARNED = 0.99
"""What is left of the loss at most when a whole curve ends: one that does not fall shows nothing."""
OVERFIT_STEPS, OVERFIT_BLOCKS, OVERFIT_SHAPE = 200, 2, ClipShape(64, 64, 9)
OVERFIT_RATE, OVERFIT_WIDTH = 1e-3, 128
"""The learning rate at this width, and less at larger ones, whose steps reach further."""
SHARE_OF_MEMORY = 0.4
"""Of the device's memory, for both models' weights; the rest is for activations and gradients."""
ADAPTED = 0.02
"""The width of B's values in the one step: at B = 0 half of all gradients are zero."""


@dataclass(frozen=True)
class Step:
    """One step's result: each modality's loss, and the adapter's gradients by name."""

    losses: Mapping[str, float]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How near a step is to the reference: relative errors of loss and whole gradient, and the cosine of the latter."""

    loss_error: float
    gradient_error: float
    cosine: float


NONE = Agreement(math.inf, math.inf, -1.0)


def agreement(found: Step, reference: Step) -> Agreement:
    """Compare in float64. What is not finite, or missing on one side, agrees with nothing."""
    if found.losses.keys() != reference.losses.keys() or found.gradients.keys() != reference.gradients.keys():
        return NONE
    if not all(map(math.isfinite, [*found.losses.values(), *reference.losses.values()])):
        return NONE
    loss = max(abs(found.losses[name] - value) / abs(value) for name, value in reference.losses.items())
    apart = product = own = other = 0.0
    for name, wanted in reference.gradients.items():
        a, b = found.gradients[name].double(), wanted.to(found.gradients[name].device).double()
        apart, product = apart + float((a - b).square().sum()), product + float((a * b).sum())
        own, other = own + float(a.square().sum()), other + float(b.square().sum())
    if not own or not other or not math.isfinite(apart):
        return NONE
    return Agreement(loss, (apart / other) ** 0.5, product / (own * other) ** 0.5)


def step_gates(case: TrainingCase, plan: Plan, hardware: Hardware) -> list[Gate]:
    """Loss and gradient of one step against the stock step in float32; the stock step in our precision beside them.

    Raises:
        NonFiniteError: the stock step itself gives no finite loss, so that there is nothing to compare with.
    """
    device, dtype = torch_device(hardware.kind), torch_dtype(case.precision)
    spec = with_blocks(case.spec, blocks_that_fit(case.spec, hardware))
    training, memory = dataclasses.replace(plan.training, accumulate=1), of_fewer_blocks(plan.memory, spec.blocks)
    plan = dataclasses.replace(plan, training=training, memory=memory)
    model, _ = trainable(plan, case, spec, device)
    batch = synthetic_batch(case, model)
    judge_products(plan, model, lambda: batch, ignore)
    load_adapter(model.transformer, adapted(model.transformer))
    ours = our_step(plan, model, batch)
    reference = stock_step(plan, model, spec, batch, torch.float32)
    if not all(map(math.isfinite, reference.losses.values())):
        raise NonFiniteError("the stock step's loss in float32 is NaN or infinite on these random weights")
    beside = agreement(stock_step(plan, model, spec, batch, dtype), reference) if dtype != torch.float32 else None
    del model
    release_memory(device)
    found = agreement(ours, reference)
    told = f"one step of {spec.blocks} of {case.spec.blocks} blocks against stock float32"
    kept = case.precision if case.base_precision == "bf16" else case.base_precision
    loss_bound, distance_bound = LOSS_BOUND[kept], 1 - LEAST_COSINE[kept]
    return [
        _gate(f"{told}: loss", found.loss_error, loss_bound, beside and beside.loss_error),
        _gate(f"{told}: 1 − cosine of the LoRA gradient", 1 - found.cosine, distance_bound,
              beside and 1 - beside.cosine),
    ]  # fmt: skip


def overfit_gates(case: StepCase, plan: Plan, hardware: Hardware, stop: StopRequest) -> list[Gate]:
    """The overfit curve against the stock step's, and that there was something to learn."""
    if not case.overfit_steps:
        return []
    curves = overfit(case, plan, hardware, stop)
    if stop.requested:
        return []
    told = f"{case.overfit_steps} steps of overfitting with {curves.blocks} blocks"
    gates = [_gate(f"{told}: deviation from the stock step's curve", curves.deviation, LARGEST_DEVIATION)]
    if case.overfit_steps >= OVERFIT_STEPS:
        gates.append(_gate(f"{told}: what is left of the loss", curves.left, LEARNED))
    return gates


def _gate(what: str, error: float, bound: float, beside: float | None = None) -> Gate:
    return Gate("ltxforge", what, error <= bound, error, bound, beside)  # NaN passes nothing


def red(gates: Iterable[Gate]) -> str:
    """What is wrong, in words; empty where nothing is."""
    return "; ".join(f"{gate.what} {gate.error:.2e}, at most {gate.bound:.2e}" for gate in gates if not gate.passed)


@dataclass(frozen=True)
class Curves:
    """Each step's loss of ours and of the stock step, on the same draws."""

    ours: Sequence[float]
    stock: Sequence[float]
    blocks: int

    @property
    def deviation(self) -> float:
        """The largest relative difference between the means of windows of `WINDOW` steps."""
        return max(abs(a - b) / b for a, b in zip(windows(self.ours), windows(self.stock), strict=True))

    @property
    def left(self) -> float:
        """The last window of the stock step's curve, as a share of the first."""
        means = windows(self.stock)
        return means[-1] / means[0]


def windows(losses: Sequence[float]) -> list[float]:
    """Means of `WINDOW` losses each; the last window may be shorter."""
    return [statistics.fmean(losses[first : first + WINDOW]) for first in range(0, len(losses), WINDOW)]


def overfit(case: StepCase, plan: Plan, hardware: Hardware, stop: StopRequest) -> Curves:
    """Train ours in the case's precision and the stock step in float32, from the same start on the same draws."""
    device, steps = torch_device(hardware.kind), case.overfit_steps
    spec = with_blocks(case.spec, min(case.spec.blocks, OVERFIT_BLOCKS))
    small = case.model_copy(update={"size": str(OVERFIT_SHAPE), "accumulate": 1})
    rate = OVERFIT_RATE * math.sqrt(OVERFIT_WIDTH / spec.width)
    plan = dataclasses.replace(
        plan_of(small, hardware), steps=steps, kernels=plan.kernels,
        memory=of_fewer_blocks(plan.memory, spec.blocks),
        optimizer=dataclasses.replace(plan.optimizer, learning_rate=rate),
    )  # fmt: skip
    model, optimizer = trainable(plan, small, spec, device)
    batch, start = synthetic_batch(small, model), copied(adapter_parameters(model.transformer))
    ours = train_watched(plan, model, batch, optimizer, StepWatch(device), stop)
    stock = stock_of(plan, model, spec, torch.float32)
    stock.take(start)
    _, theirs = stock.run([batch], as_ours(plan, device), range(1, len(ours) + 1))
    del model, optimizer, stock
    release_memory(device)
    return Curves(ours, theirs, spec.blocks)


def trainable(
    plan: Plan, case: TrainingCase, spec: ModelSpec, device: torch.device
) -> tuple[VideoModel, Optimizer]:  # fmt: skip
    """Our model of random weights with its adapter, as a run's."""
    model = random_model(spec, device, torch_dtype(case.precision), case.trained)
    return model, make_trainable(plan, model, ignore)


def our_step(plan: Plan, model: VideoModel, batch: Batch) -> Step:
    """The trainer's own step 1."""
    data = SyntheticData(plan, batch, StepWatch(model.device))
    loss = trainer.accumulate(plan, model, data, 1, StopRequest())
    assert loss is not None
    losses = {name: each.value for name, each in loss.streams.items()}
    return Step(losses, taken(adapter_parameters(model.transformer)))


def stock_step(plan: Plan, model: VideoModel, spec: ModelSpec, batch: Batch, dtype: torch.dtype) -> Step:
    """The stock step 1 over our model's weights and adapter, all of it in the dtype."""
    stock = stock_of(plan, model, spec, dtype)
    stock.take({name: value.detach().to(dtype) for name, value in adapter_parameters(model.transformer).items()})
    losses = stock.accumulate([batch], as_ours(plan, model.device), 1)
    found = Step(dict(losses.items()), taken(stock.adapter))
    del stock
    release_memory(model.device)
    return found


def stock_of(plan: Plan, model: VideoModel, spec: ModelSpec, dtype: torch.dtype) -> StockStep:
    """The stock step over our model's weights, on its device."""
    names = [name for name in adapter_parameters(model.transformer) if name.endswith(".lora_A.weight")]
    layers = [name.removesuffix(".lora_A.weight") for name in names]
    weights = base_weights(original(plan, model, spec).transformer)
    return StockStep(stock_transformer(spec, weights, model.device, dtype), spec, layers, plan, model.device)


def original(plan: Plan, model: VideoModel, spec: ModelSpec) -> VideoModel:
    """The model itself, or where its weights are quantised or elsewhere, another one with the weights as they were."""
    if plan.memory.base_precision == "bf16" and plan.memory.stream is None:
        return model
    whole = random_model(spec, model.device, model.dtype, model.modalities)
    whole.load_transformer()
    return whole


def taken(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, out of the parameters' hands."""
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of their own."""
    return {name: value.detach().clone() for name, value in parameters.items()}


def adapted(transformer: nn.Module) -> dict[str, Tensor]:
    """A as it is and B as if trained for a while."""
    found = copied(adapter_parameters(transformer))
    for name, value in found.items():
        if name.endswith(".lora_B.weight"):
            generator = torch.Generator().manual_seed(address(SEED, f"adapted/{name}"))
            value.copy_(torch.randn(value.shape, generator=generator) * ADAPTED)
    return found


def with_blocks(spec: ModelSpec, blocks: int) -> ModelSpec:
    """The same architecture with so many blocks."""
    return dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": blocks})


def of_fewer_blocks(memory: MemoryPlan, blocks: int) -> MemoryPlan:
    """The strategies of the blocks that are left."""
    stream = memory.stream
    if stream is not None:
        units = tuple(tuple(number for number in unit if number < blocks) for unit in stream.units)
        left = tuple(unit for unit in units if unit)
        stream = dataclasses.replace(stream, units=left) if left else None
    again = tuple(number for number in memory.checkpointed if number < blocks)
    return dataclasses.replace(memory, checkpointed=again, stream=stream)


def blocks_that_fit(spec: ModelSpec, hardware: Hardware) -> int:
    """How many blocks the model may have to be held in our precision and in float32, at least one."""
    if not hardware.memory_bytes:
        return spec.blocks
    block = empty_transformer(with_blocks(spec, 1)).transformer_blocks[0]
    bytes_of_both = sum(parameter.numel() for parameter in block.parameters()) * (4 + 4)
    return max(1, min(spec.blocks, int(SHARE_OF_MEMORY * hardware.memory_bytes / bytes_of_both)))
