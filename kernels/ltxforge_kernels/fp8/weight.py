"""An fp8 weight and how rows become fp8 (e4m3: four bits of exponent, three of mantissa). Plain PyTorch, in float32.

The same rule quantises a weight (a row is an output channel) and activations (a row is a token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltxforge_kernels.scaled_rows import stretch_rows

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


class Fp8Weight(NamedTuple):
    """values [N, K] float8_e4m3fn, contiguous, times scale [N] float32."""

    values: Tensor
    scale: Tensor


def quantise(weight: Tensor) -> Fp8Weight:
    """A weight [N, K] as fp8 with one scale per output channel.

    Raises:
        ValueError: the weight is no matrix, or has no column.
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"a weight is [N, K] with K of at least 1, not {list(weight.shape)}")
    return Fp8Weight(*quantise_rows(weight))


def quantise_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K]·factor [K] as codes fp8 [M, K] and scale float32 [M]: codes·scale is near it."""
    stretched, scale = stretch_rows(x, factor, LARGEST)
    return stretched.to(FP8), scale
