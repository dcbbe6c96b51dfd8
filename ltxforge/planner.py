"""The deciding: recipe and facts in, plan out. Pure; it opens no file and asks no device.

Every number that the recipe leaves open is decided here, with a note of where it came from. What cannot be carried out
is refused with all reasons at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltxforge.errors import PlanError
from ltxforge.lora.targets import match, unread
from ltxforge.plan import (
    BucketPlan,
    CachePlan,
    CheckpointPlan,
    ConditioningPlan,
    DataPlan,
    DevicePlan,
    Estimates,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    PromptPlan,
    SamplePlan,
    TrainingPlan,
    ValidationPlan,
    learning_rate_at,
)
from ltxforge.recipe.rules import dataset_id
from ltxforge.recipe.schema import Dataset, Prompt, Recipe, parse_size
from ltxforge.shapes import ClipShape
from ltxforge.specs import ModelSpec

if TYPE_CHECKING:
    from ltxforge.dataset.scan import Clip
    from ltxforge.hardware import Hardware
    from ltxforge.validation.prompts import PromptEntry


@dataclass(frozen=True)
class Facts:
    """What the planner is told about the world.

    `clips` holds each enabled dataset's scan, in the recipe's order; `said` the dotted keys that the user wrote,
    `overridden` those of them that came with --set; `previous` the plan of the run that is continued, if it has a
    checkpoint.
    """

    name: str
    directory: str
    cache_directory: str
    hardware: Hardware
    model: ModelPlan
    spec: ModelSpec
    clips: Sequence[tuple[Dataset, Sequence[Clip]]]
    library: Sequence[PromptEntry] = ()
    said: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()
    out_given: bool = False
    warnings: tuple[str, ...] = ()
    previous: Plan | None = None


def make_plan(recipe: Recipe, facts: Facts) -> Plan:
    """Decide every number. Raises PlanError when there is nothing to train on or nothing to train."""
    data = _data(recipe, facts)
    per_epoch = batches_per_epoch(data, recipe.training.batch_size) / recipe.training.accumulate
    steps = recipe.run.steps or max(1, math.ceil((recipe.run.epochs or 1) * per_epoch))
    lora, optimizer = _lora(recipe), _optimizer(recipe, facts.hardware, steps, facts.previous)
    prompt_tokens = recipe.conditioning.prompt_tokens or facts.spec.default_prompt_tokens
    every = recipe.checkpoint.every or min(250, steps)
    return Plan(
        name=facts.name,
        seed=recipe.run.seed,
        steps=steps,
        steps_per_epoch=per_epoch,
        model=facts.model,
        device=_device(recipe, facts.hardware, facts.previous),
        data=data,
        cache=CachePlan(facts.cache_directory, recipe.cache.latents),
        flow=_flow(recipe),
        conditioning=ConditioningPlan(
            recipe.conditioning.first_frame, recipe.conditioning.caption_dropout, prompt_tokens
        ),
        lora=lora,
        optimizer=optimizer,
        training=_training(recipe),
        memory=MemoryPlan(_checkpointing(recipe, facts.hardware)),
        checkpoint=CheckpointPlan(every, recipe.checkpoint.keep),
        validation=_validation(recipe, facts, every),
        directory=facts.directory,
        resume=recipe.run.resume,
        estimates=_estimates(recipe, facts, data, lora, prompt_tokens),
        notes=_notes(recipe, facts, data, optimizer, steps),
        origins=_origins(recipe, facts),
    )


def batches_per_epoch(data: DataPlan, batch_size: int) -> int:
    """Micro-batches in one epoch: each bucket's samples, cut into batches of equal shape."""
    return sum(math.ceil(bucket.samples / batch_size) for bucket in data.buckets)


