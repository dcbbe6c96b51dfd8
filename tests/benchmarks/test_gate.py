"""The gate turns red on planted faults, and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ltxforge.benchmarks.gate import gates_of, told
from ltxforge.benchmarks.subject import Bounds, Contender, Subject, Work

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Numbers:
    x: Tensor


def right(given: Numbers) -> Tensor:
    return given.x.sin()


def subject(ours: object, dtype: torch.dtype = torch.float32, **changes: object) -> Subject:
    """sin x, whose compiled implementation is `ours`."""
    made = Subject(
        inputs=lambda fill: Numbers(fill.normal(64, 32, dtype=dtype)),
        ours=lambda name: Contender(right if name == "eager" else ours),
        work=Work(1),
        leaves=("x",),
    )
    return replace(made, **changes)


def passed(made: Subject, gradients: bool = True) -> dict[str, bool]:
    gates, _ = gates_of(made, ["compile", "eager"], CPU, gradients)
    return {f"{gate.implementation}: {gate.what}": gate.passed for gate in gates}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_is_green_with_every_gradient(dtype):
    assert passed(subject(right, dtype)) == {
        "compile: output 0": True, "compile: gradient of x": True,
        "eager: output 0": True, "eager: gradient of x": True,
    }  # fmt: skip
    assert passed(subject(right, dtype), gradients=False) == {"compile: output 0": True, "eager: output 0": True}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0].cos() * 1.001


FAULTS = {
    "a thousandth": (lambda given: given.x.sin() * 1.001, "output 0"),
    "one value": (lambda given: given.x.sin() + torch.eye(64, 32) * (torch.arange(64) == 5)[:, None], "output 0"),
    "nan": (lambda given: torch.where(given.x > 3, torch.nan, given.x.sin()), "output 0"),
    "the gradient": (lambda given: WrongGradient.apply(given.x), "gradient of x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_red(fault):
    ours, what = FAULTS[fault]
    found = passed(subject(ours))
    assert next(name for name, green in found.items() if not green) == f"compile: {what}"
    assert found["eager: output 0"] and found["eager: gradient of x"]


def test_ours_may_not_be_worse_than_eager_by_more_than_a_tenth():
    """Within its bound, and still red: triton, where eager is much better."""
    worse = subject(lambda given: given.x.sin() * (1 + 8e-7))
    gates, _ = gates_of(worse, ["triton"], CPU, False)
    assert gates[0].error < gates[0].bound and not gates[0].passed and "eager" in told(gates[0])
    loose = replace(worse, bounds=Bounds(beside_eager=False))
    assert gates_of(loose, ["triton"], CPU, False)[0][0].passed


def test_promised_bits_are_held_to_the_bit():
    exact = Bounds(exact=True)
    one_bit = lambda given: torch.nextafter(given.x.sin(), torch.tensor(9.0))  # noqa: E731
    for ours, green in ((right, True), (one_bit, False)):
        gates, _ = gates_of(subject(ours, bounds=exact), ["triton"], CPU, False)
        assert gates[0].passed is green and "bits" in gates[0].what


def test_a_peer_is_held_against_the_same_truth():
    _, check = gates_of(subject(right), ["eager"], CPU, False)
    assert check("rough", Contender(lambda given: given.x.sin() * 1.01)).passed
    red = check("something else", Contender(lambda given: given.x.cos()))
    assert not red.passed and "something else" in told(red)
    assert check("a part", Contender(lambda given: given.x, is_whole=False)).passed
