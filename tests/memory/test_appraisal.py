"""Phases around the step: real VAEs and real denoising under torch's profiler against what shapes alone said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ltxforge_kernels.choice import EAGER, everything
from torch.profiler import ProfilerActivity, profile

from ltxforge.memory import trace_parts
from ltxforge.memory.appraisal import IN_LINEAR_LAYERS, QUANTISING, costs_of
from ltxforge.memory.costs import phases
from ltxforge.memory.trace import traced_model
from ltxforge.models.published import TEXT_ENCODERS
from ltxforge.models.random_weights import random_model, random_vae
from ltxforge.models.vae import decode_frames, encode_frames
from ltxforge.models.vae_tiles import DecodeTiling
from ltxforge.plan import (
    AudioPlan,
    BucketPlan,
    CachePlan,
    CheckpointPlan,
    ConditioningPlan,
    DataPlan,
    DevicePlan,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    PromptPlan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS, TINY, ModelSpec

CPU = torch.device("cpu")
CLIP, REAL = ClipShape(256, 192, 33), ClipShape(768, 512, 121)


def plan_for(spec: ModelSpec, shape: ClipShape, kind: str = "cuda", cached: str = "connectors") -> Plan:
    bucket = BucketPlan(shape, 24.0, shape.latent().tokens, 4, 126 if spec.has_audio else 0)
    trained = "both" if spec.has_audio else "video"
    prompt = PromptPlan("fox", "A fox.", "blurry", "", shape, 24.0, 8, 3.0, 0, audio_guidance=3.0)
    return Plan(
        name="appraised", seed=0, steps=4, steps_per_epoch=1.0, model=ModelPlan("none", spec.version, spec.rope, {}),
        device=DevicePlan("bf16", "bf16", kind, "PyTorch SDPA", "statistical", "a test"),
        data=DataPlan((), (bucket,)), cache=CachePlan("", text=cached),
        flow=FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=ConditioningPlan(0.0, 0.0, spec.default_prompt_tokens),
        lora=LoraPlan(32, 32.0, 0.0, False, ("attention",), modalities=trained),
        optimizer=OptimizerPlan("adamw", 1e-4, (0.9, 0.999), 1e-8, 0.0, "constant", 0, 4, 0.0, 2.0),
        training=TrainingPlan(1, 1, 1.0, None, trained), memory=MemoryPlan(), checkpoint=CheckpointPlan(4, 2),
        validation=ValidationPlan(4, False, (prompt,)), directory="", kernels=everything("triton"),
        audio=AudioPlan("shared", 1.0) if spec.has_audio else None,
    )  # fmt: skip


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch allocated at once while something ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = watched.profiler.kineto_results.events()
    live = most = 0
    for _, change in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"):
        live += change
        most = max(most, live)
    return most


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2"])
def test_encoding_takes_what_was_traced(base):
    spec = TINY[base]
    vae, frames = random_vae(spec, CPU, torch.float32), torch.zeros(33, 192, 256, 3, dtype=torch.uint8)
    estimated = trace_parts.clips(spec, CLIP, torch.float32, EAGER, "cpu")
    assert peak(lambda: encode_frames(vae, frames, CPU)) == pytest.approx(estimated.work, rel=0.05)


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2"])
def test_decoding_whole_takes_what_was_traced(base):
    spec = TINY[base]
    vae, shape = random_vae(spec, CPU, torch.float32), CLIP.latent()
    latents = torch.randn(spec.latent_channels, shape.frames, shape.height, shape.width)
    estimated = trace_parts.decoding(spec, CLIP, 0, 0, torch.float32, "cpu")
    found = peak(lambda: decode_frames(vae, latents, CPU, spec.sampling.decode_timestep))
    assert found == pytest.approx(estimated.work, rel=0.05)


def test_a_tile_takes_less_and_says_so():
    spec = TINY["tiny/ltx-video"]
    vae, shape = random_vae(spec, CPU, torch.float32), CLIP.latent()
    latents = torch.randn(spec.latent_channels, shape.frames, shape.height, shape.width)
    tiled = trace_parts.decoding(spec, CLIP, 128, 16, torch.float32, "cpu")
    whole = trace_parts.decoding(spec, CLIP, 0, 0, torch.float32, "cpu")
    assert tiled.work < whole.work / 3 and tiled.weights == whole.weights
    found = peak(lambda: decode_frames(vae, latents, CPU, 0.05, DecodeTiling(128, 16)))
    # What is joined lies on the host, which is the same memory here.
    assert tiled.work * 0.95 < found < tiled.work + tiled.host


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2"])
def test_denoising_takes_what_was_traced(base):
    """One pass of diffusers' own forward, which allocates the same over values as over shapes."""
    spec = TINY[base]
    plan = plan_for(spec, CLIP, "cpu")
    plan = dataclasses.replace(plan, kernels=EAGER)
    (prompt,) = plan.validation.prompts
    estimated = trace_parts.denoising(traced_model(plan, spec, "bf16", False), prompt, 128, "cpu")
    trained = "both" if spec.has_audio else "video"
    real = random_model(spec, CPU, torch.bfloat16, trained)
    real.load_transformer()
    found = peak(lambda: trace_parts.one_pass(real, prompt, 128, CPU))
    assert found == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("base", ["int8", "fp8", "nf4"])
