"""The live display, drawn by rich on a terminal of a given width and read back as text."""

import io

import pytest
from rich.console import Console

from ltxforge.events import CheckpointSaved, ClipJudged, Note, PhaseAdvanced, PhaseEnded, PhaseStarted, StepDone
from ltxforge.ui.dispatch import Dispatcher
from ltxforge.ui.plain import Plain
from ltxforge.ui.progress import Progress
from ltxforge.ui.screen import screen_for


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def drawn(screen, width):
    stream = io.StringIO()
    Console(file=stream, width=width, height=40, color_system=None).print(screen._render())
    return stream.getvalue()


def trained(width, clock=None):
    clock = clock or Clock()
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    screen = Progress(console, clock)
    screen(PhaseStarted("train", 1000))
    for step in range(1, 401):
        clock.now += 0.5
        screen(StepDone(step, 1000, 0.5 if step < 400 else 0.9, 0.1, 1e-4, step / 100, seconds={"step": 0.5}))
    screen(CheckpointSaved(400, "x", 1, 0.1))
    screen(PhaseStarted("validate", 40))
    screen(PhaseAdvanced("validate", 10, "fox\x1b[2J"))
    return screen


@pytest.mark.parametrize("width", [80, 120])
def test_the_training_state_fits_and_says_everything(width):
    text = drawn(trained(width), width)
    lines = text.splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= width
    for told in ("400/1000", " 40 %", "5:00 min left", "loss 0.9000", "lr 1.00e-04", "0.50 s/step", "epoch 4.00"):
        assert told in text
    assert "checkpoint step 400" in text and "10/40" in text and "fox\\x1b[2J" in text
    mean = float(text.split("mean ")[1].split()[0])
    assert 0.5 < mean < 0.52


@pytest.mark.parametrize("width", [80, 120])
def test_the_sound_s_loss_fits_beside_the_video_s(width):
    screen = trained(width)
    screen(StepDone(401, 1000, 0.9, 0.1, 1e-4, 4.0, (0.5,), {"step": 0.5}, audio_loss=1.25, audio_sigma=(0.1,)))
    text = drawn(screen, width)
    assert max(map(len, text.splitlines())) <= width
    assert "loss 0.9000" in text and "sound 1.2500   mean 1.2500" in text and "lr 1.00e-04" in text


def test_a_very_narrow_terminal_is_cut_and_not_broken():
    assert max(map(len, drawn(trained(30), 30).splitlines())) <= 30


def test_finished_phases_and_notes_stay_and_bars_go():
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    with Dispatcher([Progress(console)]) as emit:
        emit(PhaseStarted("scan", 2))
        emit(ClipJudged("a.mp4", "ok", samples=1))
        emit(PhaseAdvanced("scan", 1))
        emit(PhaseEnded("scan", 1.0))
        emit(Note("[red]look[/red]", "warning"))
    text = stream.getvalue()
    assert "done in 1.00 s" in text and "1 clip: 1 ok (1 sample)" in text and "[red]look[/red]" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is shown again


def test_what_was_under_way_stays_on_the_screen_when_an_error_comes():
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    with pytest.raises(RuntimeError), Dispatcher([Progress(console)]) as emit:
        emit(StepDone(7, 9, 0.25, 0.1, 1e-4, 0.0))
        raise RuntimeError
    last = stream.getvalue().rpartition("\x1b[?25h")[2]
    assert "7/9" in last and "loss 0.2500" in last


def test_a_pipe_gets_plain_lines(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert isinstance(screen_for(io.StringIO()), Plain)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_gets_the_live_display_unless_it_cannot_show_it(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screen_for(Terminal()), Progress)
    assert isinstance(screen_for(Terminal(), plain=True), Plain)
    ascii_terminal = Terminal()
    ascii_terminal.encoding = "ascii"
    assert isinstance(screen_for(ascii_terminal), Plain)
    monkeypatch.setenv("CI", "true")
    assert isinstance(screen_for(Terminal()), Plain)
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen_for(Terminal()), Plain)
