"""Which layers keep bf16, because their numbers do not fit into few bits: measured noise against each format's floor.

Pure: tensors in, verdicts out. What is measured is what the format touches: of W8A8 and fp8, which quantise activations
too, the product on sample activations; of NF4 and int8 weight-only, the weight. Outliers in few channels are what
breaks W8A8: 0.5 % of channels, 20 times larger, take a token's whole range, while fp8 keeps its digits for each value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ltxforge_kernels.fp8.reference import fp8_linear
from ltxforge_kernels.fp8.weight import quantise as quantise_fp8
from ltxforge_kernels.int8.reference import w8a8_lora_linear
from ltxforge_kernels.int8.weight import quantise as quantise_int8
from ltxforge_kernels.precision import FLOORS, sqnr
from ltxforge_kernels.scaled_rows import dequantise_rows


@dataclass(frozen=True)
class Verdict:
    """What a format leaves of one layer.

    Attributes:
        layer: its name.
        format: one of `FLOORS`.
        sqnr: signal to quantisation noise in dB; NaN where anything was.
        floor: what the format must leave, in dB.
    """

    layer: str
    format: str
    sqnr: float
    floor: float

    @property
    def quantised(self) -> bool:
        """Whether the layer takes the format; otherwise it keeps bf16. NaN is no reason to."""
        return self.sqnr >= self.floor

    def __str__(self) -> str:
        outcome = self.format if self.quantised else "stays bf16"
        return f"{self.layer}: {outcome}, {self.sqnr:.1f} dB of {self.format} (floor {self.floor:.0f} dB)"


def judge_product(layer: str, format: str, weight: Tensor, activations: Iterable[Tensor]) -> Verdict:
    """The verdict on "w8a8" or "fp8" for a weight [N, K], by its product on samples [..., K]; the worst one counts.

    Raises:
        ValueError: the format has no product of its own, or there is no sample.
    """
    if format not in PRODUCTS:
        raise ValueError(f"{format} quantises no activations; those that do: {', '.join(PRODUCTS)}")
    found = [product_sqnr(format, weight, sample) for sample in activations]
    if not found:
        raise ValueError(f"{layer} has no sample activations to be judged by")
    return Verdict(layer, format, worst(found), FLOORS[format])


def judge_weight(layer: str, format: str, weight: Tensor, dequantised: Tensor) -> Verdict:
    """The verdict on a format that stores a weight [N, K], by what comes out of it again.

    Raises:
        KeyError: the format has no floor.
    """
    return Verdict(layer, format, sqnr(weight, dequantised), FLOORS[format])


def judge_int8_weight(layer: str, weight: Tensor) -> Verdict:
    """`judge_weight` of int8 weight-only, whose floor is that of W8A8."""
    return judge_weight(layer, "w8a8", weight, dequantise_rows(*quantise_int8(weight), torch.float32))


def product_sqnr(format: str, weight: Tensor, sample: Tensor) -> float:
    """dB that the format leaves of sample [..., K] @ weight [N, K]ᵀ, exact in float32; no bias, which hides noise."""
    rows, weight = sample.reshape(-1, sample.shape[-1]).to(torch.float32), weight.to(torch.float32)
    return sqnr(linear(rows, weight), PRODUCTS[format](rows, weight))


def w8a8_product(rows: Tensor, weight: Tensor) -> Tensor:
    return w8a8_lora_linear(rows, *quantise_int8(weight), None, None, None, 1.0, None)


def fp8_product(rows: Tensor, weight: Tensor) -> Tensor:
    return fp8_linear(rows, *quantise_fp8(weight), None)


PRODUCTS = {"w8a8": w8a8_product, "fp8": fp8_product}


def worst(found: list[float]) -> float:
    """The least, or NaN where there is one: min() alone would drop it."""
    return next((value for value in found if value != value), min(found))
