"""What other parts of a model take in memory, run over shapes alone as in `trace.py`: denoising, VAEs, encoders.

Each function builds the part on the meta device, runs what a run would, and gives the peak above its weights. Text
encoders, whose masks cannot be made without values, are counted by formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from ltxforge_kernels.choice import Kernels
from torch import Tensor, nn

from ltxforge.memory.costs import Part
from ltxforge.memory.ledger import DeviceAttention, Ledger
from ltxforge.models.interface import VideoModel
from ltxforge.models.random_weights import prompt_widths, random_vae
from ltxforge.models.vae_streaming import CHUNK_FRAMES, EncoderStream, stream_encode
from ltxforge.plan import PromptPlan
from ltxforge.shapes import ClipShape, tiles_along
from ltxforge.specs import ModelSpec

META = torch.device("meta")
PROJECTIONS = ("text_proj_in", "video_text_proj_in", "audio_text_proj_in")


def denoising(model: VideoModel, prompt: PromptPlan, tokens: int, kind: str) -> int:
    """The peak of one pass of diffusers' pipeline above all weights.

    Args:
        model: traced, with its adapter.
        tokens: the prompts' length.
    """
    return _peak(lambda: one_pass(model, prompt, tokens, META), kind)


@torch.no_grad()
def one_pass(model: VideoModel, prompt: PromptPlan, tokens: int, device: torch.device) -> Tensor:
    """What a sample's pipeline does once a step, over empty tensors: both prompts in one batch where it is guided."""
    spec, dtype = model.spec, model.dtype
    size = 2 if prompt.guided else 1
    widths = prompt_widths(spec, "both" if spec.has_audio else "video")
    shape = prompt.shape.latent(spec.spatial_factor, spec.temporal_factor)
    prompts = {name: torch.zeros(size, tokens, width, device=device, dtype=dtype) for name, width in widths.items()}
    mask = torch.ones(size, tokens, device=device)
    latents = torch.zeros(1, shape.tokens, spec.latent_channels, device=device)
    given = torch.cat([latents] * size).to(dtype)
    timestep = torch.zeros(size, shape.tokens, device=device) if prompt.image else torch.zeros(size, device=device)
    place = {"num_frames": shape.frames, "height": shape.height, "width": shape.width, "return_dict": False}
    if not spec.has_audio:
        scale = (spec.temporal_factor / prompt.fps, spec.spatial_factor, spec.spatial_factor)
        place |= {"encoder_attention_mask": mask, "rope_interpolation_scale": scale}
        found = model.transformer(given, prompts["embeds"], timestep, **place)[0]
    else:
        length = round(prompt.shape.frames / prompt.fps * spec.audio_latents_per_second)
        channels = spec.transformer_config["audio_in_channels"]
        heard = torch.zeros(size, length, channels, device=device, dtype=dtype)
        level = torch.zeros(size, device=device)
        place |= {"encoder_attention_mask": mask, "audio_encoder_attention_mask": mask, "sigma": level}
        place |= {"fps": prompt.fps, "audio_num_frames": length, "audio_timestep": level}
        found = model.transformer(given, heard, prompts["video"], prompts["audio"], timestep, **place)[0]
    return latents + found.float().chunk(size)[-1]


def clips(spec: ModelSpec, shape: ClipShape, dtype: torch.dtype, kernels: Kernels, kind: str) -> Part:
    """The video VAE while it encodes a clip of this size, chunk by chunk; the clip waits on the host."""
    vae = random_vae(spec, META, dtype)
    count = min(shape.frames, 1 + 2 * CHUNK_FRAMES)
    frames = torch.empty(count, shape.height, shape.width, 3, dtype=torch.uint8, device=META)
    EncoderStream(vae, kernels)  # packs the weights, which then are there before anything is counted

    def run() -> list[Any]:
        return [posterior.mean.float() for posterior in stream_encode(vae, frames, META, kernels)]

    return Part(_weighs(vae), _peak(run, kind), host=3 * shape.frames * shape.height * shape.width)


def decoding(spec: ModelSpec, shape: ClipShape, tile: int, frames: int, dtype: torch.dtype, kind: str) -> Part:
    """The video VAE while it decodes a sample in tiles of these sides, 0 for whole; the pixels end on the host."""
    vae = random_vae(spec, META, dtype)
    whole = shape.latent(spec.spatial_factor, spec.temporal_factor)
    side, length = tile // spec.spatial_factor, frames // spec.temporal_factor
    sizes = [_longest(*each) for each in ((whole.frames, length), (whole.height, side), (whole.width, side))]
    is_whole = sizes == [whole.frames, whole.height, whole.width]

    def run() -> Tensor:
        latents = torch.empty(1, spec.latent_channels, *sizes, device=META, dtype=dtype)
        timestep = torch.empty(1, device=META, dtype=dtype) if vae.config.timestep_conditioning else None
        pixels = vae.decode(latents, timestep, return_dict=False)[0]
        return (pixels * 0.5 + 0.5).clamp(0, 1) if is_whole else pixels  # otherwise it goes to the host as it is

    plane = 3 * shape.height * shape.width
    # As it comes, in float32 and in bytes; a part's pixels at a time.
    part = shape.frames if is_whole else min(shape.frames, sizes[0] * spec.temporal_factor)
    return Part(_weighs(vae), _peak(run, kind), host=plane * (10 * part + 2 * shape.frames))


def sound(spec: ModelSpec, length: int, kind: str) -> Part:
    """The audio VAE, in float32, while it encodes a sound of so many latents."""
    assert spec.audio_vae_config is not None
    with META:
        vae = AutoencoderKLLTX2Audio(**spec.audio_vae_config).eval()
    config = spec.audio_vae_config
    frames = length * spec.transformer_config["audio_scale_factor"]

    def run() -> Tensor:
        return vae.encode(
            torch.empty(1, config["in_channels"], frames, config["mel_bins"], device=META)
        ).latent_dist.mean

    return Part(_weighs(vae), _peak(run, kind))


def connectors(spec: ModelSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of LTX-2's connectors: all of them, and without the projections that only encoding needs."""
    with META:
        module = LTX2TextConnectors(**(spec.connectors_config or {}))
    projections = [part for name, part in module.named_children() if name in PROJECTIONS]
    item = dtype.itemsize
    every, projected = _numbers(module), sum(map(_numbers, projections))
    return every * item, (every - projected) * item


@torch.no_grad()
def _peak(run: Callable[[], Any], kind: str) -> int:
    ledger = Ledger(kind)
    with ledger, DeviceAttention(kind):
        result = run()
    del result
    return max(stretch.peak for stretch in ledger.stretches)


def _longest(size: int, most: int) -> int:
    return max(end - begin for begin, end in tiles_along(size, most))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _weighs(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
