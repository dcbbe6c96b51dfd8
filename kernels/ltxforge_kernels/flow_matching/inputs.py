"""Inputs of flow matching for a shape: for tests and the bench, and on "meta" for the compile-only harness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxforge_kernels.cases import Filler, TokenShape


@dataclass(frozen=True)
class Inputs:
    """All of one training step: x0, ε, a prediction, and per token σ and weight, both 0 at conditioning tokens."""

    latents: Tensor
    draws: Tensor
    prediction: Tensor
    sigma: Tensor
    weight: Tensor


def inputs(shape: TokenShape, fill: Filler, dtype: torch.dtype = torch.float32) -> Inputs:
    """Latents and draws are float32, as the cache and the generator give them; the prediction has the model's dtype."""
    whole = (shape.batch, shape.tokens, shape.width)
    weight = (fill.uniform(shape.batch, shape.tokens) > 0.2).to(torch.float32)
    return Inputs(
        latents=fill.normal(*whole),
        draws=fill.normal(*whole),
        prediction=fill.normal(*whole, dtype=dtype),
        sigma=fill.uniform(shape.batch, shape.tokens) * weight,
        weight=weight,
    )
