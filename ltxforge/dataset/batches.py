"""Which samples a micro-batch holds, as a function of the step: no iterator, no state, nothing to restore.

An epoch visits every sample `repeats` times. Within a bucket the order is a permutation addressed by (seed, epoch,
bucket); it is cut into micro-batches of equal shape, the last of which may be smaller; and the micro-batches of all
buckets are permuted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ltxforge.dataset.cache import Cache, Key
from ltxforge.dataset.cached import CachedData, CachedSample, read, read_prompt_at
from ltxforge.modalities import Streams, has
from ltxforge.models.interface import PromptEmbeddings
from ltxforge.plan import Plan
from ltxforge.randomness import address, permutation, uniform
from ltxforge.shapes import ClipShape, LatentShape


@dataclass(frozen=True)
class BatchIndex:
    """Which samples (positions in the data) a micro-batch holds, and the first one's index within the whole step."""

    samples: tuple[int, ...]
    first_index: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the host.

    Attributes:
        latents: float32, normalised: of the video [B, C, F, Y, X], of the sound [B, L, C], zeros where a sample has
            none; None where no sample of the batch has any, or it is not trained.
        present: [B] bool, which samples have sound; None without sound.
        prompts: one per sample; the empty prompt's where the caption was dropped.
        clean: [B, T] bool, the video tokens kept clean (first-frame conditioning).
    """

    latents: Streams[Tensor]
    present: Tensor | None
    prompts: list[PromptEmbeddings]
    clean: Tensor
    shape: LatentShape
    fps: float
    samples: tuple[CachedSample, ...]
    first_index: int


class Batches:
    """The batches of a run: `index_at` says what, `load` reads it."""

    def __init__(self, plan: Plan, data: CachedData, cache: Cache) -> None:
        self._plan, self._data, self._cache = plan, data, cache
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def per_epoch(self) -> int:
        """Micro-batches in one epoch."""
        return len(self._epoch(0))

    def epoch_at(self, step: int) -> float:
        """How many passes over the data are behind once update `step` is done."""
        return step * self._plan.training.accumulate / self.per_epoch

    def index_at(self, step: int, micro: int) -> BatchIndex:
        """The micro-batch `micro` (from 0) of update `step` (from 1)."""
        before = sum(len(self._samples(step, earlier)) for earlier in range(micro))
        return BatchIndex(self._samples(step, micro), before)

    def largest(self) -> tuple[int, int]:
        """(step, micro) of the first epoch's micro-batch that computes most tokens, sound's included; the first of
        those that do.
        """
        most = max(range(self.per_epoch), key=lambda number: self._tokens(self._epoch(0)[number]))
        return most // self._plan.training.accumulate + 1, most % self._plan.training.accumulate

    def _tokens(self, positions: Sequence[int]) -> int:
        chosen = [self._data.samples[position] for position in positions]
        buckets = {(bucket.shape, bucket.fps): bucket for bucket in self._plan.data.buckets}
        bucket = buckets[chosen[0].sample.shape, chosen[0].sample.fps]
        sounding = any(item.audio_key is not None for item in chosen)
        return len(chosen) * (bucket.tokens + (bucket.audio_tokens if sounding else 0))

    def count_at(self, step: int) -> Streams[int]:
        """Samples of each modality in the whole step: the losses' divisors, known before the first forward."""
        positions = self._step(step)
        with_sound = sum(self._data.samples[position].audio_key is not None for position in positions)
        return Streams(video=len(positions) if self._has_video else None, audio=with_sound or None)

    def steps_with_sound(self, first: int, last: int) -> int:
        """How many of the updates `first` to `last`, both included, have a sample with sound."""
        sounding = {position for position, item in enumerate(self._data.samples) if item.audio_key is not None}
        return sum(not sounding.isdisjoint(self._step(step)) for step in range(first, last + 1))

    def load(self, step: int, micro: int) -> Batch:
        """Read a micro-batch from the cache, each entry verified, with its draws made."""
        index = self.index_at(step, micro)
        chosen = tuple(self._data.samples[position] for position in index.samples)
        numbers = range(index.first_index, index.first_index + len(chosen))
        shape = chosen[0].sample.shape.latent()
        video = None
        if self._has_video:
            video = torch.stack([self._video(item, step, n) for item, n in zip(chosen, numbers, strict=True)])
        audio, present = _filled([self._audio(item, step, n) for item, n in zip(chosen, numbers, strict=True)])
        return Batch(
            latents=Streams(video, audio),
            present=present,
            prompts=[self._prompt(item, step, n) for item, n in zip(chosen, numbers, strict=True)],
            clean=torch.stack([self._clean(shape, step, n) for n in numbers]),
            shape=shape,
            fps=chosen[0].sample.fps,
            samples=chosen,
            first_index=index.first_index,
        )

    @property
    def _has_video(self) -> bool:
        return has(self._plan.training.modalities, "video")

    def _step(self, step: int) -> tuple[int, ...]:
        """The positions of all samples of an update."""
        return sum((self._samples(step, micro) for micro in range(self._plan.training.accumulate)), ())

    def _samples(self, step: int, micro: int) -> tuple[int, ...]:
        number = (step - 1) * self._plan.training.accumulate + micro
        return self._epoch(number // self.per_epoch)[number % self.per_epoch]

    def _make_epoch(self, epoch: int) -> Sequence[tuple[int, ...]]:
        seed, size = self._plan.seed, self._plan.training.batch_size
        batches: list[tuple[int, ...]] = []
        for number, members in enumerate(self._buckets()):
            order = permutation(members, seed, "order", epoch, number)
            batches += [tuple(order[start : start + size]) for start in range(0, len(order), size)]
        return permutation(batches, seed, "batches", epoch)

    def _buckets(self) -> list[list[int]]:
        """Positions of the samples by shape and rate, each as often as it is repeated."""
        found: dict[tuple[ClipShape, float], list[int]] = {}
        for position, item in enumerate(self._data.samples):
            members = found.setdefault((item.sample.shape, item.sample.fps), [])
            members += [position] * item.sample.repeats
        return [found[key] for key in sorted(found)]

    def _video(self, item: CachedSample, step: int, index: int) -> Tensor:
        assert item.latents_key is not None
        return self._drawn("latents", item.latents_key, "posterior", step, index)

    def _audio(self, item: CachedSample, step: int, index: int) -> Tensor | None:
        if item.audio_key is None:
            return None
        return self._drawn("audio", item.audio_key, "audio-posterior", step, index)

    def _drawn(self, kind: str, key: Key, purpose: str, step: int, index: int) -> Tensor:
        """The posterior's mean, or a draw from it where its standard deviation is kept."""
        tensors = read(self._cache, kind, key)
        if "std" not in tensors:
            return tensors["mean"]
        generator = torch.Generator().manual_seed(address(self._plan.seed, purpose, step, index))
        return tensors["mean"] + tensors["std"] * torch.randn(tensors["mean"].shape, generator=generator)

    def _prompt(self, item: CachedSample, step: int, index: int) -> PromptEmbeddings:
        dropped = uniform(self._plan.seed, "caption", step, index) < self._plan.conditioning.caption_dropout
        key = self._data.empty_prompt_key if dropped else item.prompt_key
        return read_prompt_at(self._cache, key)

    def _clean(self, shape: LatentShape, step: int, index: int) -> Tensor:
        """[T]: the first latent frame's tokens, if the draw says so and there is more than one frame."""
        clean = torch.zeros(shape.tokens, dtype=torch.bool)
        drawn = uniform(self._plan.seed, "first-frame", step, index) < self._plan.conditioning.first_frame
        if drawn and shape.frames > 1:
            clean[: shape.height * shape.width] = True
        return clean


def _filled(sounds: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Latents [L, C], or None, of each sample → [B, L, C] with zeros for None, and [B] bool; None if all are None."""
    like = next((sound for sound in sounds if sound is not None), None)
    if like is None:
        return None, None
    latents = torch.stack([torch.zeros_like(like) if sound is None else sound for sound in sounds])
    return latents, torch.tensor([sound is not None for sound in sounds])
