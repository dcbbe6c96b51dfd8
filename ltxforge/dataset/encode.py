"""Fills the cache with functions that the model lends: all prompts, then all pictures, then all sounds.

Decides what is missing and in which order it is made. Entries that are there and verify are not touched, so an
interrupted caching goes on where it stopped. Text encoder and VAEs are never loaded together, and not at all when
nothing is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache, Entry
from ltxforge.dataset.cached import (
    CachedData,
    CachedSample,
    audio_key,
    latents_key,
    prompt_key,
    seconds_of,
    training_prompt,
    validation_prompts,
)
from ltxforge.dataset.encode_samples import (
    Made,
    Stage,
    encode_samples,
    is_silent,
    judge_lost,
    judge_silent,
    read_frames,
    read_sound,
    stored,
    tell_mute,
)
from ltxforge.dataset.phase import Phase, weighed, weight
from ltxforge.digests import FileDigests
from ltxforge.errors import DataError
from ltxforge.events import Emit, Note
from ltxforge.modalities import has
from ltxforge.models.interface import Latents, PromptEmbeddings, WantedPrompt
from ltxforge.plan import Plan, SamplePlan
from ltxforge.signals import StopRequest


class Encoders(Protocol):
    """What caching needs of a model (see models/interface.py); of sound only where it is trained."""

    vae_dtype: torch.dtype
    text_dtype: torch.dtype

    @property
    def sound_rate(self) -> int: ...
    def vae(self) -> AbstractContextManager[Any]: ...
    def audio_vae(self) -> AbstractContextManager[Any]: ...
    def encode_prompts(
        self, wanted: Sequence[WantedPrompt], tokens: int, on_read: Callable[[int], None]
    ) -> Generator[PromptEmbeddings, None, None]: ...
    def encode_clip(self, frames: torch.Tensor) -> Latents: ...
    def sound_length(self, seconds: float) -> int: ...
    def encode_sound(self, waveform: torch.Tensor, length: int) -> Latents: ...


def fill(plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest) -> CachedData:
    """Make every missing entry and return what the run trains on.

    Raises:
        DataError: nothing is left to train on.
        Stopped: a stop was requested; what was made stays.
    """
    modalities = plan.training.modalities
    prompts = fill_prompts(plan, model, cache, emit, stop)
    kept: Collection[SamplePlan] = plan.data.samples
    latents: dict[SamplePlan, str] = {}
    audio: dict[SamplePlan, str] = {}
    if has(modalities, "video"):
        kept = latents = fill_latents(plan, model, cache, emit, stop)
    if has(modalities, "audio"):
        audio = fill_audio(plan, model, cache, emit, stop, kept)
        kept = kept if has(modalities, "video") else audio
    samples = tuple(
        _cached(plan, model, sample, latents.get(sample, ""), audio.get(sample, ""), prompts)
        for sample in plan.data.samples
        if sample in kept
    )
    if not samples:
        raise DataError("no clip could be decoded, so there is nothing to train on")
    empty = training_prompt(plan, "")
    data = CachedData(samples, prompt_key(plan, empty, model.text_dtype), prompts[empty])
    if modalities == "audio" and len(samples) < len(plan.data.samples):
        _tell_how_far(plan, data, cache, emit)
    return data


def _tell_how_far(plan: Plan, data: CachedData, cache: Cache, emit: Emit) -> None:
    """The plan counted epochs before anyone had listened."""
    epochs = Batches(plan, data, cache).epoch_at(plan.steps)
    counts = f"{len(data.samples)} of {len(plan.data.samples)} planned samples have sound"
    emit(Note(f"{counts}: {plan.steps} steps are now {epochs:.3g} epochs"))


def _cached(
    plan: Plan, model: Encoders, sample: SamplePlan, latents: str, audio: str, prompts: dict[WantedPrompt, str]
) -> CachedSample:
    prompt = training_prompt(plan, sample.caption)
    return CachedSample(
        sample=sample,
        latents_key=latents_key(plan, sample, model.vae_dtype) if latents else None,
        latents_digest=latents,
        prompt_key=prompt_key(plan, prompt, model.text_dtype),
        prompt_digest=prompts[prompt],
        audio_key=audio_key(plan, sample, model.sound_length(seconds_of(sample))) if audio else None,
        audio_digest=audio,
    )


def fill_prompts(
    plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest
) -> dict[WantedPrompt, str]:  # fmt: skip
    """Encode all captions and validation prompts; returns the digest of each one's entry."""
    captions = {training_prompt(plan, caption) for caption in ("", *(s.caption for s in plan.data.samples))}
    wanted = sorted(captions | validation_prompts(plan), key=lambda prompt: (prompt.text, prompt.modalities))
    phase = Phase("prompts", len(wanted), emit, stop)
    keys = {prompt: prompt_key(plan, prompt, model.text_dtype) for prompt in wanted}
    found = {prompt: _Short.of(entry) for prompt, key in keys.items() if (entry := cache.read("prompts", key))}
    phase.advance(len(found), "already cached")
    if missing := [prompt for prompt in wanted if prompt not in found]:

        def on_read(count: int) -> None:
            phase.advance(0, f"{count} of {len(missing)} read")

        tokens = plan.conditioning.prompt_tokens
        with contextlib.closing(model.encode_prompts(missing, tokens, on_read)) as encoded:
            for prompt, embeddings in zip(missing, encoded, strict=True):
                tensors = {**embeddings.tensors, "tokens": torch.tensor(embeddings.tokens)}
                found[prompt] = _Short.of(cache.write("prompts", keys[prompt], tensors))
                phase.advance(1)
    limit = plan.conditioning.prompt_tokens
    if at_limit := {prompt.text for prompt, entry in found.items() if entry.tokens >= limit}:
        emit(Note(f"captions that reach the limit of {limit} tokens and may be cut: {len(at_limit)}", "warning"))
    told = [
        weighed(what, [found[prompt].weight for prompt in found if (prompt in captions) == is_caption])
        for what, is_caption in (("captions", True), ("validation prompts", False))
    ]
    phase.end("; ".join(filter(None, told)))
    return {prompt: entry.digest for prompt, entry in found.items()}


