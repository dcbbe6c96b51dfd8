"""Weights and inputs of NF4 for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler
from ltxforge_kernels.nf4.tables import nf4_map
from ltxforge_kernels.nf4.weight import NESTED_BLOCKSIZE, Nf4Weight, block_count, packed_size


@dataclass(frozen=True)
class LinearShape:
    """T tokens through a weight of N rows and K columns."""

    name: str
    tokens: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return self.name


# The widest weight, and few tokens: sound of LTX-2.
WIDEST = LinearShape("feed-forward of 13B and 19B", 6144, 16384, 4096)
SOUND = LinearShape("sound of 19B", 126, 2048, 2048)


@dataclass(frozen=True)
class Inputs:
    """A weight [N, K] as a transformer's are, x [T, K], a bias [N] and a gradient [T, N] that arrives at y."""

    weight: Tensor
    x: Tensor
    bias: Tensor
    upstream: Tensor


def inputs(shape: LinearShape, fill: Filler, dtype: torch.dtype = torch.float32) -> Inputs:
    weight = fill.normal(shape.rows, shape.columns) * max(shape.columns, 1) ** -0.5
    return Inputs(
        weight=weight.to(dtype),
        x=fill.normal(shape.tokens, shape.columns, dtype=dtype),
        bias=fill.normal(shape.rows, dtype=dtype),
        upstream=fill.normal(shape.tokens, shape.rows, dtype=dtype),
    )


def empty_weight(
    shape: LinearShape, device: str | torch.device, dtype: torch.dtype, *, blocksize: int = 64, double: bool = False
) -> Nf4Weight:
    """A packed weight that holds nothing yet: room to read one into, or on "meta" to launch over."""
    size = (shape.rows, shape.columns)
    blocks = block_count(size, blocksize)
    packed = torch.empty((packed_size(size), 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32, device=device)
    quant_map = nf4_map(device)
    if not double:
        return Nf4Weight(packed, absmax, quant_map, blocksize, size, dtype)
    nested = [torch.empty(length, device=device) for length in ((-(-blocks // NESTED_BLOCKSIZE),), (256,), ())]
    return Nf4Weight(packed, absmax, quant_map, blocksize, size, dtype, *nested)
