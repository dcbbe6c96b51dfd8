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

from ltxforge.dataset.captions import CaptionError, caption_path, read_caption
from ltxforge.dataset.memo import Memo
from ltxforge.dataset.windows import too_short, window_starts
from ltxforge.errors import DataError, PlanError, Stopped
from ltxforge.events import ClipJudged, Emit, Note, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.media.audio import SOUND_EXTENSIONS, sound_beside, sounds_named
from ltxforge.media.buckets import bucket_sizes, nearest_bucket, too_small
from ltxforge.media.geometry import kept_share
from ltxforge.media.probe import Probe, ProbeError, Sound, probe, probe_sound, require_regular_file
from ltxforge.modalities import has
from ltxforge.printable import printable
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest

_MP4_AND_KIN = (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm")
_MPEG_STREAMS = (".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts")
EXTENSIONS = frozenset([*_MP4_AND_KIN, *_MPEG_STREAMS, ".avi", ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".gif"])
_IMAGES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
_KEPT_SHARE_WARNING = 0.5
# A sound may be so much shorter or longer than its clip without a word. Coders and cameras cut a few frames short; what
# is behind the clip's end is lost and no harm, but much of it tells of the wrong file.
_SHORTER_SECONDS, _LONGER_SECONDS = 0.2, 1.0


@dataclass(frozen=True)
class Clip:
    """One media file and its verdict: "ok", "rejected" or "dropped", the latter two with a reason.

    `probe` is None where the file was refused, and of a file with sound alone.

    `name` is the path within the dataset's folder, safe to print; `digest` the SHA-256 of the file; `shape` the
    samples' size and `starts` their start times in seconds, of an ok clip. `sound` says where its sound lies, as
    `SamplePlan.sound` does: "" none (or none wanted), "own" its own track, else the digest of the file beside it;
    `sound_seconds` is when it ends, None where no header says.
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
    sound_seconds: float | None = None

    def sound_at(self, start: float) -> str:
        """`sound` of a window that starts there: "" behind the sound's end."""
        return "" if self.sound_seconds is not None and start >= self.sound_seconds else self.sound


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
            clip without is dropped, nothing of its picture but the length is judged, and a file with sound alone is a
            clip too.
        memo_directory: where digests and probes are remembered; None remembers nothing.
        leave_out: folders below `folder` that are none of the user's: a run's samples, a cache.

    Raises:
        PlanError: the folder does not exist or holds no media files.
        Stopped: a stop was requested; what was probed until then is remembered.
    """
    paths = _media_files(folder, leave_out, modalities)
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


def _media_files(folder: Path, leave_out: Collection[Path], modalities: str) -> list[Path]:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise PlanError(f"the dataset's folder {what}", where=printable(str(folder)), remedy=_FOLDER_REMEDY)
    ours = {path.resolve() for path in leave_out}
    found = sorted(_walk(folder, ours), key=lambda path: path.relative_to(folder).parts)
    clips = {path.with_suffix("") for path in found if not _is_sound(path)}
    paths = [path for path in found if not _is_sound(path) or _is_clip(path, clips, modalities)]
    if not paths:
        images = sum(path.suffix.lower() in _IMAGES for path in folder.rglob("*"))
        seen = f" ({images} images were seen: datasets of images are not in this release)" if images else ""
        raise PlanError(
            f"no clips in the dataset's folder{seen}", where=printable(str(folder)),
            remedy=f"Looked for files named {' '.join(sorted(EXTENSIONS))}"
            + (f", and with sound alone {' '.join(SOUND_EXTENSIONS)}." if modalities == "audio" else "."),
        )  # fmt: skip
    return paths


_FOLDER_REMEDY = "Paths are relative to the folder where ltxforge is started; set `path` of this [[dataset]]."


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() in SOUND_EXTENSIONS


def _is_clip(sound: Path, clips: Collection[Path], modalities: str) -> bool:
    """Whether a sound file stands for itself: beside no clip, and the first of its name.

    Where pictures are trained, only a caption tells that it was meant to be a clip.
    """
    first = next(iter(sounds_named(sound)), sound)
    if sound.with_suffix("") in clips or (first != sound and not (sound.exists() and first.samefile(sound))):
        return False
    return modalities == "audio" or caption_path(sound).exists()


def _walk(folder: Path, leave_out: Collection[Path]) -> Iterator[Path]:
    """Media files by extension. Links to files are taken; links to folders, which may run in circles, are not."""
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [
            name for name in folders if not name.startswith(".") and Path(root, name).resolve() not in leave_out
        ]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS.union(SOUND_EXTENSIONS):
                yield Path(root, name)


def _judge(path: Path, folder: Path, rules: _Rules, memo: Memo) -> Clip:
    clip = Clip(path, printable(path.relative_to(folder).as_posix()))
    try:
        clip = _with_content(clip, rules, memo)
        if has(rules.modalities, "audio"):
            clip = _with_sound(clip, rules, memo)
        return _with_samples(clip, rules)
    except (_Rejected, ProbeError, CaptionError) as fault:
        return replace(clip, verdict="rejected", reason=printable(str(fault)), warnings=())
    except _Dropped as limit:
        return replace(clip, verdict="dropped", reason=str(limit))
    except OSError as error:
        return replace(clip, verdict="rejected", reason=f"cannot be read ({(error.strerror or str(error)).lower()})")


def _with_content(clip: Clip, rules: _Rules, memo: Memo) -> Clip:
    """Caption, digest and probe. The caption comes first: it is cheap to judge."""
    try:
        str(clip.path).encode()
    except UnicodeEncodeError as error:
        raise _Rejected("its path is not valid Unicode and cannot be written down; rename it") from error
    require_regular_file(clip.path)
    caption = read_caption(clip.path)
    if _is_sound(clip.path) and rules.modalities != "audio":
        raise _Dropped('sound without a picture; training.modalities = "audio" uses it')
    digest = memo.digests.of(clip.path)
    found = None if _is_sound(clip.path) else _picture(clip.path, digest, rules, memo)
    warnings: tuple[str, ...] = ()
    if found is not None:
        warnings = found.warnings + (found.picture_warnings if has(rules.modalities, "video") else ())
    return replace(clip, caption=caption, digest=digest, probe=found, warnings=tuple(map(printable, warnings)))


def _picture(path: Path, digest: str, rules: _Rules, memo: Memo) -> Probe | None:
    """The probe; None where only sound is wanted and the file holds nothing else."""
    try:
        return memo.probe(digest, path, probe)
    except ProbeError:
        if rules.modalities != "audio" or not _is_sound_alone(path, digest, memo):
            raise
        return None


def _is_sound_alone(path: Path, digest: str, memo: Memo) -> bool:
    try:
        return not memo.sound(digest, path, probe_sound).has_picture
    except ProbeError:
        return False


def _with_sound(clip: Clip, rules: _Rules, memo: Memo) -> Clip:
    """Where its sound lies. What was put beside it must be readable; its own track may be beyond us."""
    beside, found = sound_beside(clip.path), clip.probe
    if beside is not None:
        digest, sound = _sound_beside(beside, memo)
        return _with_facts(clip, digest, sound)
    if found is None:
        return _with_facts(clip, "own", memo.sound(clip.digest, clip.path, probe_sound))
    if found.audio_codec:
        end = found.audio_seconds or None
        lengths = () if end is None or found.warnings else _length_warning(end, found.duration_seconds)
        return replace(clip, sound="own", sound_seconds=end, warnings=clip.warnings + lengths)
    reason = "its sound's codec is unknown to this build of ffmpeg" if found.has_audio else ""
    if rules.modalities == "both":
        return replace(clip, warnings=(*clip.warnings, f"{reason}: its picture is trained alone")) if reason else clip
    if reason:
        raise _Rejected(reason)
    raise _Dropped("no sound: neither a track of its own nor a sound file of the same name beside it")


def _sound_beside(beside: Path, memo: Memo) -> tuple[str, Sound]:
    """Digest and facts of the sound file beside a clip."""
    try:
        require_regular_file(beside)
        digest = memo.digests.of(beside)
        return digest, memo.sound(digest, beside, probe_sound)
    except (ProbeError, OSError) as error:
        remedy = "repair it, or take it away to use the clip's own sound, if it has any"
        raise _Rejected(f"the sound file {beside.name} beside it cannot be used: {error}; {remedy}") from error


def _with_facts(clip: Clip, where: str, sound: Sound) -> Clip:
    """The clip with a sound file's facts, and what is odd about them."""
    name = Path(sound.path).name
    warnings = tuple(
        f"{other.name} is not used, {name} is" for other in sounds_named(clip.path) if not other.samefile(sound.path)
    )  # fmt: skip
    if sound.fault:
        warnings += (f"{name}: {sound.fault}; the sound of windows there is left out",)
    elif clip.probe is not None:
        warnings += _length_warning(sound.seconds, clip.probe.duration_seconds)
    return replace(
        clip, sound=where, sound_seconds=sound.seconds, warnings=clip.warnings + tuple(map(printable, warnings))
    )


def _length_warning(sound: float, clip: float) -> tuple[str, ...]:
    lengths = f"the sound is {sound:.1f} s, the clip {clip:.1f} s"
    if sound < clip - _SHORTER_SECONDS:
        return (f"{lengths}: silent from there on",)
    return (f"{lengths}: the rest of the sound is not used",) if sound > clip + _LONGER_SECONDS else ()


def _tell_the_silent(clips: Sequence[Clip], emit: Emit) -> None:
    usable = [clip for clip in clips if clip.verdict == "ok"]
    if count := sum(not clip.sound for clip in usable):
        emit(Note(f"clips without sound, which train their picture alone: {count} of {len(usable)}"))


def _with_samples(clip: Clip, rules: _Rules) -> Clip:
    """Size and windows, by the recipe."""
    found = clip.probe
    if found is None:
        return _with_windows(clip, rules, rules.sizes[0])
    bucket = nearest_bucket(found.size, rules.sizes)
    if not has(rules.modalities, "video"):
        return _with_windows(clip, rules, bucket)
    if found.is_hdr:
        raise _Rejected(f"HDR ({found.colour_transfer.upper()}) is refused until tone-mapping exists")
    clip = _with_windows(clip, rules, bucket)
    if reason := too_small(found.size, bucket, rules.max_upscale):
        raise _Dropped(reason)
    return replace(clip, warnings=clip.warnings + _crop_warning(found.size, bucket))


def _with_windows(clip: Clip, rules: _Rules, size: tuple[int, int]) -> Clip:
    """The windows, of a clip without a picture as many as its sound holds; of sound alone those that have some."""
    times, interval = _frame_times(clip, rules.fps)
    if reason := too_short(times, interval, frames=rules.frames, fps=rules.fps, is_sound=clip.probe is None):
        raise _Dropped(reason)
    starts = window_starts(times, interval, frames=rules.frames, fps=rules.fps, windows=rules.windows)
    if rules.modalities == "audio":
        starts = tuple(start for start in starts if clip.sound_at(start))
    return replace(clip, shape=ClipShape(*size, rules.frames), starts=starts)


def _frame_times(clip: Clip, fps: float) -> tuple[tuple[float, ...], float]:
    """Times of the frames and how long one is shown; of sound alone, those of the first and the last there would be."""
    if clip.probe is not None:
        return clip.probe.timestamps, clip.probe.frame_seconds
    return (0.0, max(0.0, (clip.sound_seconds or 0.0) - 1 / fps)), 1 / fps


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
