"""The objective in one file: drawing sigma, noising, the velocity target, and the masked loss.

x = (1 − σ)·x0 + σ·ε, target ε − x0 (rectified flow, arXiv 2209.03003). Every draw comes from a CPU generator addressed
by (seed, purpose, step, index of the sample within the whole step's batch), so it depends on nothing else. Sigma is
drawn in float64 and handed on in float32; noising and loss are float32 whatever the model computes in, and the op
`flow_matching` of the kernels.

Letters: B batch, T tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from ltxforge_kernels import flow_matching as op
from ltxforge_kernels.choice import EAGER, Kernels
from torch import Tensor

from ltxforge.plan import FlowPlan
from ltxforge.randomness import address, uniform

# The line through (1024 tokens, 0.95) and (4096 tokens, 2.05) of Lightricks' trainers and schedulers; not clamped.
SHIFT_AT_1024, SHIFT_AT_4096 = 0.95, 2.05
# Percentiles that the stretched draw carries to 0 and 1, and the smallest sigma it keeps (LTX-2's trainer).
STRETCH_LOW, STRETCH_HIGH = NormalDist().inv_cdf(0.005), NormalDist().inv_cdf(0.999)
SMALLEST_SIGMA = 1e-3
# What a modality's draws are called before their purpose.
PREFIX = {"video": "", "audio": "audio-"}


def mu_for_tokens(tokens: int) -> float:
    """Mean of the logit-normal as a line in the true token count T; its factor is s = exp(mu)."""
    return SHIFT_AT_1024 + (tokens - 1024) * (SHIFT_AT_4096 - SHIFT_AT_1024) / (4096 - 1024)


def mu_of(flow: FlowPlan, tokens: int) -> float:
    """Mean of the logit-normal for this plan: ln s of a fixed shift, else by token count."""
    return mu_for_tokens(tokens) if flow.shift is None else math.log(flow.shift)


def sigma_from_normal(z: float, mu: float, stretch: bool) -> float:
    """The logit-normal σ = sigmoid(mu + z), optionally stretched so that its percentiles reach 0 and 1.

    Computed through the complement 1 − σ = sigmoid(−mu − z): near σ = 1, where large token counts put almost all of
    the mass, σ itself has no digits left to subtract (in float32 the plain form is off by 1.9e-3 at 29,000 tokens).
    """
    if not stretch:
        return _sigmoid(mu + z)
    complement, lowest, highest = _sigmoid(-mu - z), _sigmoid(-mu - STRETCH_LOW), _sigmoid(-mu - STRETCH_HIGH)
    sigma = 1.0 - (complement - highest) / (lowest - highest)
    if sigma < SMALLEST_SIGMA:
        sigma = 2 * SMALLEST_SIGMA - sigma
    return min(max(sigma, 0.0), 1.0)


def sigma_at(flow: FlowPlan, tokens: int, seed: int, step: int, index: int, modality: str = "video") -> float:
    """The σ of one sample, in float64. Each modality has draws of its own."""
    u = uniform(seed, f"{PREFIX[modality]}sigma", step, index)
    kind = uniform(seed, f"{PREFIX[modality]}sigma-kind", step, index)
    if flow.sigma == "uniform" or kind < flow.uniform_fraction:
        return SMALLEST_SIGMA + (1 - SMALLEST_SIGMA) * u
    # u has 53 bits and may be 0, whose quantile is −∞; half a step inside keeps it finite (8.2 standard deviations).
    z = NormalDist().inv_cdf(u + 2.0**-54)
    return sigma_from_normal(z, mu_of(flow, tokens), flow.stretch)


def sigma_quantiles(flow: FlowPlan, tokens: int, shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9)) -> list[float]:
    """Quantiles of the σ that is really trained, the uniform share included, by bisection of the distribution."""
    return [_quantile(flow, mu_of(flow, tokens), share) for share in shares]


def _quantile(flow: FlowPlan, mu: float, share: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cumulative(flow, mu, middle) < share else (low, middle)
    return (low + high) / 2


def _cumulative(flow: FlowPlan, mu: float, sigma: float) -> float:
    """P(σ' ≤ sigma). The reflection below `SMALLEST_SIGMA` moves at most the lowest half percent and is left out."""
    even = min(max((sigma - SMALLEST_SIGMA) / (1 - SMALLEST_SIGMA), 0.0), 1.0)
    if flow.sigma == "uniform":
        return even
    complement = 1 - sigma
    if flow.stretch:
        lowest, highest = _sigmoid(-mu - STRETCH_LOW), _sigmoid(-mu - STRETCH_HIGH)
        complement = highest + complement * (lowest - highest)
    if not 0 < complement < 1:
        drawn = 0.0 if complement >= 1 else 1.0
    else:
        drawn = NormalDist().cdf(-mu - math.log(complement / (1 - complement)))
    return flow.uniform_fraction * even + (1 - flow.uniform_fraction) * drawn


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True)
class NoisyBatch:
    """A batch ready for the model. Timesteps stay on the host, where they are told apart.

    Attributes:
        tokens: [B, T, C], noised, in the model's dtype; conditioning tokens are clean.
        timesteps: [B, 1], or [B, T] when some token is conditioning: σ·1000, and 0 at conditioning tokens. Float32.
        latents: [B, T, C], x0, float32.
        noise: [B, T, C], ε, float32.
        mask: [B, T], 1 where the loss counts and 0 at conditioning tokens.
        sigma: one σ per sample.
    """

    tokens: Tensor
    timesteps: Tensor
    latents: Tensor
    noise: Tensor
    mask: Tensor
    sigma: tuple[float, ...]

    @property
    def sample_timesteps(self) -> Tensor:
        """[B] float32: σ·1000 of each sample, whatever its conditioning tokens have."""
        return (torch.tensor(self.sigma, dtype=torch.float64) * 1000).to(torch.float32)


