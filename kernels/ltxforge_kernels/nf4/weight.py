"""A weight in NF4: two codes a byte, the largest value of each block, and how to read them.

Holds, moves, and knows its sizes; computes nothing. Plain or double-quantised: then the blocks' largest values are
codes themselves, in blocks of blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What bitsandbytes allows.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bitsandbytes always takes these many blocks together, and its own product of 4-bit weights wants no other number.
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A frozen [N, K] weight; blocks run along it row by row, whether or not they end where rows do.

    Attributes:
        packed: uint8 [⌈N·K/2⌉, 1]; the even element is the high nibble.
        absmax: float32, one a block; uint8 codes of the nested map where double-quantised.
        quant_map: float32 [16], what a code stands for.
        blocksize: elements per block.
        shape: (N, K).
        dtype: what it was before, and what `dequantise` gives unless told otherwise.
        nested_absmax: float32, one for each `nested_blocksize` blocks; None where absmax is plain.
        nested_quant_map: float32 [256].
        nested_offset: float32 [], the mean that was taken off absmax.
    """

    packed: Tensor
    absmax: Tensor
    quant_map: Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_quant_map: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def double(self) -> bool:
        """Whether absmax is quantised, too."""
        return self.nested_absmax is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field, without those that it lacks: what is moved, streamed and counted."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors.values())

    @property
    def arguments(self) -> tuple:
        """Its fields in order: how it passes through ops and autograd, which know tensors, numbers and lists."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def of(cls, arguments: Sequence) -> Nf4Weight:
        """The weight that has these arguments."""
        packed, absmax, quant_map, blocksize, shape, *rest = arguments
        return cls(packed, absmax, quant_map, blocksize, tuple(shape), *rest)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Nf4Weight:
        """The same weight on a device."""
        return self.replace(**{name: part.to(device, non_blocking=non_blocking) for name, part in self.tensors.items()})

    def replace(self, **tensors: Tensor) -> Nf4Weight:
        """The same weight over other memory: what a streamer fills."""
        return dataclasses.replace(self, **tensors)


def packed_size(shape: tuple[int, int]) -> int:
    """Bytes of the codes; an odd last element has a byte for itself."""
    return -(-shape[0] * shape[1] // 2)


def block_count(shape: tuple[int, int], blocksize: int) -> int:
    """Blocks, the last of them perhaps not full."""
    return -(-shape[0] * shape[1] // blocksize)


def keep_weight(ctx: torch.autograd.function.FunctionCtx, arguments: tuple) -> None:
    """Save a weight for the gradient: its tensors as autograd wants them, all else beside them."""
    ctx.save_for_backward(*(part for part in arguments if isinstance(part, Tensor)))
    ctx.weight = [None if isinstance(part, Tensor) else (part,) for part in arguments]


def kept_weight(ctx: torch.autograd.function.FunctionCtx) -> Nf4Weight:
    """The weight again."""
    saved = iter(ctx.saved_tensors)
    return Nf4Weight.of([next(saved) if part is None else part[0] for part in ctx.weight])
