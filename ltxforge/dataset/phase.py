"""Progress of one phase of caching, and what its entries weigh."""

from __future__ import annotations

import time

from ltxforge.dataset.cache import Entry
from ltxforge.errors import Stopped
from ltxforge.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.signals import StopRequest


class Phase:
    """A phase with a known number of units; raises Stopped between units of work."""

    def __init__(self, name: str, total: int, emit: Emit, stop: StopRequest) -> None:
        self.name, self.done, self._emit, self._stop = name, 0, emit, stop
        self._started = time.monotonic()
        emit(PhaseStarted(name, total))

    def advance(self, count: int, detail: str = "") -> None:
        """So many more units are done, perhaps none; `detail` says what is going on."""
        self.done += count
        if count or detail:
            self._emit(PhaseAdvanced(self.name, self.done, detail))
        if self._stop.requested:
            raise Stopped(
                self._stop.signal_number, f"stopped while caching {self.name}",
                remedy="What is cached stays. Start the same command again to continue.",
            )  # fmt: skip

    def end(self, detail: str = "") -> None:
        """All units are done."""
        self._emit(PhaseEnded(self.name, time.monotonic() - self._started, detail))


def weight(entry: Entry) -> int:
    """Bytes of an entry's tensors; single numbers beside them do not count."""
    return sum(tensor.nbytes for tensor in entry.tensors.values() if tensor.ndim)


def weighed(what: str, weights: list[int]) -> str:
    """How many there are and what each weighs in the cache: "12 captions, 15.7 MB each at most"."""
    if not weights:
        return ""
    most = max(weights)
    size = f"{most / 1e6:.3g} MB" if most >= 1e5 else f"{most / 1e3:.3g} kB"
    return f"{len(weights)} {what}, {size} each" + (" at most" if min(weights) < most else "")
