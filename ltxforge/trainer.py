"""The loop. It knows steps and losses; not files, screens, devices or model families.

A stop request is read between micro-batches: the unfinished step is dropped (its gradients, nothing else) and comes
again after the restart, with the same draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ltxforge import flow_matching
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError
from ltxforge.events import Emit, StepDone
from ltxforge.hardware import peak_bytes, reset_peak
from ltxforge.models.interface import Noisy, VideoModel, pad_prompts, to_tokens
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan, TrainingPlan
from ltxforge.randomness import address
from ltxforge.signals import StopRequest


class StepData(Protocol):
    """The batches of a run (see dataset/batches.py)."""

    def load(self, step: int, micro: int) -> Batch: ...
    def count_at(self, step: int) -> int: ...
    def epoch_at(self, step: int) -> float: ...


@dataclass(frozen=True)
class StepLoss:
    """The step's flow loss: the mean over its samples of each sample's masked mean."""

    value: float
    by_sample: tuple[float, ...]
    sigma: tuple[float, ...]
    seconds: dict[str, float]


def train(
    plan: Plan,
    model: VideoModel,
    data: StepData,
    optimizer: Optimizer,
    start: int,
    emit: Emit,
    stop: StopRequest,
    after_step: Callable[[int], None],
) -> int:
    """Train from update `start` + 1 to the plan's end or a stop; returns the last finished update.

    Args:
        after_step: called after each update; saves and samples where the plan says so.
    """
    reset_peak(model.device)
    step = start
    while step < plan.steps and not stop.requested:
        began = time.perf_counter()
        loss = accumulate(plan, model, data, step + 1, stop)
        if loss is None:
            break
        step += 1
        grad_norm = clip_gradients(optimizer.parameters.values(), plan.training)
        require_finite(step, loss, grad_norm)
        rate = plan.learning_rate_at(step)
        updated = time.perf_counter()
        optimizer.step(rate)
        now = time.perf_counter()
        seconds = {**loss.seconds, "optimizer": now - updated, "step": now - began}
        emit(StepDone(step, plan.steps, loss.value, grad_norm, rate, data.epoch_at(step), loss.sigma, loss.by_sample,
                      seconds, peak_bytes(model.device)))  # fmt: skip
        after_step(step)
    optimizer.clear_gradients()
    return step


def accumulate(plan: Plan, model: VideoModel, data: StepData, step: int, stop: StopRequest) -> StepLoss | None:
    """Forward and backward over the step's micro-batches; None if a stop came in between.

    Every sample weighs 1 / (samples in the whole step), so the gradient does not depend on how the step is cut up.
    """
    count = data.count_at(step)
    values: list[Tensor] = []
    sigma: tuple[float, ...] = ()
    seconds = dict.fromkeys(("data", "forward", "backward"), 0.0)
    for micro in range(plan.training.accumulate):
        if stop.requested:
            return None
        times = [time.perf_counter()]
        batch = data.load(step, micro)
        times.append(time.perf_counter())
        losses, drawn = forward(plan, model, batch, step, micro)
        times.append(time.perf_counter())
        (losses.sum() / count).backward()
        times.append(time.perf_counter())
        values.append(losses.detach())
        sigma += drawn
        for part, first, last in zip(seconds, times, times[1:], strict=False):
            seconds[part] += last - first
    by_sample = torch.cat(values).tolist()
    return StepLoss(sum(by_sample) / count, tuple(by_sample), sigma, seconds)


def forward(plan: Plan, model: VideoModel, batch: Batch, step: int, micro: int) -> tuple[Tensor, tuple[float, ...]]:
    """One micro-batch's losses [B] and its sigmas."""
    latents = to_tokens(batch.latents.to(model.device))
    noisy = flow_matching.noise_batch(
        latents, batch.clean.to(model.device), plan.flow, plan.seed, step, batch.first_index
    )
    prompts = pad_prompts(batch.prompts, plan.conditioning.prompt_tokens, model.device, model.dtype)
    torch.manual_seed(address(plan.seed, "model", step, micro))  # for draws inside the model: dropout
    prediction = model.predict(Noisy(noisy.tokens.to(model.dtype), noisy.timesteps, batch.shape, batch.fps), prompts)
    return flow_matching.loss_by_sample(prediction, noisy), noisy.sigma


def clip_gradients(parameters: object, training: TrainingPlan) -> float:
    """Clip in place as the plan says; returns the gradient's norm before clipping."""
    held: list[nn.Parameter] = list(parameters)  # type: ignore[call-overload]
    if training.clip_value is not None:
        norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        nn.utils.clip_grad_value_(held, training.clip_value)
    else:
        bound = math.inf if training.clip_norm is None else training.clip_norm
        norm = nn.utils.clip_grad_norm_(held, bound)
    return float(norm)


def require_finite(step: int, loss: StepLoss, grad_norm: float) -> None:
    """Raise before the weights change if the loss or the gradient is NaN or infinite."""
    if math.isfinite(loss.value) and math.isfinite(grad_norm):
        return
    worst = [f"sigma {s:.4f}: loss {v}" for s, v in zip(loss.sigma, loss.by_sample, strict=True)]
    raise NonFiniteError(
        f"step {step} gave loss {loss.value} and gradient norm {grad_norm} ({'; '.join(worst)})",
        remedy="The weights were not changed and the last checkpoint is intact, but the same settings come here again:"
        ' start a new run with --out and a lower optimizer.learning_rate, or training.precision = "fp32".',
    )
