"""What a media file is: sizes, colours, the times of its frames, its sound, asked of the worker process. Torch-free.

Decides nothing about a recipe: HDR, length and size are judged by `dataset.scan`.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxforge.media.supervisor import BYTES_PER_SECOND, SECONDS, Refused, WorkerFault, once_more, worker

# Raise by hand when a file could get other facts than before; remembered probes of another version are not used.
PROBE_VERSION = 3
MAX_BYTES = 64 * 2**30


class ProbeError(Exception):
    """A file that cannot be used, in plain words. `is_certain` is False where the worker died instead of judging."""

    def __init__(self, reason: str, is_certain: bool = True) -> None:
        self.reason, self.is_certain = reason, is_certain
        super().__init__(reason)


@dataclass(frozen=True)
class Probe:
    """The facts of one video file.

    `width` and `height` are the picture as shown: after rotation and pixel aspect, in square pixels. `timestamps` are
    the times in seconds of all frames that decode, counted from the first; `frame_seconds` is how long a typical one
    is shown. `rotation` is in degrees clockwise. `has_audio` tells of a track of its own; its codec, rate in Hz,
    channels and layout are empty or 0 where there is none that can be decoded, and so is `audio_seconds`, where it ends
    by the header, from the first frame on, if no header says. `warnings` are about the clip's length,
    `picture_warnings` about what is seen.
    """

    path: str
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int
    mirrored: bool
    pixel_aspect: tuple[int, int]
    nominal_fps: float
    frame_seconds: float
    timestamps: tuple[float, ...]
    codec: str
    pixel_format: str
    bit_depth: int
    colour_range: str
    colour_matrix: str
    colour_primaries: str
    colour_transfer: str
    has_audio: bool
    warnings: tuple[str, ...] = ()
    audio_codec: str = ""
    audio_rate: int = 0
    audio_channels: int = 0
    audio_layout: str = ""
    audio_seconds: float = 0.0
    picture_warnings: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return self.width, self.height

    @property
    def duration_seconds(self) -> float:
        """From the first frame's appearance to the last one's end."""
        return self.timestamps[-1] + self.frame_seconds

    @property
    def is_hdr(self) -> bool:
        """Whether the transfer function is PQ or HLG (ITU-R BT.2100)."""
        return self.colour_transfer in ("pq", "hlg")


@dataclass(frozen=True)
class Sound:
    """The facts of one file's sound, all of which was decoded.

    `seconds` is its length from its first sample, `fault` where it is damaged or cut short ("" if it is not; behind
    damage the length is what its header says, if it does). Codec, rate, channels and layout are as in `Probe`.
    """

    path: str
    seconds: float
    fault: str
    has_picture: bool
    audio_codec: str
    audio_rate: int
    audio_channels: int
    audio_layout: str


def probe(path: Path) -> Probe:
    """The facts of a video file. Raises ProbeError with the reason if it has no usable picture."""
    facts = _asked(path, worker().inspect)
    return Probe(
        path=str(path), **{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    )


def probe_sound(path: Path) -> Sound:
    """The facts of a file's sound. Raises ProbeError with the reason if there is none that decodes."""
    return Sound(path=str(path), **_asked(path, worker().inspect_sound))


def _asked(path: Path, inspect: Callable[[Path, float], dict[str, Any]]) -> dict[str, Any]:
    limit = SECONDS + require_regular_file(path) / BYTES_PER_SECOND
    try:
        return once_more(lambda: inspect(path, limit))
    except Refused as refusal:
        raise ProbeError(refusal.reason) from refusal
    except WorkerFault as fault:
        raise ProbeError(fault.reason, is_certain=False) from fault


def require_regular_file(path: Path) -> int:
    """Size in bytes of a plain file; else ProbeError. Asked before opening, since opening a pipe can wait forever."""
    try:
        status = path.stat()
    except OSError as error:
        raise ProbeError(f"cannot be opened ({(error.strerror or str(error)).lower()})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ProbeError(f"not a regular file ({_kind(status.st_mode)})")
    if status.st_size == 0:
        raise ProbeError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise ProbeError(f"larger than {MAX_BYTES >> 30} GiB")
    return status.st_size


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "of unknown kind")
