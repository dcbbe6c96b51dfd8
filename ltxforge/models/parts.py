"""A model's parts on a device: cast, run in whole float32, and freed so that the next one finds the room.

Knows no part by name.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def cast(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """`module.to(device, dtype)` without diffusers' override, which warns about float32 parts that LTX has not."""
    return nn.Module.to(module, device, dtype)


def cast_weights(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """`cast` of the parameters alone: tables that a module computes for itself, as of rotary positions, stay exact."""
    module = nn.Module.to(module, device)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def release_memory(device: torch.device) -> None:
    """Give freed weights back to the device, so that the next part finds the room."""
    gc.collect()
    if device.type not in ("cpu", "meta"):
        torch.accelerator.empty_cache()


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions in float32 as it is: by default cuDNN rounds their inputs to TF32's ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
