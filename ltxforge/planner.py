"""The deciding: recipe and facts in, plan out. Pure; it opens no file and asks no device.

Every number that the recipe leaves open is decided here, with a note of where it came from. What cannot be carried out
is refused with all reasons at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxforge_kernels.choice import OPS, QUANTISED_OPS, Kernels

from ltxforge.errors import PlanError
from ltxforge.estimates import estimate, sample_bytes
from ltxforge.exactness import exactness_of
from ltxforge.fit.choice import Case, CostsOf, Decision, decide
from ltxforge.fit.wishes import stored_format, wishes_of
from ltxforge.kernel_choices import asked_for, choose_kernels, used_ops
from ltxforge.lora.init_from import LoraFile, require_trainable
from ltxforge.lora.targets import match
from ltxforge.modalities import has
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
    ModelPlan,
    OptimizerPlan,
    Plan,
    PromptPlan,
    SamplePlan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.plan_notes import notes_on
from ltxforge.precision import loss_scale, precision_remarks, precisions
from ltxforge.recipe.model_rules import LTX2_SAMPLING, SOUND_PARTS, family_named
from ltxforge.recipe.rules import dataset_id
from ltxforge.recipe.schema import Dataset, Prompt, Recipe, Validation, parse_size
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
    checkpoint; `lora_file` what `lora.init_from` names, unless that run began from it already. `costs_of` tells what a
    drafted plan takes in memory and time; without it nothing is refused for its size, and nothing fitted.
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
    lora_file: LoraFile | None = None
    costs_of: CostsOf | None = None


def make_plan(recipe: Recipe, facts: Facts) -> Plan:
    """Decide every number.

    Raises:
        PlanError: there is nothing to train on, nothing to train, or no way to make it fit.
    """
    case = Case(
        facts.hardware, facts.spec, facts.previous, facts.cache_directory, stored_format(facts.model), facts.costs_of,
        lambda other: _draft(other, _facts_for(other, recipe, facts)),
    )  # fmt: skip
    draft = _draft(recipe, facts)
    decision = decide(recipe, draft, case)
    plan = _with_memory(draft, decision, recipe, facts)
    matched = match(plan.lora.targets, facts.spec, plan.lora.modalities, plan.training.modalities)
    if facts.lora_file:
        require_trainable(facts.lora_file, plan.lora, matched, facts.spec, plan.training.modalities)
    estimates = estimate(plan, facts.spec, matched.tensor_sizes(plan.lora.rank))
    told = notes_on(plan, facts.spec, matched, _unread(recipe, facts), bool(recipe.validation.stg), facts.lora_file)
    remarks = precision_remarks(plan.device.precision, facts.hardware)
    return replace(
        plan,
        estimates=replace(estimates, phases=decision.phases, choices=decision.words),
        notes=(*facts.warnings, *facts.hardware.missing, *remarks, *decision.notes, *told),
    )


def _draft(recipe: Recipe, facts: Facts) -> Plan:
    """The plan but for its memory, which is as the recipe says, and for what follows from it."""
    spec, modalities = facts.spec, modalities_of(recipe, facts.spec)
    _require_device(spec, facts.hardware)
    data = _data(recipe, facts, modalities)
    per_epoch = data.batches_per_epoch(recipe.training.batch_size) / recipe.training.accumulate
    steps = recipe.run.steps or max(1, math.ceil((recipe.run.epochs or 1) * per_epoch))
    every = recipe.checkpoint.every or min(250, steps)
    stored = stored_format(facts.model)
    asked = wishes_of(recipe, facts.hardware, spec, facts.previous, facts.cache_directory, stored)
    kernels = _kernels(recipe, facts, modalities, asked.base_precisions)
    return Plan(
        name=facts.name,
        seed=recipe.run.seed,
        steps=steps,
        steps_per_epoch=per_epoch,
        model=_identifying(facts.model, modalities),
        device=_device(recipe, facts, kernels, data, modalities, asked.memory.text_encoder_precision),
        kernels=kernels,
        data=data,
        cache=CachePlan(
            facts.cache_directory,
            recipe.cache.latents,
            recipe.cache.text_cache if spec.connectors_config else "connectors",
        ),
        flow=_flow(recipe),
        conditioning=_conditioning(recipe, spec),
        lora=_lora(recipe, modalities, facts),
        optimizer=_optimizer(recipe, facts.hardware, steps, facts.previous, asked.optimizers[0]),
        training=_training(recipe, modalities),
        memory=asked.memory,
        checkpoint=CheckpointPlan(every, recipe.checkpoint.keep),
        validation=_validation(recipe, facts, every),
        directory=facts.directory,
        resume=recipe.run.resume,
        audio=AudioPlan(recipe.audio.sigma, recipe.audio.loss_weight) if has(modalities, "audio") else None,
        origins=_origins(recipe, facts),
    )


def _with_memory(draft: Plan, decision: Decision, recipe: Recipe, facts: Facts) -> Plan:
    """The draft with what was decided about its memory, and with the ops that such a base needs."""
    modalities, steps = draft.training.modalities, draft.steps
    kernels = _kernels(recipe, facts, modalities, (decision.memory.base_precision,))
    chosen = {key: "fit" for key in decision.chosen if draft.origins[key] not in ("recipe", "--set")}
    return replace(
        draft,
        memory=decision.memory,
        kernels=kernels,
        device=_device(recipe, facts, kernels, draft.data, modalities, decision.memory.text_encoder_precision),
        optimizer=_optimizer(recipe, facts.hardware, steps, facts.previous, decision.optimizer),
        origins=draft.origins | chosen,
    )


def _facts_for(other: Recipe, recipe: Recipe, facts: Facts) -> Facts:
    """The same facts for a recipe whose datasets have other sizes and lengths: each clip at its dataset's own."""
    enabled = [dataset for dataset in other.dataset if dataset.enabled]
    if other.dataset == recipe.dataset:
        return facts
    clips = [
        (dataset, [_resized(clip, dataset) for clip in found])
        for dataset, (_, found) in zip(enabled, facts.clips, strict=True)
    ]
    return replace(facts, clips=clips)


