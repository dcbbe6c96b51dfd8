"""GELU by its tanh approximation (arXiv 1606.08415), as the feed-forwards of both families use it.

    y = x/2·(1 + tanh u)        u = √(2/π)·(x + 0.044715·x³)

Kept for the backward pass: x alone, what the linear layer before it gives; the activation is computed again. All
arithmetic is float32, rounded once.

Bytes moved, with N = values of e bytes: forward reads x and writes y, 2·N·e; backward reads x and y's gradient and
writes x's, 3·N·e.
"""

from __future__ import annotations

from torch import Tensor

from ltxforge_kernels.gelu import reference
from ltxforge_kernels.implementations import HAS_TRITON, pick

if HAS_TRITON:
    from ltxforge_kernels.gelu import launch
else:
    launch = None


def gelu(x: Tensor, *, implementation: str) -> Tensor:
    """The activation, in the shape and dtype of `x`; differentiable.

    Args:
        x: [..., K].
        implementation: "triton", "compile" or "eager", from the plan.
    """
    return pick(implementation, reference.gelu, launch and launch.gelu)(x)
