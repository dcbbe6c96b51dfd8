"""A frozen linear layer with a LoRA branch in plain PyTorch: the definition, in the order of operations of PEFT.

Computes in the dtype of x, the branch scaled last: in float32 to the bit what training without kernels computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: Tensor | None,  # noqa: ARG001
) -> Tensor:
    """[..., N]; arguments as in the op. W and B are read where they are at home, `augmented` is not."""
    if activation == "gelu":
        x = functional.gelu(x, approximate="tanh")
    return lora_branch(x, functional.linear(x, weight, bias), a, b, scale, kept, keep)


def lora_branch(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float
) -> Tensor:
    """[..., N]; arguments as in the op."""
    branch = functional.linear(dropped(x, kept, keep), a.to(x.dtype))
    return base + functional.linear(branch, b.to(x.dtype)) * scale


def dropped(x: Tensor, kept: Tensor | None, keep: float) -> Tensor:
    """x with dropout, as torch computes it on a CPU: the mask is divided before it multiplies."""
    return x if kept is None else x * (kept.to(x.dtype) / keep)


def draw_kept(x: Tensor, keep: float) -> Tensor:
    """Which of x's numbers dropout keeps, from torch's default generator; on a CPU what F.dropout would draw."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(keep)
