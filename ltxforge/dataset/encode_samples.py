"""Latents of samples: one modality at a time, each sample decoded while the one before it is encoded.

Decides the verdicts of clips whose picture or sound fails to decode, and that digital silence is no sound. A sample
without sound has an entry that says so and holds no latents: nothing is decoded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ltxforge.dataset.cache import Cache, Entry, Key
from ltxforge.dataset.cached import seconds_of
from ltxforge.dataset.memo import CLIP_DIGESTS
from ltxforge.dataset.phase import Phase, weighed, weight
from ltxforge.digests import FileDigests
from ltxforge.errors import DataError
from ltxforge.events import ClipJudged, Emit, Note
from ltxforge.media.audio import read_audio, sound_beside
from ltxforge.media.decode import DecodeError, decode
from ltxforge.models.interface import Latents
from ltxforge.plan import MOST_CLIPS_TOLD, Plan, SamplePlan
from ltxforge.printable import printable
from ltxforge.signals import StopRequest

# -80 dBFS: below it lie dither and the coder's own noise, and nothing that anyone hears.
SILENT_PEAK = 1e-4
_SILENCE = "digital silence, or behind the end of the sound"
Clip = tuple[str, str]  # dataset and path


@dataclass(frozen=True)
class Stage:
    """How one modality's latents are made.

    `phase` names the phase and the kind of the entries; `read` gives what a sample holds, or None, raising DecodeError
    or OSError; `encode` what is stored of it, inside `held`.
    """

    phase: str
    what: str
    read: Callable[[SamplePlan, FileDigests], np.ndarray | None]
    encode: Callable[[SamplePlan, np.ndarray | None], Mapping[str, Tensor]]
    held: Callable[[], AbstractContextManager[Any]]


@dataclass
class Made:
    """What became of each sample: the digest of its latents, nothing to encode, or why it does not decode."""

    digests: dict[SamplePlan, str] = field(default_factory=dict)
    empty: list[SamplePlan] = field(default_factory=list)
    failed: dict[SamplePlan, str] = field(default_factory=dict)
    weights: list[int] = field(default_factory=list)

    def take(self, sample: SamplePlan, entry: Entry) -> None:
        """Note an entry that is in the cache."""
        if "mean" in entry.tensors:
            self.digests[sample] = entry.digest
            self.weights.append(weight(entry))
        else:
            self.empty.append(sample)

    def left(self, clip: Clip) -> int:
        """How many windows of a clip have latents."""
        return sum(_clip(sample) == clip for sample in self.digests)

    def seen(self, clip: Clip) -> int:
        """How many windows of a clip there are."""
        return self.left(clip) + sum(_clip(sample) == clip for sample in (*self.empty, *self.failed))


def encode_samples(
    stage: Stage, keys: Mapping[SamplePlan, Key], plan: Plan, cache: Cache, emit: Emit, stop: StopRequest
) -> Made:  # fmt: skip
    """Make the entries that are missing; the encoder is loaded only if one is."""
    phase, made, missing = Phase(stage.phase, len(keys), emit, stop), Made(), []
    for sample, key in keys.items():
        if entry := cache.read(stage.phase, key):
            made.take(sample, entry)
            phase.advance(1, Path(sample.path).name)
        else:
            missing.append(sample)
    if missing:
        memo = Path(plan.cache.directory) / "memo" / CLIP_DIGESTS
        with stage.held():
            for sample, found in _read_ahead(stage.read, missing, memo):
                if isinstance(found, DecodeError):
                    made.failed[sample] = str(found)
                else:
                    made.take(sample, cache.write(stage.phase, keys[sample], stage.encode(sample, found)))
                phase.advance(1, Path(sample.path).name)
    phase.end(weighed(stage.what, made.weights))
    return made


def read_frames(sample: SamplePlan, digests: FileDigests) -> np.ndarray:
    """A sample's frames, uint8 [N, H, W, 3].

    A file is identified anew after it was decoded, which costs a look at its status: what is cached under a clip's
    digest really came from it, also if someone edits clips while a long caching runs.
    """
    times = [sample.start_seconds + n / sample.fps for n in range(sample.shape.frames)]
    path = Path(sample.path)
    frames = decode(path, times, (sample.shape.width, sample.shape.height))
    if digests.of(path) != sample.clip:
        raise DecodeError("the file changed since it was scanned")
    return frames


def read_sound(sample: SamplePlan, digests: FileDigests, rate: int) -> np.ndarray | None:
    """A sample's sound, float32 [2, S] at `rate` Hz, None where it has ended; identified anew like the frames."""
    path = Path(sample.path)
    samples = read_audio(path, sample.start_seconds, seconds_of(sample), rate)
    beside = sound_beside(path)
    if sample.sound == "own":
        is_same = beside is None and digests.of(path) == sample.clip
    else:
        is_same = beside is not None and digests.of(beside) == sample.sound
    if not is_same:
        raise DecodeError("the sound changed since it was scanned")
    return samples


