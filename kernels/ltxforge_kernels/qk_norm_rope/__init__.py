"""RMSNorm of queries and keys over all heads, and their rotation, of both in one launch.

    n = x / sqrt(mean_d x² + eps)·weight            (c, s) the cosine and sine of a pair of numbers' angle at a token
    y₁ = n₁·c − n₂·s                                y₂ = n₂·c + n₁·s

RMSNorm: arXiv 1910.07467; rotation: RoFormer, arXiv 2104.09864; which numbers are a pair, and what is not turned: see
`Rope`. B samples, T queries, P keys, D = H·K. The kernels compute in float32 and round once; eager keeps the order of
diffusers, which rounds between norm and rotation. Kept for the backward pass: query and key, and one number per token.

Bytes moved, with N = B·T·D values of e bytes for each of q and k: forward reads and writes both, 4·N·e; backward reads
query, key and both gradients and writes two, 6·N·e. Tables are `Rope`'s, which caches hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.adaln_rms_norm import require_tokens
from ltxforge_kernels.implementations import HAS_TRITON, pick
from ltxforge_kernels.qk_norm_rope import reference
from ltxforge_kernels.qk_norm_rope.rope import Rope

if HAS_TRITON:
    from ltxforge_kernels.qk_norm_rope import launch
else:
    launch = None


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_rope: Rope | None,
    key_rope: Rope | None,
    heads: int,
    eps: float,
    *,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """q [B, T, D] and k [B, P, D] in the dtypes of `query` and `key`; differentiable in these two.

    Args:
        query: [B, T, D].
        key: [B, P, D].
        query_weight: the norm's, [D], frozen; None for a norm without.
        key_weight: as `query_weight`.
        query_rope: tables of T tokens; None for the norm alone.
        key_rope: tables of P tokens, with pairs laid out as the queries'; None for the norm alone.
        heads: H, which divides D.
        eps: the norms'.
        implementation: "triton", "compile" or "eager", from the plan. Weights have gradients in the last two alone.
    """
    require_fit(query, key, query_rope, key_rope, heads)
    require_weights(query, query_weight, key_weight, implementation)
    norm = pick(implementation, reference.qk_norm_rope, launch and launch.qk_norm_rope)
    return norm(query, key, query_weight, key_weight, query_rope, key_rope, heads, eps)


def require_fit(query: Tensor, key: Tensor, query_rope: Rope | None, key_rope: Rope | None, heads: int) -> None:
    """Refuse what would broadcast or read beside the tables: it is a mistake of the caller."""
    ropes = {"query": query_rope, "key": key_rope}
    for name, tokens in (("query", query), ("key", key)):
        require_tokens(name, tokens)
        if tokens.shape[2] != query.shape[2] or tokens.shape[2] % heads:
            raise ValueError(f"{name} is {tokens.shape[2]} wide, not {query.shape[2]} of {heads} heads")
        rope = ropes[name]
        if rope is not None and (rope.tokens, rope.width) != tuple(tokens.shape[1:]):
            raise ValueError(f"the rope of {name} is of {rope.tokens} x {rope.width}, not {list(tokens.shape[1:])}")
        if rope is not None and rope.heads not in (None, heads):
            raise ValueError(f"the rope of {name} is of {rope.heads} heads, not {heads}")
    if query_rope is not None and key_rope is not None and query_rope.layout != key_rope.layout:
        raise ValueError(f"query's pairs are {query_rope.layout} and key's {key_rope.layout}")


def require_weights(query: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, implementation: str) -> None:
    """Refuse weights of another shape, and, rather than drop it, a gradient that the kernels do not compute."""
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is None:
            continue
        if weight.shape != query.shape[2:]:
            raise ValueError(f"{name} is {list(weight.shape)}, not {list(query.shape[2:])}")
        if implementation == "triton" and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} wants a gradient, which the triton implementation has not: choose eager")
