"""What the transformer blocks of both families are made of: attention, modulation, residuals; and how it is called.

Functions over tensors and diffusers' leaf modules, carried out by the ops of `ltxforge_kernels` as the plan chose them;
in float32 the eager ones have diffusers' order of operations, so that the bits agree. Knows no family and no version:
gates, rope layouts and the number of modulation rows are read off modules and tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from ltxforge_kernels.adaln_rms_norm import adaln_rms_norm
from ltxforge_kernels.choice import Kernels
from ltxforge_kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_twice
from ltxforge_kernels.gelu import gelu
from ltxforge_kernels.qk_norm_rope import Rope, qk_norm_rope
from torch import Tensor, nn

from ltxforge.lora.linear import LoraLinear

Result = TypeVar("Result")


@dataclass(frozen=True)
class Modulation:
    """The time embedding of U distinct timesteps: `values` [U, K, D], K rows of shifts, scales and gates.

    `index` [B, T] says which of the U a token has; None means one per sample, U = B.
    """

    values: Tensor
    index: Tensor | None

    def table(self, learned: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """[U, K, D]: rows start to stop of a learned table [K, D] plus the embedding.

        `values` of one row (K = 1) are added to every row of the table.
        """
        values = self.values if self.values.shape[1] == 1 else self.values[:, start:stop]
        return learned[start:stop][None] + values

    def rows(self, learned: Tensor) -> list[Tensor]:
        """Each row of the table as something that broadcasts against [B, T, D]."""
        return [row[:, None] if self.index is None else row[self.index] for row in self.table(learned).unbind(dim=1)]


@dataclass(frozen=True)
class Shift:
    """How a norm's result is moved: y·(1 + row `scale`) + row `shift` of a table [U, K, D]; see `Modulation`."""

    table: Tensor
    index: Tensor | None
    shift: int
    scale: int


@dataclass(frozen=True)
class Gate:
    """What a branch is multiplied with before it is added: row `gate` of a table [U, K, D]; see `Modulation`."""

    table: Tensor
    index: Tensor | None
    gate: int


