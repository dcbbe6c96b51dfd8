"""Writing video: H.264 and AAC in mp4 that every player opens, whole or absent. Torch-free."""

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
_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # ISO 14496-3
_AAC_BITS_PER_SECOND = 256_000
# A sample should sound as it was made: no noise or intensity put in the place of waves. The plain coder also keeps the
# first 20 ms, where the default one was off by a third of the level.
_AAC = {"aac_coder": "fast", "aac_pns": "0", "aac_is": "0", "aac_tns": "0", "aac_ms": "0"}


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float | Fraction,
    *,
    audio: np.ndarray | None = None,
    sample_rate: int = 0,
    threads: int = 0,
) -> None:
    """Write frames, uint8 RGB [N, H, W, 3] with even H and W, as H.264 yuv420p, BT.709 limited range, index first.

    `audio` [1 or 2, samples], full scale 1, at `sample_rate` Hz (one of AAC's own rates) becomes an AAC stereo track
    that begins and ends with the picture: what is longer is cut, what is shorter is silent at its end. The bytes
    depend on the number of encoder threads (0: one per core) and on nothing else of the machine.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.shape[0]:
        raise ValueError(f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"4:2:0 video needs even sides, not {frames.shape[2]}x{frames.shape[1]}")
    rate = exact_rate(fps)
    sound = None if audio is None else _stereo(audio, sample_rate, len(frames) / rate)
    with (
        durable.staged_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options=_INDEX_FIRST) as container,
    ):
        stream = _stream(container, frames.shape[2], frames.shape[1], rate, threads)
        track = None if sound is None else _track(container, sample_rate)
        convert, written = VideoReformatter(), 0
        for index, picture in enumerate(frames):
            frame = _yuv(convert, picture)
            frame.pts, frame.time_base = index, 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
            if track is not None:  # by turns, so that a player finds both near each other
                until = round((index + 1) / rate * sample_rate)
                container.mux(track.encode(_samples(sound[:, written:until], sample_rate, written)))
                written = until
        for encoder in (stream, track):
            if encoder is not None:
                container.mux(encoder.encode(None))


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


def _stereo(audio: np.ndarray, sample_rate: int, seconds: Fraction) -> np.ndarray:
    """The sound as float32 [2, samples] of exactly the picture's length, within full scale."""
    if audio.ndim != 2 or audio.shape[0] not in (1, 2) or not np.issubdtype(audio.dtype, np.floating):
        raise ValueError(f"audio must be floating-point [1 or 2, samples], not {audio.dtype} {list(audio.shape)}")
    if sample_rate not in _AAC_RATES:
        raise ValueError(f"AAC knows no sampling rate of {sample_rate} Hz")
    count = round(seconds * sample_rate)
    sound = np.zeros((2, count), np.float32)
    sound[:, : audio.shape[1]] = np.clip(np.nan_to_num(audio[:, :count]), -1, 1)
    return sound


def _track(container: av.container.OutputContainer, sample_rate: int) -> av.AudioStream:
    track = container.add_stream("aac", rate=sample_rate, layout="stereo", options=_AAC)
    track.codec_context.bit_rate = _AAC_BITS_PER_SECOND
    return track


def _samples(sound: np.ndarray, sample_rate: int, start: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), "fltp", "stereo")
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
    return frame
