"""The bench's view of `causal_conv3d`: one convolution of an encoder over a chunk of a clip. Peers: cuDNN's layouts.

The peers get frames with their state already in front, so that what is timed of them is the convolution alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ltxforge_kernels.causal_conv3d import causal_conv3d
from ltxforge_kernels.causal_conv3d.inputs import ConvShape, Inputs, inputs
from torch import Tensor
from torch.nn import functional

from ltxforge.benchmarks.subject import Contender, Outputs, Subject, Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

KERNEL = 3
PADDING = (0, 1, 1)


@dataclass(frozen=True)
class Prepared:
    """State and frames in one tensor, and the weight, both in the layout to be timed."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """A chunk that is not the first, without a residual."""
    frames, height, width = case.extent
    shape = ConvShape(case.width, case.out, frames, height, width, clips=case.batch, kernel=KERNEL)
    dtype = torch_dtype(case.dtype)
    pixels = case.batch * frames * height * width

    def ours(implementation: str) -> Contender:
        def call(given: Inputs) -> Outputs:
            return causal_conv3d(given.x, given.weight, given.bias, given.state, implementation=implementation)

        return Contender(call)

    values = pixels * (case.width + case.out) + KERNEL**3 * case.width * case.out
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype, residual=False),
        ours=ours,
        work=Work(values * dtype.itemsize, 2 * KERNEL**3 * pixels * case.width * case.out, f"{case.dtype} matmul"),
        peers={
            "cuDNN NCDHW": lambda: _layout(torch.contiguous_format),
            "cuDNN NDHWC": lambda: _layout(torch.channels_last_3d),
            "cuDNN NDHWC, benchmark": lambda: _layout(torch.channels_last_3d, benchmark=True),
            "three conv2d": lambda: Contender(three_conv2d, lambda given: _prepare(given, torch.channels_last_3d)),
        },
    )


def _layout(layout: torch.memory_format, *, benchmark: bool = False) -> Contender:
    """PyTorch's convolution in a layout; with cuDNN's own search for an algorithm or without."""

    def call(prepared: Prepared) -> Tensor:
        if not benchmark:
            return functional.conv3d(prepared.x, prepared.weight, prepared.bias, padding=PADDING)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return functional.conv3d(prepared.x, prepared.weight, prepared.bias, padding=PADDING)

    return Contender(call, lambda given: _prepare(given, layout))


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
