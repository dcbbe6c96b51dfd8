"""The bench's view of `causal_conv3d`: one convolution of an encoder over a chunk of a clip. Peers: cuDNN's layouts.

The peers of the convolution alone get frames with their state already in front, so that nothing else is timed of them.
Those of norm, SiLU, padding and convolution do all of it, as diffusers does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
from ltxforge_kernels.causal_conv3d import causal_conv3d
from ltxforge_kernels.causal_conv3d.inputs import ConvShape, Inputs, inputs
from torch import Tensor
from torch.nn import functional

from ltxforge.benchmarks.subject import Bounds, Contender, Outputs, Subject, Work, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

KERNEL = 3
PADDING = (0, 1, 1)
EPS = 1e-6
NORM = PerChannelRMSNorm(eps=EPS)
# cuDNN's layouts, with its own search for an algorithm or without.
LAYOUTS = {
    "cuDNN NCDHW": (torch.contiguous_format, False),
    "cuDNN NDHWC": (torch.channels_last_3d, False),
    "cuDNN NDHWC, benchmark": (torch.channels_last_3d, True),
}


@dataclass(frozen=True)
class Prepared:
    """State and frames in one tensor, and the weight, both in the layout to be timed."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class InParts:
    """Frames before norm and SiLU, the state, which is behind them, and the weight, all in the layout to be timed."""

    x: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor


def subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """A chunk that is not the first, without a residual."""
    peers = {
        name: lambda settings=settings: _layout(convolve, _prepare, *settings) for name, settings in LAYOUTS.items()
    }
    return _subject(
        case,
        None,
        peers
        | {
            "torch.compile": lambda: compiled(_layout(convolve, _prepare, torch.channels_last_3d)),
            "three conv2d": lambda: Contender(three_conv2d, lambda given: _prepare(given, torch.channels_last_3d)),
        },
        Bounds(),
    )


def activated_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """The same after RMSNorm and SiLU, as in a residual block."""
    peers = {name: lambda settings=settings: _layout(chain, _parts, *settings) for name, settings in LAYOUTS.items()}
    # What is convolved was rounded once before.
    bounds = Bounds(output=2.6e-3) if case.dtype == "bf16" else Bounds()
    whole = {"torch.compile": lambda: compiled(_layout(chain, _parts, torch.channels_last_3d))}
    return _subject(case, EPS, peers | whole, bounds)


def _subject(
    case: KernelCase, norm_eps: float | None, peers: dict[str, Callable[[], Contender]], bounds: Bounds
) -> Subject:
    frames, height, width = case.extent
    shape = ConvShape(case.width, case.out, frames, height, width, clips=case.batch, kernel=KERNEL)
    dtype = torch_dtype(case.dtype)
    pixels = case.batch * frames * height * width

    def ours(implementation: str) -> Contender:
        def call(given: Inputs) -> Outputs:
            operands = (given.x, given.weight, given.bias, given.state)
            return causal_conv3d(*operands, norm_eps=norm_eps, implementation=implementation)

        return Contender(call)

    values = pixels * (case.width + case.out) + KERNEL**3 * case.width * case.out
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype, residual=False),
        ours=ours,
        work=Work(values * dtype.itemsize, 2 * KERNEL**3 * pixels * case.width * case.out, f"{case.dtype} matmul"),
        peers=peers,
        bounds=bounds,
    )


def _layout(
    call: Callable[[Any], Tensor],
    prepare: Callable[[Inputs, torch.memory_format], Any],
    layout: torch.memory_format,
    benchmark: bool = False,
) -> Contender:
    """PyTorch's convolution, or what holds one, in a layout; with cuDNN's own search for an algorithm or without."""

    def searched(prepared: Any) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return call(prepared)

    return Contender(searched if benchmark else call, lambda given: prepare(given, layout))


def convolve(prepared: Prepared) -> Tensor:
    """The convolution alone."""
    return functional.conv3d(prepared.x, prepared.weight, prepared.bias, padding=PADDING)


def chain(given: InParts) -> Tensor:
    """Norm, SiLU, the state in front, and the convolution, as diffusers' blocks have them."""
    whole = torch.cat((given.state, functional.silu(NORM(given.x))), dim=2)
    return functional.conv3d(whole, given.weight, given.bias, padding=PADDING)


def _parts(given: Inputs, layout: torch.memory_format) -> InParts:
    return InParts(
        *(each.contiguous(memory_format=layout) for each in (given.x, given.state, given.weight)), given.bias
    )


def _prepare(given: Inputs, layout: torch.memory_format) -> Prepared:
    whole = torch.cat((given.state, given.x), dim=2)
    return Prepared(whole.contiguous(memory_format=layout), given.weight.contiguous(memory_format=layout), given.bias)


def three_conv2d(prepared: Prepared) -> Tensor:
    """The same by a convolution of pictures for each frame of the kernel: [B·T, C, H, W], summed over time."""
    batch, channels, frames, height, width = prepared.x.shape
    kept, result = frames - KERNEL + 1, None
    for step in range(KERNEL):
        pictures = prepared.x[:, :, step : step + kept].transpose(1, 2).reshape(-1, channels, height, width)
        bias = prepared.bias if step == 0 else None
        part = functional.conv2d(pictures, prepared.weight[:, :, step], bias, padding=PADDING[1:])
        result = part if result is None else result + part
    return result.unflatten(0, (batch, kept)).transpose(1, 2)
