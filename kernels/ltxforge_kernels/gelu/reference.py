"""GELU in plain PyTorch: the definition. PyTorch computes it in float32 for narrower dtypes, in float64 for that."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """[..., K]; arguments as in the op."""
    return F.gelu(x, approximate="tanh")
