"""Fills the cache with functions that the model lends: first all prompts, then all latents, one encoder at a time.

Decides what is missing and in which order it is made. Entries that are there and verify are not touched, so an
interrupted caching goes on where it stopped. Text encoder and VAE are never loaded together, and not at all when
nothing is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ltxforge.dataset.cache import Cache, Entry, Key, key_text
from ltxforge.dataset.memo import CLIP_DIGESTS
from ltxforge.digests import FileDigests
from ltxforge.errors import DataError, Stopped
from ltxforge.events import ClipJudged, Emit, Note, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.media.decode import RESIZE, DecodeError, decode
from ltxforge.models.interface import Latents, PromptEmbeddings, WantedPrompt
from ltxforge.plan import Plan, SamplePlan, identity
from ltxforge.signals import StopRequest

# Raised by hand when an encoding changes meaning; tests/dataset/test_encode.py holds the values they guard.
LATENTS_VERSION = 1
PROMPTS_VERSION = 2


class Encoders(Protocol):
    """What caching needs of a model (see models/interface.py)."""

    vae_dtype: torch.dtype
    text_dtype: torch.dtype

    def vae(self) -> AbstractContextManager[Any]: ...
    def encode_prompts(
        self, wanted: Sequence[WantedPrompt], tokens: int
    ) -> Generator[PromptEmbeddings, None, None]: ...
    def encode_clip(self, frames: torch.Tensor) -> Latents: ...


@dataclass(frozen=True)
class CachedSample:
    """A sample with the keys of its cache entries and the digest of its latents."""

    sample: SamplePlan
    latents_key: Key
    latents_digest: str
    prompt_key: Key
    prompt_digest: str

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

    def to_json(self) -> dict[str, Any]:
        """The run's data manifest: identity and content digest of each sample."""
        return {
            "empty_prompt": self.empty_prompt_digest,
            "samples": [
                {"path": item.sample.path, "identity": item.identity,
                 "latents": item.latents_digest, "prompt": item.prompt_digest}
                for item in self.samples
            ]
        }  # fmt: skip


def latents_key(plan: Plan, sample: SamplePlan, dtype: torch.dtype) -> Key:
    """Everything that a sample's latents follow from."""
    return {
        "stage": "latents", "version": LATENTS_VERSION, "clip": sample.clip, "start": sample.start_seconds,
        "fps": sample.fps, "shape": str(sample.shape), "resize": RESIZE, "latents": plan.cache.latents,
        "vae": plan.model.components["vae"].digest, "dtype": str(dtype),
    }  # fmt: skip


def prompt_key(plan: Plan, caption: str, dtype: torch.dtype) -> Key:
    """Everything that a caption's embeddings follow from."""
    return {
        "stage": "prompt", "version": PROMPTS_VERSION, "caption": caption, "dtype": str(dtype),
        "tokens": plan.conditioning.prompt_tokens,
        "rule": f"padded to tokens as {plan.model.rope} pipelines do, stored trimmed",
        "text_encoder": plan.model.components["text_encoder"].digest,
        "tokenizer": plan.model.components["tokenizer"].digest,
    }  # fmt: skip


def fill(plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest) -> CachedData:
    """Make every missing entry and return what the run trains on.

    Raises:
        DataError: nothing is left to train on.
        Stopped: a stop was requested; what was made stays.
    """
    prompts = fill_prompts(plan, model, cache, emit, stop)
    digests = _fill_latents(plan, model, cache, emit, stop)
    samples = tuple(
        CachedSample(
            sample=sample,
            latents_key=latents_key(plan, sample, model.vae_dtype),
            latents_digest=digests[sample],
            prompt_key=prompt_key(plan, sample.caption, model.text_dtype),
            prompt_digest=prompts[sample.caption],
        )
        for sample in plan.data.samples
        if sample in digests
    )
    if not samples:
        raise DataError("no clip could be decoded, so there is nothing to train on")
    return CachedData(samples, prompt_key(plan, "", model.text_dtype), prompts[""])


def fill_prompts(plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest) -> dict[str, str]:
    """Encode all captions and validation prompts; returns caption → digest of its entry."""
    captions = sorted({"", *(s.caption for s in plan.data.samples), *validation_captions(plan)})
    phase = _Phase("prompts", len(captions), emit, stop)
    keys = {caption: prompt_key(plan, caption, model.text_dtype) for caption in captions}
    found = {caption: _short(entry) for caption, key in keys.items() if (entry := cache.read("prompts", key))}
    phase.advance(len(found), "already cached")
    missing = [caption for caption in captions if caption not in found]
    if missing:
        wanted = [WantedPrompt(caption) for caption in missing]
        with contextlib.closing(model.encode_prompts(wanted, plan.conditioning.prompt_tokens)) as encoded:
            for caption, prompt in zip(missing, encoded, strict=True):
                tensors = {**prompt.tensors, "tokens": torch.tensor(prompt.tokens)}
                found[caption] = _short(cache.write("prompts", keys[caption], tensors))
                phase.advance(1)
    limit = plan.conditioning.prompt_tokens
    if at_limit := sum(tokens >= limit for _, tokens in found.values()):
        emit(Note(f"captions that reach the limit of {limit} tokens and may be cut: {at_limit}", "warning"))
    phase.end()
    return {caption: digest for caption, (digest, _) in found.items()}


