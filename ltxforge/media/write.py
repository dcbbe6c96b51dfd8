"""Writing video: H.264 in mp4 that every player opens, whole or absent. Torch-free."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ltxforge import durable

# No B-frames: with them x264 gives other bytes at every run for some small sizes (96x128 was one).
_X264 = {"crf": "18", "preset": "medium", "bf": "0"}
_INDEX_FIRST = {"movflags": "+faststart"}
_BT709 = 1  # ITU-T H.273: matrix, primaries and transfer share the number


def write_video(path: Path, frames: np.ndarray, fps: float | Fraction, *, threads: int = 0) -> None:
    """Write frames, uint8 RGB [N, H, W, 3] with even H and W, as H.264 yuv420p, BT.709 limited range, index first.

    The bytes depend on the number of encoder threads (0: one per core) and on nothing else of the machine.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.shape[0]:
        raise ValueError(f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"4:2:0 video needs even sides, not {frames.shape[2]}x{frames.shape[1]}")
    with (
        durable.staged_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options=_INDEX_FIRST) as container,
    ):
        stream = _stream(container, frames.shape[2], frames.shape[1], exact_rate(fps), threads)
        convert = VideoReformatter()
        for index, picture in enumerate(frames):
            frame = _yuv(convert, picture)
            frame.pts, frame.time_base = index, 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def exact_rate(fps: float | Fraction) -> Fraction:
    """The frame rate that a decimal means: 29.97 is 30000/1001 and 23.976 is 24000/1001."""
    if isinstance(fps, Fraction):
        return fps
    nearest = Fraction(round(fps), 1)
    broadcast = nearest * Fraction(1000, 1001)
    if nearest and abs(fps - broadcast) < min(2e-3, abs(fps - nearest)):
        return broadcast
    return Fraction(fps).limit_denominator(1001)


def _stream(
    container: av.container.OutputContainer, width: int, height: int, rate: Fraction, threads: int
) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=rate, options=_X264)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = threads
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    return stream


def _yuv(convert: VideoReformatter, picture: np.ndarray) -> av.VideoFrame:
    return convert.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24"),
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )
