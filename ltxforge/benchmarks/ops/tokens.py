"""What the ops over tokens share in the bench: shapes, traffic, modulation spread per token as in diffusers."""

from __future__ import annotations

import torch
from ltxforge_kernels.cases import TokenShape
from torch import Tensor

from ltxforge.benchmarks.subject import Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def shape_of(case: KernelCase) -> TokenShape:
    """B samples of T tokens, D wide."""
    return TokenShape(case.name, case.batch, case.tokens, case.width)


def traffic(case: KernelCase, forward: int, backward: int) -> Work:
    """Work of an op that reads and writes so many tensors of N = B·T·D values, forward and backward."""
    tensors = {"forward": forward, "backward": backward, "both": forward + backward}[case.timed]
    return Work(tensors * case.batch * case.tokens * case.width * torch_dtype(case.dtype).itemsize)


def per_token(table: Tensor, index: Tensor | None, hidden: Tensor) -> Tensor:
    """[B, T, K·D]: the embedding of its own timestep for every token, before the learned rows are added to it."""
    batch, tokens, _ = hidden.shape
    rows = table if index is None else table[index]
    if index is None:
        rows = rows[:, None].expand(-1, tokens, -1, -1)
    return rows.reshape(batch, tokens, -1).contiguous()


def spread_rows(learned: Tensor, embedded: Tensor) -> tuple[Tensor, ...]:
    """The K rows [B, T, D] of every token: learned [K, D] plus embedded [B, T, K·D]."""
    batch, tokens, _ = embedded.shape
    return (learned[None, None] + embedded.reshape(batch, tokens, len(learned), -1)).unbind(dim=2)


def learned_of(table: Tensor) -> Tensor:
    """Learned rows [K, D] that add nothing: the table holds the sums already."""
    return torch.zeros_like(table[0])
