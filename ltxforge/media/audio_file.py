"""Reading a stretch of sound from one media file, with PyAV. Runs inside the worker process only.

Decides which stream is the sound, where its samples lie on the clip's time line, and what becomes of gaps, damage and
surround. Like `media.video_file` it may crash on hostile files, so only the worker imports it. Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import closing

import av
import numpy as np
from av.stream import Disposition

from ltxforge.media.video_file import FORMATS, SEEKABLE, MediaFault, VideoFile, open_container, pictures

# Demuxers that may look at a clip, or at the sound beside it.
AUDIO_FORMATS = f"{FORMATS},wav,w64,flac,mp3,aac,aiff,caf"
LOWEST_RATE, HIGHEST_RATE = 4000, 768_000
# Samples follow each other without a seam as long as their times agree this well (a frame of 25 fps is longer). Times
# are rough: Matroska and FLV round them to 1 ms, ffmpeg's for Vorbis swing by half a long block (10 ms at 44.1 kHz);
# to follow them would tear the wave. Beyond this there is a gap in the file, or its clocks drifted apart.
SEAM_SECONDS = 0.035
# Read on both sides of what is wanted, so that the resampler's filter (32 samples of the lower rate) sees real sound.
_MARGIN_SECONDS = 0.02
# So many frames together tell where the first one belongs, since the time of a single one may be off: an edit list that
# cuts into an AAC packet leaves that packet's frame whole and gives it the time of the cut.
_FRAMES_FOR_ANCHOR = 9
# A seek is worth it beyond this; it lands this much early, because decoders need a run-up (Opus: 80 ms).
_SEEK_BEYOND_SECONDS = 10.0
_RUN_UP_SECONDS = 1.0
# A header that promises this much more than there is tells of a file that was cut.
_MISSING_SECONDS = 0.5


def read_samples(
    path: str, start: float, seconds: float, rate: int, channels: int, *, on_picture_time: bool
) -> np.ndarray | None:
    """Sound as float32 [channels, round(seconds · rate)], or None where there is none. See `media.audio.read_audio`.

    `on_picture_time`: time 0 is the first frame of the file's own picture; else it is the first sample that decodes.
    """
    origin = None
    with closing(open_container(path, AUDIO_FORMATS)) as container:
        if not container.streams.audio:
            return None
        has_picture = bool(pictures(container))
    if on_picture_time and has_picture:
        with VideoFile(path) as video:
            origin = video.origin
    stretch = _Stretch(start, seconds, rate, origin)
    if not _seek_and_fill(path, stretch):
        stretch = _Stretch(start, seconds, rate, origin)
        _fill(path, stretch)
    if not stretch.has_sound:
        return None
    samples = stretch.samples()
    if not np.isfinite(samples).all():
        raise MediaFault("its sound holds values that are no numbers")
    return samples if channels == 2 else samples.mean(0, keepdims=True)


def facts_of(container: av.container.InputContainer) -> dict[str, str | int]:
    """Codec, sampling rate in Hz, channels and their layout of a container's sound; empty and 0 without one."""
    try:
        context = sound_stream(container).codec_context
    except MediaFault:
        return {"audio_codec": "", "audio_rate": 0, "audio_channels": 0, "audio_layout": ""}
    return {
        "audio_codec": context.codec.canonical_name,
        "audio_rate": context.sample_rate,
        "audio_channels": context.layout.nb_channels,
        "audio_layout": context.layout.name,
    }


def sound_stream(container: av.container.InputContainer) -> av.AudioStream:
    """The default audio stream that can be decoded, else the first one. Raises MediaFault if there is none."""
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not streams:
        raise MediaFault("its sound's codec is unknown to this build of ffmpeg")
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


class _Stretch:
    """The wanted stretch of sound, in stereo at the file's own rate, filled frame by frame.

    `origin` is the container time of time 0; None takes the first frame's. The array begins `lead` samples of the
    wanted rate before the stretch; where nothing is put it is silent.
    """

    def __init__(self, start: float, seconds: float, rate: int, origin: float | None) -> None:
        self.rate, self.origin, self.has_sound = rate, origin, False
        self.count, self.lead = round(seconds * rate), math.ceil(_MARGIN_SECONDS * rate)
        self.begin = start - self.lead / rate
        self.source_rate = 0
        self._held = np.zeros((2, 0), np.float32)
        self._next: int | None = None
        self._mixer = _Mixer()

    @property
    def is_full(self) -> bool:
        """Whether everything up to the end has been put."""
        return self._next is not None and self._next >= self._held.shape[1]

    @property
    def is_begun(self) -> bool:
        """Whether what was put last reaches into the stretch or its margin."""
        return self._next is not None and self._next > 0

    @property
    def reached(self) -> float:
        """Where, in seconds on the clip's time line, the last put sample ends."""
        return self.begin + (self._next or 0) / max(1, self.source_rate)

    def put(self, frame: av.AudioFrame, seconds: float | None) -> None:
        """Place a frame that belongs at `seconds` of container time, None where it just follows."""
        if self._next is None:
            self._open(frame.sample_rate, seconds)
        elif frame.sample_rate != self.source_rate:
            raise MediaFault("the sampling rate of its sound changes on the way")
        at = self._next or 0
        if seconds is not None:
            wanted = round((seconds - self.origin - self.begin) * self.source_rate)
            if self._next is None or abs(wanted - at) > SEAM_SECONDS * self.source_rate:
                at = wanted
        self._next = at + frame.samples
        first, last = max(at, 0), min(self._next, self._held.shape[1])
        if first < last:
            self._held[:, first:last] = self._mixer.stereo(frame)[:, first - at : last - at]
            inner = self.lead * self.source_rate / self.rate
            self.has_sound |= last > inner and first < inner + self.count * self.source_rate / self.rate

    def samples(self) -> np.ndarray:
        """The stretch at the wanted rate: float32 [2, count]."""
        samples = _resampled(self._held, self.source_rate, self.rate)[:, self.lead :][:, : self.count]
        return np.pad(samples, ((0, 0), (0, self.count - samples.shape[1])))

    def _open(self, source_rate: int, seconds: float | None) -> None:
        if not LOWEST_RATE <= source_rate <= HIGHEST_RATE:
            raise MediaFault(f"a sampling rate of {source_rate} Hz is not supported")
        if self.origin is None:
            self.origin = seconds or 0.0
        if seconds is None:  # a file without times begins at 0
            self._next = round((-self.origin - self.begin) * source_rate)
        self.source_rate = source_rate
        self._held = np.zeros((2, math.ceil((self.count + 2 * self.lead) * source_rate / self.rate)), np.float32)