@dataclass(frozen=True)
class _Short:
    """What is kept of an entry: ten thousand captions must not be held in memory."""

    digest: str
    tokens: int
    weight: int

    @staticmethod
    def of(entry: Entry) -> _Short:
        return _Short(entry.digest, int(entry.tensors["tokens"]), weight(entry))


def fill_latents(
    plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest
) -> dict[SamplePlan, str]:  # fmt: skip
    """Encode the pictures of all samples; returns the digest of each one's latents, of those that decode."""

    def encode(_sample: SamplePlan, frames: np.ndarray | None) -> dict[str, torch.Tensor]:
        return stored(model.encode_clip(torch.from_numpy(frames)), plan.cache.latents)

    stage = Stage("latents", "samples", read_frames, encode, model.vae)
    keys = {sample: latents_key(plan, sample, model.vae_dtype) for sample in plan.data.samples}
    made = encode_samples(stage, keys, plan, cache, emit, stop)
    judge_lost(plan, "windows", made, emit)
    return made.digests


def fill_audio(
    plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest, kept: Collection[SamplePlan]
) -> dict[SamplePlan, str]:
    """Encode the sound of the kept samples that have some; returns the digest of each one's latents."""
    lengths = {sample: model.sound_length(seconds_of(sample)) for sample in plan.data.samples}

    def read(sample: SamplePlan, digests: FileDigests) -> np.ndarray | None:
        return read_sound(sample, digests, model.sound_rate)

    def encode(sample: SamplePlan, waveform: np.ndarray | None) -> dict[str, torch.Tensor]:
        if waveform is None or is_silent(waveform):
            return {"silent": torch.ones((), dtype=torch.bool)}
        return stored(model.encode_sound(torch.from_numpy(waveform), lengths[sample]), plan.cache.latents)

    stage = Stage("audio", "samples with sound", read, encode, model.audio_vae)
    heard = [sample for sample in plan.data.samples if sample.sound and sample in kept]
    keys = {sample: audio_key(plan, sample, lengths[sample]) for sample in heard}
    made = encode_samples(stage, keys, plan, cache, emit, stop)
    _judge_sound(plan, made, emit)
    return made.digests


def _judge_sound(plan: Plan, made: Made, emit: Emit) -> None:
    if has(plan.training.modalities, "video"):
        tell_mute(made, emit)
        if not made.digests:
            emit(Note("no sample has sound that can be trained: the picture is trained alone", "warning"))
    else:
        judge_silent(made, emit)
        judge_lost(plan, "windows' sound", made, emit)