def _resized(clip: Clip, dataset: Dataset) -> Clip:
    """A clip as its dataset would have it, in the largest of its buckets."""
    shape = ClipShape(*parse_size(dataset.resolution), dataset.frames)
    return replace(clip, shape=shape) if clip.shape else clip


def _require_device(spec: ModelSpec, hardware: Hardware) -> None:
    if spec.has_audio and hardware.kind == "mps":
        raise PlanError(
            f"{spec.version} cannot be computed on Apple GPUs: its positions are in float64, which they do not have",
            remedy="Train LTX-Video here, or LTX-2 on a machine with a CUDA or ROCm GPU.",
        )


def _identifying(model: ModelPlan, modalities: str) -> ModelPlan:
    """The model, told from others by the parts it trains and encodes with; a VAE for samples alone is free."""
    unused = {"video": "audio_vae", "audio": "vae"}.get(modalities)
    parts = model.components.items()
    return replace(model, components={n: replace(part, digest="") if n == unused else part for n, part in parts})


def modalities_of(recipe: Recipe, spec: ModelSpec) -> str:
    """What is trained: "video", "audio" or "both"; by default all that the model makes.

    Raises PlanError for sound of a model that makes none.
    """
    said = recipe.training.modalities
    if said is not None and has(said, "audio") and not spec.has_audio:
        raise PlanError(
            f'training.modalities = "{said}", but {spec.version} makes no sound', where=recipe.model.base,
            remedy="Leave it out, or take an LTX-2 base.",
        )  # fmt: skip
    return said or ("both" if spec.has_audio else "video")


def _data(recipe: Recipe, facts: Facts, modalities: str) -> DataPlan:
    hears = has(modalities, "audio")
    samples = [
        SamplePlan(
            dataset=dataset_id(dataset), clip=clip.digest, path=str(clip.path), caption=clip.caption,
            shape=clip.shape, fps=dataset.fps or facts.spec.default_fps, start_seconds=start, repeats=dataset.repeats,
            sound=clip.sound_at(start) if hears else "",
        )
        for dataset, clips in facts.clips
        for clip in clips
        if clip.verdict == "ok" and clip.shape is not None
        for start in clip.starts
    ]  # fmt: skip
    _require_samples(samples, facts, modalities)
    # By content first: names and places of folders must not decide the order of what is otherwise the same.
    samples.sort(
        key=lambda s: (s.clip, s.shape, s.fps, s.start_seconds, s.caption, s.sound, s.repeats, s.dataset, s.path)
    )
    of_bucket: dict[tuple[ClipShape, float], list[SamplePlan]] = {}
    for sample in samples:
        of_bucket.setdefault((sample.shape, sample.fps), []).append(sample)
    buckets = tuple(
        _bucket(shape, fps, of_bucket[shape, fps], facts.spec, modalities, recipe.cache.latents)
        for shape, fps in sorted(of_bucket)
    )
    return DataPlan(tuple(samples), buckets, recipe.run.max_rejected)


