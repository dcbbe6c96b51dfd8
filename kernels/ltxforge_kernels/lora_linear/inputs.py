"""Inputs of a LoRA layer for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler
from ltxforge_kernels.lora_linear.augmented import augment, refresh


@dataclass(frozen=True)
class LayerShape:
    """S tokens, a linear layer of K in and N out, and the LoRA's rank."""

    name: str
    tokens: int
    inward: int
    outward: int
    rank: int

    def __str__(self) -> str:
        return self.name


# The layers whose targets the bench states; rank 32 unless it says otherwise.
LAYERS = tuple(
    LayerShape(f"{tokens}x{inward}x{outward} rank {rank}", tokens, inward, outward, rank)
    for tokens, inward, outward, rank in (
        (6144, 2048, 2048, 32),
        (6144, 4096, 4096, 32),
        (6144, 4096, 4096, 128),
        (6144, 4096, 16384, 32),
        (6144, 16384, 4096, 32),
        (1024, 4096, 4096, 32),
        (126, 2048, 2048, 32),
    )
)


@dataclass(frozen=True)
class Inputs:
    """All that a layer is given, and a gradient that arrives at y. `weight` is a view where `augmented` is there."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    kept: Tensor | None
    keep: float
    activation: str
    augmented: Tensor | None
    upstream: Tensor

    @property
    def layer(self) -> tuple:
        """The op's arguments in their order."""
        return (
            *(self.x, self.weight, self.bias, self.a, self.b),
            *(self.scale, self.kept, self.keep, self.activation, self.augmented),
        )


def inputs(
    shape: LayerShape,
    fill: Filler,
    dtype: torch.dtype = torch.float32,
    *,
    augmented: bool = False,
    dropout: float = 0.0,
    activation: str = "none",
    bias: bool = True,
    leading: tuple[int, ...] | None = None,
) -> Inputs:
    """x [leading or S, K] and W as a trained layer has them, y near 1; the LoRA adds about a quarter of y."""
    leading = leading or (shape.tokens,)
    weight = (fill.normal(shape.outward, shape.inward) * shape.inward**-0.5).to(dtype)
    a = fill.normal(shape.rank, shape.inward) * shape.inward**-0.5
    b = fill.normal(shape.outward, shape.rank) * shape.rank**-0.5
    wide = None
    if augmented:
        wide = augment(weight, shape.rank)
        refresh(wide, b)
        weight = wide[:, : shape.inward]
    return Inputs(
        x=fill.normal(*leading, shape.inward, dtype=dtype),
        weight=weight,
        bias=fill.normal(shape.outward, dtype=dtype) if bias else None,
        a=a,
        b=b,
        scale=0.25,
        kept=fill.uniform(*leading, shape.inward) >= dropout if dropout else None,
        keep=1.0 - dropout,
        activation=activation,
        augmented=wide,
        upstream=fill.normal(*leading, shape.outward, dtype=dtype),
    )
