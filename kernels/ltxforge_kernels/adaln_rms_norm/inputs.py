"""Inputs of RMSNorm with modulation for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler, TokenShape

# Six rows as in a block of LTX-Video: shift, scale and gate of attention, and of the feed-forward.
ROWS = 6


@dataclass(frozen=True)
class Inputs:
    """x, the table, which timestep a token has (None: its sample's), and a gradient that arrives at y."""

    hidden: Tensor
    table: Tensor
    index: Tensor | None
    upstream: Tensor


def inputs(shape: TokenShape, fill: Filler, dtype: torch.dtype = torch.float32, *, distinct: int | None = 2) -> Inputs:
    """`distinct` timesteps, tokens drawn among them; None for one per sample. Shifts and scales are small."""
    whole = (shape.batch, shape.tokens, shape.width)
    table = fill.normal(shape.batch if distinct is None else distinct, ROWS, shape.width)
    return Inputs(
        hidden=fill.normal(*whole, dtype=dtype),
        table=(0.2 * table).to(dtype),
        index=None if distinct is None else fill.integers(distinct, shape.batch, shape.tokens),
        upstream=fill.normal(*whole, dtype=dtype),
    )
