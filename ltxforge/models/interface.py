"""The one interface through which everything else sees a model, and the tensors that cross it.

Decides the layouts (latents [C, F, Y, X], tokens [B, T, C]) and the padding of prompts. Knows no model family: there is
no `if model == …` anywhere above this floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltxforge.shapes import LatentShape
from ltxforge.specs import ModelSpec


@dataclass(frozen=True)
class Latents:
    """A clip's VAE posterior, [C, F, Y, X] float32, normalised with the VAE's own statistics.

    A draw from the posterior is `mean + std · ε`.
    """

    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> LatentShape:
        """F, Y and X."""
        return LatentShape(*self.mean.shape[1:])


@dataclass(frozen=True)
class PromptEmbeddings:
    """One caption's text-encoder output, [P, E], trimmed to its real tokens, in the dtype it was encoded in."""

    embeds: Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one batch: `embeds` [B, P, E], zero where there is no token; `mask` [B, P], 1 real and 0 padding."""

    embeds: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Noisy:
    """What the transformer sees.

    `tokens` [B, T, C]; `timesteps` [B, 1] (one per sample) or [B, T] (one per token), float32, sigma · 1000 and never
    rounded; `shape` of the latents behind the T tokens; `fps` of the clip, which scales the time coordinate.
    """

    tokens: Tensor
    timesteps: Tensor
    shape: LatentShape
    fps: float


def pad_prompts(
    prompts: Sequence[PromptEmbeddings], tokens: int, device: torch.device | str, dtype: torch.dtype
) -> PromptBatch:
    """Stack prompts to [B, tokens, E] with zeros under the mask.

    The text encoder's own output at padding positions is not needed: attention adds −10000 there, whose softmax weight
    is exactly 0, so zeros give the same bits.
    """
    width = prompts[0].embeds.shape[-1]
    embeds = torch.zeros(len(prompts), tokens, width, device=device, dtype=dtype)
    mask = torch.zeros(len(prompts), tokens, device=device, dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        length = prompt.embeds.shape[0]
        assert length <= tokens, f"a prompt of {length} tokens does not fit in {tokens}"
        embeds[row, :length] = prompt.embeds.to(device=device, dtype=dtype)
        mask[row, :length] = 1
    return PromptBatch(embeds, mask)


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, F, Y, X] → [B, T, C]; frames vary slowest, columns fastest (patch size 1)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, shape: LatentShape) -> Tensor:
    """[B, T, C] → [B, C, F, Y, X]: the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (shape.frames, shape.height, shape.width))


class VideoModel(Protocol):
    """A base model. Encoders load on demand and are freed; training touches `predict` and `blocks` alone."""

    spec: ModelSpec
    rope: str
    device: torch.device
    dtype: torch.dtype

    @property
    def transformer(self) -> nn.Module:
        """The diffusers module whose linears take the adapter. Loaded by `load_transformer`."""
        ...

    def load_transformer(self) -> None:
        """Put the transformer, frozen, on the device."""
        ...

    def text_encoder(self) -> AbstractContextManager[None]:
        """Hold text encoder and tokenizer on the device. Never together with `vae()`."""
        ...

    def vae(self) -> AbstractContextManager[None]:
        """Hold the VAE on the device. Never together with `text_encoder()`."""
        ...

    def encode_prompts(self, captions: Sequence[str], tokens: int) -> list[PromptEmbeddings]:
        """Encode captions, each padded or cut to `tokens` for the encoder; on the CPU. Inside `text_encoder()`."""
        ...

    def encode_clip(self, frames: Tensor) -> Latents:
        """Encode uint8 frames [N, height, width, 3], N = 8k + 1; on the CPU. Inside `vae()`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, F, Y, X] → uint8 frames [N, height, width, 3] on the CPU. Inside `vae()`."""
        ...

    def predict(self, noisy: Noisy, prompts: PromptBatch) -> Tensor:
        """The velocity, noise − latents, [B, T, C] in the model's dtype."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks in order."""
        ...

    def set_checkpointing(self, every: int) -> None:
        """Recompute every n-th block in the backward pass instead of keeping its activations; 0 is off."""
        ...

    def pipeline(self, with_image: bool) -> Any:
        """diffusers' own sampling pipeline over this transformer and the loaded VAE. Inside `vae()`."""
        ...
