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

from ltxforge.media.audio_header import stated_end, torn_page
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
# A header that promises this much more than there is tells of a file that was cut; coders' own padding is shorter.
_MISSING_SECONDS = 0.2
# Formats that store samples one after the other and cannot leave any out: a gap in their times is what ffmpeg stepped
# over because it made no sense. Those of the second row count their times, so behind such a place all are too early.
_GAPLESS = ("flac", "ogg", "mp3", "aac")
_COUNTED = ("ogg", "mp3", "aac")
# In Matroska a gap is legal, but bytes that belong to no packet are not: more of them than headers are damage.
_HEADER_BYTES = 1024


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
        fill(path, stretch)
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


class TimeLine:
    """Where the frames of a file's sound lie, counted in samples of its own rate from `begin` (seconds).

    `origin` is the container time of time 0; None takes the first frame's. What is done with the frames is for those
    who inherit: here they are only counted.
    """

    is_full = False

    def __init__(self, origin: float | None = None, begin: float = 0.0) -> None:
        self.origin, self.begin, self.source_rate = origin, begin, 0
        self.has_sound = self.has_ended = False
        self._next: int | None = None

    @property
    def reached(self) -> float:
        """Where, in seconds on the clip's time line, the last put sample ends."""
        return self.begin + (self._next or 0) / max(1, self.source_rate)

    @property
    def is_begun(self) -> bool:
        """Whether what was put last reaches into what is wanted."""
        return self._next is not None and self._next > 0

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was put yet."""
        return self._next is None

    def is_wanted(self, first: int, last: int) -> bool:
        """Whether something is wanted of the samples from `first` on, up to but without `last`."""
        return first < last

    def put(self, frame: av.AudioFrame, seconds: float | None, *, is_torn: bool = False) -> int:
        """Place a frame that belongs at `seconds` of container time, None where it just follows.

        `is_torn`: something before it was lost, so that its own time is better than the count. Returns how many samples
        are left open before it that are not known to be empty; negative where it overlaps.
        """
        if self.is_fresh:
            self._open(frame.sample_rate, seconds)
        elif frame.sample_rate != self.source_rate:
            raise MediaFault("the sampling rate of its sound changes on the way")
        expected = at = self._next or 0
        if seconds is not None:
            wanted = round((seconds - self.origin - self.begin) * self.source_rate)
            if self.is_fresh or is_torn or abs(wanted - at) > SEAM_SECONDS * self.source_rate:
                at = wanted
        opened = 0 if self.is_fresh else at - expected
        self._next = at + frame.samples
        self.take(frame, at)
        return opened

    def take(self, frame: av.AudioFrame, at: int) -> None:
        """Use a frame whose first sample is number `at`."""
        self.has_sound |= self.is_wanted(at, at + frame.samples)

    def skip_to(self, seconds: float, rate: int) -> None:
        """The sound begins at this container time, but its first frames are lost."""
        self._open(rate, seconds)
        self._next = round((seconds - self.origin - self.begin) * rate)

    def _open(self, source_rate: int, seconds: float | None) -> None:
        if not LOWEST_RATE <= source_rate <= HIGHEST_RATE:
            raise MediaFault(f"a sampling rate of {source_rate} Hz is not supported")
        if self.origin is None:
            self.origin = seconds or 0.0
        if seconds is None:  # a file without times begins at 0
            self._next = round((-self.origin - self.begin) * source_rate)
        self.source_rate = source_rate


class _Stretch(TimeLine):
    """The wanted stretch of sound, in stereo at the file's own rate, filled frame by frame.

    The array begins `lead` samples of the wanted rate before the stretch; where nothing is put it is silent.
    """

    def __init__(self, start: float, seconds: float, rate: int, origin: float | None) -> None:
        self.rate, self.count, self.lead = rate, round(seconds * rate), math.ceil(_MARGIN_SECONDS * rate)
        super().__init__(origin, start - self.lead / rate)
        self._held = np.zeros((2, 0), np.float32)
        self._mixer = _Mixer()

    @property
    def is_full(self) -> bool:
        """Whether everything up to the end has been put."""
        return self._next is not None and self._next >= self._held.shape[1]

    def is_wanted(self, first: int, last: int) -> bool:
        """Whether these samples reach into the stretch; its margins do not count."""
        inner = self.lead * self.source_rate / self.rate
        return first < last and last > inner and first < inner + self.count * self.source_rate / self.rate

    def take(self, frame: av.AudioFrame, at: int) -> None:
        """Keep what lies in the stretch."""
        first, last = max(at, 0), min(at + frame.samples, self._held.shape[1])
        if first < last:
            self._held[:, first:last] = self._mixer.stereo(frame)[:, first - at : last - at]
            self.has_sound |= self.is_wanted(first, last)

    def samples(self) -> np.ndarray:
        """The stretch at the wanted rate: float32 [2, count]."""
        samples = _resampled(self._held, self.source_rate, self.rate)[:, self.lead :][:, : self.count]
        return np.pad(samples, ((0, 0), (0, self.count - samples.shape[1])))

    def _open(self, source_rate: int, seconds: float | None) -> None:
        super()._open(source_rate, seconds)
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
            return _fill_from(path, container, stretch, must_begin_before=True)
        except av.error.FFmpegError:
            return False


def fill(path: str, line: TimeLine) -> None:
    """Put all frames of a file's sound on `line` until it is full. Raises MediaFault if what it wants is damaged, or
    missing though a header promises it. Damage before it matters only where times behind the damage are wrong.
    """
    with closing(open_container(path, AUDIO_FORMATS)) as container:
        _fill_from(path, container, line)


def _fill_from(
    path: str, container: av.container.InputContainer, line: TimeLine, must_begin_before: bool = False
) -> bool:
    """Decode from here on. False if `must_begin_before` and it began behind the beginning of what is wanted."""
    stream, kind, is_torn = sound_stream(container), container.format.name, False
    for frame, seconds in _anchored(_decoded(path, container, stream)):
        if frame is None:
            is_torn = True
            _refuse_damage(line, line.is_begun or (kind in _COUNTED and not line.is_fresh))
            continue
        if must_begin_before and line.is_fresh and (seconds is None or seconds - line.origin > line.begin):
            return False
        if is_torn and line.is_fresh and not must_begin_before:
            _count_what_is_lost(line, stream, frame, seconds)
        before = line.reached
        opened = line.put(frame, seconds, is_torn=is_torn)
        if is_torn or (kind in _GAPLESS and opened):
            at = round((before - line.begin) * line.source_rate)
            _refuse_damage(line, line.is_wanted(at, at + opened) or kind in _COUNTED, before)
        is_torn = False
        if line.is_full:
            return True
    line.has_ended = True
    if line.is_fresh:
        if is_torn:
            raise MediaFault("no sound of it can be decoded")
        return not must_begin_before  # a track without packets is as good as none
    end = stated_end(path, container, stream)
    if end is not None and end - line.origin > line.reached + _MISSING_SECONDS:
        stated = f"its header promises {end - line.origin:.2f} s"
        raise MediaFault(f"its sound is cut short: it ends at {line.reached:.2f} s, and {stated}")
    return True


def _refuse_damage(line: TimeLine, is_refused: bool, at: float | None = None) -> None:
    if is_refused:
        raise MediaFault(f"its sound is damaged at {line.reached if at is None else at:.2f} s")


def _count_what_is_lost(line: TimeLine, stream: av.AudioStream, frame: av.AudioFrame, seconds: float | None) -> None:
    """Where frames before the first that decodes were lost, time 0 is theirs. One packet may be: decoders warm up."""
    if seconds is None or stream.start_time is None:
        return
    begins = float(stream.start_time * stream.time_base)
    if seconds - begins > SEAM_SECONDS:
        line.skip_to(begins, frame.sample_rate)


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


def _decoded(
    path: str, container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame | None]:
    """All frames of the sound in order; None in the place of what does not decode or is not there."""
    torn = torn_page(path) if container.format.name == "ogg" else None
    if stream.codec_context.name == "flac":  # a frame's checksum is all that tells of a flipped bit
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    for packet in _packets(container, stream):
        if packet is None:
            yield None
            continue
        if torn is not None and (packet.pos or 0) > torn:
            yield None
            torn = None
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            yield None
    if torn is not None:
        yield None


def _packets(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet | None]:
    """The sound's packets; None where bytes between two of them belong to no packet, or the file cannot be read on."""
    is_matroska = container.format.name.startswith("matroska")
    packets, end = container.demux() if is_matroska else container.demux(stream), 0
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # the file ends here
            yield None
            return
        if packet is None:
            return
        if is_matroska and packet.size and packet.pos:
            if end and packet.pos > end + _HEADER_BYTES:
                yield None
            end = max(end, packet.pos + packet.size)
        if packet.stream_index == stream.index:
            yield packet
