"""What a measured step is made of: a plan as the planner would make it, and a batch as the cache would give it.

Decides what does not matter to speed and memory: latents, sound and captions are random, and the same in every step.
Sound shares the picture's sigma, as in the official trainer, so that diffusers' own forward computes the same step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from ltxforge_kernels.choice import OPS, QUANTISED_OPS

from ltxforge.dataset.batches import Batch
from ltxforge.fit.wishes import wishes_of
from ltxforge.hardware import Hardware, torch_dtype
from ltxforge.kernel_choices import choose_kernels, used_ops
from ltxforge.modalities import Streams, has
from ltxforge.models.interface import VideoModel, to_tokens
from ltxforge.models.random_weights import random_prompt
from ltxforge.moments import MOMENTS
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
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.randomness import address
from ltxforge.recipe.schema import Dataset, Model, Recipe, Training
from ltxforge.recipe.schema import Optimizer as RecipeOptimizer
from ltxforge.suites.step import TrainingCase

SEED = 0


def plan_of(case: TrainingCase, hardware: Hardware) -> Plan:
    """What the planner would decide for such a run, as far as a step depends on it.

    Raises:
        PlanError: the case asks for kernels that cannot run here.
    """
    spec, steps = case.spec, case.warmup_steps + case.steps
    return Plan(
        name=case.name,
        seed=SEED,
        steps=steps,
        steps_per_epoch=1.0,
        model=ModelPlan(case.model, spec.version, spec.rope, {}),
        device=DevicePlan(
            case.precision, case.precision, hardware.kind, "PyTorch SDPA", "statistical", "a measurement", hardware.name
        ),
        data=DataPlan((), ()),
        cache=CachePlan(""),
        flow=FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=ConditioningPlan(0.0, 0.0, spec.default_prompt_tokens),
        lora=LoraPlan(case.rank, float(case.rank), 0.0, False, tuple(case.targets), modalities=case.trained),
        optimizer=OptimizerPlan(
            case.optimizer, 1e-4, MOMENTS[case.optimizer].betas, 1e-8, 0.0, "constant", 0, steps, 0.0, 2.0
        ),
        training=TrainingPlan(case.batch_size, case.accumulate, 1.0, None, case.trained, case.compile),
        memory=memory_of(case, hardware),
        checkpoint=CheckpointPlan(steps, 2),
        validation=ValidationPlan(0, False),
        directory="",
        audio=AudioPlan("shared", 1.0) if has(case.trained, "audio") else None,
        kernels=choose_kernels(
            used_ops(case.trained, case.base_precision),
            hardware.machine,
            case.precision,
            case.precision,
            asked=dict.fromkeys((*OPS, *QUANTISED_OPS), case.kernels) if case.kernels else None,
            spec=spec,
            rank=case.rank,
        ),
    )


def memory_of(case: TrainingCase, hardware: Hardware) -> MemoryPlan:
    """What the planner makes of such a [memory] on this machine."""
    recipe = Recipe(
        model=Model(base=case.model), dataset=[Dataset(path=case.name)], memory=case.memory,
        optimizer=RecipeOptimizer(name=case.optimizer), training=Training(compile=case.compile),
    )  # fmt: skip
    return replace(wishes_of(recipe, hardware, case.spec, None, "").memory, dry_run=False)


def bucket_of(case: TrainingCase, model: VideoModel) -> BucketPlan:
    """The bucket that the case's clips would be in."""
    tokens = case.shape.latent(case.spec.spatial_factor, case.spec.temporal_factor).tokens
    length = model.sound_length(case.shape.frames / case.rate) if has(case.trained, "audio") else 0
    return BucketPlan(
        case.shape, case.rate, tokens if has(case.trained, "video") else 0, case.batch_size, length,
        with_sound=case.batch_size if length else 0,
    )  # fmt: skip


def synthetic_batch(case: TrainingCase, model: VideoModel) -> Batch:
    """A micro-batch as the cache would give it: standard normal latents, whole captions, every clip with sound.

    L, the sound's latents, is what the model says belongs to the clip's duration.
    """
    spec, size = case.spec, case.batch_size
    shape = case.shape.latent(spec.spatial_factor, spec.temporal_factor)
    generator = torch.Generator().manual_seed(address(SEED, "synthetic-latents"))
    video = audio = None
    if has(case.trained, "video"):
        video = torch.randn(
            size, spec.latent_channels, shape.frames, shape.height, shape.width, generator=generator
        )  # fmt: skip
    if has(case.trained, "audio"):
        length = model.sound_length(case.shape.frames / case.rate)
        audio = torch.randn(size, length, spec.transformer_config["audio_in_channels"], generator=generator)
    prompt = random_prompt(spec, spec.default_prompt_tokens, case.trained, torch_dtype(case.precision))
    return Batch(
        latents=Streams(video, audio),
        present=None if audio is None else torch.ones(size, dtype=torch.bool),
        prompts=[prompt] * size,
        clean=torch.zeros(size, shape.tokens, dtype=torch.bool),
        shape=shape,
        fps=case.rate,
        samples=(),
        first_index=0,
    )


def tokens_of(batch: Batch) -> dict[str, int]:
    """Sequence lengths of one sample: T of the video, L of the sound, P of the prompt."""
    streams = {name: each.shape[1] for name, each in model_tokens(batch).items()}
    return {**streams, "prompt": batch.prompts[0].tokens}


def model_tokens(batch: Batch) -> Streams[torch.Tensor]:
    """Each modality's tokens, [B, T, C] and [B, L, C]."""
    video = batch.latents.video
    return Streams(None if video is None else to_tokens(video), batch.latents.audio)


def tokens_told(batch: Batch) -> str:
    """`6,144 video tokens, 126 audio tokens, 1,024 prompt tokens`."""
    return ", ".join(f"{count:,} {name} tokens" for name, count in tokens_of(batch).items())
