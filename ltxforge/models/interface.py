"""The one interface through which everything else sees a model, and the tensors that cross it.

Decides the layouts: latents [C, F, Y, X], tokens [B, T, C]. Knows no model family: there is
no `if model == …` anywhere above this floor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from ltxforge_kernels.choice import Kernels
from PIL import Image
from torch import Tensor, nn

from ltxforge.modalities import Streams
from ltxforge.models.blocks import RunBlock
from ltxforge.models.vae_tiles import DecodeTiling
from ltxforge.plan import PromptPlan
from ltxforge.quant.keep import Keep
from ltxforge.quant.report import BaseReport
from ltxforge.shapes import LatentShape
from ltxforge.specs import ModelSpec


@dataclass(frozen=True)
class Latents:
    """A VAE's posterior, float32, normalised with the VAE's own statistics: `mean` and `std` of one shape.

    Of a clip [C, F, Y, X], of its sound [L, C], one token per latent frame. A draw from it is `mean + std · ε`.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PromptEmbeddings:
    """One caption as the text side leaves it, on the CPU, in the dtype it was encoded in.

    `tensors` have names that only the model reads: `embeds` [P, E] of T5, trimmed to its real tokens; `video` and
    `audio` [P, D] of LTX-2's connectors, whole; or what the connectors are fed, trimmed. `tokens` counts the caption's
    real tokens, cut ones left out.
    """

    tensors: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class WantedPrompt:
    """A caption to encode, and for which modalities ("video", "audio", "both") its embeddings will serve."""

    text: str
    modalities: str = "video"


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one batch: `embeds` [B, P, E] for each modality; `mask` [B, P], 1 real and 0 padding.

    `mask` is None where every position is real, as after LTX-2's connectors.
    """

    embeds: Streams[Tensor]
    mask: Tensor | None = None


@dataclass(frozen=True)
class NoisyTokens:
    """One modality as the transformer sees it.

    `tokens` [B, T, C]; `timesteps` [B, 1] (one per sample) or [B, T] (one per token) and `sample_timesteps` [B], the
    sample's own noise level whatever its clean tokens have: float32, sigma · 1000 and never rounded. `present` [B] is 1
    where the sample has this modality and 0 where its tokens only fill the batch; None where all have it.
    """

    tokens: Tensor
    timesteps: Tensor
    sample_timesteps: Tensor
    present: Tensor | None = None


@dataclass(frozen=True)
class Noisy:
    """What the transformer sees: each modality's tokens, the `shape` of the video latents behind them, and the clip's
    `fps`, which scales the time coordinate.
    """

    streams: Streams[NoisyTokens]
    shape: LatentShape
    fps: float


@dataclass(frozen=True)
class Sample:
    """One sampled video: latents [T, C] and [L, C] after the last denoising step, `frames` uint8 [N, height, width, 3],
    and the sound of just these frames, float32 [channels, samples] at `sound_rate` Hz, or None.
    """

    latents: Streams[Tensor]
    frames: np.ndarray
    sound: np.ndarray | None = None
    sound_rate: int = 0


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, F, Y, X] → [B, T, C]; frames vary slowest, columns fastest (patch size 1)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, shape: LatentShape) -> Tensor:
    """[B, T, C] → [B, C, F, Y, X]: the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (shape.frames, shape.height, shape.width))


class VideoModel(Protocol):
    """A base model. Encoders load on demand and are freed; training touches `predict` and `blocks` alone.

    `keep` says how the transformer's weights are kept; it counts when they are loaded.

    `modalities` says what it computes: "video", "audio" or "both"; what is left out costs nothing. `kernels` says how
    each op is carried out, eager until a run's choices are set, `run_block` how blocks are called, plainly until then,
    `make_room` gives up what is held only so that it is there when it is needed (places of streamed weights, the host's
    buffers for activations), `decode_tiling` in which tiles latents are decoded, whole until then.
    """

    spec: ModelSpec
    rope: str
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    text_dtype: torch.dtype
    modalities: str
    keep: Keep
    kernels: Kernels
    run_block: RunBlock
    make_room: Callable[[], None]
    decode_tiling: DecodeTiling

    @property
    def base_report(self) -> BaseReport:
        """What became of the transformer's linear layers when it was loaded."""
        ...

    @property
    def transformer(self) -> nn.Module:
        """The diffusers module whose linears take the adapter. Loaded by `load_transformer`."""
        ...

    def load_transformer(self) -> None:
        """Load the transformer, frozen, each of its weights as `keep` says."""
        ...

    def vae(self) -> AbstractContextManager[None]:
        """Hold the VAE on the device. No two encoders are ever held together."""
        ...

    def audio_vae(self) -> AbstractContextManager[None]:
        """Hold the audio VAE on the device, in float32. Only where `spec.has_audio`."""
        ...

    def encode_prompts(
        self, wanted: Sequence[WantedPrompt], tokens: int, on_read: Callable[[int], None] = ...
    ) -> Generator[PromptEmbeddings, None, None]:
        """Encode captions in order, each padded or cut to `tokens` for the encoder; on the CPU.

        Text encoders are loaded when the first caption is asked for and freed at the end or when the iterator is
        closed. Nothing else is on the device with a text encoder. A model without sound makes nothing of `modalities`.
        `on_read` hears how many captions the encoder has read, which may be long before they are given; it may raise.
        """
        ...

    def encode_clip(self, frames: Tensor) -> Latents:
        """Encode uint8 frames [N, height, width, 3], N = 8k + 1; on the CPU. Inside `vae()`."""
        ...

    def sound_length(self, seconds: float) -> int:
        """L: how many audio latents belong to a video of this duration."""
        ...

    @property
    def sound_rate(self) -> int:
        """The sample rate, in Hz, that `encode_sound` wants."""
        ...

    def encode_sound(self, waveform: Tensor, length: int) -> Latents:
        """Encode float32 [2, samples] at `sound_rate` to [L, C], L = `length`; on the CPU. Inside `audio_vae()`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, F, Y, X] → uint8 frames [N, height, width, 3] on the CPU. Inside `vae()`."""
        ...

    def batch_prompts(self, prompts: Sequence[PromptEmbeddings], tokens: int, modalities: str = "both") -> PromptBatch:
        """Stack prompts on the device, in the model's dtype, ready for `predict`.

        `tokens` as in `encode_prompts`; `modalities` says which of those that the embeddings serve are needed.
        """
        ...

    def predict(self, noisy: Noisy, prompts: PromptBatch) -> Streams[Tensor]:
        """The velocity, noise − latents, [B, T, C] of each modality that is in `noisy`, in the model's dtype."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks in order."""
        ...

    def unused_modules(self) -> Sequence[nn.Module]:
        """The transformer's modules that `predict` never computes with these modalities; samples may."""
        ...

    def sample(
        self,
        prompt: PromptPlan,
        prompts: Mapping[str, PromptEmbeddings],
        tokens: int,
        image: Image.Image | None,
        on_step: Callable[[int], None],
    ) -> Sample:
        """Make one sample by diffusers' own pipeline over this transformer; loads and frees the VAEs it needs.

        May seed torch's default generators. Raises FloatingPointError where the sample's numbers are not finite.

        Args:
            prompts: the embeddings of the prompt's text, and of the negative one's where guidance uses it; for "both".
            image: the first frame, of the prompt's size, or None for text-to-video.
            on_step: called with the number of finished denoising steps; may raise to break off.
        """
        ...
