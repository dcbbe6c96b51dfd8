"""An int8 weight and how rows become int8: symmetric, by each row's largest magnitude. Plain PyTorch, in float32.

The same rule quantises a weight (a row is an output channel) and activations (a row is a token); the kernels follow it
to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
# Below it LARGEST / absmax could overflow: such a row is 0.
SMALLEST = 2.0**-100
# Where a sum of int8 products, each at most 127², could leave int32.
LONGEST_SUM = (2**31 - 1) // LARGEST**2


class Int8Weight(NamedTuple):
    """values [N, K] int8, contiguous, times scale [N] float32."""

    values: Tensor
    scale: Tensor


def quantise(weight: Tensor) -> Int8Weight:
    """A weight [N, K] as int8 with one scale per output channel.

    Raises:
        ValueError: the weight is no matrix, or too wide for exact int32 sums.
    """
    if weight.ndim != 2 or not 0 < weight.shape[1] <= LONGEST_SUM:
        raise ValueError(f"a weight is [N, K] with K from 1 to {LONGEST_SUM}, not {list(weight.shape)}")
    return Int8Weight(*quantise_rows(weight))


def quantise_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K]·factor [K] as codes int8 [M, K] and scale float32 [M]: codes·scale is near it.

    Rounds to nearest, ties to even. A row with an infinity or NaN has a scale that is one. In float32 whatever comes
    in, so that codes do not depend on the precision of what surrounds them.
    """
    wide = x.to(torch.float32)
    if factor is not None:
        wide = wide * factor
    absmax = wide.abs().amax(dim=1)
    # Not LARGEST / absmax: for a Python number PyTorch multiplies by a rounded reciprocal.
    stretch = torch.where(absmax <= SMALLEST, 0.0, torch.full_like(absmax, LARGEST) / absmax)
    return torch.round(wide * stretch[:, None]).nan_to_num().to(torch.int8), absmax / LARGEST


def dequantise_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values [N, K]·scale [N], multiplied in float32 (float64 where that is asked for) and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(wide) * scale.to(wide)[:, None]).to(dtype)
