"""Rows stretched over the range of a number format of few bits, by each row's largest magnitude, and back.

Plain PyTorch. In float32 whatever comes in, so that codes do not depend on the precision of what surrounds them; the
kernels follow it to the bit (`scaled_rows_kernel.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below it a stretch could overflow: such a row is 0.
SMALLEST = 2.0**-100


def stretch_rows(x: Tensor, factor: Tensor | None, largest: float) -> tuple[Tensor, Tensor]:
    """x [M, K]·factor [K] with every row's largest magnitude `largest`, and what undoes that, [M]; both float32.

    A row of zeros stays one. A row with an infinity or NaN has a scale that is one, and NaN in its own place.
    """
    wide = x.to(torch.float32)
    if factor is not None:
        wide = wide * factor
    absmax = wide.abs().amax(dim=1)
    # Not largest / absmax: for a Python number PyTorch multiplies by a rounded reciprocal.
    stretch = torch.where(absmax <= SMALLEST, 0.0, torch.full_like(absmax, largest) / absmax)
    return wide * stretch[:, None], absmax / largest


def dequantise_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values [N, K]·scale [N], multiplied in float32 (float64 where that is asked for) and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(wide) * scale.to(wide)[:, None]).to(dtype)
