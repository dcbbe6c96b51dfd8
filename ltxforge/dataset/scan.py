"""A folder becomes clips with verdicts: which files are samples, at which size and times, and why others are not.

Decides the verdicts. "rejected" is the file's fault (unreadable, bad caption) and counts against `max_rejected`;
"dropped" is the recipe's own limit (too short, too small, a duplicate). Reads user files, never writes beside them;
digests and probes are remembered in `memo_directory`. Torch-free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltxforge.dataset.captions import CaptionError, read_caption
from ltxforge.dataset.memo import Memo
from ltxforge.dataset.windows import too_short, window_starts
from ltxforge.errors import DataError, PlanError, Stopped
from ltxforge.events import ClipJudged, Emit, Note, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.media.audio import require_sound, sound_beside
from ltxforge.media.buckets import bucket_sizes, nearest_bucket, too_small
from ltxforge.media.decode import DecodeError
from ltxforge.media.geometry import kept_share
from ltxforge.media.probe import Probe, ProbeError, probe, require_regular_file
from ltxforge.modalities import has
from ltxforge.printable import printable
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest

_MP4_AND_KIN = (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm")
_MPEG_STREAMS = (".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts")
EXTENSIONS = frozenset([*_MP4_AND_KIN, *_MPEG_STREAMS, ".avi", ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".gif"])
_IMAGES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
_KEPT_SHARE_WARNING = 0.5


@dataclass(frozen=True)
class Clip:
    """One media file and its verdict: "ok", "rejected" or "dropped", the latter two with a reason.

    `name` is the path within the dataset's folder, safe to print; `digest` the SHA-256 of the file; `shape` the
    samples' size and `starts` their start times in seconds, of an ok clip. `sound` says where its sound lies, as
    `SamplePlan.sound` does: "" none (or none wanted), "own" its own track, else the digest of the file beside it.
    """

    path: Path
    name: str
    digest: str = ""
    caption: str = ""
    probe: Probe | None = None
    verdict: str = "ok"
    reason: str = ""
    warnings: tuple[str, ...] = ()
    shape: ClipShape | None = None
    starts: tuple[float, ...] = ()
    sound: str = ""


@dataclass(frozen=True)
class _Rules:
    """The recipe's part of a verdict."""

    sizes: tuple[tuple[int, int], ...]
    frames: int
    fps: float
    windows: str | int
    max_upscale: float
    modalities: str


class _Rejected(Exception):
    """The file's fault."""


class _Dropped(Exception):
    """The recipe's limit."""


def scan(
    folder: Path,
    *,
    dataset_id: str,
    resolution: tuple[int, int],
    frames: int,
    fps: float,
    windows: str | int = "all",
    buckets: str = "aspect",
    max_upscale: float = 2.0,
    factors: tuple[int, int] = (32, 8),
    modalities: str = "video",
    emit: Emit,
    stop: StopRequest,
    memo_directory: Path | None = None,
    leave_out: Collection[Path] = (),
) -> list[Clip]:
    """Judge every media file below `folder`, hidden ones left out, in the order of their names.

    Args:
        resolution: the recipe's (width, height).
        windows: see `windows.window_starts`.
        buckets: "aspect" or "fixed", see `buckets.bucket_sizes`.
        factors: the VAE's (spatial, temporal) factors.
        modalities: what is trained. With "both" each clip's sound is looked for and may be missing; with "audio" a
            clip without is dropped, and nothing of its picture but the length is judged.
        memo_directory: where digests and probes are remembered; None remembers nothing.
        leave_out: folders below `folder` that are none of the user's: a run's samples, a cache.

    Raises:
        PlanError: the folder does not exist or holds no media files.
        Stopped: a stop was requested; what was probed until then is remembered.
    """
    paths = _media_files(folder, leave_out)
    sizes = bucket_sizes(resolution, buckets if has(modalities, "video") else "fixed", factors[0])
    for width, height in sizes:
        ClipShape(width, height, frames).latent(*factors)  # the recipe was checked: every sample is legal
    rules = _Rules(sizes, frames, fps, windows, max_upscale, modalities)
    began, clips, seen = time.monotonic(), [], {}
    emit(PhaseStarted("scan", len(paths), dataset_id))
    with Memo(memo_directory) as memo:
        for path in paths:
            if stop.requested:
                raise Stopped(stop.signal_number, "stopped while scanning clips", remedy="Nothing was trained yet.")
            clip = _without_duplicate(_judge(path, folder, rules, memo), seen)
            clips.append(clip)
            shown = printable(str(path))
            emit(ClipJudged(shown, clip.verdict, clip.reason, clip.warnings, len(clip.starts), dataset_id))
            emit(PhaseAdvanced("scan", len(clips), clip.name))
    if modalities == "both":
        _tell_the_silent(clips, emit)
    emit(PhaseEnded("scan", time.monotonic() - began, dataset_id))
    return clips


def enforce_max_rejected(clips: Sequence[Clip], share: float) -> None:
    """Raise DataError, listing them, if more than `share` of the clips and more than one were rejected."""
    rejected = [clip for clip in clips if clip.verdict == "rejected"]
    if len(rejected) <= 1 or len(rejected) <= share * len(clips):
        return
    listing = "\n".join(f"  {clip.name}: {clip.reason}" for clip in rejected)
    raise DataError(
        f"{len(rejected)} of {len(clips)} clips were rejected, more than max_rejected = {share:g} allows:\n{listing}",
        remedy="Repair or remove these files, or raise max_rejected (1.0 goes on with whatever is left).",
    )


