"""How near a result is to the truth, and the bounds that correct kernels meet."""

from __future__ import annotations

import torch
from torch import Tensor

# One rounding of exact values to bf16 has a relative error of 1.66e-3 in the Frobenius norm.
BF16_ROUNDING = 1.8e-3
# Half a unit in the last place: what a few values, all of them unlucky, may come to.
BF16_WORST, FEW = 2**-9 + 1e-6, 256
# Sums of float32 products, in whatever order.
FLOAT32 = 1e-6
DTYPES = (torch.bfloat16, torch.float32)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in float64; 0 where both are 0 or empty. NaN anywhere gives NaN: no bound holds."""
    assert result.shape == truth.shape, f"{list(result.shape)} is not {list(truth.shape)}"
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    apart = (result - truth).norm().item()
    return 0.0 if apart == 0 else apart / max(truth.norm().item(), 1e-300)


def require_close(result: Tensor, truth: Tensor, name: str = "") -> None:
    """The result is the truth but for one rounding to its own dtype: float32 or bf16."""
    bound = FLOAT32
    if result.dtype == torch.bfloat16:
        bound = BF16_ROUNDING if truth.count_nonzero() > FEW else BF16_WORST
    assert relative_error(result, truth) <= bound, name
