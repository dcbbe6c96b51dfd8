"""Tiny models of one block with a LoRA on each of its linears, a batch, a plan: little, for the interpreter is slow."""

from __future__ import annotations

import dataclasses

import torch
import triton
from ltxforge_kernels.choice import Kernels

from ltxforge.dataset.batches import Batch
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.modalities import Streams
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import PromptEmbeddings, VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import AudioPlan, ConditioningPlan, Plan, TrainingPlan
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY, ModelSpec

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
SHAPE, FPS, PROMPT, LENGTH = LatentShape(2, 2, 2), 24.0, 6, 5


def spec_of(base: str) -> ModelSpec:
    """The tiny model with one block: the interpreter takes its time."""
    spec = TINY[base]
    return dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": 1})


def make_model(base: str, plan: Plan, kernels: Kernels, dtype: torch.dtype) -> VideoModel:
    """Of one block, with a LoRA on each of its linears that is not zero."""
    spec, modalities = spec_of(base), plan.training.modalities
    if spec.has_audio:
        parts = ltx2_tiny.tiny_parts(spec)
        model: VideoModel = LTX2Video(spec, spec.rope, parts, DEVICE, dtype, modalities=modalities)
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), DEVICE, dtype)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(("all",), spec, modalities, modalities), plan.seed, kernels)
    model.kernels = kernels
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model.transformer).values():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=draw)).to(DEVICE))
    model.transformer.train()
    return model


def make_batch(base: str) -> Batch:
    """Two samples, of which the first one's first frame is clean."""
    spec, draw = TINY[base], torch.Generator().manual_seed(1)
    video = torch.randn(2, spec.latent_channels, SHAPE.frames, SHAPE.height, SHAPE.width, generator=draw)
    clean = torch.zeros(2, SHAPE.tokens, dtype=torch.bool)
    clean[0, : SHAPE.height * SHAPE.width] = True
    config, audio, present = spec.transformer_config, None, None
    if spec.has_audio:
        audio = torch.randn(2, LENGTH, config["audio_in_channels"], generator=draw)
        present = torch.tensor([True, True])
        widths = {"video": config["cross_attention_dim"], "audio": config["audio_cross_attention_dim"]}
        if config["use_prompt_embeddings"]:
            widths = dict.fromkeys(widths, config["caption_channels"])
    else:
        widths = {"embeds": spec.caption_channels}
    prompts = [
        PromptEmbeddings({name: torch.randn(PROMPT, width, generator=draw) for name, width in widths.items()}, PROMPT)
        for _ in range(2)
    ]
    return Batch(Streams(video, audio), present, prompts, clean, SHAPE, FPS, (), 0)


def plan_for(base: str, maker, dropout: float = 0.0) -> Plan:
    modalities = "both" if TINY[base].has_audio else "video"
    plan = maker(base)
    return dataclasses.replace(
        plan,
        conditioning=ConditioningPlan(0.5, 0.0, PROMPT),
        lora=dataclasses.replace(plan.lora, alpha=6.0, modalities=modalities, dropout=dropout),
        training=TrainingPlan(2, 1, 1.0, None, modalities),
        audio=AudioPlan("independent", 1.0) if modalities == "both" else None,
    )
