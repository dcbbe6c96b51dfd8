"""Puts the adapter into the transformer: freezes the base, lets PEFT wrap the matched layers, reports what it did.

The only place that registers `LoraLinear` with PEFT. Initial values are drawn by address, one generator per layer, so
they depend on the seed and the layer's name and on nothing that ran before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ltxforge_kernels.choice import EAGER, Kernels
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import Match
from ltxforge.plan import LoraPlan
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.randomness import address

ADAPTER = "default"


@dataclass(frozen=True)
class LoraReport:
    """What was matched and trained. `unread` maps layers that not every program reads to the program that does not."""

    layers: int
    by_target: dict[str, int]
    parameters: int
    file_bytes: int
    unread: dict[str, str]


def inject(
    transformer: nn.Module,
    plan: LoraPlan,
    matched: Match,
    seed: int,
    kernels: Kernels = EAGER,
    device: torch.device | None = None,
) -> LoraReport:
    """Freeze every parameter, wrap the matched layers, initialise A and B in float32 (B = 0).

    Args:
        kernels: with what the wrapped layers and all quantised ones compute from now on.
        device: of A and B; by default where each base layer's weight is, which then must be there.
    """
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]  # PEFT divides it; floats are fine
        lora_dropout=plan.dropout,
        use_rslora=plan.rslora,
        target_modules="|".join(map(re.escape, matched.layers)),
        init_lora_weights=False,
    )
    config._register_custom_module({nn.Linear: LoraLinear, QuantisedLinear: LoraLinear})
    # PEFT's own first draw is replaced below, so that it makes A and B on "meta".
    with torch.random.fork_rng(devices=[]), _weights_to_look_at(transformer, matched):
        inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    wrapped = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}
    assert wrapped.keys() == matched.layers.keys(), "PEFT wrapped other layers than the plan matched"
    for name, module in wrapped.items():
        _initialise(module, name, seed, device or _device_of(module.base_layer))
        module.compute_with(kernels)
    for module in transformer.modules():
        if isinstance(module, QuantisedLinear):
            module.kernels = kernels
    parameters = sum(parameter.numel() for parameter in adapter_parameters(transformer).values())
    return LoraReport(
        layers=len(wrapped),
        by_target=matched.by_target,
        parameters=parameters,
        file_bytes=parameters * (4 if plan.save_precision == "fp32" else 2),
        unread=matched.unread,
    )


@contextmanager
def _weights_to_look_at(transformer: nn.Module, matched: Match) -> Iterator[None]:
    """A stand-in where a layer has no weight, being quantised, or none here: PEFT asks each for its device."""
    layers = [transformer.get_submodule(name) for name in matched.layers]
    without = [layer for layer in layers if getattr(layer, "weight", None) is None]
    for layer in without:
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
    try:
        yield
    finally:
        for layer in without:
            if isinstance(layer, QuantisedLinear):
                del layer.weight
            else:
                layer.weight = None


def _device_of(layer: nn.Module) -> torch.device:
    weight = next(iter(layer.stored.values())) if isinstance(layer, QuantisedLinear) else layer.weight
    return weight.device


def _initialise(module: LoraLinear, name: str, seed: int, device: torch.device) -> None:
    """Kaiming-uniform A with gain for a = √5 and B = 0, as in the LoRA paper's code and PEFT."""
    bound = 1 / math.sqrt(module.in_features)
    generator = torch.Generator().manual_seed(address(seed, f"lora-init/{name}"))
    a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    values = torch.rand(a.weight.shape, generator=generator, dtype=torch.float32) * (2 * bound) - bound
    a.weight = nn.Parameter(values.to(device))
    b.weight = nn.Parameter(torch.zeros(b.weight.shape, dtype=torch.float32, device=device))


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, `<module>.lora_A.weight` and `<module>.lora_B.weight`, sorted by name."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLinear):
            found[f"{name}.lora_A.weight"] = module.lora_A[ADAPTER].weight
            found[f"{name}.lora_B.weight"] = module.lora_B[ADAPTER].weight
    return dict(sorted(found.items()))


def adapter_scaling(transformer: nn.Module) -> float:
    """PEFT's own scale of the adapter, alpha / rank or alpha / √rank: one number for all layers."""
    scales = {module.scaling[ADAPTER] for module in transformer.modules() if isinstance(module, LoraLinear)}
    assert len(scales) == 1, "layers of one adapter have one scale"
    return scales.pop()


def load_adapter(transformer: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy saved values into the adapter; names and shapes must be exactly those of `adapter_parameters`."""
    parameters = adapter_parameters(transformer)
    assert parameters.keys() == values.keys(), "the saved adapter has other layers than the plan"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


@contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """The base model alone, for the length of the block."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
