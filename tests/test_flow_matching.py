"""The objective against float64 formulations written out here, and against SciPy-free statistics of its draws."""

import math

import numpy as np
import pytest
import torch

from ltxforge import flow_matching as fm
from ltxforge.plan import FlowPlan

STRETCHED = FlowPlan("stretched-logit-normal", None, True, 0.1)
PLAIN = FlowPlan("logit-normal", 3.0, False, 0.0)
UNIFORM = FlowPlan("uniform", None, False, 0.0)


def draws(flow: FlowPlan, tokens: int, count: int = 4000) -> np.ndarray:
    return np.array([fm.sigma_at(flow, tokens, 7, step, 0) for step in range(count)])


def longdouble_sigma(z: float, mu: float) -> float:
    """The stretch as Lightricks states it, in 80-bit floats: (x − lo)/(hi − lo) on x = sigmoid(mu + z)."""
    number = np.longdouble

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    low, high = sigmoid(number(mu) + fm.STRETCH_LOW), sigmoid(number(mu) + fm.STRETCH_HIGH)
    x = (sigmoid(number(mu) + number(z)) - low) / (high - low)
    x = 2 * number(fm.SMALLEST_SIGMA) - x if x < fm.SMALLEST_SIGMA else x
    return float(min(max(x, 0), 1))


@pytest.mark.parametrize(
    ("tokens", "mu"), [(1024, 0.95), (4096, 2.05), (6144, 2.7833333333333333), (576, 0.7895833333)]
)
def test_mu_follows_the_published_line(tokens, mu):
    assert fm.mu_for_tokens(tokens) == pytest.approx(mu, abs=1e-9)


@pytest.mark.parametrize("tokens", [36, 1024, 6144, 29_000])
@pytest.mark.parametrize("z", [-6.0, -2.5, -0.3, 0.0, 1.7, 3.0, 3.5])
def test_stretch_keeps_its_digits(tokens, z):
    mu = fm.mu_for_tokens(tokens)
    assert fm.sigma_from_normal(z, mu, True) == pytest.approx(longdouble_sigma(z, mu), abs=1e-9)


def test_stretch_is_finite_at_any_length():
    values = draws(STRETCHED, 60_000, 500)
    assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()


@pytest.mark.parametrize("flow", [STRETCHED, PLAIN, UNIFORM])
def test_quantiles_are_those_of_the_draws(flow):
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    values = draws(flow, 2048)
    below = [(values <= q).mean() for q in fm.sigma_quantiles(flow, 2048, shares)]
    # Standard error of a share over 4000 draws is at most 0.008.
    assert below == pytest.approx(shares, abs=0.03)


def test_static_shift_equals_the_shifted_logit_normal():
    z = 0.37
    x = 1 / (1 + math.exp(-z))
    assert fm.sigma_from_normal(z, math.log(3.0), False) == pytest.approx(3 * x / (1 + 2 * x), rel=1e-14)


def test_draws_depend_on_their_address_alone():
    first = fm.noise_for((5, 4), 1, 2, 3)
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(first, fm.noise_for((5, 4), 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, fm.noise_for((5, 4), *other))


def test_a_batch_is_its_samples_put_together():
    latents = torch.randn(3, 6, 4)
    clean = torch.zeros(3, 6, dtype=torch.bool)
    clean[1, :2] = True
    whole = fm.noise_batch(latents, clean, STRETCHED, 5, 9, 0)
    for row in range(3):
        part = fm.noise_batch(latents[row : row + 1], clean[row : row + 1], STRETCHED, 5, 9, row)
        assert torch.equal(whole.tokens[row], part.tokens[0])
        assert torch.equal(whole.noise[row], part.noise[0])
        assert whole.sigma[row] == part.sigma[0]


def test_sound_draws_its_own_sigma_and_noise():
    """At one address, each modality's draws are its own and do not hang on the other's being drawn."""
    pairs = [[fm.sigma_at(STRETCHED, 36, 7, step, 0, each) for each in ("video", "audio")] for step in range(500)]
    video, audio = np.array(pairs).T
    assert abs(np.corrcoef(video, audio)[0, 1]) < 0.15  # standard error of 500 pairs: 0.045
    assert not torch.equal(fm.noise_for((5, 4), 1, 2, 3), fm.noise_for((5, 4), 1, 2, 3, "audio"))


def test_a_shared_sigma_is_taken_as_it_is():
    latents, clean = torch.randn(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool)
    shared = fm.noise_batch(latents, clean, STRETCHED, 5, 9, 0, "audio", (0.25, 0.5))
    own = fm.noise_batch(latents, clean, STRETCHED, 5, 9, 0, "audio")
    assert shared.sigma == (0.25, 0.5) != own.sigma
    assert shared.timesteps.flatten().tolist() == shared.sample_timesteps.tolist() == [250.0, 500.0]
    assert torch.equal(shared.noise, own.noise)


def test_a_sample_keeps_its_own_timestep_beside_clean_tokens():
    clean = torch.zeros(2, 6, dtype=torch.bool)
    clean[0, :3] = True
    sigma = [1 / 3, 0.4]
    batch = fm.mix(torch.randn(2, 6, 4), torch.randn(2, 6, 4), sigma, clean)
    assert batch.sample_timesteps.dtype == torch.float32
    assert batch.sample_timesteps.tolist() == np.float32(np.array(sigma) * 1000).tolist()
    assert torch.equal(batch.sample_timesteps, batch.timesteps[:, -1])


def test_conditioning_tokens_are_clean_timeless_and_free_of_loss():
    latents = torch.randn(2, 6, 4)
    clean = torch.zeros(2, 6, dtype=torch.bool)
    clean[0, :3] = True
    batch = fm.mix(latents, torch.randn(2, 6, 4), [0.7, 0.4], clean)
    assert torch.equal(batch.tokens[0, :3], latents[0, :3])
    assert batch.timesteps.shape == (2, 6)
    assert (batch.timesteps[0, :3] == 0).all() and (batch.timesteps[0, 3:] == 700.0).all()
    prediction = torch.randn(2, 6, 4, requires_grad=True)
    fm.loss_by_sample(prediction, batch).sum().backward()
    assert (prediction.grad[0, :3] == 0).all() and (prediction.grad[0, 3:] != 0).all()


def test_loss_is_the_mean_of_masked_means():
    latents, noise = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    clean = torch.zeros(2, 6, dtype=torch.bool)
    clean[0, :3] = True
    batch = fm.mix(latents, noise, [0.7, 0.4], clean)
    prediction = torch.randn(2, 6, 4, dtype=torch.float64)
    error = (prediction - (noise - latents)).numpy() ** 2
    expected = [error[0, 3:].mean(), error[1].mean()]
    assert fm.loss_by_sample(prediction, batch).tolist() == pytest.approx(expected, rel=1e-14)


def test_a_wholly_conditioned_sample_has_no_loss():
    batch = fm.mix(torch.randn(1, 2, 4), torch.randn(1, 2, 4), [0.5], torch.ones(1, 2, dtype=torch.bool))
    assert fm.loss_by_sample(torch.randn(1, 2, 4), batch).item() == 0.0
