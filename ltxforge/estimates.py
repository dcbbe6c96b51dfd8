"""How many bytes a plan's things take: captions and latents in the cache, checkpoints, the LoRA file, downloads.

Formulas over the plan and its version's sizes; what they cannot know (how many tokens a caption has) is guessed and
said to be. Pure and torch-free; decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ltxforge.modalities import MODALITIES, Streams, has
from ltxforge.moments import saved_bytes
from ltxforge.plan import ComponentPlan, Estimates, Plan
from ltxforge.specs import ModelSpec

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
LETTERS_PER_TOKEN = 4
"""Of English text, about; a beginning and an end come on top."""


def estimate(plan: Plan, spec: ModelSpec, sizes: Sequence[int]) -> Estimates:
    """All estimates of a plan. `sizes` are how many numbers each of the adapter's tensors has, trained in float32."""
    captions = {"", *(sample.caption for sample in plan.data.samples)}
    prompts = {prompt.prompt for prompt in plan.validation.prompts}
    prompts |= {prompt.negative_prompt for prompt in plan.validation.prompts if prompt.guided}
    shared = spec, plan.conditioning.prompt_tokens, BYTES[plan.device.encoder_precision]
    each = caption_bytes(*shared, plan.training.modalities, captions)
    of_prompt = caption_bytes(*shared, "both", prompts)  # samples have sound, whatever is trained
    kept = plan.cache.text
    lora_bytes = sum(sizes) * BYTES[plan.lora.save_precision]
    return Estimates(
        cache_bytes=latents_bytes(plan) + each[kept] * len(captions) + of_prompt[kept] * len(prompts),
        caption_bytes=each[kept],
        text_bytes=each if spec.connectors_config else {},
        checkpoint_bytes=sum(sizes) * 4 + saved_bytes(plan.optimizer.name, sizes) + lora_bytes,
        lora_bytes=lora_bytes,
        download_bytes=download_bytes(plan.model.components),
    )


def caption_bytes(
    spec: ModelSpec, tokens: int, item: int, modalities: str, captions: Collection[str]
) -> dict[str, int]:  # fmt: skip
    """What one caption weighs, by `CachePlan.text`.

    Without connectors the text encoder's output at its full length. With them their output, as long as the prompt may
    be whatever the caption is; or what they are fed, guessed for the mean of these captions.

    Args:
        tokens: a prompt's length.
        item: bytes of a number.
        modalities: what the caption serves; what is made for the other one is not kept.
    """
    if not spec.connectors_config:
        return {"connectors": tokens * spec.caption_channels * item}
    lengths = [rough_tokens(text, tokens) for text in captions] or [tokens]
    return {
        "connectors": tokens * _width(connector_widths(spec), modalities) * item,
        "features": round(sum(lengths) / len(lengths)) * _width(feature_widths(spec), modalities) * item,
    }


def connector_widths(spec: ModelSpec) -> Streams[int]:
    """How wide the connectors' output is: heads · head width."""
    config = spec.connectors_config or {}
    sizes = {
        name: config[f"{name}_connector_num_attention_heads"] * config[f"{name}_connector_attention_head_dim"]
        for name in MODALITIES
    }
    return Streams(**sizes)


def feature_widths(spec: ModelSpec) -> Streams[int]:
    """How wide the connectors' input is. One that serves both modalities stands as the video's."""
    config = spec.connectors_config or {}
    if config["per_modality_projections"]:
        return Streams(config["video_hidden_dim"], config["audio_hidden_dim"])
    return Streams(video=config["caption_channels"])


def _width(widths: Streams[int], modalities: str) -> int:
    """The widths that serve `modalities` together."""
    return sum(width for name, width in widths.items() if has(modalities, name) or widths.audio is None)


def rough_tokens(caption: str, most: int) -> int:
    """A guess at a caption's length in tokens."""
    return min(most, len(caption) // LETTERS_PER_TOKEN + 2)


def sample_bytes(tokens: int, channels: int, latents: str) -> int:
    """What the latents of one sample weigh: float32, the mean and, for `latents` "sample", the deviation too."""
    return tokens * channels * 4 * (2 if latents == "sample" else 1)


def latents_bytes(plan: Plan) -> int:
    """What all samples' latents weigh; a sample that is repeated is kept once."""
    buckets = {(bucket.shape, bucket.fps): bucket for bucket in plan.data.buckets}
    found = ((buckets[sample.shape, sample.fps], sample.sound) for sample in plan.data.samples)
    return sum(bucket.video_bytes + (bucket.audio_bytes if sound else 0) for bucket, sound in found)


def download_bytes(parts: Mapping[str, ComponentPlan]) -> int:
    """What is not here yet; parts that lie in one file are one download."""
    absent: Iterable[ComponentPlan] = (part for part in parts.values() if not part.location)
    return sum({(part.repository, part.revision, part.inside): part.bytes for part in absent}.values())
