"""An int8 weight and how rows become int8: symmetric, by each row's largest magnitude. Plain PyTorch, in float32.

The same rule quantises a weight (a row is an output channel) and activations (a row is a token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltxforge_kernels.scaled_rows import stretch_rows

LARGEST = 127
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

    Rounds to nearest, ties to even. What is not finite has code 0, and shows in its row's scale alone.
    """
    stretched, scale = stretch_rows(x, factor, LARGEST)
    return torch.round(stretched).nan_to_num().to(torch.int8), scale