class _Mixer:
    """Frames of any format and layout → stereo float32, by swresample's own default coefficients.

    Full scale is 1. Surround is folded without lowering the front channels, as ffmpeg does for float output, so loud
    passages may exceed 1. One channel is heard on both sides at its own level.
    """

    def __init__(self) -> None:
        self._converters: dict[tuple[str, str, int], av.AudioResampler] = {}

    def stereo(self, frame: av.AudioFrame) -> np.ndarray:
        """[2, samples]"""
        channels, rate = frame.layout.nb_channels, frame.sample_rate
        key = frame.format.name, frame.layout.name, channels
        if key not in self._converters:
            layout = frame.layout if channels <= 2 else "stereo"
            self._converters[key] = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        frame.pts = None
        try:
            parts = self._converters[key].resample(frame)
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaFault(f"its sound's channels ({frame.layout.name}) cannot be folded into two") from error
        mixed = np.concatenate([part.to_ndarray() for part in parts], axis=1)
        return np.broadcast_to(mixed, (2, mixed.shape[1]))


def _resampled(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    if source_rate == rate:
        return samples
    frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
    frame.sample_rate = source_rate
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray() for part in parts], axis=1)


def _seek_and_fill(path: str, stretch: _Stretch) -> bool:
    """Fill by seeking. False where that is not worth it, not possible, or landed behind the beginning."""
    if stretch.begin < _SEEK_BEYOND_SECONDS or stretch.origin is None:
        return False
    with closing(open_container(path, AUDIO_FORMATS)) as container:
        if not container.format.name.startswith(SEEKABLE):
            return False
        try:
            container.seek(int((stretch.origin + stretch.begin - _RUN_UP_SECONDS) * av.time_base))
            return _fill_from(container, stretch, must_begin_before=True)
        except av.error.FFmpegError:
            return False


def _fill(path: str, stretch: _Stretch) -> None:
    with closing(open_container(path, AUDIO_FORMATS)) as container:
        _fill_from(container, stretch)


def _fill_from(container: av.container.InputContainer, stretch: _Stretch, must_begin_before: bool = False) -> bool:
    """Decode from here until the stretch is full. Damage before its beginning is none of its business."""
    stream, fresh, damaged = sound_stream(container), True, False
    for frame, seconds in _anchored(_decoded(container, stream)):
        if frame is None:
            damaged = True
            if stretch.is_begun:
                raise MediaFault(f"its sound is damaged at {stretch.reached:.2f} s")
            continue
        if must_begin_before and fresh and (seconds is None or seconds - stretch.origin > stretch.begin):
            return False
        fresh = False
        stretch.put(frame, seconds)
        if stretch.is_full:
            return True
    if fresh:
        if damaged:
            raise MediaFault("no sound of it can be decoded")
        return not must_begin_before  # a track without packets is as good as none
    promised = ((stream.start_time or 0) + (stream.duration or 0)) * stream.time_base - stretch.origin
    if promised > stretch.reached + _MISSING_SECONDS:
        raise MediaFault(f"its sound ends at {stretch.reached:.2f} s, and its header promises {float(promised):.2f} s")
    return True


def _anchored(frames: Iterator[av.AudioFrame | None]) -> Iterator[tuple[av.AudioFrame | None, float | None]]:
    """Frames with their container times; the first one's is the median of what the first few say about it, unless
    there is a gap between them.
    """
    held, offsets, passed = [], [], 0.0
    for frame in frames:
        held.append(frame)
        if frame is not None:
            if (seconds := _seconds(frame)) is not None:
                offsets.append(seconds - passed)
            passed += frame.samples / max(1, frame.sample_rate)
            if len(offsets) == _FRAMES_FOR_ANCHOR or len(held) > 10 * _FRAMES_FOR_ANCHOR:
                break
    anchor = statistics.median(offsets) if offsets else None
    if anchor is not None and abs(anchor - offsets[0]) > SEAM_SECONDS:
        anchor = offsets[0]
    first = next((frame for frame in held if frame is not None), None)
    for frame in held:
        yield frame, anchor if frame is first else _seconds(frame)
    for frame in frames:
        yield frame, _seconds(frame)


def _seconds(frame: av.AudioFrame | None) -> float | None:
    return None if frame is None or frame.pts is None else float(frame.pts * frame.time_base)


def _decoded(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame | None]:
    """All frames of the sound in order; None in the place of what does not decode."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # the file ends here
            yield None
            return
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            yield None
