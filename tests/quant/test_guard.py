"""Layers whose activations have outliers multiply with whole activations: found on a real batch, kept over a resume."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ltxforge_kernels import fp8
from ltxforge_kernels.precision import sqnr
from one_block import make_batch, plan_for
from quantised_block import STEP, adapted_model, bare_model
from torch import nn

from ltxforge import trainer
from ltxforge.plan import Plan
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.guard import (
    TOKENS,
    ActivationVerdict,
    judge_activations,
    product_left,
    use_weight_only,
    weight_only,
)
from ltxforge.quant.linear import IN_8_BITS, STORED, QuantisedLinear
from ltxforge.session import judge_products

IN_8 = ("int8-w8a8", "fp8")
WIDTH = 256


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(format: str, seed: int = 0) -> QuantisedLinear:
    return QuantisedLinear.quantise(drawn(WIDTH, WIDTH, seed=seed) / WIDTH**0.5, drawn(WIDTH, seed=9), format)


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """One channel of 128 that is a hundred times larger, as transformers' residual streams have."""
    return x * torch.where(torch.arange(x.shape[-1]) % 128 == 5, 100.0, 1.0)


class TwoLayers(nn.Module):
    """One layer sees Gaussian tokens, the other one outliers."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.calm, self.wild, self.unused = (layer_of(format, seed) for seed in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calm(x) + self.wild(with_outliers(x))


def test_w8a8_spares_the_layer_with_outliers_and_no_other():
    model, x = TwoLayers("int8-w8a8"), drawn(2, 50, WIDTH, seed=1)
    verdicts = judge_activations(model, lambda: model(x))
    assert [(each.layer, each.quantised) for each in verdicts] == [("calm", True), ("wild", False)]
    assert [model.calm.product, model.wild.product, model.unused.product] == [IN_8_BITS, STORED, IN_8_BITS]
    assert weight_only(model) == {"wild"}
    calm, wild = verdicts
    assert calm.sqnr >= calm.floor == FORMATS["int8-w8a8"].floor > wild.sqnr
    assert str(wild) == (
        f"wild: keeps its activations whole, {wild.sqnr:.1f} dB of int8-w8a8 (floor 35 dB), "
        f"{wild.differing:.1f} dB of what differs between tokens (floor 20 dB)"
    )
    assert str(calm).startswith("calm: multiplies in 8 bits, ")
    exact = with_outliers(x) @ model.wild.dequantised().T + model.wild.bias
    torch.testing.assert_close(model.wild(with_outliers(x)), exact, rtol=1e-4, atol=1e-4)


def test_fp8_keeps_its_digits_under_outliers():
    model, x = TwoLayers("fp8"), drawn(2, 50, WIDTH, seed=1)
    assert all(each.quantised for each in judge_activations(model, lambda: model(x)))
    assert weight_only(model) == frozenset()


@pytest.mark.parametrize("format", IN_8)
def test_what_is_measured_is_the_product_s_own_noise(format):
    layer, x = layer_of(format), drawn(TOKENS, WIDTH, seed=1)
    exact = x.double() @ layer.dequantised(torch.float64).T
    noise = (layer(x) - layer.bias - exact).norm()
    truths = (20 * math.log10(part.norm() / noise) for part in (exact, exact - exact.mean(dim=0)))
    assert product_left(layer, x) == pytest.approx(tuple(truths), abs=0.01)
    alone = sqnr(exact[:1], layer(x[:1]) - layer.bias)
    assert product_left(layer, x[:1]) == pytest.approx((alone, alone), abs=0.01)


def test_a_channel_that_is_large_in_every_token_hides_nothing():
    """It rounds all others to 0, and is itself what the product is made of."""
    model, x = TwoLayers("int8-w8a8"), drawn(TOKENS, WIDTH, seed=1)
    x[:, 3] = 3000.0
    (verdict,) = judge_activations(model, lambda: model.calm(x))
    assert verdict.sqnr > verdict.floor and verdict.differing < 1
    assert not verdict.quantised and weight_only(model) == {"calm"}


def test_of_many_tokens_evenly_spaced_ones_are_looked_at():
    layer, x = layer_of("int8-w8a8"), drawn(1, 8 * TOKENS, WIDTH, seed=1)
    assert product_left(layer, x) == product_left(layer, x[:, ::8])


def test_the_worst_of_several_passes_counts_and_nan_is_none():
    model, x = TwoLayers("int8-w8a8"), drawn(50, WIDTH, seed=1)
    judge_activations(model, lambda: (model.calm(x), model.calm(with_outliers(x)), model.calm(x)))
    assert weight_only(model) == {"calm"}
    model = TwoLayers("int8-w8a8")
    (verdict,) = judge_activations(model, lambda: model.calm(torch.full_like(x, torch.nan)))
    assert not verdict.quantised and weight_only(model) == {"calm"}


def test_a_failed_pass_leaves_the_layers_as_they_were():
    model = TwoLayers("int8-w8a8")
    with pytest.raises(ZeroDivisionError):
        judge_activations(model, lambda: 1 / 0)
    assert weight_only(model) == frozenset() and not model.calm._forward_pre_hooks


def test_formats_that_keep_activations_whole_have_nothing_to_judge():
    model, x = TwoLayers("int8"), drawn(50, WIDTH, seed=1)
    assert judge_activations(model, lambda: model(x)) == [] and weight_only(model) == frozenset()


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2.3"])
def test_a_model_under_its_adapter_is_judged_and_restored_by_name(base, plan_maker):
    """Every layer that the step computes, by the name it has without an adapter; a resume needs no second pass."""
    plan = plan_for(base, plan_maker)
    verdicts, found = judged(base, plan)
    again = bare_model(base, "int8-w8a8", False).transformer
    names = {name for name, module in again.named_modules() if isinstance(module, QuantisedLinear)}
    assert {each.layer for each in verdicts} == names
    assert "transformer_blocks.0.ff.net.2" in found and len(found) < len(names)
    assert judged(base, plan) == (verdicts, found)
    use_weight_only(again, sorted(found))  # as a checkpoint's facts have them
    assert weight_only(again) == found
    use_weight_only(again, ())
    assert weight_only(again) == frozenset()


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_run_says_what_its_device_does_with_fp8(multiplies, plan_maker, monkeypatch):
    """A CPU follows the definition in 8 bits; a card without units makes weights whole, and nothing is to be judged."""
    base, told = "tiny/ltx-video", []
    plan = plan_for(base, plan_maker)
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, base_precision="fp8"))
    model = adapted_model(base, plan, "fp8")
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _device: multiplies)
    assert judge_products(plan, model, lambda: make_batch(base), told.append) is multiplies
    (note,) = told
    assert ("layers multiply in 8 bits" in note.text) is multiplies
    assert ("makes weights in fp8 whole for each product" in note.text) is not multiplies


def judged(base: str, plan: Plan) -> tuple[list[ActivationVerdict], frozenset[str]]:
    """A model with an outlier in what its second feed-forward layer sees, by a step of its own."""
    model = adapted_model(base, plan, "int8-w8a8")
    with torch.no_grad():
        model.transformer.transformer_blocks[0].ff.net[0].proj.base_layer.bias[3] = 3000.0
    verdicts = judge_activations(model.transformer, lambda: trainer.forward(plan, model, make_batch(base), STEP, 0))
    return verdicts, weight_only(model.transformer)
