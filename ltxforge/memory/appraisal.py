"""All that is known of what a plan's run takes, before its memory strategies are chosen: `Costs`, traced and counted.

Decides which bucket and which sample stand for all: the largest. Text encoders are counted by their published sizes.
Opens no file, asks no device, and computes nothing but shapes; a second plan of the same sizes is answered at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ltxforge.lora.layers import BLOCKS, linear_layers
from ltxforge.lora.targets import match
from ltxforge.memory import trace_parts
from ltxforge.memory.costs import BlockWork, Costs, Part, precision_key
from ltxforge.memory.trace import DTYPES, block_work, traceable
from ltxforge.modalities import has
from ltxforge.models.base_model import ROPES_KEPT
from ltxforge.models.ltx2_video import LEAST_HELD_BYTES
from ltxforge.models.published import TEXT_ENCODERS
from ltxforge.plan import BucketPlan, MemoryPlan, Plan, PromptPlan
from ltxforge.quant.formats import stored_bytes, why_not
from ltxforge.specs import ModelSpec

Base = tuple[str, bool]
"""A base precision as in a recipe, and whether NF4's scales are quantised too."""
EVERY_BASE: tuple[Base, ...] = (
    ("bf16", False), ("fp8", False), ("int8", False), ("int8-w8a8", False), ("nf4", False), ("nf4", True),
)  # fmt: skip
EVERY_TILE = ((0, 0), (512, 64))
TEXT_PRECISIONS = ("bf16", "int8", "nf4")
IN_LINEAR_LAYERS = {"t5": 4_630_511_616, "gemma-3": 10_758_389_760, "gemma-4": 10_758_389_760}
"""Numbers of the text encoders' linear layers, which can be quantised: 24 of T5 v1.1 XXL's (width 4096, 64 heads of 64,
a gated feed-forward of 10240), 48 of Gemma 3 12B's (width 3840, 16 heads of 256 and 8 of keys, 15360). Gemma 4's are
taken to be as many.
"""
TEXT_WIDTHS = {"t5": (4096, 10240, 64), "gemma-3": (3840, 15360, 16), "gemma-4": (3840, 15360, 16)}
"""Their width, that of the feed-forward, and heads."""
WORDS = {"t5": 32_128 * 4096, "gemma-3": 262_208 * 3840, "gemma-4": 262_208 * 3840}
"""Numbers of their tables of words."""
CAPTION_STATES = 200
"""Tokens of a caption whose hidden states wait on the host, a guess."""
QUANTISING = {"eager": {"nf4": 28, "int8": 16, "int8-w8a8": 16, "fp8": 16}, "triton": {"nf4": 16}}
"""Bytes for each number of a weight while it is quantised and judged: itself, float32 copies, codes, and for NF4 in
plain PyTorch numbers of 64 bits that point into its table.
"""

_known: dict[Any, Any] = {}


def costs_of(
    plan: Plan, spec: ModelSpec, bases: Sequence[Base] = EVERY_BASE, tiles: Sequence[tuple[int, int]] = EVERY_TILE
) -> Costs:
    """What is known of a run.

    Args:
        plan: whatever its memory strategies are; all else must be decided.
        bases: the base precisions that are asked about.
        tiles: sides in pixels and lengths in frames of decoding that are asked about, (0, 0) for whole.
    """
    bucket, prompt = largest_bucket(plan), largest_prompt(plan)
    matched = match(plan.lora.targets, spec, plan.lora.modalities, plan.training.modalities)
    resident = _resident_connectors(plan, spec)
    works = {_key(base): _work(plan, spec, bucket, prompt, base, resident) for base in bases}
    shared = {(0, 0), *tiles, (plan.memory.decode_tile, plan.memory.decode_frames)}
    return Costs(
        device=plan.device.kind,
        dtype=plan.device.precision,
        blocks=spec.blocks,
        works=works,
        tensors=matched.tensor_sizes(plan.lora.rank),
        accumulate=plan.training.accumulate,
        captions=_captions(plan, spec),
        clips=_clips(plan, spec, bucket),
        sound=_sound(plan, spec, bucket),
        decodes={} if prompt is None else {each: _decode(plan, spec, prompt, each) for each in sorted(shared)},
        beside=0 if prompt is None or spec.has_audio else _decode(plan, spec, prompt, (0, 0)).weights,
        aside=spec.has_audio and all(each.frugal for each in plan.validation.prompts),
        largest_tensor=_largest_layer(spec) * DTYPES[plan.device.precision].itemsize,
    )


def largest_bucket(plan: Plan) -> BucketPlan:
    """The bucket whose step takes most."""
    return max(plan.data.buckets, key=lambda bucket: (bucket.tokens, bucket.audio_tokens))


def largest_prompt(plan: Plan) -> PromptPlan | None:
    """The sample that takes most, or None if none is made."""
    made = plan.validation.prompts if plan.validation.every or plan.validation.at_start else ()
    return max(made, key=lambda prompt: (prompt.shape.latent().tokens, prompt.guided), default=None)


def _key(base: Base) -> str:
    return precision_key(MemoryPlan(base_precision=base[0], double_quant=base[1]))


def _once(key: tuple[Any, ...], make: Any) -> Any:
    """What was traced before for the same sizes; the last few hundred."""
    if key not in _known:
        while len(_known) >= 256:
            del _known[next(iter(_known))]
        _known[key] = make()
    return _known[key]


