"""Inputs of GELU for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler, TokenShape


@dataclass(frozen=True)
class Inputs:
    """What comes in, and a gradient that arrives at y; both [B, T, K]."""

    x: Tensor
    upstream: Tensor


def inputs(shape: TokenShape, fill: Filler, dtype: torch.dtype = torch.float32) -> Inputs:
    """x twice as wide as normal, so that its tails are there too."""
    whole = (shape.batch, shape.tokens, shape.width)
    return Inputs(x=(2 * fill.normal(*whole)).to(dtype), upstream=fill.normal(*whole, dtype=dtype))