def _require_samples(samples: Sequence[SamplePlan], facts: Facts, modalities: str) -> None:
    folders = ", ".join(dataset.path for dataset, _ in facts.clips)
    if modalities == "audio" and not any(sample.sound for sample in samples):
        raise PlanError(
            'training.modalities = "audio", but no usable clip has sound, so there is nothing to train on',
            where=folders,
            remedy="The verdict of each clip says why. Sound is read from the clip or from a sound file beside it.",
        )
    if not samples:
        raise PlanError(
            "no usable clip, so there is nothing to train on", where=folders,
            remedy="The verdict of each clip says why. Shorter `frames` or a smaller `resolution` let more clips in.",
        )  # fmt: skip


def _bucket(
    shape: ClipShape, fps: float, samples: Sequence[SamplePlan], spec: ModelSpec, modalities: str, latents: str
) -> BucketPlan:  # fmt: skip
    tokens = audio_tokens = audio_channels = 0
    if has(modalities, "video"):
        tokens = shape.latent(spec.spatial_factor, spec.temporal_factor).tokens
    if has(modalities, "audio"):
        audio_tokens = max(1, round(shape.frames / fps * spec.audio_latents_per_second))
        audio_channels = spec.transformer_config["audio_in_channels"]
    return BucketPlan(
        shape, fps, tokens, sum(sample.repeats for sample in samples), audio_tokens,
        with_sound=sum(sample.repeats for sample in samples if sample.sound),
        video_bytes=sample_bytes(tokens, spec.latent_channels, latents),
        audio_bytes=sample_bytes(audio_tokens, audio_channels, latents),
    )  # fmt: skip


def _conditioning(recipe: Recipe, spec: ModelSpec) -> ConditioningPlan:
    conditioning = recipe.conditioning
    tokens = conditioning.prompt_tokens or spec.default_prompt_tokens
    if rest := tokens % spec.prompt_multiple:
        legal = [count for count in (tokens - rest, tokens - rest + spec.prompt_multiple) if count]
        raise PlanError(
            f"conditioning.prompt_tokens = {tokens} is no multiple of the connectors' {spec.prompt_multiple} registers",
            remedy=f"Nearest: {' or '.join(map(str, legal))}. The version's own is {spec.default_prompt_tokens}.",
        )
    return ConditioningPlan(conditioning.first_frame, conditioning.caption_dropout, tokens)


def _kernels(recipe: Recipe, facts: Facts, modalities: str, base_precisions: Sequence[str]) -> Kernels:
    """A run that goes on keeps its own where it can, unless the recipe says another."""
    dtypes = precisions(recipe, facts.hardware, facts.previous)
    ops = dict.fromkeys(op for base in base_precisions for op in used_ops(modalities, base))
    return choose_kernels(
        tuple(ops), facts.hardware.machine, *dtypes, asked=asked_for(recipe.kernels), spec=facts.spec,
        previous=facts.previous.kernels if facts.previous else None, rank=recipe.lora.rank,
    )  # fmt: skip


def _device(
    recipe: Recipe, facts: Facts, kernels: Kernels, data: DataPlan, modalities: str, text_encoder: str
) -> DevicePlan:  # fmt: skip
    hardware, samples = facts.hardware, recipe.training.batch_size * recipe.training.accumulate
    precision, encoders = precisions(recipe, hardware, facts.previous)
    exactness, reason = exactness_of(hardware, facts.previous, kernels, recipe.training.compile, text_encoder)
    return DevicePlan(
        precision=precision, encoder_precision=encoders, kind=hardware.kind, attention="PyTorch SDPA",
        exactness=exactness, exactness_reason=reason, name=hardware.name, versions=dict(hardware.versions),
        loss_scale=loss_scale(precision, data.buckets, facts.spec, modalities, samples),
    )  # fmt: skip


