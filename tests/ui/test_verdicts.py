"""The verdict table: the bad ones first and by name, the good ones counted, names harmless."""

import io

import pytest
from rich.console import Console

from ltxforge.events import ClipJudged, Note
from ltxforge.ui.verdicts import Verdicts, verdict_table


def shown(judged, width=80, **options):
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(verdict_table(judged, **options))
    return stream.getvalue()


MIXED = [
    ClipJudged("/data/a/one.mp4", "ok", samples=2),
    ClipJudged("/data/a/warned.mp4", "ok", warnings=("ends early",), samples=1),
    ClipJudged("/data/b/short.mp4", "dropped", "too short"),
    ClipJudged("/data/b/\x1b[2J\r[red]x.mp4", "rejected", "empty\nfile"),
]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_order_reasons_and_summary(width):
    text = shown(MIXED, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.index("rejected") < text.index("dropped") < text.index("ends")
    if width > 40:  # narrower, words are folded over lines
        for told in ("b/\\x1b[2J\\x0d[red]x.mp4", "empty\\x0afile", "a/one.mp4", "b/short.mp4", "ends early"):
            assert told in text
        assert "4 clips: 2 ok (3 samples, 1 with warnings), 1 dropped, 1 rejected" in text
    assert "\x1b" not in text and "\r" not in text and "/data" not in text


def test_many_good_clips_are_counted_and_bad_ones_never_hidden():
    good = [ClipJudged(f"clip{number}.mp4", "ok", samples=1) for number in range(21)]
    bad = [ClipJudged(f"bad{number}.mp4", "rejected", "no picture") for number in range(50)]
    text = shown(good + bad)
    assert "clip0.mp4" not in text and text.count("no picture") == 50
    assert "71 clips: 21 ok (21 samples), 50 rejected" in text
    assert "clip0.mp4" in shown(good[:20])
    assert shown(good, list_ok=0).splitlines() == ["21 clips: 21 ok (21 samples)"]


def test_paths_without_a_common_folder_are_shown_whole():
    text = shown([ClipJudged("/abs/a.mp4", "ok"), ClipJudged("rel/b.mp4", "ok")])
    assert "/abs/a.mp4" in text and "rel/b.mp4" in text


def test_a_later_verdict_replaces_the_first():
    verdicts = Verdicts()
    assert not verdicts
    verdicts(ClipJudged("a.mp4", "ok", samples=3))
    verdicts(Note("something else"))
    verdicts(ClipJudged("b.mp4", "ok", samples=1))
    verdicts(ClipJudged("a.mp4", "rejected", "damaged in the middle"))
    assert [(clip.path, clip.verdict) for clip in verdicts.judged] == [("a.mp4", "rejected"), ("b.mp4", "ok")]