def is_silent(waveform: np.ndarray) -> bool:
    """Whether there is nothing to hear: digital silence."""
    return bool(np.abs(waveform).max() < SILENT_PEAK)


def stored(latents: Latents, kept: str) -> dict[str, Tensor]:
    """What the cache keeps of a posterior: `kept` is `CachePlan.latents`."""
    return {"mean": latents.mean, "std": latents.std} if kept == "sample" else {"mean": latents.mean}


def judge_lost(plan: Plan, what: str, made: Made, emit: Emit) -> None:
    """Verdicts of clips of which windows failed to decode and are not trained; raises if they are too many."""
    lost = []
    for clip, reasons in _by_clip(made.failed).items():
        left, text = made.left(clip), f"{len(reasons)} of {made.seen(clip)} {what} cannot be decoded: {reasons[0]}"
        _judge(clip, "rejected", left, text, emit)
        if not left:
            lost.append(f"  {clip[1]}: {text}")
    clips = len({_clip(sample) for sample in plan.data.samples})
    if len(lost) > 1 and len(lost) > plan.data.max_rejected * clips:
        raise DataError(
            f"{len(lost)} of {clips} clips cannot be decoded, more than max_rejected = {plan.data.max_rejected:g}"
            " allows:\n" + "\n".join(lost),
            remedy="Repair or remove these files, or raise run.max_rejected (1.0 goes on with whatever is left).",
        )


def judge_silent(made: Made, emit: Emit) -> None:
    """Where sound alone is trained, a window without any is dropped."""
    for clip, windows in _by_clip(dict.fromkeys(made.empty, "")).items():
        text = f"no sound in {len(windows)} of {made.seen(clip)} windows ({_SILENCE})"
        _judge(clip, "dropped", made.left(clip), text, emit)


def tell_mute(made: Made, emit: Emit) -> None:
    """Where the picture is trained too, a window without sound trains it alone, and the user knows which."""
    for clip, reasons in _by_clip(made.failed).items():
        seen = made.seen(clip)
        text = f"the sound of {len(reasons)} of {seen} windows cannot be decoded: {reasons[0]}; picture alone"
        _judge(clip, "", seen, text, emit)
    if made.empty:
        names = sorted({printable(Path(sample.path).name) for sample in made.empty})
        shown = ", ".join(names[:MOST_CLIPS_TOLD]) + (" and others" if len(names) > MOST_CLIPS_TOLD else "")
        text = f"samples without sound, which train their picture alone: {len(made.empty)}, of {shown} ({_SILENCE})"
        emit(Note(text))


def _judge(clip: Clip, verdict: str, left: int, text: str, emit: Emit) -> None:
    """The verdict of a clip of which nothing is left, else a warning."""
    judged = ("ok", "", (text,)) if left else (verdict, text, ())
    emit(ClipJudged(clip[1], *judged, left, clip[0]))


def _clip(sample: SamplePlan) -> Clip:
    return sample.dataset, sample.path


def _by_clip(reasons: Mapping[SamplePlan, str]) -> dict[Clip, list[str]]:
    found: dict[Clip, list[str]] = {}
    for sample, reason in reasons.items():
        found.setdefault(_clip(sample), []).append(reason)
    return found


def _read_ahead(
    read: Callable[[SamplePlan, FileDigests], np.ndarray | None], samples: Sequence[SamplePlan], memo: Path
) -> Iterator[tuple[SamplePlan, np.ndarray | DecodeError | None]]:
    """Each sample with what it holds, the next one being decoded while the caller encodes this one."""
    digests = FileDigests(memo)

    def found(sample: SamplePlan) -> np.ndarray | DecodeError | None:
        try:
            return read(sample, digests)
        except OSError as error:
            return DecodeError(f"cannot be read ({(error.strerror or str(error)).lower()})")
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(max_workers=1) as reader:
        yield from zip(samples, _one_ahead(lambda sample: reader.submit(found, sample), samples), strict=True)


def _one_ahead(submit: Callable[[SamplePlan], Any], samples: Iterable[SamplePlan]) -> Iterator[Any]:
    waiting = None
    for sample in samples:
        following = submit(sample)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()
