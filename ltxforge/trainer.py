"""The loop. It knows steps and losses; not files, screens, devices or model families.

A stop request is read between micro-batches: the unfinished step is dropped (its gradients, nothing else) and comes
again after the restart, with the same draws.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ltxforge import flow_matching
from ltxforge.dataset.batches import Batch
from ltxforge.errors import NonFiniteError
from ltxforge.events import Emit, StepDone
from ltxforge.hardware import peak_bytes, reset_peak
from ltxforge.modalities import Streams
from ltxforge.models.interface import Noisy, NoisyTokens, VideoModel, to_tokens
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan, TrainingPlan
from ltxforge.randomness import address
from ltxforge.signals import StopRequest


class StepData(Protocol):
    """The batches of a run (see dataset/batches.py)."""

    def load(self, step: int, micro: int) -> Batch: ...
    def count_at(self, step: int) -> Streams[int]: ...
    def epoch_at(self, step: int) -> float: ...


@dataclass(frozen=True)
class StreamLoss:
    """One modality's flow loss: the mean over the step's samples that have it of each sample's masked mean."""

    value: float
    by_sample: tuple[float, ...]
    sigma: tuple[float, ...]


@dataclass(frozen=True)
class StepLoss:
    """The step's flow loss of each modality that it had, unweighted."""

    streams: Streams[StreamLoss]
    seconds: dict[str, float]

    @property
    def main(self) -> StreamLoss:
        """The video's, or the sound's where that is trained alone."""
        return self.streams.items()[0][1]


@dataclass(frozen=True)
class Losses:
    """One modality's losses in a micro-batch, [samples that have it], and their sigmas."""

    by_sample: Tensor
    sigma: tuple[float, ...]


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
        require_finite(step, loss, grad_norm, plan.device.precision)
        rate = plan.learning_rate_at(step)
        updated = time.perf_counter()
        optimizer.step(rate)
        now = time.perf_counter()
        seconds = {**loss.seconds, "optimizer": now - updated, "step": now - began}
        emit(step_done(plan, step, loss, grad_norm, rate, data.epoch_at(step), seconds, peak_bytes(model.device)))
        after_step(step)
    optimizer.clear_gradients()
    return step


def step_done(
    plan: Plan, step: int, loss: StepLoss, grad_norm: float, rate: float, epoch: float, seconds: dict[str, float],
    peak: int,
) -> StepDone:  # fmt: skip
    """The event of a finished update."""
    main, audio = loss.main, loss.streams.audio
    return StepDone(
        step, plan.steps, main.value, grad_norm, rate, epoch, main.sigma, main.by_sample, seconds, peak,
        audio_loss=audio.value if audio else None,
        audio_sigma=audio.sigma if audio else (),
        audio_loss_by_sample=audio.by_sample if audio else (),
    )  # fmt: skip


def accumulate(plan: Plan, model: VideoModel, data: StepData, step: int, stop: StopRequest) -> StepLoss | None:
    """Forward and backward over the step's micro-batches; None if a stop came in between.

    Every sample weighs 1 / (samples of its modality in the whole step), so the gradient does not depend on how the step
    is cut up, nor on how many of its samples have sound.
    """
    counts = data.count_at(step)
    found: dict[str, list[Losses]] = {}
    seconds = dict.fromkeys(("data", "forward", "backward"), 0.0)
    for micro in range(plan.training.accumulate):
        if stop.requested:
            return None
        times = [time.perf_counter()]
        batch = data.load(step, micro)
        times.append(time.perf_counter())
        losses = forward(plan, model, batch, step, micro)
        times.append(time.perf_counter())
        backward(plan, losses, counts)
        times.append(time.perf_counter())
        for name, each in losses.items():
            found.setdefault(name, []).append(Losses(each.by_sample.detach(), each.sigma))
        for part, first, last in zip(seconds, times, times[1:], strict=False):
            seconds[part] += last - first
    unscale_gradients(plan, model)
    return StepLoss(Streams(**{name: whole_step(each, counts[name]) for name, each in found.items()}), seconds)


def backward(plan: Plan, losses: Streams[Losses], counts: Streams[int]) -> None:
    """Add a micro-batch's share of the step's gradient, times the plan's loss scale. `counts` as in `accumulate`."""
    weights = {"video": 1.0, "audio": plan.audio.loss_weight if plan.audio else 0.0}
    parts = [weights[name] * each.by_sample.sum() / counts[name] for name, each in losses.items()]
    total, scale = sum(parts[1:], parts[0]), plan.device.loss_scale
    if total.requires_grad:  # an adapter of the sound alone has nothing to learn from samples without any
        (total if scale == 1 else total * scale).backward()