def _short(entry: Entry) -> tuple[str, int]:
    """An entry's digest and number of tokens: ten thousand captions must not be held in memory."""
    return entry.digest, int(entry.tensors["tokens"])


def validation_captions(plan: Plan) -> set[str]:
    """Texts that validation needs embedded: prompts, and negative prompts where guidance uses them."""
    prompts = plan.validation.prompts
    return {p.prompt for p in prompts} | {p.negative_prompt for p in prompts if p.guidance > 1}


def read_prompt(plan: Plan, cache: Cache, caption: str, dtype: torch.dtype) -> PromptEmbeddings:
    """A cached prompt. Raises DataError when its entry was damaged after caching."""
    return read_prompt_at(cache, prompt_key(plan, caption, dtype))


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


def _fill_latents(
    plan: Plan, model: Encoders, cache: Cache, emit: Emit, stop: StopRequest
) -> dict[SamplePlan, str]:  # fmt: skip
    phase = _Phase("latents", len(plan.data.samples), emit, stop)
    keys = {sample: latents_key(plan, sample, model.vae_dtype) for sample in plan.data.samples}
    digests = {}
    for sample, key in keys.items():
        if entry := cache.read("latents", key):
            digests[sample] = entry.digest
            phase.advance(1, Path(sample.path).name)
    missing = [sample for sample in plan.data.samples if sample not in digests]
    failed: dict[tuple[str, str], list[str]] = {}
    if missing:
        with model.vae():
            for sample, frames in _decoded_ahead(missing, Path(plan.cache.directory) / "memo" / CLIP_DIGESTS):
                if isinstance(frames, DecodeError):
                    failed.setdefault((sample.dataset, sample.path), []).append(str(frames))
                else:
                    latents = model.encode_clip(torch.from_numpy(frames))
                    tensors = {"mean": latents.mean}
                    if plan.cache.latents == "sample":
                        tensors["std"] = latents.std
                    digests[sample] = cache.write("latents", keys[sample], tensors).digest
                phase.advance(1, Path(sample.path).name)
    phase.end()
    _judge_failures(plan, failed, digests, emit)
    return digests


def _judge_failures(
    plan: Plan, failed: Mapping[tuple[str, str], list[str]], digests: Collection[SamplePlan], emit: Emit
) -> None:  # fmt: skip
    """Verdicts of clips that failed while decoding; too many without a single good window stop the run."""
    lost = []
    for (dataset, path), reasons in failed.items():
        left = sum((sample.dataset, sample.path) == (dataset, path) for sample in digests)
        text = f"{len(reasons)} of {left + len(reasons)} windows cannot be decoded: {reasons[0]}"
        verdict = ("ok", "", (text,)) if left else ("rejected", text, ())
        emit(ClipJudged(path, *verdict, left, dataset))
        if not left:
            lost.append(f"  {path}: {text}")
    clips = len({(sample.dataset, sample.path) for sample in plan.data.samples})
    if len(lost) > 1 and len(lost) > plan.data.max_rejected * clips:
        raise DataError(
            f"{len(lost)} of {clips} clips cannot be decoded, more than max_rejected = {plan.data.max_rejected:g}"
            " allows:\n" + "\n".join(lost),
            remedy="Repair or remove these files, or raise run.max_rejected (1.0 goes on with whatever is left).",
        )


def _decoded_ahead(
    samples: Sequence[SamplePlan], memo: Path
) -> Iterator[tuple[SamplePlan, np.ndarray | DecodeError]]:  # fmt: skip
    """Each sample's frames [N, H, W, 3], the next one being decoded while the caller encodes this one.

    A file is identified anew after it was decoded, which costs a look at its status: what is cached under a clip's
    digest really came from it, also if someone edits clips while a long caching runs.
    """
    digests = FileDigests(memo)

    def frames(sample: SamplePlan) -> np.ndarray | DecodeError:
        times = [sample.start_seconds + n / sample.fps for n in range(sample.shape.frames)]
        path = Path(sample.path)
        try:
            decoded = decode(path, times, (sample.shape.width, sample.shape.height))
            return decoded if digests.of(path) == sample.clip else DecodeError("the file changed since it was scanned")
        except OSError as error:
            return DecodeError(f"cannot be read ({(error.strerror or str(error)).lower()})")
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(max_workers=1) as reader:
        yield from zip(samples, _one_ahead(lambda sample: reader.submit(frames, sample), samples), strict=True)


def _one_ahead(submit: Callable[[SamplePlan], Any], samples: Iterable[SamplePlan]) -> Iterator[Any]:
    waiting = None
    for sample in samples:
        following = submit(sample)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()


class _Phase:
    """Progress of one caching phase; raises Stopped between units of work."""

    def __init__(self, name: str, total: int, emit: Emit, stop: StopRequest) -> None:
        self.name, self.done, self._emit, self._stop = name, 0, emit, stop
        self._started = time.monotonic()
        emit(PhaseStarted(name, total))

    def advance(self, count: int, detail: str = "") -> None:
        self.done += count
        if count:
            self._emit(PhaseAdvanced(self.name, self.done, detail))
        if self._stop.requested:
            raise Stopped(
                self._stop.signal_number, f"stopped while caching {self.name}",
                remedy="What is cached stays. Start the same command again to continue.",
            )  # fmt: skip

    def end(self) -> None:
        self._emit(PhaseEnded(self.name, time.monotonic() - self._started))
