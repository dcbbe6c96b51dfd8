"""How numbers and times are written on every screen. Torch-free; knows no event and no terminal."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """A wall time or a forecast: "0.42 s", "12.3 s", "4:05 min", "3:12:00 h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min"


def time_left(seconds: float) -> str:
    """A forecast, no finer than it can be: "12 s left", "4:05 min left"."""
    if not math.isfinite(seconds):
        return ""
    return f"{seconds:.0f} s left" if seconds < 59.5 else f"{duration(max(seconds, 60))} left"


def size(count: float) -> str:
    """Bytes in decimal units as disks and download pages count: "812 B", "3.4 MB", "26.1 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """A setting, short and exact: 0.1, 1e-4, 2.05, 1000."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if not math.isfinite(value) or 1e-3 <= abs(value) < 1e6:
        return repr(float(value))
    exact = next(text for digits in range(18) if float(text := f"{value:.{digits}e}") == value)
    mantissa, _, exponent = exact.partition("e")
    return f"{mantissa}e{int(exponent)}"


def short(value: float) -> str:
    """A computed number to six significant digits: 1.7e-5 where binary arithmetic gives 1.7000000000000003e-5."""
    return number(float(f"{value:.6g}"))


def loss(value: float) -> str:
    """A loss with four significant places after the point where it matters: 0.0512, 1.2345."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def counted(count: int, word: str) -> str:
    """A count with its noun: 1 clip, 2 clips, 12,000 tokens."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
