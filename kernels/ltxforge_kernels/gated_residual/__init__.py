"""A branch back onto the residual stream, with its gate; and in the same pass the next norm, modulated once or twice.

    x' = x + a·gates[v, gate]                                       v = gate_index[b, t], or b without an index
    n = x' / sqrt(mean_d x'² + eps)
    y = n·(1 + table[u, scale]) + table[u, shift]                                        as `adaln_rms_norm`
    z = n·(1 + table[u, second scale]) + table[u, second shift]

Gates and modulation: DiT, arXiv 2212.09748; twice where a stream asks another one and answers it, as sound and video in
LTX-2. Without gates it is x + a; without a table y is the norm alone. The two tables may be of different timesteps: V
and U. All arithmetic is float32, y's and z's from the sum before that is rounded. Kept for the backward pass: x', one
number per token, and a only where the gates learn.

Bytes moved, with N = B·T·D values of e bytes: forward reads x and a and writes x' and y, 4·N·e; backward reads both
gradients and x' and writes the gradients of x and a, 5·N·e. Apart, forward takes 3 + 2 and backward 3 + 3 + 2. z adds
one to each; by a norm of its own it would add 2 forward, and backward 3 + 3 with the sum.
"""

from __future__ import annotations

from torch import Tensor

from ltxforge_kernels.adaln_rms_norm import require_table, require_tokens
from ltxforge_kernels.gated_residual import reference
from ltxforge_kernels.implementations import HAS_TRITON, pick

if HAS_TRITON:
    from ltxforge_kernels.gated_residual import launch
else:
    launch = None


def gated_residual(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    *,
    implementation: str,
) -> Tensor:
    """x' [B, T, D], in the dtype of `hidden`; differentiable in `hidden`, `branch` and `gates`.

    Args:
        hidden: x [B, T, D].
        branch: a [B, T, D], what attention or a feed-forward gives.
        gates: [V, K, D], the learned rows plus the embedding of each distinct timestep; None for x + a.
        gate_index: [B, T], which of the V a token has; None where each sample has its own, V = B.
        gate: which of the K rows multiplies; None without gates.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_fit(hidden, branch, gates, gate_index, gate)
    add = pick(implementation, reference.gated_residual, launch and launch.gated_residual)
    return add(hidden, branch, gates, gate_index, gate)


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
    *,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """x' and y, both [B, T, D] in the dtype of `hidden`; differentiable in `hidden`, `branch`, `gates` and `table`.

    Arguments as in `gated_residual`, then those of `adaln_rms_norm` for x'.
    """
    require_fit(hidden, branch, gates, gate_index, gate)
    require_table("table", table, index, (shift, scale), hidden)
    add = pick(implementation, reference.gated_residual_norm, launch and launch.gated_residual_norm)
    return add(hidden, branch, gates, gate_index, gate, table, index, shift, scale, eps)


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
    *,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', y and z, all [B, T, D] in the dtype of `hidden`; differentiable as in `gated_residual_norm`.

    Args:
        first: (shift, scale), the rows of the table that modulate y.
        second: (shift, scale), those that modulate z.

    The others are those of `gated_residual_norm`; a table there must be.
    """
    require_fit(hidden, branch, gates, gate_index, gate)
    if table is None:
        raise ValueError("without a table y and z are the same: gated_residual_norm gives it")
    require_table("table", table, index, (*first, *second), hidden)
    add = pick(implementation, reference.gated_residual_norm_twice, launch and launch.gated_residual_norm_twice)
    return add(hidden, branch, gates, gate_index, gate, table, index, first, second, eps)


def require_fit(
    hidden: Tensor, branch: Tensor, gates: Tensor | None, gate_index: Tensor | None, gate: int | None
) -> None:
    """Refuse what would broadcast or read beside the gates: it is a mistake of the caller."""
    require_tokens("hidden", hidden)
    if branch.shape != hidden.shape or branch.dtype != hidden.dtype:
        raise ValueError(
            f"branch is {list(branch.shape)} {branch.dtype}, not {list(hidden.shape)} {hidden.dtype} as hidden"
        )
    require_table("gates", gates, gate_index, (gate,), hidden)
