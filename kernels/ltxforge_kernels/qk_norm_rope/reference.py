"""Norm and rotation of queries and keys in plain PyTorch: the definition, in the order of diffusers.

The norm rounds to the dtype that comes in, as PyTorch's own does, and the rotation is float32 (float64 where that comes
in): the very bits of the stock transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxforge_kernels.precision import at_least_float32
from ltxforge_kernels.qk_norm_rope.rope import Rope


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_rope: Rope | None,
    key_rope: Rope | None,
    heads: int,  # noqa: ARG001
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k; arguments as in the op."""
    query = F.rms_norm(query, query.shape[2:], query_weight, eps)
    key = F.rms_norm(key, key.shape[2:], key_weight, eps)
    return rotate(query, query_rope), rotate(key, key_rope)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """[B, T, D] turned by the rope's angles, or as it is."""
    if rope is None:
        return x
    return (rotate_neighbours if rope.heads is None else rotate_halves)(x, *rope.full)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of [B, T, D]; cos and sin are [1, T, D]."""
    real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(2)
    return (at_least_float32(x) * cos + at_least_float32(turned) * sin).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn number k of each head's first half with number k of its second; cos and sin are [1, H, T, K/2]."""
    cos, sin = (table.transpose(1, 2) for table in (cos, sin))  # [1, T, H, K/2]
    first, second = at_least_float32(x.unflatten(2, (cos.shape[2], 2, -1))).unbind(3)
    # addcmul takes no mixture of dtypes.
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    turned = [torch.addcmul(first * cos, -sin, second), torch.addcmul(second * cos, sin, first)]
    return torch.stack(turned, dim=3).flatten(2).to(x.dtype)
