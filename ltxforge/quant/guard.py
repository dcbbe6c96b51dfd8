"""Which layers multiply in 8 bits only where their activations bear it: measured on real ones, then held to.

int8-w8a8 and fp8 quantise each token by its largest value. Outliers in a few channels take a token's whole range, and
no weight shows them (`ltxforge_kernels/guard.py`). Such a layer keeps its stored weight and changes its product: the
weight is made whole for it, as with int8. Decides by the format's floor and nothing else; a run that goes on takes the
names that were found when it began (`use_weight_only`), or its bits would change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ltxforge_kernels.floors import FLOORS
from ltxforge_kernels.guard import Verdict, worst
from ltxforge_kernels.precision import sqnr
from torch import Tensor, nn

from ltxforge.quant.formats import FORMATS
from ltxforge.quant.linear import IN_8_BITS, STORED, QuantisedLinear

# So many of a layer's tokens are looked at, evenly spaced over what the forward pass gives it.
TOKENS = 256
# dB that must be left of what differs between tokens: what the coarsest format leaves of a weight.
LEAST_DIFFERING = min(FLOORS.values())


@dataclass(frozen=True)
class ActivationVerdict(Verdict):
    """What quantising one layer's activations leaves of its product, as `sqnr`, and in dB of what differs in it between
    tokens: a channel that is large in every token can be nearly all of a product, and its rounding leave nothing of the
    others.
    """

    differing: float

    @property
    def quantised(self) -> bool:
        """Whether the layer multiplies in 8 bits. NaN is no reason to."""
        return super().quantised and self.differing >= LEAST_DIFFERING

    def __str__(self) -> str:
        outcome = "multiplies in 8 bits" if self.quantised else "keeps its activations whole"
        left = f"{self.sqnr:.1f} dB of {self.format} (floor {self.floor:.0f} dB)"
        differing = f"{self.differing:.1f} dB of what differs between tokens (floor {LEAST_DIFFERING:.0f} dB)"
        return f"{self.layer}: {outcome}, {left}, {differing}"


def judge_activations(transformer: nn.Module, run_forward: Callable[[], object]) -> list[ActivationVerdict]:
    """Measure every layer that multiplies in 8 bits on one forward pass, and spare those that fail.

    The pass itself is computed with whole activations throughout, so that no layer is judged by another one's noise.

    Args:
        run_forward: runs the transformer on a real batch; twice the same on equal weights. What it gives is not used.

    Returns:
        A verdict on each such layer that the pass reached, in the model's order; the others stay as they were.
    """
    layers = {name: layer for name, layer in _judged(transformer) if layer.product == IN_8_BITS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    with _watched(layers, found), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        run_forward()
    verdicts = [_verdict(name, layer.format, found[name]) for name, layer in layers.items() if found[name]]
    use_weight_only(transformer, weight_only(transformer) | {each.layer for each in verdicts if not each.quantised})
    return verdicts


def weight_only(transformer: nn.Module) -> frozenset[str]:
    """The layers that were spared, by name: what a run records so that it can go on with the same bits."""
    return frozenset(name for name, layer in _judged(transformer) if layer.product == STORED)


def use_weight_only(transformer: nn.Module, names: Collection[str]) -> None:
    """Spare just these of the layers whose format quantises activations."""
    layers = dict(_judged(transformer))
    assert set(names) <= layers.keys(), "layers that this base does not have, or not in such a format"
    for name, layer in layers.items():
        layer.product = STORED if name in names else IN_8_BITS


def product_left(layer: QuantisedLinear, x: Tensor) -> tuple[float, float]:
    """dB that quantising activations x [..., K] leaves of the layer's product, exact in float32, and of what differs in
    it between tokens. Without the bias, which hides noise; infinite on a device whose products quantise no activations.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // TOKENS)].to(torch.float32)
    exact = F.linear(rows, layer.dequantised(torch.float32))
    product = layer.product_of(rows, None, IN_8_BITS, "eager")
    common = exact.mean(dim=0) if rows.shape[0] > 1 else 0.0
    return sqnr(exact, product), sqnr(exact - common, product - common)


def _verdict(name: str, format: str, found: list[tuple[float, float]]) -> ActivationVerdict:
    whole, differing = (worst(list(each)) for each in zip(*found, strict=True))
    return ActivationVerdict(name, format, whole, FORMATS[format].floor, differing)


def _judged(transformer: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """The layers in formats that quantise activations, by the names that they have without an adapter."""
    for name, module in transformer.named_modules():
        if isinstance(module, QuantisedLinear) and FORMATS[module.format].quantises_activations:
            yield name.removesuffix(".base_layer"), module


@contextmanager
def _watched(layers: dict[str, QuantisedLinear], found: dict[str, list[tuple[float, float]]]) -> Iterator[None]:
    """Layers with whole activations, so that each calls its `forward`, whose input is measured on the way in."""

    def watch(name: str) -> Callable[[QuantisedLinear, tuple[Tensor]], None]:
        return lambda layer, inputs: found[name].append(product_left(layer, inputs[0]))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for layer in layers.values():
            layer.product = STORED
        yield
    finally:
        for hook, layer in zip(hooks, layers.values(), strict=True):
            hook.remove()
            layer.product = IN_8_BITS