def _data(recipe: Recipe, facts: Facts) -> DataPlan:
    samples = [
        SamplePlan(
            dataset=dataset_id(dataset), clip=clip.digest, path=str(clip.path), caption=clip.caption,
            shape=clip.shape, fps=dataset.fps or facts.spec.default_fps, start_seconds=start, repeats=dataset.repeats,
        )
        for dataset, clips in facts.clips
        for clip in clips
        if clip.verdict == "ok" and clip.shape is not None
        for start in clip.starts
    ]  # fmt: skip
    if not samples:
        folders = ", ".join(dataset.path for dataset, _ in facts.clips)
        raise PlanError(
            "no usable clip, so there is nothing to train on", where=folders,
            remedy="The verdict of each clip says why. Shorter `frames` or a smaller `resolution` let more clips in.",
        )  # fmt: skip
    # By content first: names and places of folders must not decide the order of what is otherwise the same.
    samples.sort(key=lambda s: (s.clip, s.shape, s.fps, s.start_seconds, s.caption, s.repeats, s.dataset, s.path))
    counts: dict[tuple[ClipShape, float], int] = {}
    for sample in samples:
        counts[sample.shape, sample.fps] = counts.get((sample.shape, sample.fps), 0) + sample.repeats
    factors = facts.spec.spatial_factor, facts.spec.temporal_factor
    buckets = tuple(
        BucketPlan(shape, fps, shape.latent(*factors).tokens, count) for (shape, fps), count in sorted(counts.items())
    )
    return DataPlan(tuple(samples), buckets, recipe.run.max_rejected)


def _device(recipe: Recipe, hardware: Hardware, previous: Plan | None) -> DevicePlan:
    """A run that goes on elsewhere keeps its precisions, unless the recipe says another, and with them its cache."""
    usual = "bf16" if hardware.has_bf16 else "fp32"
    precision = recipe.training.precision or (previous.device.precision if previous else usual)
    if previous is not None and (changes := _changes(previous, hardware)):
        exactness, reason = "statistical", f"changed since this run began: {'; '.join(changes)}"
    elif previous is not None and previous.device.exactness == "statistical":
        exactness, reason = "statistical", previous.device.exactness_reason
    elif hardware.kind == "cpu":
        exactness, reason = "exact", "every operation of PyTorch used here adds in a fixed order on the CPU"
    else:
        exactness, reason = (
            "statistical",
            "PyTorch's fused attention adds gradients in a varying order on GPUs; draws and data order are exact",
        )
    encoders = previous.device.encoder_precision if previous else "fp32" if hardware.kind == "cpu" else "bf16"
    return DevicePlan(
        precision=precision, encoder_precision=encoders, kind=hardware.kind, attention="PyTorch SDPA",
        exactness=exactness, exactness_reason=reason, name=hardware.name, versions=dict(hardware.versions),
    )  # fmt: skip


def _flow(recipe: Recipe) -> FlowPlan:
    flow = recipe.flow
    stretched = flow.sigma == "stretched-logit-normal"
    fraction = flow.uniform_fraction
    if fraction is None:
        fraction = 0.1 if stretched else 0.0
    shift = None if flow.shift in (None, "auto") else float(flow.shift)  # type: ignore[arg-type]
    return FlowPlan(flow.sigma, shift, stretched, fraction)


def _lora(recipe: Recipe) -> LoraPlan:
    lora = recipe.lora
    return LoraPlan(
        rank=lora.rank, alpha=float(lora.rank if lora.alpha is None else lora.alpha), dropout=lora.dropout,
        rslora=lora.rslora, targets=tuple(lora.targets), save_precision=lora.save_precision,
    )  # fmt: skip


