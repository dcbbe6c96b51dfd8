"""Flow matching: noising, and the masked velocity loss with its gradient in the same pass.

    x = (1 − σ)·x0 + σ·ε                                                     noise
    loss_b = Σ_t w_bt·mean_c (prediction − (ε − x0))² / max(Σ_t w_bt, 1)      velocity_loss

Rectified flow (arXiv 2209.03003). B samples, T tokens, C latent channels. Draws are explicit, so that every
implementation trains on the same noise. All arithmetic is float32; noising has the same bits in every implementation
(on a GPU: eager and triton), the loss differs by its order of summation alone, which is fixed: no atomics.

Bytes moved per element of [B, T, C], float32 latents and draws: noising reads 8 and writes one x; the loss reads 8 and
one prediction and writes 4, its gradient reads 4 and writes one prediction. Eager reads and writes 20 more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.flow_matching import reference
from ltxforge_kernels.implementations import HAS_TRITON, pick

if HAS_TRITON:
    from ltxforge_kernels.flow_matching import launch
else:
    launch = None


def noise(
    latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype | None = None, *, implementation: str
) -> Tensor:
    """Noised tokens [B, T, C].

    Args:
        latents: [B, T, C], x0.
        draws: [B, T, C], ε.
        sigma: in [0, 1]: [B] or [B, 1] per sample, [B, T] per token (0 at conditioning tokens, which stay clean).
        dtype: of the result; the latents' where not given.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    same_shape(latents, draws=draws)
    one_per_token(latents, "sigma", sigma)
    return pick(implementation, reference.noise, launch and launch.noise)(latents, draws, sigma, dtype)


def velocity_loss(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor, *, implementation: str) -> Tensor:
    """[B] float32, differentiable in the prediction alone; a sample whose weights are all 0 has loss and gradient 0.

    Args:
        prediction: [B, T, C], the model's velocity.
        latents: [B, T, C], x0.
        draws: [B, T, C], ε.
        weight: [B, T] (or as sigma in `noise`), 0 where a token does not count; usually the mask.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    same_shape(prediction, latents=latents, draws=draws)
    one_per_token(prediction, "weight", weight)
    loss = pick(implementation, reference.velocity_loss, launch and launch.velocity_loss)
    return loss(prediction, latents, draws, weight)


def same_shape(tokens: Tensor, **others: Tensor) -> None:
    """Refuse what would broadcast: it is a mistake of the caller."""
    if tokens.ndim != 3 or tokens.shape[2] == 0:
        raise ValueError(f"tokens are [B, T, C] with at least one channel, not {list(tokens.shape)}")
    for name, other in others.items():
        if other.shape != tokens.shape:
            raise ValueError(f"{name} is {list(other.shape)}, not {list(tokens.shape)}")


def one_per_token(tokens: Tensor, name: str, values: Tensor) -> None:
    """[B], [B, 1] or [B, T]."""
    batch, count, _ = tokens.shape
    if tuple(values.shape) not in ((batch,), (batch, 1), (batch, count)):
        raise ValueError(f"{name} is {list(values.shape)}, not [{batch}], [{batch}, 1] or [{batch}, {count}]")
