"""What a run trains on once it is cached: the keys of its entries, their digests, and reading them back.

Decides what each entry follows from: two encodings that could differ never share a key. Makes no entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from ltxforge.dataset.cache import Cache, Key, key_text
from ltxforge.errors import DataError
from ltxforge.media.audio import MIXDOWN
from ltxforge.media.decode import RESIZE
from ltxforge.models.interface import PromptEmbeddings, WantedPrompt
from ltxforge.models.quantised_encoders import NOT_QUANTISED, RULE
from ltxforge.plan import Plan, SamplePlan, identity

# Raised by hand when an encoding changes meaning; tests/dataset/test_encode.py holds the values they guard.
LATENTS_VERSION = 1
AUDIO_VERSION = 1
PROMPTS_VERSION = 3


@dataclass(frozen=True)
class CachedSample:
    """A sample with the keys of its cache entries and the digests of what they hold.

    `latents_key` is None where no video is trained, `audio_key` where no sound is or this sample has none; the digest
    is then "".
    """

    sample: SamplePlan
    latents_key: Key | None
    latents_digest: str
    prompt_key: Key
    prompt_digest: str
    audio_key: Key | None = None
    audio_digest: str = ""

    @property
    def identity(self) -> str:
        """Which data this is, whatever encoded it and whatever bits that gave."""
        return hashlib.sha256(key_text(identity(self.sample)).encode()).hexdigest()


@dataclass(frozen=True)
class CachedData:
    """Everything a run trains on: samples in plan order, and the empty prompt for caption dropout."""

    samples: tuple[CachedSample, ...]
    empty_prompt_key: Key
    empty_prompt_digest: str

    def without(self, identities: Collection[str]) -> CachedData:
        """The data less some samples."""
        return replace(self, samples=tuple(item for item in self.samples if item.identity not in identities))

    def without_sound(self, identities: Collection[str]) -> CachedData:
        """The data with some samples' sound left out."""
        mute = {"audio_key": None, "audio_digest": ""}
        return replace(
            self,
            samples=tuple(replace(item, **mute) if item.identity in identities else item for item in self.samples),
        )

    def to_json(self) -> dict[str, Any]:
        """The run's data manifest: identity and content digests of each sample."""
        return {
            "empty_prompt": self.empty_prompt_digest,
            "samples": [
                {"path": item.sample.path, "identity": item.identity, "latents": item.latents_digest,
                 "audio": item.audio_digest, "prompt": item.prompt_digest}
                for item in self.samples
            ]
        }  # fmt: skip


def latents_key(plan: Plan, sample: SamplePlan, dtype: torch.dtype) -> Key:
    """Everything that a sample's video latents follow from."""
    return {
        "stage": "latents", "version": LATENTS_VERSION, "clip": sample.clip, "start": sample.start_seconds,
        "fps": sample.fps, "shape": str(sample.shape), "resize": RESIZE, "latents": plan.cache.latents,
        "vae": plan.model.components["vae"].digest, "dtype": str(dtype),
    }  # fmt: skip


def audio_key(plan: Plan, sample: SamplePlan, length: int) -> Key:
    """Everything that a sample's audio latents, L = `length` of them, follow from. The audio VAE is always float32."""
    is_own = sample.sound == "own"
    return {
        "stage": "audio", "version": AUDIO_VERSION, "track": "own" if is_own else "beside",
        "file": sample.clip if is_own else sample.sound, "start": sample.start_seconds, "seconds": seconds_of(sample),
        "length": length, "mixdown": MIXDOWN, "latents": plan.cache.latents,
        "audio_vae": plan.model.components["audio_vae"].digest,
    }  # fmt: skip


def prompt_key(plan: Plan, wanted: WantedPrompt, dtype: torch.dtype) -> Key:
    """Everything that a caption's embeddings follow from."""
    parts, tokens = plan.model.components, plan.conditioning.prompt_tokens
    key: dict[str, Any] = {
        "stage": "prompt", "version": PROMPTS_VERSION, "caption": wanted.text, "modalities": wanted.modalities,
        "dtype": str(dtype), "tokens": tokens,
        "text_encoder": parts["text_encoder"].digest, "tokenizer": parts["tokenizer"].digest,
    }  # fmt: skip
    if plan.memory.text_encoder_precision != NOT_QUANTISED:
        key["quantised"] = f"{plan.memory.text_encoder_precision}: {RULE}"
    if "connectors" in parts:
        return key | {"text": plan.cache.text, "connectors": parts["connectors"].digest}
    return key | {"rule": f"padded to tokens as {plan.model.rope} pipelines do, stored trimmed"}


def seconds_of(sample: SamplePlan) -> float:
    """The sample's true duration: each of its frames is shown for 1 / fps."""
    return sample.shape.frames / sample.fps


def training_prompt(plan: Plan, caption: str) -> WantedPrompt:
    """A training caption, for what is trained."""
    return WantedPrompt(caption, plan.training.modalities)


def validation_prompts(plan: Plan) -> set[WantedPrompt]:
    """What validation needs embedded: prompts, and negative prompts where guidance uses them.

    A model with sound always samples both modalities, whatever is trained.
    """
    modalities = "both" if "audio_vae" in plan.model.components else "video"
    texts = set()
    for prompt in plan.validation.prompts:
        texts |= {prompt.prompt, prompt.negative_prompt} if prompt.guided else {prompt.prompt}
    return {WantedPrompt(text, modalities) for text in texts}


def read_prompt(plan: Plan, cache: Cache, wanted: WantedPrompt, dtype: torch.dtype) -> PromptEmbeddings:
    """A cached prompt. Raises DataError when its entry was damaged after caching."""
    return read_prompt_at(cache, prompt_key(plan, wanted, dtype))


def read_prompt_at(cache: Cache, key: Key) -> PromptEmbeddings:
    """The prompt of a key. Raises DataError as `read` does."""
    tensors = read(cache, "prompts", key)
    return PromptEmbeddings({name: tensors[name] for name in tensors.keys() - {"tokens"}}, int(tensors["tokens"]))


def read(cache: Cache, kind: str, key: Key) -> dict[str, torch.Tensor]:
    """A cache entry that caching has made sure of."""
    entry = cache.read(kind, key)
    if entry is None:
        raise DataError(
            f"a cache entry ({kind}) was damaged or removed while the run used it",
            where=str(cache.path(kind, key)), remedy="Start the same command again: it is made anew.",
        )  # fmt: skip
    return entry.tensors
