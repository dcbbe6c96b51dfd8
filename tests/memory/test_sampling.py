"""Samples of a model whose weights wait elsewhere: diffusers' own forward brings them, and they go before decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from one_block import make_batch, plan_for
from torch import Tensor

from ltxforge import trainer
from ltxforge.events import ignore
from ltxforge.lora.inject import adapter_parameters
from ltxforge.memory.simulated import SimulatedStreams
from ltxforge.memory.strategy import Strategy
from ltxforge.memory.units import groups, spread
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import Sample, VideoModel, WantedPrompt
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import MemoryPlan, PromptPlan, StreamPlan
from ltxforge.session import adapt
from ltxforge.shapes import ClipShape
from ltxforge.specs import TINY
from ltxforge.validation.sample import sample

CPU, CAPTION = torch.device("cpu"), "a red ball rolls"
AWAY = [
    MemoryPlan(stream=StreamPlan(groups(4, 1)), checkpointed=(0, 2), offload_activations=True),
    MemoryPlan(stream=StreamPlan(spread(4, 4), "leaf")),
]


def make_model(base: str, modalities: str) -> VideoModel:
    spec = TINY[base]
    if spec.has_audio:
        return LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, torch.float32, modalities=modalities)
    return LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, torch.float32)


def trained_and_sampled(base: str, memory: MemoryPlan, maker: Any, frugal: bool) -> tuple[Sample, list[Tensor], int]:
    """The gradients of a step before and one after a sample, the sample, and what slots take once it is made."""
    plan, spec = plan_for(base, maker), TINY[base]
    modalities = "video"  # so that of LTX-2 a sample needs weights that a step does not
    plan = dataclasses.replace(
        plan, memory=memory, audio=None, training=dataclasses.replace(plan.training, modalities=modalities),
        lora=dataclasses.replace(plan.lora, modalities=modalities),
    )  # fmt: skip
    model = make_model(base, modalities)
    strategy = Strategy(plan, CPU, transfers=SimulatedStreams(), least_bytes=1)
    adapt(plan, model, ignore, strategy)
    model.transformer.train()
    draw = torch.Generator().manual_seed(3)
    parameters = adapter_parameters(model.transformer)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    batch = make_batch(base)
    batch = dataclasses.replace(batch, latents=dataclasses.replace(batch.latents, audio=None), present=None)
    tokens = spec.default_prompt_tokens
    (embedded,) = model.encode_prompts([WantedPrompt(CAPTION, "both")], tokens)
    prompt = PromptPlan("ball", CAPTION, "", "", ClipShape(64, 32, 9), 25.0, 2, 1.0, 5, frugal=frugal)
    if spec.has_audio:
        prompt = dataclasses.replace(prompt, audio_guidance=1.0)
    gradients, made, left = [], None, 0
    for _ in range(2):
        (losses,) = [each for _, each in trainer.forward(plan, model, batch, 5, 0).items()]
        losses.by_sample.sum().backward()
        gradients += [parameter.grad for parameter in parameters.values()]
        for parameter in parameters.values():
            parameter.grad = None
        if made is None:
            made = sample(model, prompt, {CAPTION: embedded}, tokens)
            left = strategy.streamer.slot_bytes if strategy.streamer else 0
    strategy.close()
    return made, gradients, left


@pytest.mark.parametrize(("base", "frugal"), [("tiny/ltx-video", False), ("tiny/ltx2.3", True)])
def test_a_sample_between_steps_changes_no_bit_and_has_the_plain_one_s(base, frugal, plan_maker):
    truth, gradients, _ = trained_and_sampled(base, MemoryPlan(), plan_maker, frugal)
    for memory in AWAY:
        found, others, left = trained_and_sampled(base, memory, plan_maker, frugal)
        assert np.array_equal(found.frames, truth.frames)
        for name, latents in truth.latents.items():
            assert torch.isfinite(latents).all() and torch.equal(found.latents[name], latents)
        assert all(torch.equal(*pair) for pair in zip(others, gradients, strict=True))
        assert left == 0, "places of streamed weights are given up before the picture is decoded"
