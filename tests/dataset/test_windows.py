"""Windows over the whole clip: by hand, and as properties over many clips."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ltxforge.dataset.windows import too_short, window_starts


def clip(count: int, fps: float) -> tuple[list[float], float]:
    return [n / fps for n in range(count)], 1 / fps


@pytest.mark.parametrize(
    ("count", "source_fps", "windows", "starts"),
    [
        (17, 25, "all", (0.0,)),
        (33, 25, "all", (0.0,)),  # one frame short of two windows
        (34, 25, "all", (0.0, 0.68)),
        (51, 25, "all", (0.0, 0.68, 1.36)),
        (60, 25, "all", (0.0, 0.86, 1.72)),  # the rest is spread between them
        (600, 25, "first", (0.0,)),
        (60, 25, 1, (0.0,)),
        (60, 25, 2, (0.0, 1.72)),
        (60, 25, 3, (0.0, 0.86, 1.72)),
        (19, 25, 50, (0.0, 0.04, 0.08)),  # no two within one frame
        (17, 25, 5, (0.0,)),
        (120, 60, "all", (0.0, 1.343333)),
    ],
)
def test_by_hand(count: int, source_fps: float, windows: str | int, starts: tuple[float, ...]) -> None:
    times, interval = clip(count, source_fps)
    assert window_starts(times, interval, frames=17, fps=25, windows=windows) == starts


def test_all_covers_the_clip_without_overlap() -> None:
    draw = random.Random(0)
    for _ in range(500):
        times, interval = clip(draw.randint(1, 700), draw.choice([10, 12.5, 23.976, 25, 29.97, 30, 50, 60]))
        frames, fps = draw.choice([1, 9, 17, 49, 121]), draw.choice([16, 24, 25, 30, 50])
        starts = window_starts(times, interval, frames=frames, fps=fps, windows="all")
        assert bool(starts) == (not too_short(times, interval, frames=frames, fps=fps))
        if not starts:
            continue
        length, last = frames / fps, times[-1]
        assert starts[0] == 0 and list(starts) == sorted(starts)
        assert starts == tuple(round(start, 6) for start in starts)
        assert all(b - a >= length - 2e-3 for a, b in pairwise(starts))
        ends = [start + (frames - 1) / fps for start in starts]
        assert ends[-1] <= last + interval / 2 + 1e-5
        if len(starts) > 1:
            assert ends[-1] == pytest.approx(last, abs=2e-6)
        # One more would not fit.
        assert (len(starts) + 1) * length > last + length - (frames - 1) / fps - 2e-3


def test_too_short_has_half_a_frame_of_grace_and_gives_numbers() -> None:
    times, interval = clip(20, 30)  # last frame at 0.633
    assert window_starts(times, interval, frames=17, fps=25, windows="all") == (0.0,)  # needs 0.640
    times, interval = clip(19, 30)
    assert window_starts(times, interval, frames=17, fps=25, windows="all") == ()
    reason = too_short(times, interval, frames=17, fps=25)
    assert reason == "too short: 0.63 s (19 frames), and 17 frames at 25 fps need 0.68 s"
    assert "(1 frame)" in too_short([0.0], 0.04, frames=17, fps=25)


def test_a_single_frame_is_a_sample_of_one_frame() -> None:
    assert window_starts([0.0], 0.04, frames=1, fps=25, windows="all") == (0.0,)


@pytest.mark.parametrize("windows", ["some", 0, -1])
def test_other_words_are_mistakes(windows: str | int) -> None:
    with pytest.raises(ValueError, match="windows"):
        window_starts(*clip(60, 25), frames=17, fps=25, windows=windows)
