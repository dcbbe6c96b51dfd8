"""RMSNorm and adaptive modulation, with the step's shifts and scales in a table of distinct timesteps.

    y = x / sqrt(mean_d x² + eps)·(1 + table[u, scale]) + table[u, shift]        u = index[b, t], or b without an index

RMSNorm: arXiv 1910.07467, without a weight of its own, as in the transformers of LTX; modulation: DiT, arXiv
2212.09748. B samples, T tokens, D width, U distinct timesteps, K rows of shifts, scales and gates. Without a table it
is the norm alone. All arithmetic is float32, rounded once. Kept for the backward pass: x itself, and one number per
token.

Bytes moved, with N = B·T·D values of e bytes: forward reads x and writes y, 2·N·e; backward reads x and y's gradient
and writes x's, 3·N·e. Spread per token the table alone would be K·N·e.
"""

from __future__ import annotations

from torch import Tensor

from ltxforge_kernels.adaln_rms_norm import reference
from ltxforge_kernels.implementations import HAS_TRITON, pick

if HAS_TRITON:
    from ltxforge_kernels.adaln_rms_norm import launch
else:
    launch = None


def adaln_rms_norm(
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    eps: float = 1e-6,
    *,
    implementation: str,
) -> Tensor:
    """Normed and modulated tokens [B, T, D], in the dtype of `hidden`; differentiable in `hidden` and `table`.

    Args:
        hidden: [B, T, D].
        table: [U, K, D], the learned rows plus the embedding of each distinct timestep; None for the norm alone.
        index: [B, T], which of the U a token has; None where each sample has its own, U = B.
        shift: which of the K rows is added; None without a table.
        scale: which of the K rows, plus one, multiplies; None without a table.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_tokens("hidden", hidden)
    require_table("table", table, index, (shift, scale), hidden)
    norm = pick(implementation, reference.adaln_rms_norm, launch and launch.adaln_rms_norm)
    return norm(hidden, table, index, shift, scale, eps)


def require_tokens(name: str, tokens: Tensor) -> None:
    """Refuse what are no tokens, or tokens of no width."""
    if tokens.ndim != 3 or tokens.shape[2] == 0:
        raise ValueError(f"{name} is [B, T, D] and not empty in D, not {list(tokens.shape)}")


def require_table(
    name: str, table: Tensor | None, index: Tensor | None, rows: tuple[int | None, ...], hidden: Tensor
) -> None:
    """Refuse what would broadcast or read beside the table: it is a mistake of the caller."""
    batch, tokens, width = hidden.shape
    if table is None:
        if index is not None or rows.count(None) != len(rows):
            raise ValueError(f"without a {name} there are no rows {rows} of it, and no index into it")
        return
    if table.ndim != 3 or table.shape[2] != width:
        raise ValueError(f"{name} is {list(table.shape)}, not [U, K, {width}]")
    if not all(row is not None and 0 <= row < table.shape[1] for row in rows):
        raise ValueError(f"rows {rows} are not all among the {table.shape[1]} of {name}")
    if index is None and table.shape[0] != batch:
        raise ValueError(f"without an index {name} holds one timestep per sample, {batch}, not {table.shape[0]}")
    if index is not None and index.shape != (batch, tokens):
        raise ValueError(f"the index into {name} is {list(index.shape)}, not [{batch}, {tokens}]")
