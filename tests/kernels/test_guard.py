"""The guard's verdicts: Gaussian layers are quantised, layers with outliers are not, and figures are those expected."""

from __future__ import annotations

import math

import pytest
import torch
from ltxforge_kernels import fp8, int8
from ltxforge_kernels.guard import Verdict, judge_int8_weight, judge_product, judge_weight
from ltxforge_kernels.precision import FLOORS, sqnr
from torch.nn.functional import linear

WIDTH = 1024


def layer(seed: int = 0, outliers: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [T, K] and a weight [N, K], Gaussian; 0.5 % of the channels of x are `outliers` times larger."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, WIDTH, generator=generator) for rows in (64, 128))
    x[:, torch.randperm(WIDTH, generator=generator)[: round(0.005 * WIDTH)]] *= outliers
    return x, weight / WIDTH**0.5


@pytest.mark.parametrize(("format", "least", "most"), [("w8a8", 37, 41), ("fp8", 28, 30)])
def test_gaussian_layers_are_quantised(format, least, most):
    x, weight = layer()
    verdict = judge_product("ff", format, weight, [x])
    assert verdict.quantised and least < verdict.sqnr < most


def test_outliers_break_w8a8_and_not_fp8():
    x, weight = layer(outliers=20)
    spoiled, kept = (judge_product("ff", format, weight, [x]) for format in ("w8a8", "fp8"))
    assert not spoiled.quantised and 20 < spoiled.sqnr < 28
    assert kept.quantised
    assert str(spoiled).startswith("ff: stays bf16, 2") and str(spoiled).endswith("dB of w8a8 (floor 35 dB)")
    assert str(kept).startswith("ff: fp8, 2")


def test_the_worst_sample_counts():
    (plain, weight), (spoiled, _) = layer(), layer(1, outliers=20)
    both = judge_product("ff", "w8a8", weight, [plain, spoiled, plain])
    assert both == judge_product("ff", "w8a8", weight, [spoiled])


def test_it_measures_what_the_ops_compute():
    """In float64 from outside: the op's product against the plain one."""
    x, weight = layer()
    for format, product in (
        ("w8a8", lambda: int8.w8a8_lora_linear(x, int8.quantise(weight), implementation="eager")),
        ("fp8", lambda: fp8.fp8_linear(x, fp8.quantise(weight), implementation="eager")),
    ):
        expected = sqnr(linear(x.double(), weight.double()), product().double())
        # Leading dimensions and bf16 do not change what is measured.
        given = judge_product("ff", format, weight, [x.reshape(4, 16, WIDTH)])
        assert given.sqnr == pytest.approx(expected, abs=1e-3)


def test_weights_alone():
    _, weight = layer()
    exact = judge_weight("attn", "nf4", weight, weight)
    assert exact.quantised and exact.sqnr == math.inf
    # Eight in a hundred of the weight's size is NF4's own noise; fifteen is too much.
    for noise, expected in ((0.08, True), (0.15, False)):
        noisy = weight + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
        assert judge_weight("attn", "nf4", weight, noisy).quantised is expected


def test_int8_weights_alone():
    _, weight = layer()
    fitting = judge_int8_weight("attn", weight)
    assert fitting.quantised and fitting.sqnr == pytest.approx(41.2, abs=1)
    weight[:, :5] *= 20
    spoiled = judge_int8_weight("attn", weight)
    assert not spoiled.quantised and spoiled.floor == FLOORS["w8a8"]


def test_nan_keeps_bf16():
    x, weight = layer()
    poisoned = x.clone()
    poisoned[3, 5] = torch.nan
    for samples in ([poisoned], [x, poisoned], [poisoned, x]):
        verdict = judge_product("ff", "w8a8", weight, samples)
        assert math.isnan(verdict.sqnr) and not verdict.quantised
    assert not Verdict("ff", "fp8", -math.inf, 27).quantised


def test_what_cannot_be_judged_is_refused():
    x, weight = layer()
    with pytest.raises(ValueError, match="nf4 quantises no activations; those that do: w8a8, fp8"):
        judge_product("ff", "nf4", weight, [x])
    with pytest.raises(ValueError, match="no sample"):
        judge_product("ff", "w8a8", weight, [])
