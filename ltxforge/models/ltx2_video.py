"""LTX-2 behind the one interface: its parts on demand, its prompts, its two encoders, and `predict`.

The forward is `ltx2.py`'s, the text side `ltx2_text.py`'s, sampling `ltx2_sampling.py`'s. Decides in which order parts
are held on the device: Gemma alone, then the connectors alone, then each VAE alone. Loads no file (`load.py`) and knows
no version: what differs between 2.0, 2.3 and 2.5 shows in the modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from ltxforge_kernels.qk_norm_rope import Rope
from PIL import Image
from torch import Tensor, nn

from ltxforge.hardware import free_host_bytes
from ltxforge.modalities import MODALITIES, Streams, has
from ltxforge.models import ltx2_text
from ltxforge.models.audio_features import latent_length, log_mel, mel_frames
from ltxforge.models.base_model import BaseModel
from ltxforge.models.interface import (
    Latents,
    Noisy,
    NoisyTokens,
    PromptBatch,
    PromptEmbeddings,
    Sample,
    WantedPrompt,
)
from ltxforge.models.ltx2 import Stream, audio_ropes, transformer_forward, unused_modules, video_ropes
from ltxforge.models.ltx2_parts import LTX2Parts, Make, Part
from ltxforge.models.ltx2_sampling import LTX2Sampler
from ltxforge.models.parts import cast, release_memory, whole_float32
from ltxforge.models.vae import decode_frames, encode_frames
from ltxforge.plan import PromptPlan
from ltxforge.specs import ModelSpec

# Gemma's hidden states, 75 MB for a caption of 200 tokens, wait on the host for the connectors; the two take turns
# whenever a share of the host's free memory is full, or these bytes where there is little.
HOST_SHARE_HELD, LEAST_HELD_BYTES = 0.25, 2 * 2**30


class LTX2Video(BaseModel):
    """An LTX-2 base model; see `interface.VideoModel` for what each method promises.

    `dtype` is the transformer's. The encoders' dtypes are float32 on a CPU and bfloat16 elsewhere unless given; audio
    VAE and vocoder are float32 everywhere. `text_cache` is what `encode_prompts` gives: "connectors", the connectors'
    output, or "features", what they are fed; they then stay on the device and run with every batch.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: str,
        parts: LTX2Parts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        modalities: str = "both",
        text_cache: str = "connectors",
        vae_dtype: torch.dtype | None = None,
        text_dtype: torch.dtype | None = None,
    ) -> None:
        assert text_cache in ("connectors", "features"), text_cache
        super().__init__(spec, rope, parts, device, dtype, modalities, vae_dtype, text_dtype)
        self.text_cache = text_cache
        self._parts = parts
        self._mel = parts.mel()
        self._encoder: Any = None  # the one part beside the transformer that is on the device
        self._connectors: LTX2TextConnectors | None = None

    def load_transformer(self) -> None:
        if self._transformer is None:
            self.keep = dataclasses.replace(self.keep, waiting=partial(unused_modules, modalities=self.modalities))
            super().load_transformer()

    def _leave_unused(self, device: torch.device | str) -> None:
        """What a run on one modality never computes lies on the host; samples, which are joint, need it back."""
        unused = self.unused_modules()
        if not unused or self.device.type == "meta":  # meta tensors are shapes alone: there is nothing to move
            return
        for module in unused:
            nn.Module.to(module, device)
        release_memory(self.device)

    def unused_modules(self) -> Sequence[nn.Module]:
        return unused_modules(self.transformer, self.modalities)

    def predict(self, noisy: Noisy, prompts: PromptBatch) -> Streams[Tensor]:
        given = {
            name: self._stream(name, tokens, prompts.embeds[name], prompts.mask, noisy)
            for name, tokens in noisy.streams.items()
        }
        return transformer_forward(self.transformer, Streams(**given), self.kernels, self.run_block)

    def _stream(self, name: str, noisy: NoisyTokens, embeds: Tensor, mask: Tensor | None, clip: Noisy) -> Stream:
        assert has(self.modalities, name), f"{name} takes no part in a run on {self.modalities}"
        rope, cross_rope = self._both_ropes(name, clip, noisy.tokens.shape[1])
        return Stream(
            tokens=noisy.tokens.to(self.device, self.dtype),
            timesteps=noisy.timesteps,
            sample_timesteps=noisy.sample_timesteps,
            prompts=embeds.to(self.device, self.dtype),
            prompt_mask=None if mask is None else mask.to(self.device),
            rope=rope,
            cross_rope=cross_rope,
            present=None if noisy.present is None else noisy.present.to(self.device, non_blocking=True),
        )

    def _both_ropes(self, name: str, clip: Noisy, tokens: int) -> tuple[Rope, ...]:
        """For self attention, and for cross attention."""
        if name == "video":
            assert tokens == clip.shape.tokens
            place = (self.transformer, clip.shape, clip.fps, self.device)
            return self._ropes_of((clip.shape, clip.fps), lambda: video_ropes(*place))
        return self._ropes_of(tokens, lambda: audio_ropes(self.transformer, tokens, self.device))

    def encode_prompts(
        self, wanted: Sequence[WantedPrompt], tokens: int, on_read: Callable[[int], None] = lambda _: None
    ) -> Generator[PromptEmbeddings, None, None]:
        """See `VideoModel.encode_prompts`. Gemma and the connectors take turns, each alone on the device; captions go
        through one at a time, so that the bits of one do not depend on its neighbours.
        """
        waiting = deque(wanted)
        while waiting:
            read = self._read_captions(waiting, tokens, lambda: on_read(len(wanted) - len(waiting)))
            yield from self._connected(read, tokens)

    def _read_captions(
        self, waiting: deque[WantedPrompt], tokens: int, on_read: Callable[[], None]
    ) -> list[tuple[WantedPrompt, Tensor]]:
        """Gemma's hidden states of as many captions as the host may hold, taken from the front of `waiting`."""
        most = max(LEAST_HELD_BYTES, HOST_SHARE_HELD * free_host_bytes())
        read: list[tuple[WantedPrompt, Tensor]] = []
        with self._held(self._parts.text_encoder, self.text_dtype) as encoder:
            while waiting and sum(states.nbytes for _, states in read) < most:
                states = ltx2_text.hidden_states(*encoder, waiting[0].text, tokens)
                read.append((waiting.popleft(), states.to("cpu", self.text_dtype)))
                on_read()
            del encoder
        return read

    def _connected(
        self, read: Sequence[tuple[WantedPrompt, Tensor]], tokens: int
    ) -> Generator[PromptEmbeddings, None, None]:
        with self._held(self._parts.connectors, self.text_dtype) as connectors:
            for prompt, states in read:
                yield self._encode_prompt(connectors, states, tokens, prompt.modalities)
            del connectors

    def _encode_prompt(
        self, connectors: LTX2TextConnectors, states: Tensor, tokens: int, modalities: str
    ) -> PromptEmbeddings:
        found = ltx2_text.features(connectors, states.to(self.device), tokens, modalities)
        if self.text_cache == "connectors":
            found = {
                name: self._connect(connectors, ltx2_text.features_of(found, name), tokens, name)
                for name in MODALITIES
                if has(modalities, name)
            }
        return PromptEmbeddings({name: value.cpu().clone() for name, value in found.items()}, len(states))

    def _connect(self, connectors: LTX2TextConnectors, features: Tensor, tokens: int, name: str) -> Tensor:
        """One modality's embeddings [P, D] of a caption's features [n, D]."""
        padded, mask = ltx2_text.pad_left(features[None].to(self.device), tokens)
        return ltx2_text.embeddings(connectors, padded, mask, name)[0]

    def batch_prompts(self, prompts: Sequence[PromptEmbeddings], tokens: int, modalities: str = "both") -> PromptBatch:
        """See `VideoModel.batch_prompts`. What was encoded for one modality serves that one alone. Connectors take one
        caption at a time, as in `encode_prompts`.
        """
        tensors = [prompt.tensors for prompt in prompts]
        needed = [name for name in MODALITIES if has(modalities, name)]
        batch = {
            name: torch.stack([self._embedded(each, name, tokens) for each in tensors])
            for name in needed
            if all(self._serves(each, name) for each in tensors)
        }
        return PromptBatch(Streams(**{name: value.to(self.device, self.dtype) for name, value in batch.items()}))

    def _embedded(self, tensors: Mapping[str, Tensor], name: str, tokens: int) -> Tensor:
        if self.text_cache == "connectors":
            return tensors[name]
        return self._connect(self._resident_connectors(), ltx2_text.features_of(tensors, name), tokens, name)

    def _serves(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        if self.text_cache == "connectors":
            return name in tensors
        return f"{name}_features" in tensors or ltx2_text.SHARED in tensors

    def _resident_connectors(self) -> LTX2TextConnectors:
        """The connectors that stay, without the projections that `features` ran: those are their largest part."""
        if self._connectors is None:
            connectors = self._parts.connectors(torch.device("cpu"), self.text_dtype).requires_grad_(False).eval()
            for name in ("text_proj_in", "video_text_proj_in", "audio_text_proj_in"):
                if hasattr(connectors, name):
                    delattr(connectors, name)
            self._connectors = cast(connectors, self.device, self.text_dtype)
        return self._connectors

    def vae(self) -> contextlib.AbstractContextManager[Any]:
        return self._held(self._parts.vae, self.vae_dtype)

    def audio_vae(self) -> contextlib.AbstractContextManager[Any]:
        return self._held(self._parts.audio_vae, torch.float32)

    @contextlib.contextmanager
    def _held(self, make: Make[Part], dtype: torch.dtype) -> Iterator[Part]:
        assert self._encoder is None, "another part is on the device; it must be freed first"
        try:
            self._encoder = make(self.device, dtype)
            yield self._encoder
        finally:
            self._encoder = None
            release_memory(self.device)

    def encode_clip(self, frames: Tensor) -> Latents:
        assert isinstance(self._encoder, AutoencoderKLLTX2Video), "this works inside vae()"
        return encode_frames(self._encoder, frames, self.device, self.kernels)

    def decode(self, latents: Tensor) -> Tensor:
        assert isinstance(self._encoder, AutoencoderKLLTX2Video), "this works inside vae()"
        timestep = self.spec.sampling.decode_timestep
        return decode_frames(self._encoder, latents, self.device, timestep, self.decode_tiling)

    @property
    def sound_rate(self) -> int:
        return self._mel.sample_rate

    def sound_length(self, seconds: float) -> int:
        return latent_length(seconds, self._mel)

    @torch.no_grad()
    @whole_float32()
    def encode_sound(self, waveform: Tensor, length: int) -> Latents:
        """See `VideoModel.encode_sound`. A token is a latent frame: all channels of all its mel bins."""
        vae = self._encoder
        assert isinstance(vae, AutoencoderKLLTX2Audio), "this works inside audio_vae()"
        assert waveform.dtype == torch.float32 and waveform.ndim == 2, "sound is float32 [channels, samples]"
        frames = mel_frames(length, self._mel)
        least = max((frames - 1) * self._mel.hop_length, self._mel.n_fft // 2 + 1)
        waveform = nn.functional.pad(waveform, (0, max(0, least - waveform.shape[1])))
        mel = log_mel(waveform[None].to(self.device), self._mel)[:, :, :frames]
        posterior = vae.encode(mel).latent_dist
        mean, std = (value.transpose(1, 2).flatten(2)[0] for value in (posterior.mean, posterior.std))
        assert len(mean) == length, f"{frames} mel frames gave {len(mean)} latents, not {length}"
        return Latents(((mean - vae.latents_mean) / vae.latents_std).cpu(), (std / vae.latents_std).cpu())

    def sample(
        self,
        prompt: PromptPlan,
        prompts: Mapping[str, PromptEmbeddings],
        tokens: int,
        image: Image.Image | None,
        on_step: Callable[[int], None],
    ) -> Sample:
        """See `VideoModel.sample`. Picture and sound together, whatever is trained."""
        assert self._encoder is None, "another part is on the device; it must be freed first"
        embeds = self.batch_prompts([prompts[prompt.prompt]], tokens)
        negative = self.batch_prompts([prompts[prompt.negative_prompt]], tokens) if prompt.guided else None
        if prompt.frugal:
            self._connectors = None  # loaded again with the next batch
        place = self.device, self.vae_dtype, self.decode_tiling
        sampler = LTX2Sampler(self.spec, self.transformer, self._parts, *place, make_room=self.make_room)
        try:
            self._leave_unused(self.device)
            return sampler.sample(prompt, embeds, negative, image, on_step)
        finally:
            self._leave_unused("cpu")
