"""Host memory that a unit of weights waits in: of exactly its size, and locked for a GPU's copies where there is one.

torch's own pinned memory is rounded up to powers of two and kept for later, and what malloc was given back it may keep
too; either could cost as much again as the weights. So pages are asked of the system itself, which gets them back when
a buffer goes, and locked where they are.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

# For every CUDA context: cudaHostRegisterPortable.
PORTABLE = 1


class HostBuffer:
    """`bytes` is uint8 [length], beginning at a page of its own; `locked` whether copies from it can run by themselves.

    Args:
        length: in bytes.
        device: locks for this one, if it is a GPU.
        drain: comes back when no copy is under way; called before memory is unlocked.
    """

    def __init__(self, length: int, device: torch.device, drain: Callable[[], None]) -> None:
        self.bytes = pages(length)
        pointer = self.bytes.data_ptr()
        self.locked = device.type == "cuda" and length > 0 and _lock(pointer, length, device)
        if self.locked:
            unlocked = weakref.finalize(self, _unlock, pointer, drain)
            unlocked.atexit = False  # a process that ends gives everything back by itself


def pages(length: int) -> Tensor:
    """uint8 [length], in pages of its own that go back to the system with it."""
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        mapped = mmap.mmap(-1, length, **private)
    except OSError as error:  # which would pass for a file's fault
        raise MemoryError(f"the host has no {length} bytes more: {error.strerror}") from error
    if hasattr(mmap, "MADV_DONTFORK"):  # a child's copy on write would leave the device reading the parent's old pages
        mapped.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _lock(pointer: int, length: int, device: torch.device) -> bool:
    failed = int(torch.cuda.cudart().cudaHostRegister(pointer, length, PORTABLE)) != 0
    if failed:
        # CUDA hands this error to whoever asks next: the check behind some kernel's launch would take it for its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
    return not failed


def _unlock(pointer: int, drain: Callable[[], None]) -> None:
    drain()
    torch.cuda.cudart().cudaHostUnregister(pointer)
