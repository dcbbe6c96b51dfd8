"""Numbers, times and foreign text as screens write them."""

import math

import pytest

from ltxforge.printable import printable
from ltxforge.ui.text import counted, duration, loss, number, size, time_left


@pytest.mark.parametrize(
    "value",
    [0, 1, -0.5, 1e-4, 1.5e-5, 1e-8, 2.05, 0.999, 1000.0, 123456.0, 1e9, 3.0000000000000004, 5e-324, 1 / 3, 2e-3],
)
def test_a_number_reads_back_as_itself(value):
    assert float(number(value)) == value


def test_a_number_is_short():
    assert [number(value) for value in (1e-4, 32.0, 0.1, 1.5e-5, 1000)] == ["1e-4", "32", "0.1", "1.5e-5", "1000"]
    assert number(math.nan) == "nan"


def test_nothing_in_a_name_moves_the_cursor_or_fails_to_encode():
    nasty = "a\x1b[2J\r\n\t\x00\u202e\u2028\udcff\x9bé日本.mp4"
    shown = printable(nasty)
    shown.encode()
    assert shown.isprintable() and "é日本.mp4" in shown and "\\x1b[2J\\x0d\\x0a" in shown


def test_durations_and_sizes():
    assert [duration(value) for value in (0.42, 9.996, 59.96, 61, 3599.7, 11520)] == [
        "0.42 s", "10.0 s", "1:00 min", "1:01 min", "1:00:00 h", "3:12:00 h",
    ]  # fmt: skip
    assert duration(math.nan) == duration(-1) == "?"
    assert [time_left(value) for value in (0.2, 59.4, 59.7, 245, math.inf)] == [
        "0 s left", "59 s left", "1:00 min left", "4:05 min left", "",
    ]  # fmt: skip
    assert [size(value) for value in (0, 999, 1000, 99_960, 3.4e6, 999.6e9)] == [
        "0 B", "999 B", "1.0 kB", "100 kB", "3.4 MB", "1.0 TB",
    ]  # fmt: skip
    assert (counted(1, "clip"), counted(12_000, "token")) == ("1 clip", "12,000 tokens")
    assert [loss(value) for value in (0.05123, 1.23456, 2e-5, 0.0)] == ["0.0512", "1.2346", "2e-05", "0.0000"]
