"""Noising and the masked velocity loss in plain PyTorch: the definition, in float32 whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.precision import at_least_float32


def noise(latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x = (1 − σ)·x0 + σ·ε; shapes as in the op."""
    level = at_least_float32(sigma.unsqueeze(-1) if sigma.ndim == 2 else sigma[:, None, None])
    mixed = (1 - level) * at_least_float32(latents) + level * at_least_float32(draws)
    return mixed.to(latents.dtype if dtype is None else dtype)


def velocity_loss(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor) -> Tensor:
    """[B]: Σ_t w·mean_c (prediction − (ε − x0))² / max(Σ_t w, 1)."""
    velocity = at_least_float32(draws) - at_least_float32(latents)
    squared = (at_least_float32(prediction) - velocity).square().mean(dim=-1)
    weight = at_least_float32(weight)
    return (squared * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
