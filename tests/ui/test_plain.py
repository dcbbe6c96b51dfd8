"""Plain lines: nothing but text and line breaks, at a bounded rate, never silent for long."""

import io
import itertools
import re

import pytest
from rich.text import Text

from ltxforge.events import (
    CheckpointSaved,
    ClipJudged,
    LoraExported,
    LoraInjected,
    Note,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    Resumed,
    RunEnded,
    SampleReady,
    StepDone,
)
from ltxforge.ui.lines import line
from ltxforge.ui.plain import Plain


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def run_of(steps, seconds_per_step):
    """The output of a run of equal steps, with the times at which step lines came."""
    clock, stream, times = Clock(), io.StringIO(), []
    screen = Plain(stream, clock)
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        before = stream.tell()
        screen(StepDone(step, steps, 0.5, 0.1, 1e-4, 0.0, seconds={"step": seconds_per_step}))
        if stream.tell() > before:
            times.append(clock.now - 100.0)
    return stream.getvalue().splitlines(), times


@pytest.mark.parametrize("seconds", [0.02, 0.5, 7.0, 90.0])
def test_step_lines_come_at_a_bounded_rate_and_never_stay_away_long(seconds):
    lines, times = run_of(2000, seconds)
    assert [line.split()[1] for line in lines[:3]] == ["1/2000", "2/2000", "3/2000"]
    assert lines[-1].split()[1] == "2000/2000"
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[3:-1])]
    assert all(gap >= 5 - 1e-6 for gap in gaps)
    assert all(gap <= max(60, 5) + seconds + 1e-6 for gap in gaps)


def test_a_step_line_tells_loss_rate_speed_and_time_left():
    lines, _ = run_of(2000, 0.5)
    assert re.fullmatch(
        r"step +3/2000  loss 0\.5000  mean 0\.5000  lr 1\.00e-04  0\.50 s/step  16:38 min left", lines[2]
    )


def joint_step(step, steps, audio_loss):
    """A step of joint training: the sound's loss beside the video's, or None where no sample had sound."""
    sigma = () if audio_loss is None else (0.25,)
    return StepDone(step, steps, 0.5, 0.1, 1e-4, 0.0, (0.75,), audio_loss=audio_loss, audio_sigma=sigma)


def test_the_sound_s_loss_stands_beside_the_video_s_once_there_is_one():
    stream = io.StringIO()
    screen = Plain(stream, Clock())
    for step, audio_loss in [(1, None), (2, 1.5), (3, None)]:
        screen(joint_step(step, 3, audio_loss))
    first, second, third = stream.getvalue().splitlines()
    assert "sound" not in first
    assert "loss 0.5000  mean 0.5000  sound 1.5000  mean 1.5000  lr" in second
    assert "sound -  mean 1.5000" in third


def test_sound_alone_is_the_loss_and_nothing_stands_beside_it():
    stream = io.StringIO()
    Plain(stream, Clock())(StepDone(1, 9, 1.5, 0.1, 1e-4, 0.0, (0.75,), audio_loss=1.5, audio_sigma=(0.75,)))
    assert "loss 1.5000" in stream.getvalue() and "sound" not in stream.getvalue()


def test_a_step_has_a_line_of_its_own_with_both_losses():
    assert line(joint_step(2, 3, 1.5)) == ("step", "2/3  loss 0.5000  sound 1.5000  lr 1.00e-04")
    assert line(joint_step(2, 3, None)) == ("step", "2/3  loss 0.5000  lr 1.00e-04")


EVENTS = [
    PhaseStarted("scan", 2),
    ClipJudged("/data/good.mp4", "ok", samples=3),
    ClipJudged("/data/b\x1b[31m\r日.mp4", "rejected", "no picture\x07"),
    PhaseAdvanced("scan", 2),
    PhaseEnded("scan", 0.5),
    Note("a [bold]note[/bold] of two\nlines", "warning"),
    LoraInjected(
        {
            "layers": 2,
            "by_target": {"attention": 2},
            "parameters": 10,
            "file_bytes": 20,
            "unread": {"proj_in": "diffusers: no"},
        }
    ),
    Resumed(4, "step-000004", ("step-000005: damaged",)),
    StepDone(5, 5, float("nan"), 0.1, 1e-4, 0.0),
    CheckpointSaved(5, "step-000005", 10, 0.1),
    SampleReady(5, "fox", "fox.mp4", "fox.png", 0.1),
    LoraExported("lora.safetensors", 10, 5),
    RunEnded("finished", 5, 60.0),
]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_every_event_is_plain_text_that_the_stream_can_encode(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="")
    screen = Plain(stream)
    for event in EVENTS:
        screen(event)
    text = raw.getvalue().decode(encoding)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert ("日" in text) == (encoding == "utf-8")
    for told in ("no picture\\x07", "[bold]note[/bold] of two\\x0alines", "damaged", "fox.png", "lora.safetensors"):
        assert told in text
    if encoding != "utf-8":
        assert text.isascii()


def test_verdicts_come_after_the_scan_and_before_the_last_line():
    stream = io.StringIO()
    screen = Plain(stream)
    for event in EVENTS:
        screen(event)
    text = stream.getvalue()
    assert text.count("2 clips: 1 ok (3 samples), 1 rejected") == 2
    assert text.splitlines()[-1].startswith("finished")


@pytest.mark.parametrize(
    ("columns", "width"), [(None, 100), ("", 100), ("0", 100), ("wide", 100), ("-5", 100), ("160", 160), ("7", 40)]
)
def test_tables_are_as_wide_as_the_environment_says(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    stream = io.StringIO()
    Plain(stream).show(Text("a " * 400))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) == width - 1  # the space at the end is left out


@pytest.mark.parametrize(("phase", "told"), [("prompts", "11 texts"), ("latents", "11 samples")])
def test_a_phase_counts_what_it_works_on(phase, told):
    assert line(PhaseStarted(phase, 11)) == (phase, told)


def test_a_quick_phase_has_a_beginning_and_an_end_and_a_slow_one_shows_life():
    clock, stream = Clock(), io.StringIO()
    screen = Plain(stream, clock)
    screen(PhaseStarted("latents", 100))
    for done in range(1, 101):
        clock.now += 0.01
        screen(PhaseAdvanced("latents", done))
    screen(PhaseEnded("latents", 1.0))
    assert len(stream.getvalue().splitlines()) == 2
    screen(PhaseStarted("latents", 100))
    for done in range(1, 101):
        clock.now += 2
        screen(PhaseAdvanced("latents", done, "clip"))
    shown = re.findall(r"latents +(\d+)/100  clip", stream.getvalue())
    assert 30 <= len(shown) <= 40
