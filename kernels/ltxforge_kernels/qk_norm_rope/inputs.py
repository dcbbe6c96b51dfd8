"""Inputs of norm and rotation for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler, TokenShape
from ltxforge_kernels.qk_norm_rope.rope import Rope

# Positions of time, height and width together at 768x512, 121 frames.
POSITIONS = 16 + 16 + 24


@dataclass(frozen=True)
class Inputs:
    """Queries and keys, the norms' weights, tables, and gradients that arrive at q and k."""

    query: Tensor
    key: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    query_rope: Rope | None
    key_rope: Rope | None
    heads: int
    query_upstream: Tensor
    key_upstream: Tensor


def rope(tokens: int, width: int, heads: int | None, axes: int, fill: Filler) -> Rope:
    """Angles of a whole turn at random; `heads` None for neighbours."""
    angle = 2 * math.pi * fill.uniform(POSITIONS, width // 2 // axes)
    rows = fill.integers(POSITIONS, tokens, axes)
    return Rope(angle.cos(), angle.sin(), rows, width // 2 % axes, heads)


def inputs(
    shape: TokenShape,
    fill: Filler,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 1,
    layout: str | None = "interleaved",
    axes: int = 3,
    keys: int | None = None,
) -> Inputs:
    """`keys` per sample, with tables of their own, or as many as queries, with the same; `layout` None for no ropes."""

    def table(tokens: int) -> Rope | None:
        return layout and rope(tokens, shape.width, heads if layout == "split" else None, axes, fill)

    tokens = shape.tokens if keys is None else keys
    query_rope = table(shape.tokens)
    query, query_upstream = (fill.normal(shape.batch, shape.tokens, shape.width, dtype=dtype) for _ in range(2))
    key, key_upstream = (fill.normal(shape.batch, tokens, shape.width, dtype=dtype) for _ in range(2))
    return Inputs(
        query=query,
        key=key,
        query_weight=(1 + 0.2 * fill.normal(shape.width)).to(dtype),
        key_weight=(1 + 0.2 * fill.normal(shape.width)).to(dtype),
        query_rope=query_rope,
        key_rope=query_rope if keys is None else table(tokens),
        heads=heads,
        query_upstream=query_upstream,
        key_upstream=key_upstream,
    )
