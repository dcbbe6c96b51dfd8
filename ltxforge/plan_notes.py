"""What the reader of a plan should know besides its numbers: doubts, surprises, what cannot be had. Pure; torch-free.

Says, and decides nothing: what cannot be carried out at all is refused by `planner.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from ltxforge.lora.init_from import LoraFile
from ltxforge.lora.layers import modality_of
from ltxforge.lora.targets import Match
from ltxforge.memory.graphs import block_graphs
from ltxforge.moments import LEAST_PAGED, MOMENTS, paged_bytes
from ltxforge.plan import Plan, learning_rate_at
from ltxforge.specs import ModelSpec

# How one modality alone differs from the same modality in the joint model, which makes the samples.
ALONE = {
    "video": "the video is computed alone, as the model does with its modalities isolated: that is not the video which"
    " the joint model makes, and samples are made by the joint model",
    "audio": "the sound is computed alone, as the model does with its modalities isolated: that is not the sound which"
    " the joint model makes, and samples are made by the joint model",
}

PAGING_DEVICES = ("cuda", "rocm")


def notes_on(
    plan: Plan,
    spec: ModelSpec,
    matched: Match,
    unread_keys: Collection[str],
    stg_is_said: bool = False,
    lora_file: LoraFile | None = None,
) -> tuple[str, ...]:
    """The notes that follow from a plan.

    Args:
        unread_keys: what the recipe says and this model does not read, as dotted keys.
        stg_is_said: whether the recipe asks for STG.
        lora_file: what the run starts from.
    """
    notes = [f"the LoRA file's {layer} is not read by {why}" for layer, why in matched.unread.items()]
    if unread_keys:
        why = "counts time in one way only" if spec.has_audio else "makes no sound"
        notes.append(f"this model {why} and reads none of: {', '.join(sorted(unread_keys))}")
    if lora_file and (fresh := len(matched.layers.keys() - lora_file.header.layers.keys())):
        notes.append(f"{fresh} of the {len(matched.layers)} trained layers are not in lora.init_from and start fresh")
    if spec.has_audio:
        notes += _on_sound(plan, matched)
        if stg_is_said and not spec.skips_attention:
            notes.append(f"{spec.version} has no attention that STG could skip; validation.stg is left out")
    notes += _on_optimizer(plan, matched)
    notes += _on_compiling(plan)
    return (*notes, *_on_batches(plan), *_on_guidance(plan, spec), *_on_schedule(plan))


def _on_compiling(plan: Plan) -> Iterator[str]:
    if plan.training.compile:
        count = block_graphs(plan)
        yield (
            f"torch.compile makes {count} {'program' if count == 1 else 'programs'} of a block, one for each size and"
            " kind of micro-batch; the first step with each takes up to a minute longer"
        )


def _on_sound(plan: Plan, matched: Match) -> Iterator[str]:
    if plan.training.modalities in ALONE:
        yield ALONE[plan.training.modalities]
    if plan.training.modalities != "both":
        return
    is_context = plan.audio is not None and plan.audio.loss_weight == 0
    if is_context:
        yield from _on_context(matched)
    count, with_sound = len(plan.data.samples), sum(bool(sample.sound) for sample in plan.data.samples)
    if with_sound == 0:
        yield (
            "no sample has a sound track: every step trains the video only; with training.modalities ="
            ' "video" that costs less'
        )
    elif with_sound < count:
        others = "train without that context" if is_context else "train video only"
        if all(modality_of(layer) != "video" for layer in matched.layers):
            others = "train nothing, because every layer of the LoRA needs sound"
        yield f"{with_sound} of {count} samples have a sound track; the others {others}"


def _on_context(matched: Match) -> Iterator[str]:
    """Sound that is computed and not learnt from."""
    yield "audio.loss_weight = 0: sound is context only, nothing is learnt from it"
    if sounding := sum(modality_of(layer) == "audio" or "video_to_audio" in layer for layer in matched.layers):
        yield (
            f"{sounding} of the LoRA's layers make the sound and follow the video's loss alone: the model's sound"
            " drifts; the video's layers alone, which are the default here, leave it"
        )


def _on_batches(plan: Plan) -> Iterator[str]:
    batch_size, accumulate = plan.training.batch_size, plan.training.accumulate
    for bucket in plan.data.buckets:
        if bucket.samples < batch_size:
            yield (
                f"bucket {bucket.shape} has fewer samples ({bucket.samples}) than batch_size"
                f" ({batch_size}): its batches are smaller; repeats = {math.ceil(batch_size / bucket.samples)} would"
                " fill them"
            )
    if accumulate > (micro_batches := plan.data.batches_per_epoch(batch_size)):
        yield f"a step of {accumulate} micro-batches goes over the data's {micro_batches} more than once"


def _on_guidance(plan: Plan, spec: ModelSpec) -> Iterator[str]:
    if not spec.distilled:
        return
    prompts = plan.validation.prompts
    if any(prompt.guidance != 1 or prompt.audio_guidance not in (None, 1) for prompt in prompts):
        yield "distilled weights are made for guidance 1; higher values give burnt pictures"
    if any(prompt.stg > 0 or prompt.modality_guidance != 1 for prompt in prompts):
        yield "distilled weights are made without STG and modality guidance; with them samples are slower and burnt"


def _on_optimizer(plan: Plan, matched: Match) -> Iterator[str]:
    """A paged optimiser that has nothing to page, and Lion over a base where it is known to collapse."""
    name = plan.optimizer.name
    if MOMENTS[name].paged:
        sizes = matched.tensor_sizes(plan.lora.rank)
        if plan.device.kind not in PAGING_DEVICES:
            yield f"{name}: only GPUs of NVIDIA and AMD have pages; here it is {name.removeprefix('paged_')}"
        elif not paged_bytes(name, sizes):
            yield (
                f"{name} pages no tensor of fewer than {LEAST_PAGED:,} numbers, and the largest of this adapter has"
                f" {max(sizes):,}: nothing moves to the host"
            )
    if name.endswith("lion8bit") and plan.memory.base_precision == "nf4":
        yield (
            f"{name} over an nf4 base: the field reports that training collapses and that AdamW in 8 bits holds; its"
            " advice of training.clip_norm = 0.01 made no difference to either over the tiny model"
        )


def _on_schedule(plan: Plan) -> Iterator[str]:
    optimizer, steps = plan.optimizer, plan.steps
    if optimizer.schedule != "constant" and optimizer.decay_steps != steps:
        yield (
            f"the {optimizer.schedule} schedule ends at step {optimizer.decay_steps} and the run at step {steps}, with"
            f" learning rate {learning_rate_at(optimizer, steps):.3g}"
        )