def _identity(spec: ModelSpec) -> tuple[str, str]:
    """Two specs of one version are equal, but for tests' changes to sizes."""
    return spec.version, repr((spec.transformer_config, spec.vae_config, spec.audio_vae_config))


def _work(
    plan: Plan, spec: ModelSpec, bucket: BucketPlan, prompt: PromptPlan | None, base: Base, resident: int
) -> BlockWork:
    lora = dataclasses.replace(plan.lora, init_from="", init_digest="")
    key = (
        "work", _identity(spec), plan.device.kind, plan.device.precision, plan.kernels, lora, plan.training,
        plan.conditioning, bucket.shape, bucket.fps, bucket.tokens, bucket.audio_tokens, base,
        prompt and (prompt.shape, prompt.fps, prompt.guided, bool(prompt.image)),
    )  # fmt: skip
    work = _once(key, lambda: block_work(plan, spec, bucket, *base, prompt=prompt))
    weights = dataclasses.replace(
        work.weights, outside=work.weights.outside + resident, quantising=_quantising(plan, spec, base[0])
    )
    # Tables of rotations of the last few sizes are kept; none is larger than those of the largest bucket.
    others = (min(ROPES_KEPT, len(plan.data.buckets)) - 1) * work.ropes
    return dataclasses.replace(work, weights=weights, given=work.given + others, head=work.head + others)


def _quantising(plan: Plan, spec: ModelSpec, base: str) -> int:
    """Bytes of quantising the largest layer."""
    if base == "bf16":
        return 0
    kind = plan.kernels.of("nf4") if base == "nf4" and plan.memory.quantise_on == "device" else "eager"
    each = QUANTISING.get(kind, {}).get(base, QUANTISING["eager"][base])
    return each * _largest_layer(spec, base)


def _largest_layer(spec: ModelSpec, base: str = "bf16") -> int:
    """Numbers of the largest linear layer, of those in the blocks that are quantised."""
    layers = linear_layers(spec).items()
    return max(
        inner * outer
        for name, (inner, outer) in layers
        if base == "bf16" or (name.startswith(BLOCKS) and not why_not(name, outer, inner, base))
    )


def _captions(plan: Plan, spec: ModelSpec) -> Mapping[str, tuple[Part, ...]]:
    """The text encoder in each precision, and the connectors after it."""
    if spec.tiny:
        return {}
    kind, item = spec.text_encoder, DTYPES[plan.device.encoder_precision].itemsize
    inside, tokens = IN_LINEAR_LAYERS[kind], plan.conditioning.prompt_tokens
    width, inner, heads = TEXT_WIDTHS[kind]
    outside, words = (TEXT_ENCODERS[kind] - inside) * item, WORDS[kind] * item
    # Scores of a head for each pair of tokens in float32 before and after softmax, and the feed-forward's three.
    work = tokens * (2 * heads * tokens * 4 + 3 * inner * item)
    host = 2 * words
    after: tuple[Part, ...] = ()
    if spec.connectors_config:
        states = tokens * width * spec.connectors_config["text_proj_in_factor"] * item
        work += 2 * states  # all layers', one by one and together
        captions = len({sample.caption for sample in plan.data.samples})
        waiting = states * CAPTION_STATES // max(tokens, CAPTION_STATES) * captions
        host += min(LEAST_HELD_BYTES, waiting)
        every, _ = _connectors(plan, spec)
        after = (Part(every, 5 * states, min(LEAST_HELD_BYTES, waiting)),)  # padded, normalised and projected
    found = {"bf16": (Part(outside + inside * item, work, host), *after)}
    for name in TEXT_PRECISIONS[1:]:
        # Layer by layer; what reads no text is not kept, and the table of words stays on the host. All layers are
        # counted as one matrix, whose rows have scales of their own in int8.
        making = QUANTISING["eager"][name] * width * inner
        size = stored_bytes(name, inside // width, width, double=True)
        found[name] = (Part(size, max(work, making), host), *after)
    return found


def _connectors(plan: Plan, spec: ModelSpec) -> tuple[int, int]:
    dtype = DTYPES[plan.device.encoder_precision]
    key = ("connectors", repr(spec.connectors_config), dtype)
    return _once(key, lambda: trace_parts.connectors(spec, dtype))


def _resident_connectors(plan: Plan, spec: ModelSpec) -> int:
    """Connectors that stay on the device, where features are cached: what is outside the blocks grows by them."""
    return _connectors(plan, spec)[1] if spec.connectors_config and plan.cache.text != "connectors" else 0


def _clips(plan: Plan, spec: ModelSpec, bucket: BucketPlan) -> Part | None:
    if not has(plan.training.modalities, "video"):
        return None
    given = DTYPES[plan.device.encoder_precision], traceable(plan.kernels), plan.device.kind
    key = ("clips", _identity(spec), bucket.shape, *given)
    return _once(key, lambda: trace_parts.clips(spec, bucket.shape, *given))


def _sound(plan: Plan, spec: ModelSpec, bucket: BucketPlan) -> Part | None:
    if not has(plan.training.modalities, "audio"):
        return None
    given = bucket.audio_tokens, plan.device.kind
    return _once(("sound", _identity(spec), *given), lambda: trace_parts.sound(spec, *given))


def _decode(plan: Plan, spec: ModelSpec, prompt: PromptPlan, tile: tuple[int, int]) -> Part:
    given = prompt.shape, *tile, DTYPES[plan.device.encoder_precision], plan.device.kind
    return _once(("decode", _identity(spec), *given), lambda: trace_parts.decoding(spec, *given))
