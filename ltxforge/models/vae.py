"""Frames to normalised latents and back, through the video VAE of either family.

Decides the normalisation (the VAE's own statistics, in float32) and that decoding is deterministic. Holds no VAE.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from ltxforge_kernels.choice import EAGER, Kernels
from torch import Tensor

from ltxforge.models.interface import Latents
from ltxforge.models.vae_streaming import VideoVae, stream_encode
from ltxforge.models.vae_tiles import WHOLE, DecodeTiling, decode_parts

DECODE_NOISE_SEED = 0


@torch.no_grad()
def encode_frames(vae: VideoVae, frames: Tensor, device: torch.device, kernels: Kernels = EAGER) -> Latents:
    """uint8 frames [N, height, width, 3], N = 8k + 1, to the posterior [C, F, Y, X] on the CPU.

    Chunk by chunk: what it takes on the device does not grow with the clip.
    """
    mean, std, scale = statistics(vae)
    parts = [
        (((posterior.mean.float() - mean) * scale / std)[0].cpu(), (posterior.std.float() * scale / std)[0].cpu())
        for posterior in stream_encode(vae, frames, device, kernels)
    ]
    means, widths = zip(*parts, strict=True)
    return Latents(torch.cat(means, dim=1), torch.cat(widths, dim=1))


@torch.no_grad()
def decode_frames(
    vae: VideoVae, latents: Tensor, device: torch.device, decode_timestep: float, tiling: DecodeTiling = WHOLE
) -> Tensor:
    """Normalised latents [C, F, Y, X] to uint8 frames [N, height, width, 3] on the CPU.

    Deterministic: 0.9.1's decoder draws noise, here always the same. In tiles, what it takes on the device does not
    grow with the clip.
    """
    mean, std, scale = statistics(vae)
    latents = latents.to(device, torch.float32)[None] * std / scale + mean
    conditioned = vae.config.timestep_conditioning
    timestep = torch.tensor([decode_timestep], device=device, dtype=vae.dtype) if conditioned else None
    with fixed_randomness(device):
        return torch.cat([_to_frames(part) for part in decode_parts(vae, latents.to(vae.dtype), timestep, tiling)])


def _to_frames(pixels: Tensor) -> Tensor:
    """Pixels [1, 3, N, height, width] in [-1, 1] to uint8 frames [N, height, width, 3] on the CPU."""
    frames = ((pixels[0].float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu()


def statistics(vae: VideoVae) -> tuple[Tensor, Tensor, float]:
    """The VAE's own latents mean and std, [1, C, 1, 1, 1] float32, and its scaling factor."""
    mean, std = (buffer.float().view(1, -1, 1, 1, 1) for buffer in (vae.latents_mean, vae.latents_std))
    return mean, std, float(vae.config.scaling_factor)


@contextlib.contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """The default generators seeded for a while and then put back; nothing outside sees a draw."""
    devices: list[Any] = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.default_generator.manual_seed(DECODE_NOISE_SEED)
        if devices:
            torch.get_device_module(device).manual_seed(DECODE_NOISE_SEED)
        yield
