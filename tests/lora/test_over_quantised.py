"""A LoRA over a base that is quantised, or not there: PEFT's own numbers, and A and B where the run wants them."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from closeness import relative_error
from ltxforge_kernels.choice import EAGER, Kernels, everything
from one_block import make_batch, plan_for
from peft import LoraConfig, inject_adapter_in_model
from quantised_block import BASES, KEPT, STEP, adapted_model, add_lora, bare_model, step
from torch import Tensor, nn

from ltxforge import trainer
from ltxforge.lora.inject import ADAPTER, adapter_parameters, inject
from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import Match
from ltxforge.plan import LoraPlan
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.linear import QuantisedLinear

LORA = LoraPlan(4, 6.0, 0.0, False, ("all",), "fp32")


def made_whole(transformer: nn.Module) -> nn.Module:
    """The same module over plain layers that hold the very weights that are stored."""
    whole = copy.deepcopy(transformer)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, QuantisedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.weight, plain.bias = nn.Parameter(layer.dequantised()), layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(parent), leaf, plain)
    return whole.requires_grad_(False)


def with_peft(transformer: nn.Module, ours: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """PEFT's own LoRA over a module, with our A and B in it; its parameters by our names."""
    targets = "|".join(re.escape(name.removesuffix(".lora_A.weight")) for name in ours if "lora_A" in name)
    inject_adapter_in_model(LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets), transformer)
    found = {name: transformer.get_submodule(name.removesuffix(".weight"))[ADAPTER].weight for name in ours}
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(ours[name])
    return found


@pytest.mark.parametrize(("format", "double"), KEPT)
@pytest.mark.parametrize("base", BASES)
def test_a_step_is_peft_s_over_the_weights_made_whole(base, format, double, plan_maker):
    """Losses and every gradient; where activations are quantised, within the format's bound."""
    plan = plan_for(base, plan_maker)
    model, theirs = bare_model(base, format, double), bare_model(base, "bf16", False)
    whole = made_whole(model.transformer)
    add_lora(model.transformer, base, plan)
    losses, gradients = step(model, base, plan)
    theirs._transformer = whole
    parameters = with_peft(whole, adapter_parameters(model.transformer))
    true_losses = torch.cat(
        [each.by_sample for _, each in trainer.forward(plan, theirs, make_batch(base), STEP, 0).items()]
    )
    truths = dict(zip(parameters, torch.autograd.grad(true_losses.sum(), list(parameters.values())), strict=True))
    kind = FORMATS[format]
    if kind.quantises_activations:
        assert ((losses - true_losses).abs() / true_losses).max() <= kind.loss_error
        one, other = (torch.cat([each.flatten() for each in found.values()]) for found in (gradients, truths))
        assert torch.nn.functional.cosine_similarity(one, other, 0) >= kind.gradient_cosine
    else:
        assert relative_error(losses, true_losses) <= 1e-6
        for name, truth in truths.items():
            assert truth.norm() > 0 and relative_error(gradients[name], truth) <= 1e-4, name


def layer_of(base: nn.Module, device: str | None = None, kernels: Kernels = EAGER, **lora: float) -> LoraLinear:
    """A LoRA that is not zero on a single layer."""
    model = nn.ModuleDict({"one": base})
    matched = Match({"one": (base.in_features, base.out_features)}, {"one": 1}, {})
    inject(
        model, dataclasses.replace(LORA, **lora), matched, 1, kernels, None if device is None else torch.device(device)
    )
    layer = model["one"]
    if device != "meta":
        with torch.no_grad():
            layer.lora_B[ADAPTER].weight.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def quantised(format: str = "nf4", bias: bool = True) -> QuantisedLinear:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=draw) / 8
    return QuantisedLinear.quantise(weight, torch.randn(96, generator=draw) if bias else None, format)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_switched_off_it_is_the_base_alone(format):
    base = quantised(format)
    layer, x = layer_of(base), torch.randn(3, 64)
    truth, activated = base(x), base(F.gelu(x, approximate="tanh"))
    assert not torch.equal(layer(x), truth)
    layer.enable_adapters(enabled=False)
    assert torch.equal(layer(x), truth) and torch.equal(layer(x, activation="gelu"), activated)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_gelu_stands_before_the_product_and_the_branch(format):
    layer, x = layer_of(quantised(format)), torch.randn(3, 64, requires_grad=True)
    found, truth = layer(x, activation="gelu"), layer(F.gelu(x, approximate="tanh"))
    assert torch.equal(found, truth)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, truth)))


