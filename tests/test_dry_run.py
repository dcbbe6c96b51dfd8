"""The dry run: it tries what is largest, tells what it took, and leaves the run as it was; want of memory is explained.

That whole runs keep their bits with it is for reliability/test_same_bits.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltxforge import dry_run as module
from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.device_full import device_full_told
from ltxforge.dry_run import dry_run
from ltxforge.errors import DeviceFullError
from ltxforge.events import DryRunDone
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.modalities import Streams
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.random_weights import random_prompt
from ltxforge.models.tiny import tiny_parts
from ltxforge.optim import Optimizer
from ltxforge.plan import Estimates, PhasePlan, Plan, TrainingPlan
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY
from ltxforge.ui.lines import line

BASE, CPU = "tiny/ltx-video", torch.device("cpu")
GB = 10**9


class Two:
    """One small and one large micro-batch in turns."""

    def __init__(self, plan: Plan) -> None:
        self.small, self.large = (bucket.shape for bucket in plan.data.buckets)
        self.samples = {sample.shape: sample for sample in plan.data.samples}
        self.read: list[tuple[int, int]] = []

    def largest(self) -> tuple[int, int]:
        return 2, 0

    def load(self, step: int, micro: int) -> Batch:
        self.read.append((step, micro))
        size, spec = self.large if step % 2 == 0 else self.small, TINY[BASE]
        shape, draw = size.latent(), torch.Generator().manual_seed(step)
        video = torch.randn(2, spec.latent_channels, shape.frames, shape.height, shape.width, generator=draw)
        clean, prompt = torch.zeros(2, shape.tokens, dtype=torch.bool), random_prompt(spec, 32, "video", torch.float32)
        cached = Cached(self.samples[size])
        return Batch(Streams(video), None, [prompt] * 2, clean, shape, 25.0, (cached, cached), 0)  # type: ignore[arg-type]

    def count_at(self, step: int) -> Streams[int]:
        return Streams(video=2)

    def epoch_at(self, step: int) -> float:
        return float(step)


@dataclasses.dataclass(frozen=True)
class Cached:
    """As much of a cached sample as is asked for."""

    sample: object


@pytest.fixture
def ready(plan_maker):
    """A plan with dropout, its model and data, before the first step."""
    plan = plan_maker(training=TrainingPlan(2, 1, 1.0, None))
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.1))
    model = LTXVideo(TINY[BASE], TINY[BASE].rope, tiny_parts(TINY[BASE]), CPU, torch.float32)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(plan.lora.targets, model.spec), plan.seed)
    model.transformer.train()
    return plan, model, Two(plan), Optimizer(plan.optimizer, adapter_parameters(model.transformer))


def weights(model: LTXVideo) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in adapter_parameters(model.transformer).items()}


def test_it_tries_the_largest_and_leaves_everything_as_it_was(ready):
    plan, model, data, optimizer = ready
    before, random, told = weights(model), torch.get_rng_state(), []
    dry_run(plan, model, data, optimizer, told.append)
    assert data.read == [(2, 0)] and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(each, before[name]) for name, each in weights(model).items())
    assert all(each.grad is None for each in adapter_parameters(model.transformer).values()) and not optimizer.state()
    (event,) = told
    assert isinstance(event, DryRunDone) and (event.shape, event.samples) == (str(data.large), 2)
    assert event.measured_bytes == 0, "a CPU counts nothing"
    assert line(event)[1].endswith("it fits (memory is not counted on this device)")


def test_the_steps_after_it_are_those_without_it(ready):
    plan, model, data, _ = ready
    start = weights(model)

    def trained(first: bool) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, each in adapter_parameters(model.transformer).items():
                each.copy_(start[name])
        fresh = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
        if first:
            dry_run(plan, model, data, fresh, lambda _event: None)
        trainer.train(plan, model, data, fresh, 0, lambda _event: None, StopRequest(), lambda _step: None)
        return weights(model)

    plain, tried = trained(False), trained(True)
    assert all(torch.equal(plain[name], tried[name]) for name in plain) and not torch.equal(
        *map(first_of, (plain, start))
    )


def first_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(tensors.values()))


@pytest.fixture
def counting(monkeypatch):
    """A device that counts: 3 GB lie there before, 5 after the forward, 6 is the peak."""

    def allocated(_device: torch.device, calls=iter(range(100))) -> int:  # noqa: B008
        return (3 + 2 * (next(calls) % 2)) * GB

    monkeypatch.setattr(module, "allocated_bytes", allocated)
    monkeypatch.setattr(module, "peak_bytes", lambda _device: 6 * GB)


def with_estimate(plan: Plan, **parts: float) -> Plan:
    sizes = {name.replace("_", " "): round(size * GB) for name, size in parts.items()}
    return dataclasses.replace(plan, estimates=Estimates(phases=(PhasePlan("step", sum(sizes.values()), 0, sizes),)))


@pytest.mark.usefixtures("counting")
def test_what_was_measured_stands_beside_the_plan_part_by_part(ready):
    plan, model, data, optimizer = ready
    told: list[DryRunDone] = []
    close = with_estimate(plan, weights=3.0, optimizer_state=9, conditioning=0.5, kept_activations=1.5, workspace=1.05)
    dry_run(close, model, data, optimizer, told.append)  # type: ignore[arg-type]
    far = with_estimate(plan, weights=3.0, kept_activations=1.0, workspace=0.25, **{"one block's work": 0.5})
    dry_run(far, model, data, optimizer, told.append)  # type: ignore[arg-type]
    quiet, loud = told
    assert sum(quiet.measured.values()) == quiet.measured_bytes == 6 * GB
    assert quiet.estimated_bytes == round(6.05 * GB), "moments are made by the first update"
    assert line(quiet)[1].endswith("peak 6.0 GB of 6.0 GB planned")
    text = line(loud)[1]
    assert "(+26%)" in text and "inputs and kept activations 2.0 GB of 1.0 GB" in text
    assert "one block's work 1.0 GB of 750 MB" in text


@pytest.mark.usefixtures("counting")
def test_too_little_memory_in_it_is_compared_part_by_part(ready, monkeypatch):
    plan, model, data, optimizer = ready
    plan = with_estimate(plan, weights=3.0, kept_activations=1.0)
    before = torch.get_rng_state()

    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, "backward", full)
    with pytest.raises(DeviceFullError) as raised:
        dry_run(plan, model, data, optimizer, lambda _event: None)
    text = str(raised.value)
    assert "phase 'step': CUDA out of memory. Tried to allocate 2.00 GiB." in text
    assert (
        "step: all: 4.00 GB planned, 6.00 GB measured (+50%)" in text
        and "weights: 3.00 GB planned, 3.00 GB measured" in text
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_elsewhere_names_the_phase_and_the_ways_out(tiny_plan, monkeypatch):
    plan = with_estimate(tiny_plan, weights=3.0)
    monkeypatch.setattr("ltxforge.device_full.peak_bytes", lambda _device: 5 * GB)
    with (
        pytest.raises(DeviceFullError, match="step: all: 3.00 GB planned, 5.00 GB measured") as raised,
        device_full_told(plan, CPU, "step", changes=lambda phase, peak: (f"{phase.name} at {peak}", "set that")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert f"would fit, by what was measured:\n    step at {5 * GB}\n    set that" in str(raised.value)
    with pytest.raises(DeviceFullError, match=r"'captions'(.|\n)*memory.fit"), device_full_told(plan, CPU, "captions"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), device_full_told(plan, CPU, "step"):
        raise RuntimeError("another")
