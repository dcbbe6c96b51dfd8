"""Reading the frames of one video file at wanted times, with PyAV. Runs inside the worker process only.

Decides which stream is the video, what a good frame is, and which frame is shown at a time. It may crash, hang or eat
memory on hostile files; `media.worker` and `media.supervisor` put limits around it, so
only they import it. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ltxforge.media import geometry

# Demuxers that may look at a user's file. Playlists (hls, concat, dash) are left out: they open other files and hosts.
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,mxf,m4v,wtv"
# In these a seek by time is exact; elsewhere frames are found by decoding from the start.
SEEKABLE = ("mov", "matroska")
MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4608
# How much later than asked a frame may start: Matroska rounds times to milliseconds, as do copies made of it.
TICK_SECONDS = 1e-3 + 0.5e-6
# Reading on from the start is cheaper than a seek that lands on the key frame before it.
_SEEK_BEYOND_SECONDS = 2.0
# Bit-exact across processors; full chroma resolution and correct rounding, where swscale's defaults trade both away.
_SWSCALE = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
# ITU-T H.273 MatrixCoefficients → swscale's tables. 2 is "unspecified", 0 is RGB.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
MATRIX_NAMES = {0: "rgb", 1: "bt709", 2: "unspecified", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m"}
MATRIX_NAMES |= {8: "ycgco", 9: "bt2020", 10: "bt2020-cl", 14: "ictcp"}


class MediaFault(Exception):
    """A file, or a part of it, that cannot be used. `good` counts the wanted frames that were delivered before."""

    def __init__(self, reason: str, good: int = 0) -> None:
        self.reason, self.good = reason, good
        super().__init__(reason)


class VideoFile:
    """An opened video: its picture stream and the time of its first frame. Use as a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.container = open_container(path)
        try:
            self.stream = _picture_stream(self.container)
            self.first = next(self._decoded())
        except BaseException as error:
            self.container.close()
            if isinstance(error, StopIteration):
                raise MediaFault("no frame of it can be decoded") from error
            raise
        self.orientation = _orientation(self.first)
        self.pixel_aspect = geometry.sane_pixel_aspect(self.stream.sample_aspect_ratio)
        self._reformatter = VideoReformatter()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.container.close()

    @property
    def origin(self) -> float:
        """Container time in seconds of the first frame that decodes; all other times count from it."""
        return self.seconds(self.first.pts) if self.first.pts is not None else 0.0

    @property
    def nominal_fps(self) -> float:
        """The rate that the header states or that ffmpeg guesses; 0 if neither."""
        return float(self.stream.guessed_rate or self.stream.average_rate or 0)

    @property
    def is_seekable(self) -> bool:
        """Whether seeking by time is exact."""
        return self.first.pts is not None and self.container.format.name.startswith(SEEKABLE)

    @property
    def has_several_pictures(self) -> bool:
        """Whether the file holds more than one video."""
        return len(pictures(self.container)) > 1

    def frames(self, start: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames in order of presentation with their times, from at or before `start` (seconds from the first) on.

        Raises MediaFault behind the last good frame if the file is damaged there.
        """
        if start > _SEEK_BEYOND_SECONDS and self.is_seekable:
            yield from self._sought(start)
        else:
            self.reopen()
            yield from self._timed()

    def reopen(self) -> None:
        """Go back to the start. A new demuxer, because seeking to 0 misses frames with negative times."""
        self.container.close()
        self.container = open_container(self.path)
        self.stream = _picture_stream(self.container)

    def seconds(self, ticks: int) -> float:
        """A time of the picture stream, in ticks of its time base, as container time in seconds."""
        return float(ticks * (self.stream.time_base or Fraction(0)))

    def picture(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """The frame as shown, resized to cover `size` (width, height) and cropped: uint8 [H, W, 3], sRGB-like RGB."""
        _refuse_huge(frame.width, frame.height)  # it may change in mid-stream
        shown = geometry.display_size(frame.width, frame.height, self.pixel_aspect, self.orientation)
        cover = geometry.cover_size(shown, size)
        stored = cover[::-1] if self.orientation.transpose else cover
        matrix, colour_range = colour_of(frame)
        rgb = self._reformatter.reformat(
            frame,
            width=stored[0],
            height=stored[1],
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=colour_range,
            dst_color_range=ColorRange.JPEG,
            interpolation=_SWSCALE,
        )
        return geometry.crop_centre(self.orientation.apply(rgb.to_ndarray()), size)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Every good frame up to the first damage, then MediaFault."""
        begun = False
        try:
            for frame in self._raw():
                if frame.is_corrupt and begun:
                    raise MediaFault("it is damaged (a frame decodes only in part)")
                begun = begun or not frame.is_corrupt  # a start in mid-stream lacks what its first frames refer to
                if begun:
                    yield frame
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaFault(f"it is damaged ({_plain(error)})") from error

    def _raw(self) -> Iterator[av.VideoFrame]:
        """All that the decoder gives. A torn packet is not fed to it: the frames before are whole, then MediaFault."""
        torn = None
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:
                torn = packet
                break
            if packet.size:
                yield from self.stream.decode(packet)
        try:
            rest = self.stream.codec_context.decode(None)
        except av.error.EOFError:  # already drained
            rest = []
        for frame in rest:
            if torn is None or None in (frame.pts, torn.pts) or frame.pts < torn.pts:
                yield frame
        if torn is not None:
            raise MediaFault("the file ends in the middle of a frame")

    def _timed(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames with their times; where the file has none, counted at the nominal rate."""
        seconds = None
        for frame in self._decoded():
            if frame.pts is not None:
                seconds = self.seconds(frame.pts) - self.origin
            elif self.nominal_fps > 0:
                seconds = 0.0 if seconds is None else seconds + 1 / self.nominal_fps
            else:
                raise MediaFault("its frames carry no times and the file states no frame rate")
            yield seconds, frame

    def _sought(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Like `_timed`, from the key frame at or before `start`. A seek that lands too late is made again at 0."""
        try:
            self.container.seek(int((self.origin + start) / self.stream.time_base), stream=self.stream)
        except av.error.FFmpegError:
            self.reopen()
        key = None
        for seconds, frame in self._timed():
            if key is None:
                if not frame.key_frame:
                    continue
                key = seconds
                if key > start + TICK_SECONDS:
                    break
            if seconds >= key:  # leading frames of an open group refer to pictures before the key frame
                yield seconds, frame
        else:
            if key is not None:
                return
        self.reopen()
        yield from self._timed()


def read_frames(path: str, timestamps: Sequence[float], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """For every time (seconds from the first frame, not decreasing) the frame shown then, as uint8 [H, W, 3].

    A frame is shown from its own time until the next one's. Raises MediaFault with the number already delivered.
    """
    good = 0
    with VideoFile(path) as video:
        held, held_at, interval, fault = None, 0.0, 1 / (video.nominal_fps or 25.0), "the picture ends"
        try:
            for seconds, frame in video.frames(timestamps[0]):
                picture = None
                while held is not None and timestamps[good] + TICK_SECONDS < seconds:
                    picture = video.picture(held, size) if picture is None else picture
                    yield picture
                    good += 1
                    if good == len(timestamps):
                        return
                if held is not None:
                    interval = max(interval, seconds - held_at)
                held, held_at = frame, seconds
        except MediaFault as error:
            fault = error.reason
        last = None if held is None else video.picture(held, size)
        for wanted in timestamps[good:]:
            if last is None or wanted > held_at + interval + TICK_SECONDS:
                raise MediaFault(f"{fault} at {held_at:.3f} s and {wanted:.3f} s is wanted", good)
            yield last
            good += 1


def pictures(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The video streams that are video: a cover image in a music file is one to ffmpeg, and to no one else."""
    stills = Disposition.attached_pic | Disposition.timed_thumbnails
    return [stream for stream in container.streams.video if not stream.disposition & stills]


def _picture_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The default video stream, else the first, ready to decode."""
    streams = pictures(container)
    if not streams:
        kind = "audio only" if container.streams.audio else "no video stream"
        raise MediaFault(f"no picture in it ({kind}{', with a cover image' if container.streams.video else ''})")
    stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    if stream.codec_context is None:
        raise MediaFault("its video codec is unknown to this build of ffmpeg")
    _refuse_huge(stream.codec_context.width, stream.codec_context.height)
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(4, os.cpu_count() or 1)
    return stream


def open_container(path: str, formats: str = FORMATS) -> av.container.InputContainer:
    """The file, opened by one of `formats` (names of demuxers) and nothing else. Raises MediaFault."""
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": formats}
        return av.open(path, options=options, metadata_errors="replace")  # titles in Latin-1 are common
    except MemoryError as error:
        raise MediaFault("reading it needs more memory than the worker may use") from error
    except av.error.FFmpegError as error:
        raise MediaFault(_why_not_opened(path, error, "video" if formats == FORMATS else "sound")) from error


def _why_not_opened(path: str, error: av.error.FFmpegError, wanted: str) -> str:
    boxes = _top_boxes(path)
    if boxes and "moov" not in boxes:
        return "its index is missing (no moov box): the file was cut off or never finished"
    if isinstance(error, (av.error.InvalidDataError, av.error.ArgumentError)):  # the latter: a format not in FORMATS
        return f"not a {wanted} file"
    return f"cannot be opened ({_plain(error)})"


def _top_boxes(path: str) -> list[str]:
    """Names of the top-level boxes of an ISO media file (ISO/IEC 14496-12, 4.2); [] for any other file."""
    names: list[str] = []
    with Path(path).open("rb") as file:
        while len(names) < 1000:
            start, head = file.tell(), file.read(16)
            name = head[4:8].decode("latin-1")
            if len(head) < 8 or (not names and name not in ("ftyp", "moov", "mdat", "wide", "free", "skip")):
                return names
            names.append(name)
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            if size < 8:
                return names
            file.seek(start + size)
    return names


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """The frame's 3×3 display matrix as nine 32-bit integers, or None."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32).tolist()


def _orientation(frame: av.VideoFrame) -> geometry.Orientation:
    matrix = display_matrix(frame)
    return geometry.Orientation() if matrix is None else geometry.orientation_of(matrix)


def colour_of(frame: av.VideoFrame) -> tuple[Colorspace, ColorRange]:
    """Matrix and range of the stored colours; unspecified means BT.709 for HD and BT.601 below, limited range."""
    if frame.format.is_rgb:
        return Colorspace.ITU709, ColorRange.JPEG
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if frame.colorspace in (0, 2):
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    elif frame.colorspace in _MATRICES:
        matrix = _MATRICES[frame.colorspace]
    else:
        name = MATRIX_NAMES.get(frame.colorspace, f"number {frame.colorspace}")
        raise MediaFault(f"its colour matrix ({name}) is not supported")
    return matrix, ColorRange.JPEG if full else ColorRange.MPEG


def _refuse_huge(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"{MAX_SIDE} a side and {MAX_PIXELS / 1e6:.0f} megapixels"
        raise MediaFault(f"too large: {width}x{height}, and the limit is {limit}")


def _plain(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split(":")[0].lower()
