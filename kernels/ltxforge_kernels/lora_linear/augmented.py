"""W and B in one matrix, Wc = [W | B | 0] of [N, K + tail]: the frozen product and the LoRA in one matrix product.

The tail is R padded to a multiple of 64, so that a row stays aligned for tensor cores. W is stored nowhere else: the
layer's weight becomes the view Wc[:, :K]. B stands in the tail as a rounded copy, which is as old as the last
`refresh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64


def tail_width(rank: int) -> int:
    """Columns behind W: the rank, padded."""
    return -(-rank // ALIGNMENT) * ALIGNMENT


def augment(weight: Tensor, rank: int) -> Tensor:
    """[N, K + tail] with W in front and zeros behind, a LoRA that is off; W's own storage can be freed then.

    Called once a layer: after the weights are loaded and the LoRA is injected, before the optimiser, a compiled block
    or a CUDA graph sees the layer. Its weight becomes `Wc[:, :K]`; then `refresh`, since B need not be 0.
    """
    wide = weight.new_zeros(weight.shape[0], weight.shape[1] + tail_width(rank))
    wide[:, : weight.shape[1]] = weight.detach()
    return wide


@torch.no_grad()
def refresh(augmented: Tensor, b: Tensor) -> None:
    """Copy B [N, R] into the tail, rounded to its dtype.

    Called whenever B has changed, and before the next forward: after every optimiser step, after a checkpoint or
    another LoRA is loaded, at both ends of an EMA swap. The scale is not in the tail. Never between a forward and its
    backward: autograd then refuses the backward, because the matrix it kept has changed.
    """
    rank = b.shape[1]
    start = augmented.shape[1] - tail_width(rank)
    augmented[:, start : start + rank] = b