def _optimizer(recipe: Recipe, hardware: Hardware, steps: int, previous: Plan | None) -> OptimizerPlan:
    """The schedule's length is fixed when the run is first planned, unless the recipe says it: `steps` may be raised
    later without changing the rate of a step that is planned already.
    """
    optimizer = recipe.optimizer
    if optimizer.name == "adamw-8bit" and "bitsandbytes" not in hardware.packages:
        raise PlanError(
            'optimizer.name = "adamw-8bit" needs the package bitsandbytes, which is not installed',
            remedy='pip install bitsandbytes (it has no build for macOS), or set optimizer.name = "adamw".',
        )
    warmup, decay_steps = optimizer.warmup_steps, steps
    if warmup is None:
        warmup = min(100, steps // 20)
    if previous is not None:
        decay_steps = previous.optimizer.decay_steps
        if optimizer.warmup_steps is None:
            warmup = previous.optimizer.warmup_steps
    decay_steps = optimizer.decay_steps or decay_steps
    if optimizer.schedule != "constant" and optimizer.end_fraction == 0 and steps > decay_steps:
        raise PlanError(
            f"the {optimizer.schedule} schedule reaches learning rate 0 at step {decay_steps}: the steps from there to"
            f" {steps} would change nothing",
            remedy=f"Stretch it over them with optimizer.decay_steps = {steps}, or stop at step {decay_steps}.",
        )
    if warmup >= steps:
        raise PlanError(
            f"optimizer.warmup_steps = {warmup} is not below the run's {steps} steps: it would never leave warm-up",
            remedy="Lower warmup_steps or train longer.",
        )
    return OptimizerPlan(
        name=optimizer.name, learning_rate=optimizer.learning_rate,
        betas=(optimizer.betas[0], optimizer.betas[1]), epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay, schedule=optimizer.schedule, warmup_steps=warmup,
        decay_steps=decay_steps, end_fraction=optimizer.end_fraction, power=optimizer.power,
    )  # fmt: skip


def _training(recipe: Recipe) -> TrainingPlan:
    training = recipe.training
    norm = training.clip_norm
    if norm is None and training.clip_value is None:
        norm = 1.0
    return TrainingPlan(training.batch_size, training.accumulate, norm, training.clip_value)


def _checkpointing(recipe: Recipe, hardware: Hardware) -> int:
    """On for GPUs by default. On Apple's, torch does not put the device's random state back before it recomputes, so
    dropout would draw another mask there and the gradients would be silently wrong.
    """
    said, dropout = recipe.memory.checkpointing, recipe.lora.dropout > 0
    if hardware.kind == "mps" and dropout:
        if said:
            raise PlanError(
                "lora.dropout with memory.checkpointing gives wrong gradients on Apple GPUs",
                remedy="Set memory.checkpointing = false or lora.dropout = 0.",
            )
        return 0
    return int(hardware.kind != "cpu") if said is None else int(said)


def _validation(recipe: Recipe, facts: Facts, save_every: int) -> ValidationPlan:
    section, first = recipe.validation, facts.clips[0][0]
    entries = [*section.prompt, *(_from_library(entry) for entry in facts.library)]
    names = [entry.name for entry in entries]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError(
            f"validation prompts share a name: {', '.join(doubled)}",
            remedy="A name becomes a file; rename one, in the recipe or in the library.",
        )

    def planned(entry: Prompt) -> PromptPlan:
        width, height = parse_size(entry.resolution or section.resolution or first.resolution)
        return PromptPlan(
            name=entry.name, prompt=entry.prompt, image=str(Path(entry.image).expanduser()) if entry.image else "",
            negative_prompt=section.negative_prompt if entry.negative_prompt is None else entry.negative_prompt,
            shape=ClipShape(width, height, entry.frames or section.frames or first.frames),
            fps=entry.fps or section.fps or first.fps or facts.spec.default_fps,
            steps=section.steps or facts.spec.sampling.steps,
            guidance=section.guidance or facts.spec.sampling.guidance,
            seed=section.seed if entry.seed is None else entry.seed,
        )  # fmt: skip

    every = save_every if section.every is None else section.every
    return ValidationPlan(every, section.at_start, tuple(planned(entry) for entry in entries))


def _from_library(entry: PromptEntry) -> Prompt:
    return Prompt(
        name=entry.name, prompt=entry.prompt, image=str(entry.image) if entry.image else None,
        negative_prompt=entry.negative_prompt, seed=entry.seed,
    )  # fmt: skip


def _estimates(recipe: Recipe, facts: Facts, data: DataPlan, lora: LoraPlan, prompt_tokens: int) -> Estimates:
    parameters = match(lora.targets, facts.spec).parameters(lora.rank)
    parts = 2 if recipe.cache.latents == "sample" else 1
    latents = sum(s.shape.latent().tokens for s in data.samples) * facts.spec.latent_channels * 4 * parts
    captions = len({s.caption for s in data.samples}) + 1
    text_bytes = 4 if facts.hardware.kind == "cpu" else 2
    moments = 2 if recipe.optimizer.name == "adamw-8bit" else 8
    lora_bytes = parameters * (4 if lora.save_precision == "fp32" else 2)
    return Estimates(
        cache_bytes=latents + captions * prompt_tokens * facts.spec.caption_channels * text_bytes,
        checkpoint_bytes=parameters * (4 + moments) + lora_bytes,
        lora_bytes=lora_bytes,
        download_bytes=_download_bytes(facts.model),
    )


def _download_bytes(model: ModelPlan) -> int:
    """What is not here yet; parts that lie in one file are one download."""
    absent = [part for part in model.components.values() if not part.location]
    return sum({(part.repository, part.revision, part.inside): part.bytes for part in absent}.values())


def _notes(recipe: Recipe, facts: Facts, data: DataPlan, optimizer: OptimizerPlan, steps: int) -> tuple[str, ...]:
    notes = [*facts.warnings, *facts.hardware.missing]
    layers = match(recipe.lora.targets, facts.spec).layers
    notes += [f"the LoRA file's {layer} is not read by {why}" for layer, why in unread(layers).items()]
    for bucket in data.buckets:
        if bucket.samples < recipe.training.batch_size:
            repeats = math.ceil(recipe.training.batch_size / bucket.samples)
            notes.append(
                f"bucket {bucket.shape} has fewer samples ({bucket.samples}) than batch_size"
                f" ({recipe.training.batch_size}): its batches are smaller; repeats = {repeats} would fill them"
            )
    micro_batches, accumulate = batches_per_epoch(data, recipe.training.batch_size), recipe.training.accumulate
    if accumulate > micro_batches:
        notes.append(f"a step of {accumulate} micro-batches goes over the data's {micro_batches} more than once")
    if facts.spec.distilled and recipe.validation.guidance not in (None, 1, 1.0):
        notes.append("distilled weights are made for guidance 1; higher values give burnt pictures")
    if optimizer.schedule != "constant" and optimizer.decay_steps != steps:
        rate = learning_rate_at(optimizer, steps)
        notes.append(
            f"the {optimizer.schedule} schedule ends at step {optimizer.decay_steps} and the run at step {steps}, with"
            f" learning rate {rate:.3g}"
        )
    return tuple(notes)


# Where an open number's value comes from when the recipe does not say it.
_OTHER_ORIGINS = {
    "training.precision": "device",
    "memory.checkpointing": "device",
    "model.version": "weights",
    "model.rope": "weights",
    "conditioning.prompt_tokens": "default",
    "validation.steps": "weights",
    "validation.guidance": "weights",
    "validation.resolution": "dataset",
    "validation.frames": "dataset",
    "validation.fps": "dataset",
}


def _origins(recipe: Recipe, facts: Facts) -> dict[str, str]:
    """Dotted recipe key → "recipe", "--set", "default", or the fact that decided it."""
    origins: dict[str, str] = {}
    for section, model in recipe:
        if isinstance(model, list):
            continue
        for key in type(model).model_fields:
            name = f"{section}.{key}"
            origins[name] = (
                "--set" if name in facts.overridden
                else "recipe" if name in facts.said
                else _OTHER_ORIGINS.get(name, "default")
            )  # fmt: skip
    if facts.out_given:
        origins["run.directory"] = "--out"
    return origins


def _changes(saved: Plan, hardware: Hardware) -> list[str]:
    """What differs, in words, between the machines and versions of two attempts: any of it may change bits."""
    before = {**saved.device.versions, "device": f"{saved.device.kind} {saved.device.name}".strip()}
    now = {**hardware.versions, "device": f"{hardware.kind} {hardware.name}".strip()}
    harmless = {"ltxforge", "python"}
    return [
        f"{name} was {before.get(name, 'unknown')}, now {now.get(name, 'unknown')}"
        for name in sorted((before.keys() | now.keys()) - harmless)
        if before.get(name) != now.get(name)
    ]
