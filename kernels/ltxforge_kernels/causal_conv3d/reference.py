"""Causal convolution in plain PyTorch: the definition.

Not widened to float32, other than elsewhere: PyTorch's convolution multiplies in the tensors' own dtype and sums in
float32 itself, and its bits are those that diffusers' encoders give. For the truth, pass float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxforge_kernels.precision import at_least_float32


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None = None,
    norm_eps: float | None = None,
    activate: Callable[[Tensor, float], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, CO, T, H, W] and the new state; arguments as in the op. `activate` stands in for `activated`."""
    if norm_eps is not None:
        x = (activate or activated)(x, norm_eps)
    before = weight.shape[2] - 1
    whole = after_state(x, state, before)
    y = F.conv3d(whole, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return y if residual is None else y + residual, last(whole, before)


def activated(x: Tensor, eps: float) -> Tensor:
    """SiLU of RMSNorm over the channels of each pixel, rounded once."""
    wide = at_least_float32(x)
    return F.silu(wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)


def after_state(x: Tensor, state: Tensor | None, before: int) -> Tensor:
    """[B, CI, before + T, H, W]: x after the state, or after copies of its first frame."""
    # Not `repeat`, whose result has channels outermost, and the whole with it.
    frames_before = [x[:, :, :1]] * before if state is None else [state]
    return torch.cat([*frames_before, x], dim=2)


def last(whole: Tensor, frames: int) -> Tensor:
    """The last frames, in memory of their own, so that they keep no chunk alive."""
    return whole[:, :, whole.shape[2] - frames :].clone()


def channels_last(tensor: Tensor) -> Tensor:
    """The same tensor of five dimensions with the second one innermost in memory; itself where that is so."""
    return tensor.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
