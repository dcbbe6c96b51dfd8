"""Where streamed weights wait: in host memory, or in a file of no name that ends with the process.

Takes tensors one by one while a transformer is loaded, then hands out whole units, each in one buffer. Frozen weights
only: nothing is ever written back.
"""

from __future__ import annotations

import errno
import io
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ltxforge.durable import make_folder
from ltxforge.errors import DiskFullError, LtxforgeError, PlanError, RunError
from ltxforge.memory.host_buffer import HostBuffer, pages
from ltxforge.memory.transfers import Transfers
from ltxforge.memory.units import STAGES

# The number of a block and a tensor's name within it.
Key = tuple[int, str]
# A unit's tensors and where each begins in the unit's buffer, in ascending order.
Contents = Sequence[tuple[Key, int]]
# Starts a copy from host bytes; gives what can be waited for.
StartCopy = Callable[[Tensor], Any]
NOT_LOCKED = "host memory could not be locked for the device's copies: streamed weights come more slowly"


class Store(Protocol):
    """See `HostStore` and `DiskStore`. `host_bytes` is what the store itself holds; `notes` what a user should know."""

    host_bytes: int
    notes: tuple[str, ...]

    def put(self, key: Key, tensor: Tensor) -> None:
        """Take a tensor on the host, while a transformer is loaded."""

    def seal(self, units: Sequence[Contents], lengths: Sequence[int]) -> None:
        """All is there: lay it out as units, of so many bytes."""

    def send(self, unit: int, length: int, copy: StartCopy) -> Callable[[], Any]:
        """Call `copy` with the first `length` bytes of a unit, now or soon; gives a function that gives its result."""

    def close(self) -> None:
        """Let go of everything."""


class HostStore:
    """Units in host memory."""

    def __init__(self, device: torch.device, transfers: Transfers) -> None:
        self._device, self._transfers = device, transfers
        self._waiting: dict[Key, Tensor] = {}
        self._buffers: list[HostBuffer] = []
        self.notes: tuple[str, ...] = ()

    @property
    def host_bytes(self) -> int:
        return sum(len(buffer.bytes) for buffer in self._buffers)

    def put(self, key: Key, tensor: Tensor) -> None:
        """Into pages of its own: `seal` gives these back one by one, and whoever read the tensor gets its memory."""
        held = as_bytes(tensor)
        self._waiting[key] = pages(len(held)).copy_(held)

    def seal(self, units: Sequence[Contents], lengths: Sequence[int]) -> None:
        """One unit after the other, so that only one is there twice; what cannot be locked stays as it is."""
        for contents, length in zip(units, lengths, strict=True):
            device = torch.device("cpu") if self.notes else self._device
            buffer = HostBuffer(length, device, self._transfers.drain)
            for key, begin in contents:
                tensor = self._waiting.pop(key)
                buffer.bytes[begin : begin + len(tensor)].copy_(tensor)
            self._buffers.append(buffer)
            if device.type == "cuda" and not buffer.locked:
                self.notes = (NOT_LOCKED,)
        assert not self._waiting, f"these belong to no unit: {sorted(self._waiting)}"

    def send(self, unit: int, length: int, copy: StartCopy) -> Callable[[], Any]:
        copied = copy(self._buffers[unit].bytes[:length])
        return lambda: copied

    def close(self) -> None:
        self._waiting.clear()
        self._buffers.clear()


@dataclass
class Stage:
    """Host memory between disk and device; `leaving` is the copy that was last started from it."""

    buffer: HostBuffer
    leaving: Any = None


class DiskStore:
    """Units in a file; of host memory only the stages they are read into, by a thread where copies can be early."""

    def __init__(self, folder: Path, device: torch.device, transfers: Transfers) -> None:
        """
        Raises:
            PlanError: nothing can be written in the folder.
        """
        self._folder, self._device, self._transfers = folder, device, transfers
        try:
            if not folder.exists() and folder.parent.is_dir():  # `fit` names one in the cache that nobody has made
                make_folder(folder)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _fault(folder, error) from error
        weakref.finalize(self, self._file.close)
        self._places: dict[Key, tuple[int, int]] = {}
        self._units: Sequence[Contents] = ()
        self._stages: list[Stage] = []
        self._next = 0
        self._reader = ThreadPoolExecutor(1, "weights-reader") if transfers.overlaps else None
        self.notes: tuple[str, ...] = ()

    @property
    def host_bytes(self) -> int:
        return sum(len(stage.buffer.bytes) for stage in self._stages)

    def put(self, key: Key, tensor: Tensor) -> None:
        """
        Raises:
            DiskFullError: the disk is full.
            PlanError: it cannot be written.
        """
        left = memoryview(as_bytes(tensor).numpy())
        self._places[key] = self._file.seek(0, io.SEEK_END), len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _fault(self._folder, error) from error

    def seal(self, units: Sequence[Contents], lengths: Sequence[int]) -> None:
        assert sum(map(len, units)) == len(self._places), "every tensor belongs to one unit"
        self._units = units
        for _ in range(min(STAGES if self._reader else 1, len(units))):
            buffer = HostBuffer(max(lengths), self._device, self._transfers.drain)
            self._stages.append(Stage(buffer))
            if self._device.type == "cuda" and not buffer.locked:
                self.notes = (NOT_LOCKED,)

    def send(self, unit: int, length: int, copy: StartCopy) -> Callable[[], Any]:
        if self._reader is not None:
            return self._reader.submit(self._send, unit, length, copy).result
        copied = self._send(unit, length, copy)
        return lambda: copied

    def _send(self, unit: int, length: int, copy: StartCopy) -> Any:
        stage = self._stages[self._next]
        self._next = (self._next + 1) % len(self._stages)
        if stage.leaving is not None:
            self._transfers.finish(stage.leaving)
        into = memoryview(stage.buffer.bytes.numpy())
        for key, begin in self._units[unit]:
            if begin < length:
                at, size = self._places[key]
                self._read(at, into[begin : begin + size])
        stage.leaving = copy(stage.buffer.bytes[:length])
        return stage.leaving

    def _read(self, at: int, into: memoryview) -> None:
        try:
            self._file.seek(at)
            while into:
                count = self._file.readinto(into)
                if not count:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                into = into[count:]
        except OSError as error:
            raise RunError(
                f"weights that wait on the disk cannot be read again: {error.strerror}", where=str(self._folder),
                remedy="Start the same command again to continue, with another memory.offload_to_disk if this disk is"
                " at fault.",
            ) from error  # fmt: skip

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._file.close()
        self._stages.clear()


def require_folder(folder: Path, made: Sequence[Path] = ()) -> None:
    """Raise what `DiskStore` would if it cannot put weights in a folder; leaves nothing behind.

    Args:
        made: folders that will be there by then, with those around them.
    """
    there = folder if folder.exists() else folder.parent
    while not there.exists() and any(there == each or there in each.parents for each in made):
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there, buffering=0).close()
    except OSError as error:
        raise _fault(folder, error) from error


def _fault(folder: Path, error: OSError) -> LtxforgeError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind = DiskFullError if full else PlanError
    remedy = "Make room there, or name" if full else "Make it a folder that can be written, or name"
    return kind(
        f"streamed weights cannot be put here: {error.strerror}", where=str(folder),
        remedy=f"{remedy} another one as memory.offload_to_disk; without that key they wait in host memory.",
    )  # fmt: skip


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements as uint8 [bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
