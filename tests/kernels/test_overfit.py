"""Two hundred steps of overfitting with our kernels, interpreted, and with compiled references: the stock curve."""

from __future__ import annotations

import dataclasses

import pytest
from ltxforge_kernels.choice import everything

from ltxforge.benchmarks import quality
from ltxforge.benchmarks.synthetic import plan_of
from ltxforge.hardware import detect
from ltxforge.signals import StopRequest
from ltxforge.suites.step import StepCase

pytestmark = pytest.mark.sweep

# Of the loss in means of windows, from diffusers' and PEFT's own float32 step. Sums in another order grow with the
# steps; bf16 rounds every activation.
BOUNDS = {"fp32": 1e-3, "bf16": quality.LARGEST_DEVIATION}
RUNS = [("tiny/ltx-video", "triton", "fp32"), ("tiny/ltx-video", "triton", "bf16"),
        ("tiny/ltx-video", "compile", "fp32"), ("tiny/ltx2", "triton", "fp32")]  # fmt: skip


@pytest.mark.parametrize(("base", "implementation", "precision"), RUNS)
def test_two_hundred_steps_follow_the_stock_curve(base, implementation, precision, record_property):
    case = StepCase(name="overfit", model=base, size="64x64x9", precision=precision, rank=8)
    hardware = detect()
    plan = dataclasses.replace(plan_of(case, hardware), kernels=everything(implementation))
    curves = quality.overfit(case, plan, hardware, StopRequest())
    assert len(curves.ours) == quality.OVERFIT_STEPS
    assert curves.left <= quality.LEARNED, "nothing was learnt, so nothing is shown"
    assert curves.deviation <= BOUNDS[precision]
    told = f"{implementation} on {base} in {precision}: at most {curves.deviation:.1e} from the stock curve"
    record_property("count", told)
