"""Quality before speed: gates are green for ours in both precisions, and red for faults that only they could see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ltxforge_kernels.choice import everything

from ltxforge.benchmarks import quality
from ltxforge.benchmarks.quality import Curves, Step, agreement, blocks_that_fit, overfit_gates, red, step_gates
from ltxforge.benchmarks.step_peers import base_weights
from ltxforge.benchmarks.synthetic import plan_of
from ltxforge.dataset.batches import Batch
from ltxforge.hardware import detect
from ltxforge.models.interface import VideoModel
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS
from ltxforge.suites.case import Gate
from ltxforge.suites.step import StepCase

CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", memory_bytes=0)


def case_of(base: str = "tiny/ltx-video", **changes: object) -> tuple[StepCase, Plan]:
    settings = {"size": "64x64x9", "precision": "fp32", "rank": 4, "overfit_steps": 20}
    case = StepCase(name="a", model=base, **{**settings, **changes})
    return case, plan_of(case, CPU_HARDWARE)


def gates_of(base: str = "tiny/ltx-video", **changes: object) -> list[Gate]:
    return step_gates(*case_of(base, **changes), CPU_HARDWARE)


@pytest.mark.parametrize(
    ("base", "modalities"),
    [("tiny/ltx-video", None), ("tiny/ltx2.3", None), ("tiny/ltx2.5", "video"), ("tiny/ltx2", "audio")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_step_passes(base, modalities, precision):
    loss, gradient = gates_of(base, modalities=modalities, precision=precision)
    assert red([loss, gradient]) == ""
    if precision == "bf16":
        assert 0 < gradient.error <= 1e-4 and gradient.bound == pytest.approx(1e-4)
        assert gradient.eager_error is not None and gradient.eager_error > 0, "stock bf16 is no better by nature"
    else:
        assert loss.error <= 1e-5 and gradient.error <= 1e-9 and gradient.eager_error is None


def test_every_op_by_eager_s_definition_passes():
    case, plan = case_of("tiny/ltx2")
    assert red(step_gates(case, dataclasses.replace(plan, kernels=everything("eager")), CPU_HARDWARE)) == ""


IN_THE_INTERPRETER = pytest.mark.skipif(
    not (CPU_HARDWARE.interpreted and CPU_HARDWARE.triton), reason="kernels on a CPU want Triton and TRITON_INTERPRET=1"
)


@IN_THE_INTERPRETER
@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2"])
def test_every_kernel_of_ours_passes(base, monkeypatch):
    """Both ways through one block, in Triton's interpreter."""
    monkeypatch.setattr(quality, "blocks_that_fit", lambda _spec, _hardware: 1)
    case, plan = case_of(base, checkpointing=0)
    gates = step_gates(case, dataclasses.replace(plan, kernels=everything("triton")), CPU_HARDWARE)
    assert red(gates) == "" and gates[1].error > 0, "other kernels round otherwise"


@IN_THE_INTERPRETER
@pytest.mark.sweep
def test_kernels_of_ours_follow_the_stock_step_s_curve():
    case, plan = case_of(overfit_steps=2, checkpointing=0)
    plan = dataclasses.replace(plan, kernels=everything("triton"))
    (gate,) = overfit_gates(case, plan, CPU_HARDWARE, StopRequest())
    assert gate.passed and gate.error <= 1e-5


def test_a_wrong_gradient_alone_turns_the_gate_red(monkeypatch):
    """The loss is right to the last bit: one layer's A learns at half the speed."""
    whole = quality.our_step

    def halved(*arguments: object) -> Step:
        step = whole(*arguments)
        name = next(name for name in step.gradients if "attn1.to_q.lora_A" in name)
        return Step(step.losses, {**step.gradients, name: step.gradients[name] / 2})

    monkeypatch.setattr(quality, "our_step", halved)
    loss, gradient = gates_of(precision="bf16")
    assert loss.passed and not gradient.passed and "cosine" in red([loss, gradient])


