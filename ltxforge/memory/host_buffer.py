"""Host memory that a unit of weights waits in: of exactly its size, and locked for a GPU's copies where there is one.

torch's own pinned memory is rounded up to powers of two and kept for later, which would cost up to twice the weights;
so ordinary memory is locked where it is, and unlocked when the buffer goes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ltxforge.memory.units import PAGE

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
        whole = torch.empty(length + PAGE, dtype=torch.uint8)
        first = -whole.data_ptr() % PAGE
        self.bytes: Tensor = whole[first : first + length]
        pointer = self.bytes.data_ptr()
        self.locked = device.type == "cuda" and length > 0 and _lock(pointer, length, device)
        if self.locked:
            unlocked = weakref.finalize(self, _unlock, pointer, drain)
            unlocked.atexit = False  # a process that ends gives everything back by itself


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
