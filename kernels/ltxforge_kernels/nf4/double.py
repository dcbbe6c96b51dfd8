"""Double quantisation: the blocks' largest values as 8-bit codes, and back.

One part in `blocksize` of a weight, once when it is loaded: plain PyTorch in every implementation, so that they agree
to the bit. The mean is the device's own, as it is in bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.nf4.tables import dynamic_map, midpoints
from ltxforge_kernels.nf4.weight import NESTED_BLOCKSIZE

# bitsandbytes on a CPU looks a number of [−1, 1] up in this many bins, and takes the code nearest to the bin's own.
BINS = 65536


@dataclass(frozen=True)
class Nested:
    """codes uint8 [blocks], absmax float32 [⌈blocks/256⌉], offset float32 []; fields as in `Nf4Weight`."""

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    offset: Tensor


def compress(absmax: Tensor) -> Nested:
    """absmax float32 [blocks], less its mean, as codes of the dynamic type in blocks of 256."""
    offset = absmax.mean()
    blocks = in_blocks(absmax - offset, NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(dim=1)
    quant_map = dynamic_map(absmax.device)
    normed = (blocks * (1 / largest)[:, None]).clamp(-1, 1)
    bins = ((normed + 1) * 0.5 * (BINS - 1) + 0.5).to(torch.int32)
    codes = torch.bucketize(2.0 * bins / (BINS - 1) - 1.0, midpoints(quant_map)).to(torch.uint8)
    # A block of zeros normalises to nothing; bitsandbytes writes 0.
    codes = codes.masked_fill((largest == 0)[:, None], 0)
    return Nested(codes.flatten()[: absmax.numel()], largest, quant_map, offset)


def expand(codes: Tensor, absmax: Tensor, quant_map: Tensor, offset: Tensor, blocksize: int) -> Tensor:
    """float32 [blocks] again: product and sum each rounded."""
    values = in_blocks(quant_map[codes.int()], blocksize) * absmax[:, None]
    return values.flatten()[: codes.numel()] + offset


def in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """[n] as [⌈n / blocksize⌉, blocksize], zeros behind its end."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)
