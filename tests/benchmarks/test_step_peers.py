"""The strongest gate: diffusers' transformer with PEFT's LoRA and the objective in plain torch gives our step's loss
and gradients, in float32 to 1e-5, for every wiring; over the same weights, and also compiled.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltxforge import trainer
from ltxforge.benchmarks.quality import adapted, stock_of, trainable
from ltxforge.benchmarks.step_peers import StockStep, as_ours, base_weights, on_device, tokens_of
from ltxforge.benchmarks.step_watch import StepWatch, SyntheticData, train_watched
from ltxforge.benchmarks.synthetic import plan_of, synthetic_batch
from ltxforge.dataset.batches import Batch
from ltxforge.hardware import detect
from ltxforge.lora.inject import adapter_parameters, load_adapter
from ltxforge.models.interface import VideoModel
from ltxforge.plan import Plan
from ltxforge.signals import StopRequest
from ltxforge.suites.step import StepCase

CPU = torch.device("cpu")
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu")
WIRINGS = [
    ("tiny/ltx-video-0.9.0", None),  # rope from the sizes, prompts of 128 tokens
    ("tiny/ltx-video", None),  # rope from coordinates
    ("tiny/ltx-video-13b", None),
    ("tiny/ltx2", None),
    ("tiny/ltx2.3", None),
    ("tiny/ltx2.5", None),
    ("tiny/ltx2", "video"),
    ("tiny/ltx2.3", "audio"),
]


def prepared(base: str, modalities: str | None = None, **changes: object) -> tuple[Plan, VideoModel, Batch, StockStep]:
    """Our model with an adapter that changes something, a batch, and the stock step over the same weights."""
    settings = {"size": "96x64x17", "precision": "fp32", "rank": 3, "batch_size": 2, "accumulate": 2}
    case = StepCase(name="a", model=base, modalities=modalities, **{**settings, **changes})
    plan = plan_of(case, CPU_HARDWARE)
    model, _ = trainable(plan, case, case.spec, CPU)
    load_adapter(model.transformer, adapted(model.transformer))
    stock = stock_of(plan, model, case.spec, model.dtype)
    stock.take({name: value.to(model.dtype) for name, value in adapter_parameters(model.transformer).items()})
    return plan, model, synthetic_batch(case, model), stock


def ours(plan: Plan, model: VideoModel, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    data = SyntheticData(plan, batch, StepWatch(CPU))
    loss = trainer.accumulate(plan, model, data, 5, StopRequest())
    gradients = {name: p.grad for name, p in adapter_parameters(model.transformer).items()}
    return {name: each.value for name, each in loss.streams.items()}, gradients


def theirs(plan: Plan, stock: StockStep, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    size = plan.training.batch_size
    batches = [dataclasses.replace(batch, first_index=micro * size) for micro in range(plan.training.accumulate)]
    losses = stock.accumulate(batches, as_ours(plan, CPU), 5)
    return dict(losses.items()), {name: p.grad for name, p in stock.adapter.items()}


@pytest.mark.parametrize(("base", "modalities"), WIRINGS)
def test_the_peer_s_step_is_ours(base, modalities):
    plan, model, batch, stock = prepared(base, modalities)
    if not model.spec.has_audio:  # diffusers' LTX-2 lets gates follow a conditioned token's own timestep
        batch.clean[1, :6] = True  # the first latent frame of the second sample
    (losses, gradients), (expected, wanted) = ours(plan, model, batch), theirs(plan, stock, batch)
    assert losses == pytest.approx(expected, rel=1e-5) and losses.keys() == expected.keys()
    assert gradients.keys() == wanted.keys() and len(gradients) > 8
    for name, gradient in gradients.items():
        assert wanted[name].norm() > 0, name
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_the_peer_trains_as_ours_does():
    """Updates too: clipping, AdamW and its moments, over four steps of the trainer's own loop."""
    plan, model, batch, stock = prepared("tiny/ltx-video", accumulate=1)
    plan = dataclasses.replace(plan, steps=4, optimizer=dataclasses.replace(plan.optimizer, learning_rate=1e-2))
    case = StepCase(name="a", model="tiny/ltx-video", size="96x64x17", precision="fp32", rank=3, batch_size=2)
    model, optimizer = trainable(plan, case, case.spec, CPU)
    stock.plan = plan
    stock.take(adapter_parameters(model.transformer))
    expected = train_watched(plan, model, batch, optimizer, StepWatch(CPU), StopRequest())
    seconds, losses = stock.run([batch], as_ours(plan, CPU), range(1, 5))
    assert losses == pytest.approx(expected, rel=1e-5) and len(seconds) == 4 and min(seconds) > 0
    for name, value in adapter_parameters(model.transformer).items():
        assert (stock.adapter[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_are_shared_and_the_rest_is_as_the_trainers_have_it(precision):
    _, model, batch, stock = prepared("tiny/ltx2", precision=precision)
    weights, held = base_weights(model.transformer), base_weights(stock.transformer)
    assert weights.keys() == held.keys()
    assert all(weights[name].data_ptr() == value.data_ptr() for name, value in held.items())
    trained = {name for name, parameter in stock.transformer.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(stock.adapter) and all(".lora_" in name for name in trained)
    assert {value.dtype for value in stock.adapter.values()} == {model.dtype}, "as add_adapter leaves them"
    assert stock.transformer.gradient_checkpointing and stock.transformer.training
    drawn = on_device(CPU)(batch, 1)
    assert drawn.video.noise.shape == tokens_of(batch, CPU).video.shape
    assert drawn.audio.sigma is drawn.video.sigma, "the official trainer shares sigma"
    assert 0 < float(drawn.video.sigma.min()) and float(drawn.video.sigma.max()) < 1


def test_compiled_blocks_compute_the_same():
    """compile_repeated_blocks with checkpointing and PEFT: traced by AOTAutograd here, by Inductor in the sweep."""
    check_compiled(backend="aot_eager")


@pytest.mark.sweep
@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2.3"])
def test_compiled_blocks_compute_the_same_through_inductor(base):
    check_compiled(base)


def check_compiled(base: str = "tiny/ltx-video", **options: object) -> None:
    torch.compiler.reset()
    plan, model, batch, stock = prepared(base, accumulate=1, batch_size=1, size="64x64x9")
    stock.compile_blocks(**options)
    (losses, gradients), (expected, wanted) = ours(plan, model, batch), theirs(plan, stock, batch)
    assert all(block._compiled_call_impl is not None for block in stock.transformer.transformer_blocks)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all((gradients[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm() for name in gradients)
