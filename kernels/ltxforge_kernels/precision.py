"""The precision of references: float32, or float64 where that comes in, so that one definition is also the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float64, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
