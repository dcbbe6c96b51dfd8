"""The video VAEs' encoders over a clip in chunks: the whole clip's latents, in memory that no clip's length adds to.

Own forward over the modules of diffusers' encoders of both families. It is exact: every convolution is causal and every
norm is per pixel, so all that a chunk needs of those before it is the last frames that each convolution was given.
Decides the chunk and what it costs; the order of operations is diffusers', so that a clip of one chunk has its bits.
Knows no version: blocks, strides and padding are read off the modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from ltxforge_kernels.causal_conv3d import causal_conv3d, pack
from ltxforge_kernels.causal_conv3d.reference import after_state, last
from ltxforge_kernels.choice import EAGER, Implementation, Kernels
from torch import Tensor, nn

from ltxforge.shapes import is_legal_frames, is_legal_side

VideoVae = AutoencoderKLLTXVideo | AutoencoderKLLTX2Video

# Frames of a chunk; the first one has one more. A multiple of every VAE's temporal factor. By count of live tensors in
# bf16 at 768x512, eager: 0.97 GB above the weights for 0.9.0 and 0.9.1, 1.18 for 0.9.5 and 2.0, 1.12 for 2.3, where 24
# frames take up to 1.55. Workspaces inside a convolution come on top.
CHUNK_FRAMES = 16


@torch.no_grad()
def stream_encode(
    vae: VideoVae, frames: Tensor, device: torch.device, kernels: Kernels = EAGER, chunk: int = CHUNK_FRAMES
) -> Iterator[DiagonalGaussianDistribution]:
    """The posterior of each chunk of a clip, mean and std [1, C, f, Y, X], on the device; joined along f the clip's.

    Args:
        vae: its encoder's convolutions are packed in place if any of them may be other than eager.
        frames: uint8 [N, height, width, 3], N = 8k + 1, anywhere: a chunk of them is on the device at a time.
        kernels: which implementation each convolution has, by the pixels and channels that it reads.
        chunk: frames per chunk, a multiple of the VAE's temporal factor.
    """
    count, height, width, channels = frames.shape
    assert frames.dtype == torch.uint8 and channels == 3, "frames are uint8 [N, height, width, 3]"
    assert is_legal_frames(count, vae.temporal_compression_ratio), f"{count} frames are not 8k + 1"
    factor = vae.spatial_compression_ratio
    assert all(is_legal_side(side, factor) for side in (height, width)), (
        f"{height} and {width} are not multiples of {factor}"
    )
    assert chunk > 0 and chunk % vae.temporal_compression_ratio == 0, f"chunks of {chunk} frames split a latent frame"
    stream = EncoderStream(vae, kernels)
    for part in (frames[: 1 + chunk], *frames[1 + chunk :].split(chunk)):
        if len(part):
            yield DiagonalGaussianDistribution(stream.encode(to_pixels(part, device, vae.dtype)))


def to_pixels(frames: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 frames [N, height, width, 3] to [1, 3, N, height, width] in [-1, 1]."""
    return (frames.to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).to(dtype)


