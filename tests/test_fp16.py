"""fp16 really trains: both families' gradients against float32, the loss scale that they need, and what ends a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError
from ltxforge.events import StepDone
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.modalities import Streams
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.random_weights import random_prompt
from ltxforge.optim import Optimizer
from ltxforge.plan import AudioPlan, BucketPlan, ConditioningPlan, LoraPlan, OptimizerPlan, Plan, TrainingPlan
from ltxforge.precision import loss_scale
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY

CPU = torch.device("cpu")
BASES = ["tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3"]
SHAPE, FPS, LENGTH, PROMPT, SAMPLES = ClipShape(96, 64, 17), 24.0, 18, 128, 2


class OneBatch:
    """The same samples in every step, as one of `parts` micro-batches of a larger step."""

    def __init__(self, base: str, parts: int = 1) -> None:
        spec, draw = TINY[base], torch.Generator().manual_seed(1)
        shape = SHAPE.latent()
        # One colour, which is soon learnt.
        video = 2 * torch.randn(1, spec.latent_channels, 1, 1, 1, generator=draw)
        video = video.expand(SAMPLES, -1, shape.frames, shape.height, shape.width)
        audio = present = None
        if spec.has_audio:
            audio = torch.randn(1, 1, spec.transformer_config["audio_in_channels"], generator=draw)
            audio = 2 * audio.expand(SAMPLES, LENGTH, -1)
            present = torch.ones(SAMPLES, dtype=torch.bool)
        prompt = random_prompt(spec, PROMPT, "both" if spec.has_audio else "video", torch.float32)
        clean = torch.zeros(SAMPLES, shape.tokens, dtype=torch.bool)
        self.batch = Batch(Streams(video, audio), present, [prompt] * SAMPLES, clean, shape, FPS, (), 0)
        self.parts = parts

    def load(self, step: int, micro: int) -> Batch:
        return self.batch

    def count_at(self, step: int) -> Streams[int]:
        return Streams(SAMPLES * self.parts, SAMPLES * self.parts if self.batch.latents.audio is not None else None)

    def epoch_at(self, step: int) -> float:
        return float(step)


def make_model(base: str, plan: Plan, dtype: torch.dtype) -> VideoModel:
    spec = TINY[base]
    if spec.has_audio:
        model = LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, dtype, modalities="both")
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, dtype)
    model.load_transformer()
    matched = match(plan.lora.targets, spec, plan.lora.modalities, plan.training.modalities)
    inject(model.transformer, plan.lora, matched, plan.seed)
    model.transformer.train()
    return model


@pytest.fixture
def plan_for(plan_in, tmp_path):
    """A plan of one batch; `scale` of the loss as planned unless it is given."""

    def plan(base: str, precision: str, steps: int = 1, samples: int = SAMPLES, scale: float | None = None) -> Plan:
        spec = TINY[base]
        modalities = "both" if spec.has_audio else "video"
        bucket = BucketPlan(SHAPE, FPS, SHAPE.latent().tokens, samples, LENGTH)
        if scale is None:
            scale = loss_scale(precision, [bucket], spec, modalities, samples)
        made = plan_in(
            tmp_path, base, steps=steps, conditioning=ConditioningPlan(0.0, 0.0, PROMPT),
            lora=LoraPlan(8, 8.0, 0.0, False, ("all",), "fp32", modalities),
            optimizer=OptimizerPlan("adamw", 1e-2, (0.9, 0.999), 1e-8, 0.0, "constant", 0, steps, 0.0, 2.0),
            training=TrainingPlan(SAMPLES, 1, 1.0, None, modalities),
            audio=AudioPlan("shared", 1.0) if spec.has_audio else None,
        )  # fmt: skip
        return dataclasses.replace(made, device=dataclasses.replace(made.device, precision=precision, loss_scale=scale))

    return plan


def gradient(base: str, plan: Plan, parts: int = 1) -> Tensor:
    """The whole adapter's gradient, float32 masters of a base in the plan's precision. B is not 0, so that A learns."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[plan.device.precision]
    model, draw = make_model(base, plan, dtype), torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(model.transformer).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    assert trainer.accumulate(plan, model, OneBatch(base, parts), 5, StopRequest()) is not None
    found = adapter_parameters(model.transformer).values()
    assert {p.dtype for p in found} == {p.grad.dtype for p in found} == {torch.float32}
    return torch.cat([p.grad.flatten() for p in found])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("base", BASES)
def test_the_gradient_is_float32_s(base, plan_for):
    exact, half = (gradient(base, plan_for(base, precision)) for precision in ("fp32", "fp16"))
    assert cosine(half, exact) >= 0.9999 and float(half.norm() / exact.norm()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("base", BASES[:2])
def test_the_scale_keeps_small_gradients(base, plan_for):
    """As in a step of many samples, whose gradients are small: planned they are float32's, at scale 1 not."""
    parts = 4096
    exact = gradient(base, plan_for(base, "fp32", samples=SAMPLES * parts), parts)
    planned = gradient(base, plan_for(base, "fp16", samples=SAMPLES * parts), parts)
    plain = gradient(base, plan_for(base, "fp16", scale=1.0), parts)
    assert cosine(planned, exact) >= 0.9999
    assert cosine(plain, exact) < 0.999


@pytest.mark.parametrize("base", BASES[:2])
def test_a_scale_changes_no_bit_where_nothing_underflows(base, plan_for):
    """It is a power of two: in float32 multiplying and dividing by it are exact."""
    once, scaled = (gradient(base, plan_for(base, "fp32", scale=scale)) for scale in (1.0, 2.0**14))
    assert torch.equal(once, scaled)


@pytest.mark.parametrize("base", BASES[:2])
def test_it_learns_as_bf16_does(base, plan_for):
    """Twenty steps on one batch: the losses are float32's, more closely than bf16's are."""

    def losses(precision: str) -> Tensor:
        plan = plan_for(base, precision, steps=20)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        model, found = make_model(base, plan, dtype), []
        optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
        emit = lambda event: found.append(event.loss) if isinstance(event, StepDone) else None  # noqa: E731
        trainer.train(plan, model, OneBatch(base), optimizer, 0, emit, StopRequest(), lambda _step: None)
        return torch.tensor(found, dtype=torch.float64)

    exact, half, brain = (losses(precision) for precision in ("fp32", "fp16", "bf16"))
    assert exact[-5:].mean() < 0.8 * exact[:5].mean()
    assert (half - exact).norm() < (brain - exact).norm() and (half / exact - 1).abs().max() < 0.01


def test_a_step_that_leaves_the_range_is_refused_with_the_way_out(plan_for):
    base = "tiny/ltx-video"
    plan = plan_for(base, "fp16")
    model = make_model(base, plan, torch.float16)
    model.transformer.proj_in.weight.data *= 1e5
    optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
    before = {name: value.detach().clone() for name, value in adapter_parameters(model.transformer).items()}
    with pytest.raises(NonFiniteError, match=r'65504.*training.precision = "fp32"'):
        trainer.train(plan, model, OneBatch(base), optimizer, 0, lambda _e: None, StopRequest(), lambda _step: None)
    assert all(torch.equal(value, before[name]) for name, value in adapter_parameters(model.transformer).items())
