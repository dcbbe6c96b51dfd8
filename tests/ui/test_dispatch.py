"""A broken screen is taken out once, said once, and the others see every event."""

import pytest

from ltxforge.events import Note
from ltxforge.ui.dispatch import Dispatcher


class Broken:
    def __init__(self, fails_at=("__call__",)):
        self.fails_at, self.calls = fails_at, []

    def _do(self, name):
        self.calls.append(name)
        if name in self.fails_at:
            raise OSError("the terminal is gone")

    def __enter__(self):
        self._do("__enter__")

    def __exit__(self, *_):
        self._do("__exit__")

    def __call__(self, _event):
        self._do("__call__")


def test_a_consumer_that_raises_is_off_and_the_others_are_told_once():
    seen, broken = [], Broken(("__call__", "__exit__"))
    with Dispatcher([broken, seen.append]) as emit:
        for number in range(3):
            emit(Note(str(number)))
    assert broken.calls == ["__enter__", "__call__", "__exit__"]
    warning, *rest = seen
    assert warning.level == "warning" and "Broken" in warning.text and "the terminal is gone" in warning.text
    assert [note.text for note in rest] == ["0", "1", "2"]


def test_two_that_break_on_each_others_notes_end_the_recursion(capsys):
    emit = Dispatcher([Broken(), Broken(), Broken()])
    emit(Note("a"))
    emit(Note("b"))
    assert capsys.readouterr().err.count("warning:") == 1


def test_one_that_cannot_start_is_off(capsys):
    broken = Broken(("__enter__",))
    with Dispatcher([broken]) as emit:
        emit(Note("a"))
    assert broken.calls == ["__enter__", "__exit__"]
    assert "failed and is off" in capsys.readouterr().err


def test_a_stop_is_not_swallowed():
    def interrupted(_event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher([interrupted])(Note("a"))