def test_quantising_a_layer_stays_within_its_bytes(base):
    weight = torch.randn(512, 1024, dtype=torch.bfloat16)

    def make() -> None:
        layer = QuantisedLinear.quantise(weight.clone(), None, base, True)
        torch.linalg.vector_norm(weight.float() - layer.dequantised(torch.float32), dtype=torch.float64)

    bound = QUANTISING["eager"][base] * weight.numel()
    assert 0.5 * bound < peak(make) <= bound


def test_every_phase_of_a_real_run_is_there():
    spec = SPECS["2.0-dev"]
    costs = costs_of(plan_for(spec, REAL), spec, (("nf4", True),))
    memory = MemoryPlan(tuple(range(48)), base_precision="nf4", double_quant=True)
    found = {phase.name: phase for phase in phases(costs, memory, "adamw")}
    assert list(found) == ["captions", "clips", "sound", "load", "step", "sample", "decode", "save"]
    assert all(phase.device_bytes == sum(phase.parts.values()) for phase in found.values())
    assert 23.5e9 < found["captions"].device_bytes < 27e9  # Gemma 3 12B in bf16
    assert 14e9 < found["step"].device_bytes < 19e9
    assert found["decode"].device_bytes > found["sample"].device_bytes
    tiles = dataclasses.replace(memory, decode_tile=512, decode_frames=64, text_encoder_precision="nf4")
    frugal = {phase.name: phase for phase in phases(costs, tiles, "adamw")}
    assert frugal["decode"].device_bytes < found["decode"].device_bytes - 2e9
    assert frugal["captions"].device_bytes < 12e9


def test_a_second_plan_of_the_same_sizes_is_answered_from_memory():
    spec = SPECS["0.9.5"]
    plan = plan_for(spec, REAL)
    first = costs_of(plan, spec, (("bf16", False),))
    again = costs_of(dataclasses.replace(plan, name="other", seed=5), spec, (("bf16", False),))
    assert again == first and again.clips is first.clips


def test_connectors_that_stay_are_counted_with_the_weights():
    spec = SPECS["2.0-dev"]
    kept, features = (
        costs_of(plan_for(spec, REAL, cached=text), spec, (("nf4", True),)).works["nf4-double"].weights
        for text in ("connectors", "features")
    )
    assert features.outside - kept.outside == trace_parts.connectors(spec, torch.bfloat16)[1] > 1e9


def test_rotations_of_several_sizes_are_kept():
    spec = SPECS["0.9.5"]
    plan = dataclasses.replace(plan_for(spec, REAL), kernels=EAGER)
    (bucket,) = plan.data.buckets
    smaller = dataclasses.replace(bucket, shape=CLIP, tokens=CLIP.latent().tokens)
    both = dataclasses.replace(plan, data=DataPlan((), (smaller, bucket)))
    one, two = (costs_of(each, spec, (("bf16", False),)).works["bf16"] for each in (plan, both))
    assert two.given - one.given == one.ropes
    assert one.ropes == pytest.approx(2 * 6144 * 2048 * 4, rel=0.01)  # cos and sin in float32


def test_linear_layers_of_text_encoders_are_most_of_them():
    assert IN_LINEAR_LAYERS["t5"] == TEXT_ENCODERS["t5"] - 32_128 * 4096 - 32 * 64 - 49 * 4096
    assert IN_LINEAR_LAYERS.keys() == TEXT_ENCODERS.keys()
    # Beside Gemma 3's linear layers: its embedding, the tower for pictures and what joins them, and norms.
    rest = TEXT_ENCODERS["gemma-3"] - IN_LINEAR_LAYERS["gemma-3"] - 262_208 * 3840
    assert 0.4e9 < rest < 0.45e9
