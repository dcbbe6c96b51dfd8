"""The facts of one video file: sizes, colours, and the times of all frames that truly decode. Runs in the worker only.

Decides where a damaged file ends and which files have no usable picture; whether a recipe wants the clip is decided
by `dataset.scan`. Torch-free.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import av
from av.video.reformatter import ColorRange

from ltxforge.media import geometry
from ltxforge.media.audio_file import facts_of, sound_stream
from ltxforge.media.audio_header import stated_end
from ltxforge.media.video_file import MATRIX_NAMES, TICK_SECONDS, MediaFault, VideoFile, colour_of, display_matrix

MAX_GAP_SECONDS = 60.0
# A header that promises this much more than there is tells of a file that was cut.
_MISSING_SECONDS = 0.5
# ITU-T H.273; numbers that are not listed are shown as such.
_TRANSFERS = {1: "bt709", 2: "unspecified", 4: "gamma22", 5: "gamma28", 6: "bt601", 8: "linear", 13: "srgb"}
_TRANSFERS |= {14: "bt2020", 15: "bt2020", 16: "pq", 18: "hlg"}
_PRIMARIES = {1: "bt709", 2: "unspecified", 5: "bt601-625", 6: "bt601-525", 9: "bt2020", 12: "display-p3"}
_WIDE_GAMUT = (9, 11, 12)


def inspect(path: str) -> dict[str, Any]:
    """The facts of a video file, as JSON-ready data for `probe.Probe`. Raises MediaFault if it cannot be used."""
    with VideoFile(path) as video:
        first = video.first
        colours = _colours(video)  # refuses colours that cannot be converted
        times, warnings = _frame_times(video)
        interval = _typical_interval(times, video.nominal_fps)
        _refuse_gaps(times)
        width, height = geometry.display_size(first.width, first.height, video.pixel_aspect, video.orientation)
        return {
            "width": width,
            "height": height,
            "coded_width": first.width,
            "coded_height": first.height,
            "rotation": video.orientation.rotation,
            "mirrored": video.orientation.mirrored,
            "pixel_aspect": [video.pixel_aspect.numerator, video.pixel_aspect.denominator],
            "nominal_fps": video.nominal_fps or 1 / interval,
            "frame_seconds": interval,
            "timestamps": times,
            "codec": video.stream.codec_context.codec.canonical_name,
            "has_audio": bool(video.container.streams.audio),
            "audio_seconds": _sound_end(video),
            "warnings": warnings,
            "picture_warnings": _time_warnings(times, interval) + _picture_warnings(video),
            **facts_of(video.container),
            **colours,
        }


def _sound_end(video: VideoFile) -> float:
    """Where the file's own sound ends by its header, in seconds from the first frame; 0 where it does not say."""
    try:
        end = stated_end(video.path, video.container, sound_stream(video.container))
    except MediaFault:
        return 0.0
    return 0.0 if end is None else max(0.0, end - video.origin)


def _colours(video: VideoFile) -> dict[str, Any]:
    frame, context = video.first, video.stream.codec_context
    video.picture(frame, (32, 32))
    transfer = context.color_trc if frame.color_trc == 2 else frame.color_trc
    return {
        "pixel_format": frame.format.name,
        "bit_depth": frame.format.components[0].bits,
        "colour_range": "full" if colour_of(frame)[1] == ColorRange.JPEG else "limited",
        "colour_matrix": MATRIX_NAMES.get(frame.colorspace, str(frame.colorspace)),
        "colour_primaries": _PRIMARIES.get(frame.color_primaries, str(frame.color_primaries)),
        "colour_transfer": _TRANSFERS.get(transfer, str(transfer)),
    }


