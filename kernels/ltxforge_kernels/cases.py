"""Shapes that tests and the bench share: those of real LTX training, and awkward ones.

Data, and a way to fill tensors with it. What an op makes of a shape stands in its `inputs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LATENT_CHANNELS = 128
# 16,000 Hz / hop 160 / factor 4: 25 latents per second, 121 frames at 24 fps.
AUDIO_TOKENS = 126


@dataclass(frozen=True)
class TokenShape:
    """B samples of T tokens, D wide."""

    name: str
    batch: int
    tokens: int
    width: int

    def __str__(self) -> str:
        return self.name


# Widths of the transformers: 2B, 13B and LTX-2's video, LTX-2's audio.
WIDTH_2B, WIDTH_13B, WIDTH_AUDIO = 2048, 4096, 2048
# 768x512, 121 frames: 24 · 16 · 16 tokens; 512x320, 49 frames: 16 · 10 · 7 tokens, and others of the bench.
TOKENS = {"768x512x121": 6144, "512x320x49": 1120, "1792": 1792, "13376": 13376, "27588": 27588}

LATENTS = (
    *(TokenShape(f"latents {name}", 1, tokens, LATENT_CHANNELS) for name, tokens in TOKENS.items()),
    TokenShape("latents of sound", 1, AUDIO_TOKENS, LATENT_CHANNELS),
    TokenShape("latents, batch of 2", 2, 6144, LATENT_CHANNELS),
)
HIDDEN = (
    *(TokenShape(f"2B at {name}", 1, tokens, WIDTH_2B) for name, tokens in TOKENS.items()),
    *(TokenShape(f"13B and 19B at {name}", 1, tokens, WIDTH_13B) for name, tokens in TOKENS.items()),
    TokenShape("sound of 19B", 1, AUDIO_TOKENS, WIDTH_AUDIO),
)
# What the feed-forwards hold between their two layers, four times as wide.
FEED_FORWARD = (
    TokenShape("2B's feed-forward at 768x512x121", 1, 6144, 4 * WIDTH_2B),
    TokenShape("13B's and 19B's feed-forward at 768x512x121", 1, 6144, 4 * WIDTH_13B),
    TokenShape("sound's feed-forward of 19B", 1, AUDIO_TOKENS, 4 * WIDTH_AUDIO),
)

# Few rows of real widths, for the interpreter.
FEW_LATENTS = (TokenShape("few latents", 2, 96, LATENT_CHANNELS), TokenShape("latents of sound", 1, 126, 128))
FEW_HIDDEN = (TokenShape("few of 2B", 2, 16, WIDTH_2B), TokenShape("few of 13B", 1, 16, WIDTH_13B))
# Nothing divides anything, one token, one channel, and none at all.
AWKWARD = (
    TokenShape("odd", 3, 67, 5),
    TokenShape("no power of two", 1, 65, 96),
    TokenShape("one token", 2, 1, 128),
    TokenShape("one channel", 1, 7, 1),
    TokenShape("no token", 2, 0, 128),
    TokenShape("no sample", 0, 5, 128),
)


class Filler:
    """Fills tensors for one device from a seed. On "meta" there is nothing to fill: shapes and strides alone."""

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, rounded to the dtype."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in [0, 1)."""
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Int32 in [0, below)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int32, device="meta")
        return torch.randint(below, shape, generator=self.generator, dtype=torch.int32).to(self.device)
