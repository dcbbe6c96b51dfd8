"""LTX-2's samples, picture and sound, denoised by diffusers' own pipelines over the transformer that is being trained.

Decides how a planned prompt becomes the pipeline's call, and what is on the device at each stage: first frame (VAE),
denoising (transformer), picture (VAE), sound (audio VAE, then vocoder); a part is loaded for its stage and freed after
it. Stage by stage the arithmetic is the pipeline's, so that a sample equals a stock pipeline's bit for bit. Writes
nothing, and knows no version: what differs is in the spec and the modules.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2Pipeline
from diffusers.pipelines.ltx2.utils import DEFAULT_IMAGE_CRF, LTX2_5_IMAGE_CRF, apply_image_conditioning_crf
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn

from ltxforge.errors import DeviceFullError
from ltxforge.hardware import free_host_bytes
from ltxforge.media.write import exact_rate
from ltxforge.modalities import Streams
from ltxforge.models.interface import PromptBatch, Sample, to_tokens
from ltxforge.models.ltx2_parts import LTX2Parts, Make
from ltxforge.models.parts import release_memory, whole_float32
from ltxforge.models.sampling import pictures, plain_arguments, require_finite
from ltxforge.models.vae import statistics
from ltxforge.models.vae_tiles import FRUGAL, WHOLE, DecodeTiling, decode_parts
from ltxforge.plan import PromptPlan
from ltxforge.shapes import ClipShape
from ltxforge.specs import ModelSpec

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class LTX2Sampler:
    """Makes samples with a transformer on `device`; the VAE is loaded in `vae_dtype`, audio VAE and vocoder in float32.

    Pictures are decoded in tiles as `tiling` says; a frugal one in `FRUGAL` ones, where that says nothing. `make_room`
    is called before another part is loaded.

    In bfloat16 the picture is the stock pipeline's to the last bit where `vae_dtype` is the transformer's dtype.
    """

    spec: ModelSpec
    transformer: nn.Module
    parts: LTX2Parts
    device: torch.device
    vae_dtype: torch.dtype
    tiling: DecodeTiling = WHOLE
    make_room: Callable[[], None] = lambda: None

    @torch.no_grad()
    def sample(
        self,
        prompt: PromptPlan,
        embeds: PromptBatch,
        negative: PromptBatch | None,
        image: Image.Image | None,
        on_step: Callable[[int], None],
    ) -> Sample:
        """One sample; see `VideoModel.sample`.

        Args:
            embeds: the prompt for both modalities, batch 1, in the transformer's dtype and on its device.
            negative: likewise the negative prompt; None unless `prompt.guided`.

        A frugal sample holds no other part on the device while the transformer is there, nor the transformer while
        another part is; its latents are the same, its picture too unless it is larger than a tile.
        """
        aside = self._transformer_aside if prompt.frugal and self._fits_on_host() else contextlib.nullcontext
        first = None
        if image is not None:
            with aside():
                first = self.first_frame(image, prompt.shape)
        video, audio = self.denoise(prompt, embeds, negative, first, on_step)
        require_finite("latents", video)
        require_finite("sound's latents", audio)
        with aside():
            frames = self.picture(video, prompt)
            sound, rate = self.sound(audio)
        require_finite("sound", torch.from_numpy(sound))
        samples = round(len(frames) / exact_rate(prompt.fps) * rate)
        latents = Streams(to_tokens(video)[0].cpu(), audio[0].cpu())
        return Sample(latents, frames, cut_or_padded(sound, samples), rate)

    def first_frame(self, image: Image.Image, shape: ClipShape) -> Tensor:
        """An image as normalised latents [1, C, 1, Y, X], float32.

        As the pipeline does by default, it is first compressed by H.264 as strongly as the version's training data was.
        """
        strength = LTX2_5_IMAGE_CRF if self.spec.text_encoder == "gemma-4" else DEFAULT_IMAGE_CRF
        compressed = Image.fromarray(apply_image_conditioning_crf(np.array(image.convert("RGB")), strength))
        with self._alone():
            vae = self._load(self.parts.vae, self.vae_dtype)
            processor = VideoProcessor(vae_scale_factor=vae.spatial_compression_ratio, resample="bilinear")
            pixels = processor.preprocess(compressed, height=shape.height, width=shape.width)
            latents = vae.encode(pixels.to(self.device, vae.dtype)[:, :, None]).latent_dist.mode().float()
            mean, std, scale = statistics(vae)
            del vae
        return (latents - mean) * scale / std

    def denoise(
        self,
        prompt: PromptPlan,
        embeds: PromptBatch,
        negative: PromptBatch | None,
        first: Tensor | None,
        on_step: Callable[[int], None],
    ) -> tuple[Tensor, Tensor]:
        """Normalised latents, float32: of the video [1, C, F, Y, X] and of the sound [1, L, C]."""
        pipeline = self._pipeline(first is not None, embeds)
        call = call_arguments(prompt, self.spec, embeds, negative)
        if "sigmas" in call:
            pipeline.scheduler = unshifted(pipeline.scheduler)
        if first is not None:
            # All noise but for the first frame, as the pipeline itself begins when it encodes the image.
            frames = prompt.shape.latent(self.spec.spatial_factor, self.spec.temporal_factor).frames
            call |= {"latents": first.repeat(1, 1, frames, 1, 1), "noise_scale": 1.0}

        def after_step(_pipeline: Any, index: int, _timestep: Any, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(index + 1)
            return {}

        video, audio = pipeline(**call, callback_on_step_end=after_step, output_type="latent", return_dict=False)
        return video, audio.transpose(1, 2).flatten(2)

    def _pipeline(self, with_image: bool, embeds: PromptBatch) -> LTX2Pipeline | LTX2ImageToVideoPipeline:
        """diffusers' pipeline with nothing but the transformer on the device, for prompts as `packed` gives them."""
        video, audio = unloaded_vaes(self.spec)
        width = embeds.embeds.video.shape[-1]
        kind = LTX2ImageToVideoPipeline if with_image else LTX2Pipeline
        made = kind(
            scheduler=self.parts.scheduler(), vae=video, audio_vae=audio, text_encoder=None, tokenizer=None,
            connectors=lambda both, mask, padding_side: (*unpacked(both, width), mask),  # noqa: ARG005
            transformer=self.transformer, vocoder=None,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    def picture(self, latents: Tensor, prompt: PromptPlan) -> np.ndarray:
        """Normalised latents [1, C, F, Y, X] → uint8 [N, height, width, 3]."""
        with self._alone():
            vae = self._load(self.parts.vae, self.vae_dtype)
            assert not vae.config.timestep_conditioning, "no LTX-2 decoder is published that takes a timestep"
            tiling = FRUGAL if prompt.frugal and self.tiling == WHOLE else self.tiling
            mean, std, scale = statistics(vae)
            centred = latents.to(vae.dtype) * std.to(vae.dtype) / scale + mean.to(vae.dtype)
            drawn = VideoProcessor().postprocess_video
            parts = [pictures(drawn(part, output_type="np")[0]) for part in decode_parts(vae, centred, None, tiling)]
            del vae
        return np.concatenate(parts)

    @whole_float32()
    def sound(self, latents: Tensor) -> tuple[np.ndarray, int]:
        """Normalised latents [1, L, C] → the sound, float32 [channels, samples], and its rate in Hz."""
        with self._alone():
            vae = self._load(self.parts.audio_vae, torch.float32)
            centred = latents * vae.latents_std + vae.latents_mean
            mel = vae.decode(centred.unflatten(2, (vae.config.latent_channels, -1)).transpose(1, 2)).sample
            del vae
        with self._alone():
            vocoder = self._load(self.parts.vocoder, torch.float32)
            rate = vocoder.config.output_sampling_rate
            sound = vocoder(mel)[0].cpu().numpy()
            del vocoder
        return sound, rate

    def _load(self, make: Make[Part], dtype: torch.dtype) -> Part:
        return make(self.device, dtype).requires_grad_(False).eval()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """A stage with a part of its own, whose memory is given back at the end."""
        self.make_room()
        try:
            yield
        finally:
            release_memory(self.device)

    def _fits_on_host(self) -> bool:
        """Whether the host has room for the transformer; where it has not, decoding in tiles must do."""
        return weight_bytes(self.transformer) < free_host_bytes()

    @contextlib.contextmanager
    def _transformer_aside(self) -> Iterator[None]:
        """The transformer on the host for a while.

        `Module.to` gives the parameters other storage and leaves the parameters themselves, which adapter and optimiser
        know by identity. A transformer that cannot come back ends the run, for nothing could be trained after it.
        """
        try:
            nn.Module.to(self.transformer, "cpu")
            release_memory(self.device)
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what failed must not keep the memory
            raise
        finally:
            release_memory(self.device)
            try:
                nn.Module.to(self.transformer, self.device)
            except torch.OutOfMemoryError as error:
                raise DeviceFullError(
                    "the transformer, set aside for a frugal sample, finds no room to come back",
                    remedy="Start the same command again; other programs may have taken the memory.",
                ) from error


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all that moves with a module: of a quantised one most are buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def call_arguments(
    prompt: PromptPlan, spec: ModelSpec, embeds: PromptBatch, negative: PromptBatch | None
) -> dict[str, Any]:
    """The pipeline call of a planned prompt, its image excepted.

    The noise comes from a CPU generator, the same for every device. Distilled weights get their own sigmas, as
    diffusers' LTX-2 page gives them. `use_cross_timestep` stays the pipeline's default, True, which it says is how 2.3
    and later were trained; without an image both settings are the same.
    """
    sampling = spec.sampling
    call: dict[str, Any] = {
        **plain_arguments(prompt),
        "audio_guidance_scale": prompt.audio_guidance,
        "stg_scale": prompt.stg,
        "audio_stg_scale": prompt.stg,
        "spatio_temporal_guidance_blocks": list(prompt.stg_blocks),
        "modality_scale": prompt.modality_guidance,
        "audio_modality_scale": prompt.modality_guidance,
        "guidance_rescale": prompt.rescale,
        "audio_guidance_rescale": prompt.rescale,
        "generator": torch.Generator().manual_seed(prompt.seed),
    }
    for prefix, batch in {"": embeds, "negative_": negative}.items():
        if batch is not None:
            call[f"{prefix}prompt_embeds"], call[f"{prefix}prompt_attention_mask"] = packed(batch)
    if sampling.timesteps and prompt.steps == sampling.steps:
        call["sigmas"] = [timestep / 1000 for timestep in sampling.timesteps]
    return call


def packed(batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Both modalities' embeddings side by side, [B, P, D + D], and their mask, [B, P]: what the pipeline hands on."""
    video, audio = batch.embeds.video, batch.embeds.audio
    assert video is not None and audio is not None, "samples are joint: their prompts are encoded for both modalities"
    mask = torch.ones(video.shape[:2], dtype=torch.int64, device=video.device) if batch.mask is None else batch.mask
    return torch.cat([video, audio], dim=-1), mask


def unpacked(both: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `packed`, in place of the pipeline's connectors; `width` is the video's D."""
    return both[..., :width].contiguous(), both[..., width:].contiguous()


class UnloadedVae(SimpleNamespace):
    """What the pipelines read of a VAE while they denoise. Its statistics are left out, 0 and 1, so that latents begin
    and end normalised.
    """

    latents_mean, latents_std = torch.zeros(1), torch.ones(1)


def unloaded_vaes(spec: ModelSpec) -> tuple[UnloadedVae, UnloadedVae]:
    """In place of the video VAE and the audio VAE."""
    video, audio = spec.vae_config, spec.audio_vae_config
    assert audio is not None
    factor = spec.transformer_config["audio_scale_factor"]
    return (
        UnloadedVae(
            spatial_compression_ratio=video["spatial_compression_ratio"],
            temporal_compression_ratio=video["temporal_compression_ratio"],
            config=SimpleNamespace(scaling_factor=1.0),
        ),
        UnloadedVae(
            mel_compression_ratio=factor, temporal_compression_ratio=factor, config=SimpleNamespace(**audio)
        ),
    )  # fmt: skip


def unshifted(scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    """A copy of `scheduler` that takes sigmas as they are given."""
    return scheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift_terminal=None, shift=1.0)


def cut_or_padded(sound: np.ndarray, samples: int) -> np.ndarray:
    """Sound [channels, n] of exactly so many samples: the audio VAE's last latent ends a little before the picture."""
    kept = sound[:, :samples].astype(np.float32)
    return np.pad(kept, ((0, 0), (0, samples - kept.shape[1])))
