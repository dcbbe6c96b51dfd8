"""Inputs of the int8 products for a shape: for tests and the bench, and on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler
from ltxforge_kernels.int8.weight import Int8Weight, quantise

# Of a LoRA that has learned: its branch is about a tenth of the base's output.
LORA_SCALE = 0.5
KEEP = 0.75


@dataclass(frozen=True)
class Inputs:
    """x [M, K], the weight [N, K] before and after quantising, a LoRA, a dropout mask, and a gradient at y."""

    x: Tensor
    weight: Tensor
    quantised: Int8Weight
    bias: Tensor
    a: Tensor
    b: Tensor
    kept: Tensor
    upstream: Tensor


def inputs(rows: int, width: int, outputs: int, rank: int, fill: Filler, dtype: torch.dtype = torch.float32) -> Inputs:
    """x and the gradient are standard normal, outputs of the order of 1; A and B are float32 masters."""
    weight = (fill.normal(outputs, width) / width**0.5).to(dtype)
    return Inputs(
        x=fill.normal(rows, width, dtype=dtype),
        weight=weight,
        quantised=quantise(weight),
        bias=fill.normal(outputs, dtype=dtype),
        a=fill.normal(rank, width) / width**0.5,
        b=0.2 * fill.normal(outputs, rank) / rank**0.5,
        kept=fill.uniform(rows, width) < KEEP,
        upstream=fill.normal(rows, outputs, dtype=dtype),
    )
