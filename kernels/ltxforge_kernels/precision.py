"""The precision of references (float32, or float64 where that comes in) and how much of it quantisation leaves.

A reference is then also the truth in float64. The floors (`floors.py`) say from where on a layer stays in bf16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltxforge_kernels.floors import FLOORS

__all__ = ["FLOORS", "at_least_float32", "sqnr"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float64, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def sqnr(reference: Tensor, result: Tensor) -> float:
    """Signal to quantisation noise in dB: 20·log10(‖reference‖ / ‖reference − result‖), norms in float64.

    Infinite where the two are equal, −inf where the reference is 0 and the result is not, NaN where either has one.

    Raises:
        ValueError: shapes differ: one would be broadcast.
    """
    if reference.shape != result.shape:
        raise ValueError(f"a result of {list(result.shape)} is not one of {list(reference.shape)}")
    signal = at_least_float32(reference)
    noise = signal - at_least_float32(result)
    signal, noise = (torch.linalg.vector_norm(part, dtype=torch.float64).item() for part in (signal, noise))
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf
