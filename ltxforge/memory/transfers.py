"""Copies from the host into slots on the device, in order with the computation: with streams, or plainly.

What may not happen: that a slot is overwritten while something that was asked for still reads it, or read before it
has filled. `begin` and `wait` say these two points; between them a copy may be started from any thread.
`simulated.py` is a third kind, for tests.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Transfers(Protocol):
    """How bytes reach a slot. `overlaps` says whether a copy runs beside the computation, so that it can be early."""

    overlaps: bool

    def begin(self, slot: Tensor) -> Any:
        """Give a slot up, where computations are asked for: none that follows reads what is in it now."""

    def copy(self, begun: Any, source: Tensor) -> Any:
        """Start copying into the slot that `begin` gave up, from its start; gives what can be waited for."""

    def wait(self, copied: Any) -> None:
        """What is computed from here on comes after the copy."""

    def finish(self, copied: Any) -> None:
        """Come back when the copy has been made, and its source may be overwritten."""

    def drain(self) -> None:
        """Come back when all copies have been made, so that slots and sources may go."""


class Plain:
    """Each copy has been made when `copy` returns: without streams, and where there are none."""

    overlaps = False

    def begin(self, slot: Tensor) -> Tensor:
        return slot

    def copy(self, begun: Tensor, source: Tensor) -> None:
        begun[: len(source)].copy_(source)

    def wait(self, copied: None) -> None:
        pass

    def finish(self, copied: None) -> None:
        pass

    def drain(self) -> None:
        pass


class Streams:
    """Copies on a stream of their own. Computations are asked for on whichever stream is current then.

    The copying stream waits for what was asked for before `begin`, and nothing later: so a prefetch is begun before
    the computation that it shall run beside.
    """

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, slot: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        return slot, torch.cuda.current_stream(self._device).record_event()

    def copy(self, begun: tuple[Tensor, torch.cuda.Event], source: Tensor) -> torch.cuda.Event:
        slot, free = begun
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            slot[: len(source)].copy_(source, non_blocking=True)
            # Who waits for it on the host, the thread that reads a disk, sleeps meanwhile.
            return self._stream.record_event(torch.cuda.Event(blocking=True))

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)

    def finish(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()

    def drain(self) -> None:
        self._stream.synchronize()


def transfers_for(overlapped: bool, device: torch.device) -> Transfers:
    """What the plan asks for, as far as the device has it."""
    return Streams(device) if overlapped and device.type == "cuda" else Plain()