def test_dropout_draws_as_over_a_plain_base():
    """The same numbers are dropped, whatever the base is kept in."""
    base = quantised("int8")
    plain = made_whole(nn.ModuleDict({"one": base}))["one"]
    found = []
    for layer in (layer_of(base, dropout=0.5), layer_of(plain, dropout=0.5)):
        torch.manual_seed(3)
        found.append(layer.train()(torch.ones(5, 64)))
    assert relative_error(*found) <= 1e-6
    assert not torch.equal(found[0], layer_of(base, dropout=0.0)(torch.ones(5, 64)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_and_b_are_the_same_over_every_base_and_wherever_it_is(bias):
    """Quantised, parked, without a bias; PEFT finds a weight to look at and none of it stays."""
    plain = layer_of(nn.Linear(64, 96, bias=bias))
    bare, parked, absent = quantised(bias=bias), quantised(bias=bias), nn.Linear(64, 96, bias=bias)
    parked.park()
    absent.weight = None
    for base in (bare, parked, absent):
        layer = layer_of(base, "cpu")
        for name, one in plain.lora_A[ADAPTER].named_parameters():
            assert torch.equal(one, layer.lora_A[ADAPTER].get_parameter(name)) and one.requires_grad
        assert layer.lora_B[ADAPTER].weight.shape == (96, 4) and layer.base_layer is base
        assert getattr(base, "weight", None) is None and ("weight" in base._parameters) is (base is absent)
        assert not any(each.requires_grad for each in base.parameters())


def test_a_and_b_lie_where_the_run_wants_them():
    """Not where a parked base waits."""
    layer = layer_of(quantised(), "meta")
    assert {each.device.type for each in (*layer.lora_A.parameters(), *layer.lora_B.parameters())} == {"meta"}
    assert layer.base_layer.packed.device.type == "cpu"


def test_only_a_resident_16_bit_weight_is_stored_with_b_behind_it():
    kernels = everything("triton")
    resident, absent = nn.Linear(64, 96, dtype=torch.bfloat16), nn.Linear(64, 96, dtype=torch.bfloat16)
    absent.weight = None
    assert layer_of(resident, "cpu", kernels).augmented.shape == (96, 128)
    assert layer_of(absent, "cpu", kernels).augmented is None
    assert layer_of(quantised().bfloat16(), "cpu", kernels).augmented is None


def test_all_quantised_layers_take_the_run_s_kernels():
    """Those without a LoRA too."""
    kernels = everything("eager")
    model = nn.ModuleDict({"one": quantised(), "other": quantised()})
    inject(model, LORA, Match({"one": (64, 96)}, {"one": 1}, {}), 1, kernels)
    assert isinstance(model["other"], QuantisedLinear) and model["other"].kernels is kernels
    assert model["one"].base_layer.kernels is model["one"].kernels is kernels


def test_a_cast_of_the_model_leaves_what_is_stored(plan_maker):
    model = adapted_model("tiny/ltx-video", plan_for("tiny/ltx-video", plan_maker), "fp8").transformer
    model.to(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    assert layers and {layer.values.dtype for layer in layers} == {torch.float8_e4m3fn}
    assert {layer.scale.dtype for layer in layers} == {torch.float32}
    assert {layer.bias.dtype for layer in layers} == {torch.bfloat16}