def distinct_timesteps(timesteps: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The timesteps to embed, [U], and each token's number among them, [B, T] int32, or None for one per sample.

    With first-frame conditioning a sample has T timesteps of two values; embedding them per token would cost K·T·D.
    Timesteps that lie on the host are told apart there, and go over without waiting for what the device has to do.
    """
    assert timesteps.dtype == torch.float32, f"timesteps must be float32, not {timesteps.dtype}"
    if timesteps.shape[1] == 1:
        return timesteps[:, 0].to(device, non_blocking=True), None
    distinct, index = timesteps.unique(return_inverse=True)
    return distinct.to(device, non_blocking=True), index.to(torch.int32).to(device, non_blocking=True)


def norm(module: nn.Module, hidden: Tensor, moved: Shift | None, kernels: Kernels) -> Tensor:
    """A block's RMSNorm of [B, T, D], moved by the modulation where there is one."""
    implementation = kernels.on("adaln_rms_norm", hidden.shape)
    return adaln_rms_norm(hidden, *_shift(moved), eps_of(module), implementation=implementation)


def add(hidden: Tensor, branch: Tensor, gate: Gate | None, kernels: Kernels) -> Tensor:
    """The residual stream [B, T, D] with a branch added, gated where it is."""
    implementation = kernels.on("gated_residual", hidden.shape)
    return gated_residual(hidden, branch, *_gate(gate), implementation=implementation)


def add_and_norm(
    hidden: Tensor, branch: Tensor, gate: Gate | None, module: nn.Module, moved: Shift | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """`add`, and `norm` of its result, in one pass."""
    implementation = kernels.on("gated_residual", hidden.shape)
    return gated_residual_norm(
        hidden, branch, *_gate(gate), *_shift(moved), eps_of(module), implementation=implementation
    )


def add_and_norm_twice(
    hidden: Tensor,
    branch: Tensor,
    gate: Gate | None,
    module: nn.Module,
    first: Shift,
    second: Shift,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_and_norm`, with the one norm moved twice, by rows of the same table."""
    assert first.table is second.table and first.index is second.index, "both are rows of one table"
    implementation = kernels.on("gated_residual", hidden.shape)
    rows = ((first.shift, first.scale), (second.shift, second.scale))
    return gated_residual_norm_twice(
        hidden, branch, *_gate(gate), first.table, first.index, *rows, eps_of(module), implementation=implementation
    )


def eps_of(module: nn.Module) -> float:
    """The eps of a block's norm, which has no weight in any LTX model."""
    assert module.weight is None, "norms of LTX blocks have no weight"
    return module.eps


def _shift(moved: Shift | None) -> tuple[Tensor | None, Tensor | None, int | None, int | None]:
    return (None,) * 4 if moved is None else (moved.table, moved.index, moved.shift, moved.scale)


def _gate(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, int | None]:
    return (None,) * 3 if gate is None else (gate.table, gate.index, gate.gate)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention over [B, T, H, K]; `bias` is added to the scores and broadcasts to [B, H, T, P]."""
    query, key, value = (tensor.permute(0, 2, 1, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).permute(0, 2, 1, 3)


def attention_forward(
    attn: nn.Module,
    hidden: Tensor,
    context: Tensor,
    kernels: Kernels,
    rope: Rope | None = None,
    bias: Tensor | None = None,
    context_rope: Rope | None = None,
) -> Tensor:
    """One attention of a block: project, normalise q and k over all heads, rotate, attend, gate, project back.

    Args:
        attn: diffusers' attention module; with `to_gate_logits` each head's result is scaled by 2·sigmoid(logit).
        hidden: the queries' side, [B, T, D].
        context: the keys' and values' side, [B, P, E].
        rope: for the queries, or None for no rotation (arXiv 2104.09864).
        bias: what is added to the scores, [B, 1, 1, P], or None.
        context_rope: for the keys, where they are not the queries' own tokens.
    """
    query, key = qk_norm_rope(
        attn.to_q(hidden),
        attn.to_k(context),
        attn.norm_q.weight,
        attn.norm_k.weight,
        rope,
        rope if context_rope is None else context_rope,
        attn.heads,
        attn.norm_q.eps,
        implementation=kernels.on("qk_norm_rope", hidden.shape),
    )
    query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, attn.to_v(context)))
    mixed = attend(query, key, value, bias).to(query.dtype)
    if (gate_logits := getattr(attn, "to_gate_logits", None)) is not None:
        mixed = mixed * (2.0 * torch.sigmoid(gate_logits(hidden))).unsqueeze(-1)
    return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3)))


def feed_forward(ff: nn.Module, hidden: Tensor, kernels: Kernels) -> Tensor:
    """A block's feed-forward, [B, T, D] → [B, T, D]: two linears around GELU (tanh).

    Where the second one has a LoRA, whose gradient needs GELU's result, that is computed again from what goes in.
    """
    first, dropout, second = ff.net
    before = first.proj(hidden)
    if isinstance(second, LoraLinear):
        return second(before, activation="gelu")
    return second(dropout(gelu(before, implementation=kernels.on("gelu", before.shape))))


def prompt_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for real tokens and −10000 for padding, [B, 1, 1, P] (heads and queries broadcast)."""
    return ((1 - mask.to(dtype)) * -10000.0)[:, None, None, :]


class RunBlock(Protocol):
    """How a forward calls each of its blocks: `run(number, forward, block, hidden, *shared)` gives what
    `forward(block, hidden, *shared)` gives.

    Memory strategies stand here: they may fetch the block's weights before, keep `hidden` elsewhere, and compute the
    block again in the backward pass. `hidden` is the residual stream, or a mapping of streams; `shared` is the same for
    every block.
    """

    def __call__(
        self, number: int, forward: Callable[..., Result], block: nn.Module, hidden: Any, *shared: Any
    ) -> Result: ...


def run_plainly(_number: int, forward: Callable[..., Result], block: nn.Module, hidden: Any, *shared: Any) -> Result:
    """Everything in its place: the block is called, and autograd keeps what it keeps."""
    return forward(block, hidden, *shared)
