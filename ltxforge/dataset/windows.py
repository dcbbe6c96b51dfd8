"""Which pieces of a clip are samples: windows of a fixed number of frames at the recipe's rate, over the whole clip.

Pure arithmetic on the source's frame times; decides start times and nothing else. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Containers store times in ticks, Matroska's of a millisecond; lengths closer than this are equal.
_TICK_SECONDS = 1e-3


def window_starts(
    timestamps: Sequence[float], frame_seconds: float, *, frames: int, fps: float, windows: str | int
) -> tuple[float, ...]:
    """Start times in seconds of the windows taken from a clip, rounded to microseconds; () if it is too short.

    Frame n of a window is at start + n / fps, so a window spans (frames − 1) / fps seconds between its first and last
    frame. The clip may miss half a source frame of that.

    Args:
        timestamps: times of all source frames in seconds from the first.
        frame_seconds: how long a typical source frame is shown.
        frames: frames per window.
        fps: the window's frame rate.
        windows: "all" (as many as fit without overlap, the first at 0, the last ending with the clip), "first", or
            how many to spread evenly over the clip (fewer where two would start within one source frame).
    """
    if too_short(timestamps, frame_seconds, frames=frames, fps=fps):
        return ()
    room = max(0.0, timestamps[-1] - (frames - 1) / fps)  # latest possible start
    if windows == "first":
        count = 1
    elif windows == "all":
        count = 1 + math.floor((room + _TICK_SECONDS) * fps / frames)
    elif isinstance(windows, int) and windows >= 1:
        count = min(windows, 1 + math.floor((room + _TICK_SECONDS) / frame_seconds))
    else:
        raise ValueError(f"windows are 'all', 'first' or a positive number, not {windows!r}")
    if count == 1:
        return (0.0,)
    return tuple(round(room * index / (count - 1), 6) for index in range(count))


def too_short(
    timestamps: Sequence[float], frame_seconds: float, *, frames: int, fps: float, is_sound: bool = False
) -> str:
    """Why not even one window fits, with the numbers, or "". `is_sound`: the frames are only counted, not there."""
    needed = (frames - 1) / fps
    if timestamps[-1] + frame_seconds / 2 + 1e-6 >= needed:
        return ""
    shown = timestamps[-1] + frame_seconds
    counted = "of sound" if is_sound else f"({len(timestamps)} {'frame' if len(timestamps) == 1 else 'frames'})"
    return f"too short: {shown:.2f} s {counted}, and {frames} frames at {fps:g} fps need {needed + 1 / fps:.2f} s"
