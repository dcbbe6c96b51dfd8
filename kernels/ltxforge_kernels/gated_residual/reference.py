"""Gated residual and the next norm in plain PyTorch: the definition, in float32 whatever comes in."""

from __future__ import annotations

from torch import Tensor

from ltxforge_kernels.adaln_rms_norm.reference import adaln_rms_norm, modulated, rms_norm, spread
from ltxforge_kernels.precision import at_least_float32


def gated_residual(
    hidden: Tensor, branch: Tensor, gates: Tensor | None, gate_index: Tensor | None, gate: int | None
) -> Tensor:
    """x' [B, T, D]; arguments as in the op."""
    return unrounded(hidden, branch, gates, gate_index, gate).to(hidden.dtype)


def gated_residual_norm(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x' and y, [B, T, D]; arguments as in the op."""
    total = unrounded(hidden, branch, gates, gate_index, gate)
    normed = adaln_rms_norm(total, table, index, shift, scale, eps)
    return total.to(hidden.dtype), normed.to(hidden.dtype)


def gated_residual_norm_twice(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor,
    index: Tensor | None,
    first: tuple[int, int],
    second: tuple[int, int],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', y and z, [B, T, D]; arguments as in the op. One norm, so that both gradients meet before they go through."""
    total = unrounded(hidden, branch, gates, gate_index, gate)
    normed = rms_norm(total, eps)
    y, z = (modulated(normed, table, index, *rows).to(hidden.dtype) for rows in (first, second))
    return total.to(hidden.dtype), y, z


def unrounded(
    hidden: Tensor, branch: Tensor, gates: Tensor | None, gate_index: Tensor | None, gate: int | None
) -> Tensor:
    """x' in float32, or float64 where that comes in."""
    added = at_least_float32(branch)
    if gates is not None:
        added = added * spread(gates, gate_index, gate)
    return at_least_float32(hidden) + added