def _flow(recipe: Recipe) -> FlowPlan:
    flow = recipe.flow
    stretched = flow.sigma == "stretched-logit-normal"
    fraction = flow.uniform_fraction
    if fraction is None:
        fraction = 0.1 if stretched else 0.0
    shift = None if flow.shift in (None, "auto") else float(flow.shift)  # type: ignore[arg-type]
    return FlowPlan(flow.sigma, shift, stretched, fraction)


def _lora(recipe: Recipe, modalities: str, facts: Facts) -> LoraPlan:
    """A run that goes on keeps what it began from: its checkpoint holds all that came of it."""
    lora, begun = recipe.lora, facts.previous.lora.init_digest if facts.previous and recipe.lora.init_from else ""
    # Sound that is context only teaches nothing: its layers would drift with the video's loss.
    learnt = "video" if recipe.audio.loss_weight == 0 and has(modalities, "video") else modalities
    return LoraPlan(
        rank=lora.rank, alpha=float(lora.rank if lora.alpha is None else lora.alpha), dropout=lora.dropout,
        rslora=lora.rslora, targets=tuple(lora.targets), save_precision=lora.save_precision,
        modalities=lora.modalities or learnt,
        init_from=str(Path(lora.init_from).expanduser()) if lora.init_from else "",
        init_digest=facts.lora_file.digest if facts.lora_file else begun,
    )  # fmt: skip


def _optimizer(recipe: Recipe, hardware: Hardware, steps: int, previous: Plan | None, name: str) -> OptimizerPlan:
    """The schedule's length is fixed when the run is first planned, unless the recipe says it: `steps` may be raised
    later without changing the rate of a step that is planned already.
    """
    optimizer, moments = recipe.optimizer, MOMENTS[name]
    if name != "adamw" and "bitsandbytes" not in hardware.packages:
        raise PlanError(
            f'optimizer.name = "{name}" needs the package bitsandbytes, which is not installed',
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
        name=name, learning_rate=optimizer.learning_rate,
        betas=tuple(optimizer.betas or moments.betas),  # type: ignore[arg-type]
        epsilon=optimizer.epsilon if moments.has_epsilon else 0.0,
        weight_decay=optimizer.weight_decay, schedule=optimizer.schedule, warmup_steps=warmup,
        decay_steps=decay_steps, end_fraction=optimizer.end_fraction, power=optimizer.power,
    )  # fmt: skip


def _training(recipe: Recipe, modalities: str) -> TrainingPlan:
    training = recipe.training
    norm = training.clip_norm
    if norm is None and training.clip_value is None:
        norm = 1.0
    return TrainingPlan(
        training.batch_size, training.accumulate, norm, training.clip_value, modalities, training.compile
    )


def _validation(recipe: Recipe, facts: Facts, save_every: int) -> ValidationPlan:
    section, first = recipe.validation, facts.clips[0][0]
    entries = [*section.prompt, *(_from_library(entry) for entry in facts.library)]
    names = [entry.name for entry in entries]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError(
            f"validation prompts share a name: {', '.join(doubled)}",
            remedy="A name becomes a file; rename one, in the recipe or in the library.",
        )

    guided = _guidance(section, facts.spec)

    def planned(entry: Prompt) -> PromptPlan:
        width, height = parse_size(entry.resolution or section.resolution or first.resolution)
        return PromptPlan(
            name=entry.name, prompt=entry.prompt, image=str(Path(entry.image).expanduser()) if entry.image else "",
            negative_prompt=next(
                text
                for text in (entry.negative_prompt, section.negative_prompt, facts.spec.sampling.negative_prompt)
                if text is not None
            ),
            shape=ClipShape(width, height, entry.frames or section.frames or first.frames),
            fps=entry.fps or section.fps or first.fps or facts.spec.default_fps,
            steps=section.steps or facts.spec.sampling.steps,
            seed=section.seed if entry.seed is None else entry.seed, **guided,
        )  # fmt: skip

    every = save_every if section.every is None else section.every
    prompts = tuple(planned(entry) for entry in entries)
    for prompt in prompts:
        _require_samplable(prompt, facts.spec)
    return ValidationPlan(every, section.at_start, prompts)


