"""Sound out of files: where a clip's sound lies, and the samples of a stretch of it. Torch-free.

Decides that a sound file beside a clip replaces the clip's own track. Decoding happens in the worker process.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ltxforge.media.decode import DecodeError
from ltxforge.media.probe import ProbeError, require_regular_file
from ltxforge.media.supervisor import BYTES_PER_SECOND, SECONDS, Refused, WorkerFault, once_more, worker

# How stored sound becomes samples. It enters the cache keys: raise the number whenever the same file could give others.
MIXDOWN = "swresample, stereo, surround folded at full front level; 1"
# Sound files that may stand beside a clip, the first that exists is taken.
SOUND_EXTENSIONS = (".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".oga", ".aac", ".mka", ".aif", ".aiff")


def sounds_named(clip: Path) -> list[Path]:
    """The sound files of a clip's name, with the extension in lower or upper case: the first is the one to use."""
    names = (clip.with_suffix(written) for ending in SOUND_EXTENSIONS for written in (ending, ending.upper()))
    found: list[Path] = []
    for path in names:  # some file systems give one file under both spellings
        if path.exists() and not any(path.samefile(other) for other in found):
            found.append(path)
    return found


def sound_beside(clip: Path) -> Path | None:
    """The sound file beside a clip, which replaces the clip's own track, since someone put it there on purpose.

    None if there is none, or the clip is a sound file itself.
    """
    if clip.suffix.lower() in SOUND_EXTENSIONS:
        return None
    return next(iter(sounds_named(clip)), None)


def read_audio(
    path: Path, start_seconds: float, seconds: float, sample_rate: int, channels: int = 2
) -> np.ndarray | None:
    """A stretch of a clip's sound, from the file beside it (see `sound_beside`) or else from its own track.

    Args:
        path: the clip. A file with sound alone will do.
        start_seconds: time from the clip's first frame, as in `decode`; the first sample of a file beside the clip,
            or of one without a picture, counts as time 0.
        seconds: length.
        sample_rate: of the result, in Hz; whatever the file has is resampled by swresample.
        channels: 2, or 1 for the mean of both.

    Returns:
        float32 [channels, round(seconds · sample_rate)], full scale 1: mono on both channels, stereo as it is,
        surround folded as `ffmpeg -ac 2` folds it into float samples (LFE left out; loud passages may exceed 1).
        Gaps, what lies before the track's beginning and behind its end are silent. None if the clip has no sound, or
        none in this stretch.

    Raises:
        DecodeError: the sound of this stretch does not decode, whole or in part, or ends earlier than its header says.
            In formats that only count their samples (MP3, AAC, Ogg) also damage before it, which moves it. Where plain
            samples are overwritten by others nothing tells.
    """
    if not (0 <= start_seconds < math.inf and 1 <= seconds * sample_rate < math.inf and channels in (1, 2)):
        raise ValueError("wanted: a start that is not negative, at least one sample, one or two channels")
    beside = sound_beside(path)
    source = beside or path
    try:
        limit = SECONDS + seconds + require_regular_file(source) / BYTES_PER_SECOND
        samples = once_more(
            lambda: worker().audio(source, start_seconds, seconds, sample_rate, channels, beside is None, limit)
        )
    except (ProbeError, Refused, WorkerFault) as error:
        reason = error.reason if beside is None else f"{beside.name} beside it: {error.reason}"
        raise DecodeError(reason) from error
    if samples is None and beside is not None and start_seconds == 0:
        raise DecodeError(f"{beside.name} beside it: no sound in it")
    return samples