def unscale_gradients(plan: Plan, model: VideoModel) -> None:
    """Undo the loss scale, a power of two: exact."""
    found = (parameter.grad for parameter in model.transformer.parameters())
    if plan.device.loss_scale != 1 and (gradients := [gradient for gradient in found if gradient is not None]):
        torch._foreach_mul_(gradients, 1 / plan.device.loss_scale)


def whole_step(losses: Sequence[Losses], count: int) -> StreamLoss:
    """One modality's loss over all micro-batches."""
    by_sample = torch.cat([each.by_sample for each in losses]).tolist()
    return StreamLoss(sum(by_sample) / count, tuple(by_sample), sum((each.sigma for each in losses), ()))


def forward(plan: Plan, model: VideoModel, batch: Batch, step: int, micro: int) -> Streams[Losses]:
    """One micro-batch's losses."""
    drawn = draw(plan, batch, step, model)
    prompts = model.batch_prompts(batch.prompts, plan.conditioning.prompt_tokens, plan.training.modalities)
    present = Streams(audio=batch.present)
    inputs = {
        name: NoisyTokens(each.tokens, each.timesteps, each.sample_timesteps, present[name])
        for name, each in drawn.items()
    }
    torch.manual_seed(address(plan.seed, "model", step, micro))  # for draws inside the model: dropout
    predicted = model.predict(Noisy(Streams(**inputs), batch.shape, batch.fps), prompts)
    losses = {}
    for name, each in drawn.items():
        by_sample = flow_matching.loss_by_sample(predicted[name], each, model.kernels)
        losses[name] = of_those_present(by_sample, each.sigma, present[name])
    return Streams(**losses)


def of_those_present(by_sample: Tensor, sigma: tuple[float, ...], present: Tensor | None) -> Losses:
    """The losses of the samples that have the modality."""
    if present is None:
        return Losses(by_sample, sigma)
    kept = present.tolist()  # on the host; a mask on the device would wait for it
    return Losses(torch.stack(list(itertools.compress(by_sample, kept))), tuple(itertools.compress(sigma, kept)))


def draw(plan: Plan, batch: Batch, step: int, model: VideoModel) -> Streams[flow_matching.NoisyBatch]:
    """Sigma and noise of each modality. The sound's sigma is its own, or the video's where the plan shares it."""
    video = audio = None
    drawn_at, how = (plan.flow, plan.seed, step, batch.first_index), {"dtype": model.dtype, "kernels": model.kernels}
    if (latents := batch.latents.video) is not None:
        video = flow_matching.noise_batch(to_tokens(latents.to(model.device)), batch.clean, *drawn_at, **how)
    if (sound := batch.latents.audio) is not None:
        shared = video.sigma if video and plan.audio and plan.audio.sigma == "shared" else None
        clean = torch.zeros(sound.shape[:2], dtype=torch.bool)
        audio = flow_matching.noise_batch(sound.to(model.device), clean, *drawn_at, "audio", shared, **how)
    return Streams(video, audio)


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


def require_finite(step: int, loss: StepLoss, grad_norm: float, precision: str) -> None:
    """Raise before the weights change if a loss or the gradient is NaN or infinite."""
    losses = [each.value for _, each in loss.streams.items()]
    if all(map(math.isfinite, [*losses, grad_norm])):
        return
    worst = [
        f"{name}, sigma {sigma:.4f}: loss {value}"
        for name, each in loss.streams.items()
        for sigma, value in zip(each.sigma, each.by_sample, strict=True)
    ]
    unchanged = "The weights were not changed and the last checkpoint is intact, but the same settings come here again:"
    if precision == "fp16":
        remedy = (
            f'{unchanged} fp16 holds nothing above 65504. Start a new run with --out and training.precision = "fp32".'
        )
    else:
        slower = 'a lower optimizer.learning_rate, or training.precision = "fp32".'
        remedy = f"{unchanged} start a new run with --out and {slower}"
    raise NonFiniteError(
        f"step {step} gave loss {loss.main.value} and gradient norm {grad_norm} ({'; '.join(worst)})", remedy=remedy
    )