def _require_samplable(prompt: PromptPlan, spec: ModelSpec) -> None:
    """Refuse what the version's pipeline would only fail at after hours of training."""
    if min(prompt.shape.width, prompt.shape.height) < spec.smallest_sampled_side:
        raise PlanError(
            f"validation prompt {prompt.name!r} is {prompt.shape}, and the decoder of {spec.version} needs sides of"
            f" {spec.smallest_sampled_side} pixels or more",
            remedy="Raise validation.resolution, or that of the prompt.",
        )
    if prompt.steps < spec.least_sampling_steps:
        raise PlanError(
            f"validation.steps = {prompt.steps}: the schedule of {spec.version} needs {spec.least_sampling_steps} or"
            " more",
            remedy=f"Leave validation.steps out for the version's own {spec.sampling.steps}.",
        )


def _guidance(section: Validation, spec: ModelSpec) -> dict[str, Any]:
    """The part of a PromptPlan that steers sampling: what the recipe says, else the version's own."""
    sampling = spec.sampling
    guided: dict[str, Any] = {"guidance": section.guidance or sampling.guidance}
    if not spec.has_audio:
        return guided
    stg = sampling.stg if section.stg is None else section.stg
    stg = stg if spec.skips_attention else 0.0
    return guided | {
        "audio_guidance": section.audio_guidance or sampling.audio_guidance,
        "stg": stg,
        "stg_blocks": sampling.stg_blocks if stg else (),
        "modality_guidance": section.modality_guidance or sampling.modality_guidance,
        "rescale": sampling.rescale if section.rescale is None else section.rescale,
        "frugal": section.frugal,
    }


def _unread(recipe: Recipe, facts: Facts) -> set[str]:
    """Keys that the recipe says for nothing, because of the family that the weights turned out to be.

    Where the text names the family, `recipe/model_rules.py` has told already.
    """
    if family_named(recipe.model):
        return set()
    if facts.spec.has_audio:
        return {"model.rope"} if recipe.model.rope != "auto" else set()
    keys = {f"model.{name}" for name in SOUND_PARTS} | {f"validation.{name}" for name in LTX2_SAMPLING}
    return {key for key in facts.said if key in keys or key == "cache.text_cache" or key.startswith("audio.")}


def _from_library(entry: PromptEntry) -> Prompt:
    return Prompt(
        name=entry.name, prompt=entry.prompt, image=str(entry.image) if entry.image else None,
        negative_prompt=entry.negative_prompt, seed=entry.seed,
    )  # fmt: skip


# Where an open number's value comes from when the recipe does not say it.
_OTHER_ORIGINS = {
    "training.precision": "device",
    **{f"kernels.{op}": "device" for op in (*OPS, *QUANTISED_OPS)},
    "memory.checkpointing": "device",
    "model.version": "weights",
    "model.rope": "weights",
    "conditioning.prompt_tokens": "default",
    "validation.steps": "weights",
    "validation.guidance": "weights",
    "validation.audio_guidance": "weights",
    "validation.stg": "weights",
    "validation.modality_guidance": "weights",
    "validation.rescale": "weights",
    "training.modalities": "weights",
    "validation.resolution": "dataset",
    "validation.frames": "dataset",
    "validation.fps": "dataset",
}


def _kept(recipe: Recipe, facts: Facts) -> dict[str, str]:
    """Keys whose open value is the weights' own, or that of the run that goes on; see `fit/wishes.py`."""
    previous = facts.previous
    if previous is None:
        return {"memory.base_precision": "weights"} if stored_format(facts.model) else {}
    kept = ["memory.base_precision", "memory.text_encoder_precision", "optimizer.name", "training.precision"]
    if previous.memory.base_precision == "nf4" and recipe.memory.base_precision is None:
        kept.append("memory.double_quant")
    return dict.fromkeys(kept, "this run")


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
    origins |= {key: whose for key, whose in _kept(recipe, facts).items() if origins[key] not in ("recipe", "--set")}
    if recipe.kernels.all:
        unsaid = (op for op in (*OPS, *QUANTISED_OPS) if getattr(recipe.kernels, op) is None)
        origins |= {f"kernels.{op}": origins["kernels.all"] for op in unsaid}
    if facts.out_given:
        origins["run.directory"] = "--out"
    if recipe.run.steps is None:
        origins["run.steps"] = origins["run.epochs"]
    if recipe.validation.stg and not facts.spec.skips_attention:
        origins["validation.stg"] = "weights"  # which have nothing to skip, so that it is off
    return origins
