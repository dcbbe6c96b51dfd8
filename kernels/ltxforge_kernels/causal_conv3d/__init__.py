"""Convolution over time and space that is causal in time, a piece of a clip after the other: what VAE encoders are of.

    y[t, h, w, o] = bias[o] + Σ weight[o, i, a, b, c]·x'[t + a, h + b − ⌊KH/2⌋, w + c − ⌊KW/2⌋, i]  (+ residual)

x' is the state, KT − 1 frames, followed by x; beyond the picture's edges it is 0. The new state is the last KT − 1
frames of x', so that pieces of a clip give the frames that the clip gives at once. At a clip's start (state None) the
first frame stands in for those before it, as in diffusers' LTXVideoCausalConv3d. Stride 1, odd kernels.

With `norm_eps` x is normed and passed through SiLU on its way, x / sqrt(mean_i x² + eps) over the channels of each
pixel, as in front of every convolution of a residual block; the state then holds frames as they are convolved.

B clips, CI channels in, CO out, T frames of H · W pixels; kernel KT · KH · KW. Values are multiplied in their own dtype
and summed in float32. Bytes moved, with N = B·T·H·W pixels of e bytes a value: N·(CI + CO)·e and the weight, if each
pixel is read once; a buffer of state and frames adds 2·N·CI·e, with the norm in it.

Encoding only: there is no backward pass, and asking for a gradient is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ltxforge_kernels.causal_conv3d import reference
from ltxforge_kernels.implementations import HAS_TRITON, pick

if HAS_TRITON:
    from ltxforge_kernels.causal_conv3d import launch
else:
    launch = None


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm_eps: float | None = None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """y [B, CO, T, H, W] and the new state [B, CI, KT − 1, H, W], in the dtype of x.

    Shapes are those of `torch.nn.functional.conv3d`; triton wants channels innermost in memory (`channels_last_3d`),
    copies what is not, and returns its results so.

    Args:
        x: [B, CI, T, H, W], T at least 1.
        weight: [CO, CI, KT, KH, KW], odd; packed by `pack` once, triton copies it no more.
        bias: [CO], or None.
        state: what the call for the frames before these gave; None at the clip's start.
        residual: [B, CO, T, H, W], added to y.
        norm_eps: RMSNorm over channels and SiLU come first; None for none.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_fit(x, weight, bias, state, residual)
    if implementation == "compile":
        return reference.causal_conv3d(x, weight, bias, state, residual, norm_eps, compiled_activation())
    convolve = pick(implementation, reference.causal_conv3d, launch and launch.causal_conv3d)
    return convolve(x, weight, bias, state, residual, norm_eps)


@functools.cache
def compiled_activation() -> Callable[[Tensor, float], Tensor]:
    """Norm and SiLU compiled once for all layers.

    Not the convolution, which is the library's either way, but would cost a compilation per layer and chunk.
    """
    return torch.compile(reference.activated, fullgraph=True, dynamic=True)


def pack(weight: Tensor) -> Tensor:
    """The same weight [CO, CI, KT, KH, KW], with channels innermost in memory: [CO, KT, KH, KW, CI]. Shape unchanged.

    Gives the weight itself where it is packed already.
    """
    return reference.channels_last(weight)


def require_fit(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, residual: Tensor | None) -> None:
    """Refuse what would broadcast, read beside a tensor or lose a gradient: it is a mistake of the caller."""
    tensors = {"x": x, "weight": weight, "bias": bias, "state": state, "residual": residual}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if x.ndim != 5 or 0 in x.shape[1:]:
        raise ValueError(f"x is [B, CI, T, H, W] with frames of pixels, not {list(x.shape)}")
    if weight.ndim != 5 or any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight is [CO, CI, KT, KH, KW] with odd sizes, not {list(weight.shape)}")
    clips, _, frames, height, width = x.shape
    channels, taken, before = weight.shape[0], weight.shape[1], weight.shape[2] - 1
    expected = {
        "x": (clips, taken, frames, height, width),
        "bias": (channels,),
        "state": (clips, taken, before, height, width),
        "residual": (clips, channels, frames, height, width),
    }
    for name, shape in expected.items():
        if name in given and given[name].shape != shape:
            raise ValueError(f"{name} is {list(given[name].shape)}, not {list(shape)}")
    if len({tensor.dtype for tensor in given.values()}) > 1:
        kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise ValueError(f"one dtype for all, not {kinds}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
        raise RuntimeError("causal_conv3d has no gradient: clips are encoded under torch.no_grad()")
