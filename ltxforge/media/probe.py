"""What a video file is: sizes, colours and the times of its frames, asked of the worker process. Torch-free.

Decides nothing about a recipe: HDR, length and size are judged by `dataset.scan`.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from ltxforge.media.supervisor import BYTES_PER_SECOND, SECONDS, Refused, WorkerFault, once_more, worker

# Raise by hand when a file could get other facts than before; remembered probes of another version are not used.
PROBE_VERSION = 2
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
    channels and layout are empty or 0 where there is none that can be decoded.
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


def probe(path: Path) -> Probe:
    """The facts of a video file. Raises ProbeError with the reason if it has no usable picture."""
    size = require_regular_file(path)
    try:
        facts = once_more(lambda: worker().inspect(path, SECONDS + size / BYTES_PER_SECOND))
    except Refused as refusal:
        raise ProbeError(refusal.reason) from refusal
    except WorkerFault as fault:
        raise ProbeError(fault.reason, is_certain=False) from fault
    return Probe(
        path=str(path), **{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    )


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