def noise_for(shape: Sequence[int], seed: int, step: int, index: int, modality: str = "video") -> Tensor:
    """ε for one sample: standard normal, float32, on the CPU, from the sample's own address."""
    generator = torch.Generator().manual_seed(address(seed, f"{PREFIX[modality]}noise", step, index))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def noise_batch(
    latents: Tensor,
    clean: Tensor,
    flow: FlowPlan,
    seed: int,
    step: int,
    first_index: int,
    modality: str = "video",
    sigma: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    kernels: Kernels = EAGER,
) -> NoisyBatch:
    """Draw σ and ε for each sample and make the model's input and target.

    Args:
        latents: [B, T, C] clean latents x0, float32.
        clean: [B, T] bool, the conditioning tokens that stay clean; on the host.
        first_index: index of the first sample within the whole step's batch.
        modality: whose draws these are, "video" or "audio".
        sigma: one σ per sample where it is not drawn here but shared with the other modality.
        dtype: the model's; the latents' where not given.
    """
    batch, tokens, _ = latents.shape
    numbers = range(first_index, first_index + batch)
    if sigma is None:
        sigma = [sigma_at(flow, tokens, seed, step, number, modality) for number in numbers]
    noise = torch.stack([noise_for(latents.shape[1:], seed, step, number, modality) for number in numbers])
    return mix(latents, noise.to(latents.device), sigma, clean, dtype, kernels)


def mix(
    latents: Tensor,
    noise: Tensor,
    sigma: Sequence[float],
    clean: Tensor,
    dtype: torch.dtype | None = None,
    kernels: Kernels = EAGER,
) -> NoisyBatch:
    """Noise latents with given draws; shapes as in `noise_batch`. Each σ and σ·1000 is rounded once, from float64."""
    drawn = torch.tensor(sigma, dtype=torch.float64)[:, None]
    per_token = drawn.expand(clean.shape).masked_fill(clean, 0.0)
    timesteps = per_token if bool(clean.any()) else drawn
    level = per_token.to(latents.dtype).to(latents.device, non_blocking=True)
    implementation = kernels.on("flow_matching", latents.shape)
    return NoisyBatch(
        tokens=op.noise(latents, noise, level, dtype, implementation=implementation),
        timesteps=(timesteps * 1000).to(torch.float32),
        latents=latents,
        noise=noise,
        mask=(~clean).to(latents.dtype).to(latents.device, non_blocking=True),
        sigma=tuple(sigma),
    )


def loss_by_sample(prediction: Tensor, batch: NoisyBatch, kernels: Kernels = EAGER) -> Tensor:
    """[B]: mean over the unmasked tokens and all channels of (prediction − (ε − x0))².

    A sample whose tokens are all conditioning (a single latent frame that is kept clean) has loss 0.
    """
    implementation = kernels.on("flow_matching", prediction.shape)
    return op.velocity_loss(prediction, batch.latents, batch.noise, batch.mask, implementation=implementation)
