"""Small videos written with PyAV, so that what is in them is known exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """Writes frames (RGB arrays or ready VideoFrames) to a file of known times, lossless, and gives its path."""

    def make(
        name: str,
        frames: Sequence[np.ndarray | av.VideoFrame],
        *,
        fps: int = 25,
        milliseconds: Sequence[int] | None = None,
        codec: str = "libx264",
        pix_fmt: str = "yuv444p",
        options: dict[str, str] | None = None,
        rotation: float | None = None,
        mirror: bool = False,
        pixel_aspect: Fraction | None = None,
        colours: dict[str, int] | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=fps, options=options or {"qp": "0", "preset": "ultrafast"})
            first = frames[0]
            stream.width = first.width if isinstance(first, av.VideoFrame) else first.shape[1]
            stream.height = first.height if isinstance(first, av.VideoFrame) else first.shape[0]
            stream.pix_fmt = pix_fmt
            if rotation is not None or mirror:
                stream.set_display_rotation(rotation or 0.0, hflip=mirror)
            if pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            for key, value in (colours or {}).items():
                setattr(stream.codec_context, key, value)
            if milliseconds is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for index, picture in enumerate(frames):
                frame = picture if isinstance(picture, av.VideoFrame) else av.VideoFrame.from_ndarray(picture, "rgb24")
                if milliseconds is not None:
                    frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
                else:
                    frame.pts, frame.time_base = index, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def counter_frames() -> Callable[..., list[np.ndarray]]:
    """Pictures that carry their number in the grey of their halves, sixteens left and ones right: see `index_of`."""

    def make(count: int, width: int = 32, height: int = 32) -> list[np.ndarray]:
        frames = np.empty((count, height, width, 3), np.uint8)
        frames[:, :, : width // 2] = (8 + 15 * (np.arange(count) // 16))[:, None, None, None]
        frames[:, :, width // 2 :] = (8 + 15 * (np.arange(count) % 16))[:, None, None, None]
        return list(frames)

    return make


@pytest.fixture
def index_of() -> Callable[[np.ndarray], list[int]]:
    """The numbers of counter pictures [N, H, W, 3]."""

    def read(frames: np.ndarray) -> list[int]:
        quarter = frames.shape[2] // 4
        tens, ones = (np.rint((frames[:, :, part].mean((1, 2, 3)) - 8) / 15) for part in _outer(quarter))
        return [int(ten * 16 + one) for ten, one in zip(tens, ones, strict=True)]

    return read


def _outer(quarter: int) -> tuple[slice, slice]:
    return slice(0, quarter), slice(-quarter, None)
