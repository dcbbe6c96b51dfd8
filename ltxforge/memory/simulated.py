"""Streams simulated on a CPU, where a missing wait shows: for tests of whatever streams.

As late as they may be: a copy is made only when something waits for it, or for a later one. As early as they may be:
a slot that is given up is filled at once with bytes that are NaN in every floating-point format. So what is read too
early or too late, and a source that is overwritten too soon, gives NaN or other weights instead of going well by luck.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from torch import Tensor

POISON = 0xFF


@dataclass(eq=False)
class Copy:
    """A slot that was given up; and where it is filled from, once that is known."""

    slot: Tensor
    source: Tensor | None = None
    made: bool = False


class SimulatedStreams:
    """See `transfers.Transfers`; any thread may call."""

    overlaps = True

    def __init__(self) -> None:
        self._queue: deque[Copy] = deque()
        self._lock = threading.Lock()

    def begin(self, slot: Tensor) -> Copy:
        slot.fill_(POISON)
        return Copy(slot)

    def copy(self, begun: Copy, source: Tensor) -> Copy:
        assert begun.source is None, "a slot is filled once for each time that it is given up"
        with self._lock:
            begun.source = source
            self._queue.append(begun)
        return begun

    def wait(self, copied: Copy) -> None:
        with self._lock:
            while not copied.made:
                self._make(self._queue.popleft())

    def finish(self, copied: Copy) -> None:
        self.wait(copied)

    def drain(self) -> None:
        with self._lock:
            while self._queue:
                self._make(self._queue.popleft())

    @staticmethod
    def _make(copy: Copy) -> None:
        assert copy.source is not None
        copy.slot[: len(copy.source)].copy_(copy.source)
        copy.made = True
