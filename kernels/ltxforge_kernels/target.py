"""What a launch must know of where it runs: the chip to configure for, and the device to launch on.

Asks Triton's active driver, which the compile-only harness replaces, so that launch code is the same in both.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

INTERPRETER = "interpreter"


def architecture(tensor: Tensor) -> int | str:
    """The chip that a launch on this tensor is for: 90 for sm_90, "gfx942" for AMD's, `INTERPRETER` where that is set.

    Raises:
        RuntimeError: a CPU tensor outside the interpreter; whoever chose triton for it made a mistake.
    """
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if tensor.device.type == "cpu":
        raise RuntimeError("a Triton kernel was launched on a CPU tensor; without a GPU the choice is eager")
    return triton.runtime.driver.active.get_current_target().arch


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Around every launch: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
