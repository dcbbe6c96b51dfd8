"""Two hundred steps of overfitting with our kernels, interpreted or on a GPU, and compiled: the eager curve."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from ltxforge_kernels.choice import EAGER, Kernels, everything
from one_block import make_batch, make_model, plan_for

from ltxforge import trainer
from ltxforge.benchmarks.quality import windows
from ltxforge.dataset.batches import Batch
from ltxforge.events import Event, StepDone
from ltxforge.lora.inject import adapter_parameters
from ltxforge.modalities import Streams
from ltxforge.optim import Optimizer
from ltxforge.plan import OptimizerPlan, Plan
from ltxforge.signals import StopRequest

pytestmark = pytest.mark.sweep

STEPS = 200
# Of means of twenty losses: sums in another order drift apart over the steps; bf16 rounds every activation.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
RUNS = [
    ("tiny/ltx-video", "triton", torch.float32),
    ("tiny/ltx-video", "triton", torch.bfloat16),
    ("tiny/ltx-video", "compile", torch.float32),
    ("tiny/ltx2.3", "compile", torch.float32),
]


class OneBatch:
    """The same samples in every step, with noise of its own; see `trainer.StepData`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def load(self, step: int, micro: int) -> Batch:
        return self.batch

    def count_at(self, step: int) -> Streams[int]:
        return self.batch.latents.map(len)

    def epoch_at(self, step: int) -> float:
        return float(step)


def losses(base: str, plan: Plan, kernels: Kernels, dtype: torch.dtype) -> list[float]:
    """The main modality's, of each step."""
    model, found = make_model(base, plan, kernels, dtype), []
    optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            found.append(event.loss)

    trainer.train(plan, model, OneBatch(make_batch(base)), optimizer, 0, emit, StopRequest(), lambda _step: None)
    return found


@pytest.mark.parametrize(("base", "implementation", "dtype"), RUNS)
def test_two_hundred_steps_follow_the_eager_curve(base, implementation, dtype, plan_maker, record_property):
    rates = OptimizerPlan("adamw", 1e-3, (0.9, 0.999), 1e-8, 0.0, "constant", 0, STEPS, 0.0, 2.0)
    plan = dataclasses.replace(plan_for(base, plan_maker), steps=STEPS, optimizer=rates)
    truth = windows(losses(base, plan, EAGER, torch.float32))
    found = windows(losses(base, plan, everything(implementation), dtype))
    assert statistics.fmean(truth[-3:]) < 0.9 * truth[0], "nothing was learnt, so nothing is shown"
    worst = max(abs(one - other) / other for one, other in zip(found, truth, strict=True))
    assert worst <= BOUNDS[dtype]
    record_property("count", f"{STEPS} steps of {base} in {dtype} by {implementation}: at most {worst:.1e} off eager")
