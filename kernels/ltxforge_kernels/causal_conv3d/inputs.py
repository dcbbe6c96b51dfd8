"""Inputs of the causal convolution for a shape: for tests and the bench; on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler
from ltxforge_kernels.causal_conv3d.reference import channels_last


@dataclass(frozen=True)
class ConvShape:
    """CI channels in, CO out, T frames of H · W pixels, B clips, a kernel of K in each direction."""

    taken: int
    channels: int
    frames: int
    height: int
    width: int
    clips: int = 1
    kernel: int = 3

    def __str__(self) -> str:
        return f"{self.taken} to {self.channels} at {self.frames}x{self.height}x{self.width}"


# One chunk of 768x512 in the encoders of 0.9.5 and LTX-2: the first convolution, then the blocks' hot ones.
HOT = (
    ConvShape(48, 128, 8, 128, 192),
    ConvShape(128, 128, 8, 128, 192),
    ConvShape(256, 256, 8, 64, 96),
    ConvShape(512, 512, 4, 64, 96),
    ConvShape(1024, 1024, 2, 32, 48),
    ConvShape(2048, 2048, 1, 16, 24),
)
# The convolutions in front of the downsamplers give a quarter or an eighth of the next block's channels.
NARROW = ConvShape(128, 64, 8, 128, 192)


@dataclass(frozen=True)
class Inputs:
    """Frames, the frames before them, weights, and what is added to the result."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor | None
    residual: Tensor | None

    def double(self) -> Inputs:
        """In float64."""
        given = {name: getattr(self, name) for name in ("x", "weight", "bias", "state", "residual")}
        return Inputs(**{name: None if tensor is None else tensor.double() for name, tensor in given.items()})

    def at_the_start(self) -> Inputs:
        """Without a state."""
        return replace(self, state=None)


def inputs(shape: ConvShape, fill: Filler, dtype: torch.dtype = torch.float32, *, residual: bool = True) -> Inputs:
    """Channels innermost in memory; the weight scaled so that y is about as large as x."""
    sizes = (shape.kernel,) * 3
    picture = (shape.height, shape.width)
    weight = fill.normal(shape.channels, shape.taken, *sizes) / (shape.taken * shape.kernel**3) ** 0.5
    result = (shape.clips, shape.channels, shape.frames, *picture)
    return Inputs(
        x=channels_last(fill.normal(shape.clips, shape.taken, shape.frames, *picture, dtype=dtype)),
        weight=channels_last(weight.to(dtype)),
        bias=fill.normal(shape.channels, dtype=dtype),
        state=channels_last(fill.normal(shape.clips, shape.taken, shape.kernel - 1, *picture, dtype=dtype)),
        residual=channels_last(fill.normal(*result, dtype=dtype)) if residual else None,
    )