class EncoderStream:
    """One clip on its way through an encoder; `states` is what convolutions keep of the frames that they were given."""

    def __init__(self, vae: VideoVae, kernels: Kernels = EAGER) -> None:
        assert vae.config.encoder_causal, "an encoder that looks ahead cannot be streamed"
        assert vae.config.patch_size_t == 1, "patches of several frames cannot be streamed"
        self.encoder = vae.encoder
        self.kernels = kernels
        self.states: dict[nn.Module, Tensor] = {}
        self.has_begun = False
        # All or none: pixels pass from one to the next with channels innermost, and an eager convolution among packed
        # ones would turn its weight around at every call. That is also how the bench measures eager.
        self.is_packed = kernels.choice("causal_conv3d").implementations != {"eager"}
        if self.is_packed:
            pack_convolutions(vae.encoder)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments [B, 2·C, f, Y, X] of the clip's next frames [B, 3, N, height, width]: first 8k + 1, then 8k."""
        encoder = self.encoder
        hidden = self.convolve(encoder.conv_in, patches(pixels, encoder.patch_size))
        for block in encoder.down_blocks:
            hidden = self.down_block(block, hidden)
        for resnet in encoder.mid_block.resnets:
            hidden = self.resnet(resnet, hidden)
        hidden = self.activate_and_convolve(encoder.norm_out, encoder.conv_act, encoder.conv_out, hidden)
        self.has_begun = True
        # The last channel is the logarithm of the variance of all latent channels.
        return torch.cat([hidden, hidden[:, -1:].repeat(1, hidden.size(1) - 2, 1, 1, 1)], dim=1)

    def down_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Residual blocks, the downsampler, and in 0.9.0 and 0.9.1 a residual block to the next width."""
        for resnet in block.resnets:
            hidden = self.resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            has_groups = hasattr(downsampler, "group_size")
            hidden = self.downsample(downsampler, hidden) if has_groups else self.convolve(downsampler, hidden)
        widen = getattr(block, "conv_out", None)
        return hidden if widen is None else self.resnet(widen, hidden)

    def resnet(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden + conv(act(norm(conv(act(norm(hidden)))))), hidden through a convolution where the width changes."""
        assert block.scale_shift_table is None and block.per_channel_scale1 is None, "encoders draw and take nothing"
        inner = self.activate_and_convolve(block.norm1, block.nonlinearity, block.conv1, hidden)
        if block.norm3 is not None:
            hidden = block.norm3(hidden.movedim(1, -1)).movedim(-1, 1)
        if block.conv_shortcut is not None:
            hidden = self.convolve(block.conv_shortcut, hidden)
        return self.activate_and_convolve(block.norm2, block.nonlinearity, block.conv2, inner, hidden)

    def downsample(self, downsampler: nn.Module, hidden: Tensor) -> Tensor:
        """A convolution to few channels whose pixels become channels, plus means over groups of the input's own.

        At the clip's start its first frames stand before it once more, so that frames fill whole strides.
        """
        stride = downsampler.stride
        if not self.has_begun:
            hidden = torch.cat([hidden[:, :, : stride[0] - 1], hidden], dim=2)
        means = space_to_depth(hidden, stride, self.is_packed).unflatten(1, (-1, downsampler.group_size)).mean(dim=2)
        return space_to_depth(self.convolve(downsampler.conv, hidden), stride, self.is_packed) + means

    def activate_and_convolve(
        self, norm: nn.Module, activation: nn.Module, conv: nn.Module, hidden: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """conv(act(norm(hidden))), plus the residual; norm and SiLU inside the op unless it is eager here."""
        fits = is_plain(conv.conv) and isinstance(activation, nn.SiLU) and getattr(norm, "weight", None) is None
        if fits and self.implementation(hidden) != "eager":
            return self.run(conv.conv, hidden, residual, norm.eps)
        return self.convolve(conv, activation(normed(norm, hidden)), residual)

    def convolve(self, module: nn.Module, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """A causal convolution of diffusers', or a plain one of one frame, in place of the module's forward."""
        conv = module if isinstance(module, nn.Conv3d) else module.conv
        if is_plain(conv):
            return self.run(conv, hidden, residual)
        whole = after_state(hidden, self.states.get(conv), conv.kernel_size[0] - 1)
        # What the next window of a stride begins with.
        self.states[conv] = last(whole, conv.kernel_size[0] - conv.stride[0])
        convolved = conv(whole)
        return convolved if residual is None else convolved + residual

    def run(self, conv: nn.Conv3d, hidden: Tensor, residual: Tensor | None, norm_eps: float | None = None) -> Tensor:
        """The op, and its new state kept: the same frames for every implementation, which may change with the chunk."""
        result, self.states[conv] = causal_conv3d(
            hidden,
            conv.weight,
            conv.bias,
            self.states.get(conv),
            residual=residual,
            norm_eps=norm_eps,
            implementation=self.implementation(hidden),
        )
        return result

    def implementation(self, hidden: Tensor) -> Implementation:
        """Of a convolution that reads [B, C, T, H, W]: by B·T·H·W and C, as the bench measures it."""
        return self.kernels.on("causal_conv3d", hidden.movedim(1, -1).shape)


def is_plain(conv: nn.Conv3d) -> bool:
    """Whether it is the op: no stride, zeros around the picture."""
    return (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1, 1), (1, 1, 1), 1, "zeros")


def pack_convolutions(encoder: nn.Module) -> None:
    """Channels innermost in every weight's memory, in place: names, shapes and values stay, and no copy is kept."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = pack(module.weight.data)


def normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Either family's norm over the channels of [B, C, T, H, W]: LTX-Video's wants them last."""
    if isinstance(norm, PerChannelRMSNorm):
        return norm(hidden)
    return norm(hidden.movedim(1, -1)).movedim(-1, 1)


def patches(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, T, height, width] to [B, 3·size², T, height / size, width / size], a patch's columns before its rows."""
    split = pixels.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return split.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def space_to_depth(hidden: Tensor, stride: tuple[int, int, int], channels_innermost: bool) -> Tensor:
    """[B, C, T, H, W] to [B, C·a·b·c, T / a, H / b, W / c] for strides a, b, c, laid out as the next op wants it."""
    split = hidden.unflatten(4, (-1, stride[2])).unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    if channels_innermost:
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).permute(0, 4, 1, 2, 3)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