def _frame_times(video: VideoFile) -> tuple[list[float], list[str]]:
    """Times of all frames in seconds from the first, and what was found wrong.

    The packets tell them without decoding. Where they cannot be trusted or the end does not decode, everything is
    decoded, and the times are those of the frames that came out.
    """
    times, doubt = _packet_times(video)
    if not doubt and _ends_at(video, times[-1]):
        return times, []
    promised = max(len(times), video.stream.frames)
    times, fault = _decoded_times(video)
    if not fault and not doubt.startswith("cut"):
        return times, []
    of = f" of {promised}" if promised > len(times) else ""
    return times, [f"truncated or damaged: used up to {times[-1]:.2f} s ({len(times)} frames{of})"]


def _packet_times(video: VideoFile) -> tuple[list[float], str]:
    """Times by the packets, and why they cannot be trusted ("" if they can)."""
    if not video.is_seekable:
        return [], "no index"
    times, end, count, doubt = [], 0.0, 0, ""
    video.reopen()
    try:
        for packet in video.container.demux():
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != video.stream.index or not packet.size:
                continue
            count += 1
            if packet.is_corrupt:
                doubt = "cut: a torn packet"
            elif packet.pts is None:
                doubt = doubt or "packets without times"
            elif not packet.is_discard:
                times.append(video.seconds(packet.pts) - video.origin)
    except av.error.FFmpegError:
        doubt = "cut: the file cannot be read to its end"
    if count < video.stream.frames:
        doubt = "cut: fewer packets than the index says"
    if video.container.duration and video.container.duration / 1e6 > end + _MISSING_SECONDS:
        doubt = doubt or "cut: shorter than its header says"
    times = [seconds for seconds in _distinct(times) if seconds >= 0]
    return times, doubt if times else doubt or "packets without times"


def _decoded_times(video: VideoFile) -> tuple[list[float], str]:
    """Times of all frames that decode, and what ended them too early ("" if nothing did)."""
    times, fault = [], ""
    try:
        for seconds, _ in video.frames():
            times.append(seconds)
    except MediaFault as error:
        fault = error.reason
    if not times:
        raise MediaFault(fault or "no frame of it can be decoded")
    return _distinct(times), fault


def _ends_at(video: VideoFile, last: float) -> bool:
    """Whether decoding the end of the file gives the last frame that the packets promise."""
    reached = -1.0
    try:
        for seconds, _ in video.frames(last):
            reached = seconds
    except MediaFault:
        return False
    return abs(reached - last) <= TICK_SECONDS


def _distinct(times: Iterable[float]) -> list[float]:
    return sorted({round(seconds, 9) for seconds in times})


def _typical_interval(times: list[float], nominal_fps: float) -> float:
    """How long a frame is shown: the median gap; for a single frame the nominal rate's, or that of 25 fps."""
    if len(times) > 1:
        return round(statistics.median(later - earlier for earlier, later in pairwise(times)), 9)
    return 1 / (nominal_fps or 25.0)


def _refuse_gaps(times: list[float]) -> None:
    for earlier, later in pairwise(times):
        if later - earlier > MAX_GAP_SECONDS:
            raise MediaFault(f"unusable times: a gap of {later - earlier:.0f} s between two frames, at {earlier:.2f} s")


def _time_warnings(times: list[float], interval: float) -> list[str]:
    gap, at = max(((later - earlier, earlier) for earlier, later in pairwise(times)), default=(0.0, 0.0))
    if gap > max(1.0, 10 * interval):
        return [f"the picture stands still for {gap:.1f} s at {at:.2f} s (no frames there)"]
    return []


def _picture_warnings(video: VideoFile) -> list[str]:
    found, matrix = [], display_matrix(video.first)
    if video.has_several_pictures:
        found.append("several video streams: only the default or first one is used")
    if video.first.interlaced_frame:
        found.append("interlaced: its combed lines are kept")
    if video.first.color_primaries in _WIDE_GAMUT:
        found.append("wide-gamut colours are read as BT.709 and look paler")
    if matrix is not None and not geometry.is_quarter_turn(matrix):
        found.append("its rotation is no quarter turn: the nearest one is used")
    return found
