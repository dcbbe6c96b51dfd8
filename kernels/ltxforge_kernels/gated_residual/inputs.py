"""Inputs of the gated residual for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.adaln_rms_norm.inputs import inputs as inputs_of_norm
from ltxforge_kernels.cases import Filler, TokenShape


@dataclass(frozen=True)
class Inputs:
    """x, a, gates and table with which timestep a token has (None: its sample's), and the gradients of x', y and z."""

    hidden: Tensor
    branch: Tensor
    gates: Tensor
    gate_index: Tensor | None
    table: Tensor
    index: Tensor | None
    total_upstream: Tensor
    upstream: Tensor
    second_upstream: Tensor


def inputs(shape: TokenShape, fill: Filler, dtype: torch.dtype = torch.float32, *, distinct: int | None = 2) -> Inputs:
    """`distinct` timesteps in the norm's table and one more among the gates; None for one per sample in both."""
    norm = inputs_of_norm(shape, fill, dtype, distinct=distinct)
    other = inputs_of_norm(shape, fill, dtype, distinct=None if distinct is None else distinct + 1)
    return Inputs(
        hidden=norm.hidden,
        branch=other.hidden,
        gates=(5 * other.table).to(dtype),
        gate_index=other.index,
        table=norm.table,
        index=norm.index,
        total_upstream=other.upstream,
        upstream=norm.upstream,
        second_upstream=fill.normal(*norm.hidden.shape, dtype=dtype),
    )
