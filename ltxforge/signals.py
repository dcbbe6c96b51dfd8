"""SIGTERM, SIGINT and SIGHUP become a flag; a second signal means now.

The handler sets the flag and does nothing else. Loops read it between units of work (micro-batches, clips, denoising
steps) and stop in normal code, where saving is safe.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """A stop that was asked for, by a signal or by a caller. Use as a context manager to receive signals."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether work should stop at the next safe point."""
        return self.signal_number != 0

    def request(self, signal_number: int = signal.SIGINT) -> None:
        """Ask for a stop as the signal would."""
        self.signal_number = int(signal_number)

    def __enter__(self) -> StopRequest:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            # What the parent chose to ignore stays ignored: nohup, or a job in the background of a script.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.signal_number = number
