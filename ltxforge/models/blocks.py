"""What the transformer blocks of both families are made of: attention, rotation, modulation, checkpointing.

Functions over tensors and diffusers' leaf modules; the order of operations is diffusers', so that the bits agree. Knows
no family and no version: gates, rope layouts and the number of modulation rows are read off modules and tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Modulation:
    """The time embedding of N distinct timesteps: `values` [N, K, D], K rows of shifts, scales and gates.

    `index` [B, T] says which of the N a token has; None means one per sample, N = B.
    """

    values: Tensor
    index: Tensor | None

    def rows(self, table: Tensor, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Rows start to stop of a learned table [K, D] plus the embedding; each broadcasts against [B, T, D].

        `values` of one row (K = 1) are added to every row of the table.
        """
        values = self.values if self.values.shape[1] == 1 else self.values[:, start:stop]
        return [self.spread(row) for row in (table[start:stop][None] + values).unbind(dim=1)]

    def spread(self, row: Tensor) -> Tensor:
        """[N, D] → something that broadcasts against [B, T, D]."""
        return row[:, None] if self.index is None else row[self.index]


def distinct_timesteps(timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
    """The timesteps to embed, [N], and each token's number among them, [B, T], or None for one per sample.

    With first-frame conditioning a sample has T timesteps of two values; embedding them per token would cost K·T·D.
    """
    assert timesteps.dtype == torch.float32, f"timesteps must be float32, not {timesteps.dtype}"
    return (timesteps[:, 0], None) if timesteps.shape[1] == 1 else timesteps.unique(return_inverse=True)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention over [B, T, H, K]; `bias` is added to the scores and broadcasts to [B, H, T, P]."""
    query, key, value = (tensor.permute(0, 2, 1, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).permute(0, 2, 1, 3)


def attention_forward(
    attn: nn.Module,
    hidden: Tensor,
    context: Tensor,
    rope: Rope | None = None,
    bias: Tensor | None = None,
    context_rope: Rope | None = None,
) -> Tensor:
    """One attention of a block: project, normalise q and k over all heads, rotate, attend, gate, project back.

    Args:
        attn: diffusers' attention module; with `to_gate_logits` each head's result is scaled by 2·sigmoid(logit).
        hidden: the queries' side, [B, T, D].
        context: the keys' and values' side, [B, P, E].
        rope: for the queries, or None for no rotation.
        bias: what is added to the scores, [B, 1, 1, P], or None.
        context_rope: for the keys, where they are not the queries' own tokens.
    """
    query, key, value = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    query, key = attn.norm_q(query), attn.norm_k(key)
    if rope is not None:
        query, key = rotate(query, rope), rotate(key, rope if context_rope is None else context_rope)
    query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
    mixed = attend(query, key, value, bias).to(query.dtype)
    if (gate_logits := getattr(attn, "to_gate_logits", None)) is not None:
        mixed = mixed * (2.0 * torch.sigmoid(gate_logits(hidden))).unsqueeze(-1)
    return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3)))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of [B, T, D], in float32 (RoFormer, arXiv:2104.09864).

    Tables [1, T, D] turn neighbouring numbers, tables [1, H, T, K/2] the two halves of each head.
    """
    return rotate_halves(x, rope) if rope[0].ndim == 4 else rotate_neighbours(x, rope)


def rotate_neighbours(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of [B, T, D]; cos and sin are [1, T, D]."""
    cos, sin = rope
    real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rotate_halves(x: Tensor, rope: Rope) -> Tensor:
    """Turn number k of each head's first half with number k of its second; cos and sin are [1, H, T, K/2]."""
    cos, sin = (table.transpose(1, 2) for table in rope)  # [1, T, H, K/2]
    first, second = x.unflatten(2, (cos.shape[2], 2, -1)).float().unbind(3)
    turned = [torch.addcmul(first * cos, -sin, second), torch.addcmul(second * cos, sin, first)]
    return torch.stack(turned, dim=3).flatten(2).to(x.dtype)


def prompt_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for real tokens and −10000 for padding, [B, 1, 1, P] (heads and queries broadcast)."""
    return ((1 - mask.to(dtype)) * -10000.0)[:, None, None, :]


def checkpointed(step: Callable[..., Result], number: int, every: int) -> Callable[..., Result]:
    """Block `number`'s forward, recomputed in the backward pass if it is every n-th; `every` 0 is off."""
    if every and number % every == 0 and torch.is_grad_enabled():
        return partial(checkpoint, step, use_reentrant=False, preserve_rng_state=True)
    return step
