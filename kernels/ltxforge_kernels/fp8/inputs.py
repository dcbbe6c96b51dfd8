"""Inputs of the fp8 products for a shape: for tests and the bench, and on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler
from ltxforge_kernels.fp8.weight import Fp8Weight, quantise


@dataclass(frozen=True)
class Inputs:
    """x [M, K], the weight [N, K] before and after quantising, a bias, and a gradient that arrives at y."""

    x: Tensor
    weight: Tensor
    quantised: Fp8Weight
    bias: Tensor
    upstream: Tensor


def inputs(rows: int, width: int, outputs: int, fill: Filler, dtype: torch.dtype = torch.float32) -> Inputs:
    """x and the gradient are standard normal, outputs of the order of 1."""
    weight = (fill.normal(outputs, width) / width**0.5).to(dtype)
    return Inputs(
        x=fill.normal(rows, width, dtype=dtype),
        weight=weight,
        quantised=quantise(weight),
        bias=fill.normal(outputs, dtype=dtype),
        upstream=fill.normal(rows, outputs, dtype=dtype),
    )
