"""Launches of GELU: what is allocated, which blocks, and the torch.library ops."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.gelu import kernel
from ltxforge_kernels.target import architecture, launching_on

# Triton 3.10 changes the default.
FUSED = {"enable_fp_fusion": True}


def gelu(x: Tensor) -> Tensor:
    """The op on a GPU."""
    return forward_op(x)


def launch_forward(x: Tensor) -> Tensor:
    """y, contiguous, in the shape and dtype of x."""
    return launch_rows(kernel.forward_kernel, "gelu.forward", x)


def launch_backward(upstream: Tensor, x: Tensor) -> Tensor:
    """∂/∂x, contiguous; `upstream` is y's gradient."""
    return launch_rows(kernel.backward_kernel, "gelu.backward", upstream, x)


def launch_rows(function: triton.JITFunction, name: str, *inputs: Tensor) -> Tensor:
    """A result in the shape of the last input, rows of all of them by the kernel."""
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    x = inputs[-1]
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    width = x.shape[-1] if x.ndim else 1
    chosen = configuration(name, architecture(x), x.dtype, width)
    block = min(chosen.blocks["BLOCK"], triton.next_power_of_2(width))
    options = {**chosen.options(), "BLOCK": block, **FUSED}
    with launching_on(x):
        function[(x.numel() // width, triton.cdiv(width, block))](*inputs, output, K=width, **options)
    return output


@torch.library.custom_op("ltxforge::gelu", mutates_args=())
def forward_op(x: Tensor) -> Tensor:
    return launch_forward(x)


@forward_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ltxforge::gelu_backward", mutates_args=())
def backward_op(upstream: Tensor, x: Tensor) -> Tensor:
    return launch_backward(upstream, x)


@backward_op.register_fake
def _(upstream: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
    return backward_op(upstream, *ctx.saved_tensors)


forward_op.register_autograd(gradient, setup_context=keep_for_gradient)
