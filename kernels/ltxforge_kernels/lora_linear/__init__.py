"""A frozen linear layer with a LoRA branch, forward and backward: one read of x beside the large matrix product.

    y = act(x)·Wᵀ + bias + scale·B·A·dropout(act(x))                lora_linear
    y = base + scale·B·A·dropout(x)                                 lora_branch, for a base that is quantised

LoRA: arXiv 2106.09685. x [..., K], W [N, K], A [R, K], B [N, R], act the identity or GELU (tanh), dropout on the
branch alone by a mask that is given. A and B are float32 masters, rounded to the dtype of x at use; W and bias are
frozen. With `augmented` = [W | B | 0] (`augmented.py`) the branch rides inside the base's own matrix product, is
summed with it in float32 and rounded once; without, it is added to a base that was rounded before.

Bytes moved beside the matrix product, with S rows and e bytes a number: with `augmented` forward packs [x | h], 2·S·K·e
(with GELU that is the activation's own traffic); without, it reads x and adds to y, S·(K + 2·N)·e. Backward reads the
base's ∂/∂x and x and writes ∂/∂x, 3·S·K·e, and reads ∂/∂y once, S·N·e. Kept for backward: x as it came, the mask and
h [S, R]; with GELU never act(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.choice import HIGHEST_LORA_RANK
from ltxforge_kernels.implementations import HAS_TRITON, pick
from ltxforge_kernels.lora_linear import reference
from ltxforge_kernels.lora_linear.augmented import augment, refresh, tail_width
from ltxforge_kernels.lora_linear.reference import draw_kept

if HAS_TRITON:
    from ltxforge_kernels.lora_linear import launch
else:
    launch = None

__all__ = ["lora_linear", "lora_branch", "augment", "refresh", "tail_width", "draw_kept"]

ACTIVATIONS = ("none", "gelu")


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None = None,
    keep: float = 1.0,
    activation: str = "none",
    augmented: Tensor | None = None,
    *,
    implementation: str,
) -> Tensor:
    """y [..., N] in x's dtype; differentiable in x, a and b, whose gradients have their own dtype.

    Args:
        x: [..., K]; with "gelu" what comes before the activation.
        weight: [N, K], in x's dtype, frozen; a view of `augmented` where that is given.
        bias: [N] in x's dtype, frozen, or None.
        a: [R, K], R at most `HIGHEST_LORA_RANK` with "triton".
        b: [N, R].
        scale: of the branch, alpha / R or what PEFT says.
        kept: bool [..., K], what dropout keeps (`draw_kept`); None without dropout.
        keep: the probability that it keeps, 1 − p.
        activation: "none" or "gelu".
        augmented: [N, K + tail], W with B behind it, refreshed since B last changed. The eager and compiled
            implementations read `weight` and `b` instead.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_branch(x, a, b, kept, keep, implementation)
    require_frozen(x, weight, bias, b, augmented)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    linear = pick(implementation, reference.lora_linear, launch and launch.lora_linear)
    return linear(x, weight, bias, a, b, scale, kept, keep, activation, augmented)


def lora_branch(
    x: Tensor,
    base: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None = None,
    keep: float = 1.0,
    *,
    implementation: str,
) -> Tensor:
    """base + scale·B·A·dropout(x), [..., N]; differentiable in x, base, a and b. Arguments as in `lora_linear`."""
    require_branch(x, a, b, kept, keep, implementation)
    if base.shape != (*x.shape[:-1], b.shape[0]) or base.dtype != x.dtype:
        wanted = [*x.shape[:-1], b.shape[0]]
        raise ValueError(f"base is {list(base.shape)} of {base.dtype}, not {wanted} of {x.dtype}")
    branch = pick(implementation, reference.lora_branch, launch and launch.lora_branch)
    return branch(x, base, a, b, scale, kept, keep)


def require_branch(x: Tensor, a: Tensor, b: Tensor, kept: Tensor | None, keep: float, implementation: str) -> None:
    """Refuse what would broadcast or read beside a tensor: it is a mistake of the caller."""
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x is [..., K] and not empty in K, not {list(x.shape)}")
    if a.ndim != 2 or a.shape[1] != x.shape[-1] or a.shape[0] == 0:
        raise ValueError(f"a is {list(a.shape)}, not [R, {x.shape[-1]}]")
    if implementation == "triton" and a.shape[0] > HIGHEST_LORA_RANK:
        raise ValueError(f"the kernel takes a rank of {HIGHEST_LORA_RANK} at most, not {a.shape[0]}: choose eager")
    if b.ndim != 2 or b.shape[1] != a.shape[0] or b.shape[0] == 0:
        raise ValueError(f"b is {list(b.shape)}, not [N, {a.shape[0]}]")
    if kept is not None and (kept.shape != x.shape or kept.dtype != torch.bool):
        raise ValueError(f"kept is {list(kept.shape)} of {kept.dtype}, not {list(x.shape)} of torch.bool")
    if not 0 < keep <= 1:
        raise ValueError(f"dropout keeps with probability {keep}, which is not in (0, 1]")


def require_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, augmented: Tensor | None) -> None:
    """A gradient of W or bias, which nobody computes, is refused and not dropped."""
    outward, inward = b.shape[0], x.shape[-1]
    if weight.shape != (outward, inward) or weight.dtype != x.dtype:
        raise ValueError(f"weight is {list(weight.shape)} of {weight.dtype}, not {[outward, inward]} of {x.dtype}")
    if bias is not None and (bias.shape != (outward,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {list(bias.shape)} of {bias.dtype}, not [{outward}] of {x.dtype}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen: nothing computes their gradients")
    if augmented is None:
        return
    wanted = (outward, inward + tail_width(b.shape[1]))
    if augmented.shape != wanted or augmented.dtype != x.dtype or augmented.requires_grad:
        raise ValueError(f"augmented is {list(augmented.shape)} of {augmented.dtype}, not frozen {list(wanted)}")
