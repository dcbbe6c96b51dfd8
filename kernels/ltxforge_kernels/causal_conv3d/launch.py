"""Launches of the causal convolution: the buffer of state and frames, which kernel, and the torch.library op.

The op has no backward pass. Which of the two kernels runs follows from the chip and the layer alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ltxforge_kernels.causal_conv3d import kernel
from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.target import INTERPRETER, architecture, launching_on

# Triton 3.10 changes the default.
FUSED = {"enable_fp_fusion": True}
# Hopper is the first with a tensor memory engine, which wants strides of whole 16 bytes.
FIRST_WITH_TILES = 90
TILE_ALIGNMENT = 16


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU."""
    return forward_op(x, weight, bias, state, residual, norm_eps)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """y and the new state, channels innermost in memory."""
    buffer = launch_buffer(x, state, weight.shape[2] - 1, norm_eps)
    kept = buffer[:, x.shape[2] :].clone(memory_format=torch.contiguous_format)
    y = launch_convolution(buffer, pixels_first(weight), bias, None if residual is None else pixels_first(residual))
    return channels_second(y), channels_second(kept)


def launch_buffer(x: Tensor, state: Tensor | None, before: int, norm_eps: float | None) -> Tensor:
    """[B, before + T, H, W, CI]: the state, then x, normed and activated where there is an eps."""
    x = pixels_first(x)
    clips, frames, height, width, channels = x.shape
    buffer = x.new_empty(clips, before + frames, height, width, channels)
    if norm_eps is None:
        buffer[:, before:] = x
    elif x.numel():
        launch_activation(x, buffer, norm_eps)
    buffer[:, :before] = buffer[:, before : before + 1] if state is None else pixels_first(state)
    return buffer


def launch_activation(x: Tensor, buffer: Tensor, eps: float) -> None:
    """Into the buffer's frames behind the state."""
    clips, frames, height, width, channels = x.shape
    pixels, picture = clips * frames * height * width, height * width
    chosen = configuration("causal_conv3d.activate", architecture(x), x.dtype, channels).options()
    grid = (triton.cdiv(pixels, chosen["PIXELS"]),)
    of_state = (buffer.shape[1] - frames) * picture
    channels_of = {"CI": channels, "CHANNELS": triton.next_power_of_2(channels)}
    with launching_on(x):
        kernel.activate_kernel[grid](
            x, buffer, pixels, frames * picture, of_state, eps, **channels_of, **chosen, **FUSED
        )


def launch_convolution(buffer: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y [B, T, H, W, CO] of a buffer [B, KT − 1 + T, H, W, CI] and a weight [CO, KT, KH, KW, CI]."""
    clips, whole, height, width, _ = buffer.shape
    y = buffer.new_empty(clips, whole - weight.shape[1] + 1, height, width, weight.shape[0])
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    by_tiles = has_tiles(buffer, weight)
    with launching_on(buffer):
        (launch_tiles if by_tiles else launch_pixels)(buffer, weight, bias, residual, y)
    return y


def has_tiles(buffer: Tensor, weight: Tensor) -> bool:
    """Whether the tensor memory engine is there and takes these channels; float32 would not reach tensor cores."""
    arch = architecture(buffer)
    is_aligned = all(size * buffer.element_size() % TILE_ALIGNMENT == 0 for size in (weight.shape[0], weight.shape[-1]))
    has_engine = arch == INTERPRETER or (isinstance(arch, int) and arch >= FIRST_WITH_TILES)
    return has_engine and is_aligned and buffer.dtype != torch.float32


def launch_tiles(buffer: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """By rectangles of a frame."""
    clips, frames, height, width, channels = y.shape
    chosen = configuration("causal_conv3d.tile", architecture(y), y.dtype, channels).options()
    rectangle = [1, chosen["ROWS"], chosen["COLUMNS"]]
    result = [*rectangle, chosen["OUT"]]
    descriptors = (
        TensorDescriptor.from_tensor(buffer.flatten(0, 1), [*rectangle, chosen["IN"]]),
        TensorDescriptor.from_tensor(weight.flatten(1), [chosen["OUT"], chosen["IN"]]),
        bias,
        None if residual is None else TensorDescriptor.from_tensor(residual.flatten(0, 1), result),
        TensorDescriptor.from_tensor(y.flatten(0, 1), result),
    )
    tiles = triton.cdiv(height, chosen["ROWS"]) * triton.cdiv(width, chosen["COLUMNS"])
    grid = (clips * frames * tiles, triton.cdiv(channels, chosen["OUT"]))
    kernel.tile_kernel[grid](*descriptors, frames, height, width, **layer(weight, bias, residual), **chosen, **FUSED)


def launch_pixels(buffer: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """By runs of pixels."""
    clips, frames, height, width, channels = y.shape
    chosen = configuration("causal_conv3d.pixel", architecture(y), y.dtype, channels).options()
    pixels = clips * frames * height * width
    grid = (triton.cdiv(pixels, chosen["PIXELS"]), triton.cdiv(channels, chosen["OUT"]))
    kernel.pixel_kernel[grid](
        buffer, weight, bias, residual, y, pixels, frames, height, width, **layer(weight, bias, residual), **chosen,
        **FUSED,
    )  # fmt: skip


def layer(weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> dict[str, int | bool]:
    """What a layer fixes: channels, the kernel's sizes, and what is added."""
    channels, *sizes, taken = weight.shape
    return {
        "CI": taken, "CO": channels, **dict(zip(("KT", "KH", "KW"), sizes, strict=True)),
        "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
    }  # fmt: skip


def pixels_first(tensor: Tensor) -> Tensor:
    """[a, c, …] as contiguous [a, …, c]; a copy only where memory is laid out otherwise."""
    return tensor.permute(0, 2, 3, 4, 1).contiguous()


def channels_second(tensor: Tensor) -> Tensor:
    """[a, …, c] seen as [a, c, …]."""
    return tensor.permute(0, 4, 1, 2, 3)


@torch.library.custom_op("ltxforge::causal_conv3d", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, weight, bias, state, residual, norm_eps)


@forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    clips, taken, frames, height, width = x.shape
    y = x.new_empty(clips, frames, height, width, weight.shape[0])
    kept = x.new_empty(clips, weight.shape[2] - 1, height, width, taken)
    return channels_second(y), channels_second(kept)