def test_weights_rounded_to_seven_bits_are_not_bf16(monkeypatch):
    """A quantised base has a bound of its own; unasked for, it is a fault. The stock step has the true weights."""
    whole = quality.our_step

    def on_rounded_weights(plan: Plan, model: VideoModel, batch: Batch) -> Step:
        true = {name: value.clone() for name, value in base_weights(model.transformer).items()}
        for value in base_weights(model.transformer).values():
            unit = value.abs().amax() / 63
            value.copy_((value / unit).round() * unit)
        step = whole(plan, model, batch)
        for name, value in base_weights(model.transformer).items():
            value.copy_(true[name])
        return step

    monkeypatch.setattr(quality, "our_step", on_rounded_weights)
    _, gradient = gates_of(precision="bf16")
    assert not gradient.passed and gradient.eager_error <= gradient.bound


def test_the_overfit_curve_follows_the_stock_step_s():
    case, plan = case_of("tiny/ltx2", precision="bf16")
    (gate,) = overfit_gates(case, plan, CPU_HARDWARE, StopRequest())
    assert gate.passed and 0 < gate.error < 0.005, "bf16 against float32: near, and not the same"


def test_an_update_that_is_too_large_leaves_the_curve(monkeypatch):
    """Loss and gradient of the first step are right."""
    step = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, rate: step(self, 4 * rate))
    case, plan = case_of(overfit_steps=60)
    (gate,) = overfit_gates(case, plan, CPU_HARDWARE, StopRequest())
    assert not gate.passed and gate.error > gate.bound == 0.02
    assert red(step_gates(case, plan, CPU_HARDWARE)) == ""


@pytest.mark.sweep
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2.3"])
def test_two_hundred_steps_follow_the_stock_step_s_and_learn(base, precision, record_property):
    case, plan = case_of(base, precision=precision, overfit_steps=200)
    curve, left = overfit_gates(case, plan, CPU_HARDWARE, StopRequest())
    record_property("count", f"overfit {base} {precision}: deviation {curve.error:.1e}, loss left {left.error:.2f}")
    assert curve.passed and left.passed


def test_agreement_is_with_nothing_that_is_missing_or_not_finite():
    one = Step({"video": 2.0}, {"a": torch.tensor([3.0, 4.0])})
    same = agreement(one, one)
    assert (same.loss_error, same.gradient_error, same.cosine) == (0, 0, 1)
    turned = agreement(Step({"video": 1.0}, {"a": torch.tensor([-4.0, 3.0])}), one)
    assert turned.loss_error == 0.5 and turned.cosine == 0 and turned.gradient_error == pytest.approx(math.sqrt(2))
    for broken in (
        Step({"video": math.nan}, one.gradients),
        Step({"video": 2.0}, {}),
        Step({"video": 2.0, "audio": 1.0}, one.gradients),
        Step({"video": 2.0}, {"a": torch.tensor([math.nan, 4.0])}),
        Step({"video": 2.0}, {"a": torch.zeros(2)}),
    ):
        assert agreement(broken, one) == quality.NONE


def test_a_curve_is_compared_in_windows():
    assert Curves([1.0] * 20 + [1.1] * 20, [1.0] * 40, 2).deviation == pytest.approx(0.1)
    assert Curves([2.0, 0.0] * 20, [1.0] * 40, 2).deviation == 0
    assert Curves([], [1.0] * 20 + [0.25] * 10, 2).left == 0.25


def test_as_many_blocks_as_fit_beside_their_float32_twins():
    """At 8 bytes a number: 2B whole on 80 GiB, of 19B a part, and at least one everywhere."""

    def blocks(version: str, gib: float) -> int:
        hardware = dataclasses.replace(CPU_HARDWARE, kind="cuda", memory_bytes=int(gib * 2**30))
        return blocks_that_fit(SPECS[version], hardware)

    assert blocks("0.9.5", 80) == 28 and blocks("0.9.5", 8) < 28
    assert 10 <= blocks("2.0-dev", 139) < 48
    assert blocks("2.0-dev", 1) == 1