def _media_files(folder: Path, leave_out: Collection[Path]) -> list[Path]:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise PlanError(f"the dataset's folder {what}", where=printable(str(folder)), remedy=_FOLDER_REMEDY)
    ours = {path.resolve() for path in leave_out}
    paths = sorted(_walk(folder, ours), key=lambda path: path.relative_to(folder).parts)
    if not paths:
        images = sum(path.suffix.lower() in _IMAGES for path in folder.rglob("*"))
        seen = f" ({images} images were seen: datasets of images are not in this release)" if images else ""
        raise PlanError(
            f"no clips in the dataset's folder{seen}", where=printable(str(folder)),
            remedy=f"Looked for files named {' '.join(sorted(EXTENSIONS))}.",
        )  # fmt: skip
    return paths


_FOLDER_REMEDY = "Paths are relative to the folder where ltxforge is started; set `path` of this [[dataset]]."


def _walk(folder: Path, leave_out: Collection[Path]) -> Iterator[Path]:
    """Media files by extension. Links to files are taken; links to folders, which may run in circles, are not."""
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [
            name for name in folders if not name.startswith(".") and Path(root, name).resolve() not in leave_out
        ]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(root, name)


def _judge(path: Path, folder: Path, rules: _Rules, memo: Memo) -> Clip:
    clip = Clip(path, printable(path.relative_to(folder).as_posix()))
    try:
        clip = _with_content(clip, memo)
        if has(rules.modalities, "audio"):
            clip = _with_sound(clip, rules, memo)
        return _with_samples(clip, rules)
    except (_Rejected, ProbeError, CaptionError) as fault:
        return replace(clip, verdict="rejected", reason=printable(str(fault)), warnings=())
    except _Dropped as limit:
        return replace(clip, verdict="dropped", reason=str(limit))
    except OSError as error:
        return replace(clip, verdict="rejected", reason=f"cannot be read ({(error.strerror or str(error)).lower()})")


def _with_content(clip: Clip, memo: Memo) -> Clip:
    """Caption, digest and probe. The caption comes first: it is cheap to judge."""
    try:
        str(clip.path).encode()
    except UnicodeEncodeError as error:
        raise _Rejected("its path is not valid Unicode and cannot be written down; rename it") from error
    require_regular_file(clip.path)
    caption = read_caption(clip.path)
    digest = memo.digests.of(clip.path)
    found = memo.probe(digest, clip.path, probe)
    warnings = tuple(printable(text) for text in found.warnings)
    return replace(clip, caption=caption, digest=digest, probe=found, warnings=warnings)


def _with_sound(clip: Clip, rules: _Rules, memo: Memo) -> Clip:
    """Where its sound lies. What was put beside it must be readable; its own track may be beyond us."""
    beside, found = sound_beside(clip.path), clip.probe
    assert found is not None
    if beside is not None:
        return replace(clip, sound=_digest_of_sound(beside, memo))
    if found.audio_codec:
        return replace(clip, sound="own")
    reason = "its sound's codec is unknown to this build of ffmpeg" if found.has_audio else ""
    if rules.modalities == "both":
        return replace(clip, warnings=(*clip.warnings, f"{reason}: its picture is trained alone")) if reason else clip
    if reason:
        raise _Rejected(reason)
    raise _Dropped("no sound: neither a track of its own nor a sound file of the same name beside it")


def _digest_of_sound(beside: Path, memo: Memo) -> str:
    try:
        require_regular_file(beside)
        digest = memo.digests.of(beside)
        memo.sound(digest, beside, require_sound)
    except (ProbeError, DecodeError, OSError) as error:
        remedy = "repair it, or take it away to use the clip's own sound, if it has any"
        raise _Rejected(f"the sound file {beside.name} beside it cannot be used: {error}; {remedy}") from error
    return digest


def _tell_the_silent(clips: Sequence[Clip], emit: Emit) -> None:
    usable = [clip for clip in clips if clip.verdict == "ok"]
    if count := sum(not clip.sound for clip in usable):
        emit(Note(f"clips without sound, which train their picture alone: {count} of {len(usable)}"))


def _with_samples(clip: Clip, rules: _Rules) -> Clip:
    """Size and windows, by the recipe."""
    found = clip.probe
    assert found is not None
    is_seen = has(rules.modalities, "video")
    if is_seen and found.is_hdr:
        raise _Rejected(f"HDR ({found.colour_transfer.upper()}) is refused until tone-mapping exists")
    if reason := too_short(found.timestamps, found.frame_seconds, frames=rules.frames, fps=rules.fps):
        raise _Dropped(reason)
    bucket = nearest_bucket(found.size, rules.sizes)
    if is_seen and (reason := too_small(found.size, bucket, rules.max_upscale)):
        raise _Dropped(reason)
    starts = window_starts(
        found.timestamps, found.frame_seconds, frames=rules.frames, fps=rules.fps, windows=rules.windows
    )
    warnings = clip.warnings + (_crop_warning(found.size, bucket) if is_seen else ())
    return replace(clip, shape=ClipShape(*bucket, rules.frames), starts=starts, warnings=warnings)


def _crop_warning(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[str, ...]:
    kept = kept_share(size, bucket)
    if kept >= _KEPT_SHARE_WARNING:
        return ()
    return (f"only {kept:.0%} of the picture is left after cropping {size[0]}x{size[1]} to {bucket[0]}x{bucket[1]}",)


def _without_duplicate(clip: Clip, seen: dict[tuple[str, ...], str]) -> Clip:
    """The clip, dropped if an ok one before it has the same content, sound and caption."""
    if clip.verdict != "ok":
        return clip
    first = seen.setdefault((clip.digest, clip.sound, clip.caption), clip.name)
    if first == clip.name:
        return clip
    return replace(clip, verdict="dropped", reason=f"the same file and caption as {first}", shape=None, starts=())
