"""How near a result is to the truth, and the bounds that correct kernels meet."""

from __future__ import annotations

import torch
from torch import Tensor

# One rounding of exact values to bf16 has a relative error of 1.66e-3 in the Frobenius norm.
BF16_ROUNDING = 1.8e-3
# Sums of float32 products, in whatever order.
FLOAT32 = 1e-6
BOUNDS = {torch.bfloat16: BF16_ROUNDING, torch.float32: FLOAT32}


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in float64; 0 where both are 0 or empty. NaN anywhere gives NaN: no bound holds."""
    assert result.shape == truth.shape, f"{list(result.shape)} is not {list(truth.shape)}"
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    apart = (result - truth).norm().item()
    return 0.0 if apart == 0 else apart / max(truth.norm().item(), 1e-300)
