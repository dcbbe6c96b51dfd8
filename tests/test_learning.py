"""It learns: one clip is overfitted by the real loop, judged on fixed noise and sampled by diffusers' pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ltxforge import flow_matching
from ltxforge import plan as planning
from ltxforge.dataset.batches import Batch
from ltxforge.lora.inject import adapter_parameters, inject, without_adapter
from ltxforge.lora.targets import match
from ltxforge.media import demo
from ltxforge.media.decode import decode
from ltxforge.modalities import Streams
from ltxforge.models.interface import Noisy, NoisyTokens, WantedPrompt, to_tokens
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.optim import Optimizer
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY
from ltxforge.trainer import train
from ltxforge.validation.sample import sample

BASE, CAPTION, SHAPE, STEPS = "tiny/ltx-video", "a red disc rolls", ClipShape(96, 64, 17), 150


class OneClip:
    """The same clip in every batch, sixteen times; sigma and noise are new in every step."""

    def __init__(self, latents, prompt):
        self.latents, self.prompt = latents, prompt

    def load(self, step, micro):
        latents, shape = self.latents.mean.expand(16, -1, -1, -1, -1), SHAPE.latent()
        clean = torch.zeros(16, shape.tokens, dtype=torch.bool)
        return Batch(Streams(latents), None, [self.prompt] * 16, clean, shape, 25.0, (), 0)

    def count_at(self, step):
        return Streams(video=16)

    def epoch_at(self, step):
        return float(step)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, plan_in):
    """Losses before and after; samples of base, trained and disabled adapter; the clip as the VAE gives it back."""
    folder = tmp_path_factory.mktemp("overfit")
    plan = plan_in(
        folder,
        steps=STEPS,
        lora=planning.LoraPlan(16, 16.0, 0.0, False, ("all",), "fp32"),
        optimizer=planning.OptimizerPlan("adamw", 5e-3, (0.9, 0.999), 1e-8, 0.0, "cosine", 20, STEPS, 0.05, 2.0),
    )
    spec = TINY[BASE]
    assert spec.width >= 128
    model = LTXVideo(spec, spec.rope, tiny_parts(spec), torch.device("cpu"), torch.float32)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(plan.lora.targets, spec), plan.seed)
    clip = demo.render(folder / "shapes") / "red_disc.mp4"
    frames = decode(clip, [n / 25 for n in range(SHAPE.frames)], (SHAPE.width, SHAPE.height))
    with model.vae():
        latents = model.encode_clip(torch.from_numpy(frames))
        reconstruction = model.decode(latents.mean).numpy()
    (prompt,) = model.encode_prompts([WantedPrompt(CAPTION)], 32)
    wanted = planning.PromptPlan("disc", CAPTION, "", "", SHAPE, 25.0, 30, 1.0, 7)

    def sampled():
        return sample(model, wanted, {CAPTION: prompt}, 32)

    before, base = fixed_loss(model, latents, prompt), sampled()
    model.transformer.train()
    optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
    train(plan, model, OneClip(latents, prompt), optimizer, 0, lambda _e: None, StopRequest(), lambda _step: None)
    after, trained = fixed_loss(model, latents, prompt), sampled()
    with without_adapter(model.transformer):
        disabled = sampled()
    return before, after, base, trained, disabled, reconstruction, to_tokens(latents.mean[None])[0]


def fixed_loss(model, latents, prompt) -> float:
    """Mean loss on 16 fixed sigmas and noises that training never draws."""
    x0 = to_tokens(latents.mean[None]).expand(16, -1, -1)
    noise = torch.stack([flow_matching.noise_for(x0.shape[1:], 999, 0, index) for index in range(16)])
    sigma = [(index + 0.5) / 16 for index in range(16)]
    batch = flow_matching.mix(x0, noise, sigma, torch.zeros(x0.shape[:2], dtype=torch.bool))
    with torch.no_grad():
        noisy = Noisy(Streams(NoisyTokens(batch.tokens, batch.timesteps, batch.sample_timesteps)), SHAPE.latent(), 25.0)
        velocity = model.predict(noisy, model.batch_prompts([prompt] * 16, 32)).video
    return flow_matching.loss_by_sample(velocity, batch).mean().item()


def psnr(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    return 10 * math.log10(peak**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def test_the_loss_on_fixed_noise_falls_to_a_seventh(overfitted):
    before, after, *_ = overfitted
    assert after <= 0.15 * before, (before, after)


def test_the_sample_comes_closer_to_the_clip(overfitted):
    """Compared with the clip as the (random) VAE gives it back, which is the best that any sample could be."""
    _, _, base, trained, _, reconstruction, latents = overfitted
    assert psnr(trained.frames, reconstruction, 255) >= psnr(base.frames, reconstruction, 255) + 3
    peak = float(latents.max() - latents.min())
    before, after = (psnr(made.latents.video.numpy(), latents.numpy(), peak) for made in (base, trained))
    assert after >= before + 3


def test_without_the_adapter_it_is_the_base_to_the_last_bit(overfitted):
    _, _, base, trained, disabled, _, _ = overfitted
    assert torch.equal(disabled.latents.video, base.latents.video)
    assert not torch.equal(trained.latents.video, base.latents.video)
