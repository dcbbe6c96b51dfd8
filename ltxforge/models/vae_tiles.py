"""Decoding latents of either family in overlapping tiles of space and time, in memory that no clip's length adds to.

Decides where tiles lie in the picture and in time, and how they are blended: linearly over what neighbours share, at
least a quarter of a tile. Decoding whole is diffusers' own call, untouched; tiles that cover all are that call too.

Tiles are not exact. The decoders are not causal and see far: a tile lacks what lies beyond its edges. diffusers' own
tiles in time, 0.42, put every tile after the first one frame late. The first latent of a tile makes one frame whatever
its place in the clip, the last of the eight that it would make in the clip's middle; so a tile that begins with latent
a begins at frame 8·a, where it stands here.

What a seam costs was measured in its worst case alone, latents of noise under decoders of random weights: relative
error of all pixels, and PSNR of what is drawn. Real architectures at 256x128x9 in two tiles of 160 pixels: 0.30 and 26
dB in 0.9.5, 0.36 and 24 dB in 2.0; at 96x96x41 in tiles of 32 frames: 0.46 and 22 dB in both. The small models at
768x64x9 in tiles of 512 pixels: 0.06 and 37 dB, 0.14 and 29 dB; at 64x64x121 in tiles of 64 frames: 0.16 and 28 dB,
0.36 and 21 dB (LTX-Video, LTX-2). Beyond the decoder's sight of a seam nothing differs. Larger tiles have fewer seams.

Slicing, one clip of a batch after the other, is what is always done here: a clip is decoded alone. Loads nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge.models.vae_streaming import VideoVae
from ltxforge.shapes import tiles_along

Span = tuple[int, int]
"""[begin, end) along an axis."""


@dataclass(frozen=True)
class DecodeTiling:
    """The largest tile: `side` in pixels, `frames` in frames. 0 does not divide."""

    side: int = 0
    frames: int = 0


WHOLE = DecodeTiling()
FRUGAL = DecodeTiling(512, 64)
"""What a sample is decoded in that shall be frugal and says no more."""


@torch.no_grad()
def decode_parts(vae: VideoVae, latents: Tensor, timestep: Tensor | None, tiling: DecodeTiling) -> Iterator[Tensor]:
    """The pixels of a clip in order of time: [1, 3, n, height, width] in [-1, 1], one part after the other.

    Whole they are one part, the decoder's own output where it lies. In tiles they are float32 on the host, at most a
    tile's frames each, and nothing but one tile is on the device.

    Args:
        vae: asked by its class's own `decode`.
        latents: [1, C, F, Y, X] as the decoder takes them, on its device.
        timestep: of decoders that take one.
    """
    frames, rows, columns = _spans(vae, latents, tiling)
    if len(frames) == len(rows) == len(columns) == 1:
        yield _decoded(vae, latents, timestep)
        return
    up, ratio = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    in_time = [(begin * up, (end - 1) * up + 1) for begin, end in frames]
    weights = blend_weights(in_time)
    waiting: Tensor | None = None  # what the tiles until now say of frames that the next one says something of too
    for number, (span, (begin, end)) in enumerate(zip(frames, in_time, strict=True)):
        tile = _joined_in_space(vae, latents[:, :, slice(*span)], timestep, rows, columns, ratio)
        tile *= weights[number][:, None, None]
        if waiting is not None:
            tile[:, :, : waiting.shape[2]] += waiting
        done = in_time[number + 1][0] - begin if number + 1 < len(in_time) else end - begin
        waiting = tile[:, :, done:].clone()
        yield tile[:, :, :done]


def _spans(vae: VideoVae, latents: Tensor, tiling: DecodeTiling) -> tuple[tuple[Span, ...], ...]:
    """The tiles along frames, rows and columns, in latents."""
    side, frames = tiling.side // vae.spatial_compression_ratio, tiling.frames // vae.temporal_compression_ratio
    return tuple(tiles_along(size, most) for size, most in zip(latents.shape[2:], (frames, side, side), strict=True))


def _joined_in_space(
    vae: VideoVae, latents: Tensor, timestep: Tensor | None, rows: tuple[Span, ...], columns: tuple[Span, ...], up: int
) -> Tensor:
    """All tiles of some frames, blended: float32 [1, 3, n, height, width] on the host."""
    tall, wide = ([(begin * up, end * up) for begin, end in spans] for spans in (rows, columns))
    vertical, horizontal = blend_weights(tall), blend_weights(wide)
    joined: Tensor | None = None
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            tile = _decoded(vae, latents[..., slice(*row), slice(*column)], timestep).cpu().float()
            if joined is None:
                joined = tile.new_zeros(*tile.shape[:3], tall[-1][1], wide[-1][1])
            joined[..., slice(*tall[y]), slice(*wide[x])] += tile * vertical[y][:, None] * horizontal[x]
    assert joined is not None
    return joined


def _decoded(vae: VideoVae, latents: Tensor, timestep: Tensor | None) -> Tensor:
    return type(vae).decode(vae, latents, timestep, return_dict=False)[0]


def blend_weights(spans: list[Span]) -> list[Tensor]:
    """Each tile's share along an axis, float32 [end - begin]: 1 where it is alone, linear where two meet, in all 1."""
    windows = torch.zeros(len(spans), spans[-1][1], dtype=torch.float64)
    for number, (begin, end) in enumerate(spans):
        inside = torch.arange(begin, end, dtype=torch.float64)
        window = torch.ones_like(inside)
        if number:
            window = window.minimum((inside - begin + 1) / (spans[number - 1][1] - begin + 1))
        if number + 1 < len(spans):
            window = window.minimum((end - inside) / (end - spans[number + 1][0] + 1))
        windows[number, begin:end] = window
    shares = windows / windows.sum(dim=0)
    return [shares[number, begin:end].float() for number, (begin, end) in enumerate(spans)]


@contextlib.contextmanager
def decoding_in_tiles(vae: VideoVae, tiling: DecodeTiling) -> Iterator[None]:
    """For diffusers' pipelines: `vae.decode` gives the joined tiles, on the host, for a while; whole, it is left."""

    def decode(latents: Tensor, timestep: Tensor | None = None, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict, "pipelines ask for a tuple"
        return (torch.cat([part.cpu() for part in decode_parts(vae, latents, timestep, tiling)], dim=2),)

    if tiling == WHOLE:
        yield
        return
    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode
