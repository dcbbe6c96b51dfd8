"""Whole models on our kernels, interpreted or on a GPU, against the same models on the stock definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ltxforge_kernels.choice import EAGER, Kernels, everything
from one_block import make_batch, make_model, plan_for

from ltxforge import trainer
from ltxforge.lora.inject import adapter_parameters
from ltxforge.lora.linear import LoraLinear
from ltxforge.memory.strategy import run_block_of
from ltxforge.models import ltx2, ltx_video
from ltxforge.optim import Optimizer
from ltxforge.plan import MemoryPlan, Plan, every_nth

STEP = 5
LONG = ["tiny/ltx-video-0.9.1", "tiny/ltx2"]
BASES = ["tiny/ltx-video", "tiny/ltx2.3", *(pytest.param(base, marks=pytest.mark.sweep) for base in LONG)]
# Of sums in another order.
LOSS_BOUND, GRADIENT_BOUND = 1e-6, 1e-5


def step(
    base: str, plan: Plan, kernels: Kernels, dtype: torch.dtype = torch.float32, checkpointing: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the samples and the gradient of every LoRA weight."""
    model = make_model(base, plan, kernels, dtype)
    model.run_block = run_block_of(MemoryPlan(every_nth(checkpointing, model.spec.blocks)), model.device)
    for module in model.transformer.modules():
        if isinstance(module, LoraLinear):
            module.refresh()  # which a compiled block leaves to its caller
    losses = torch.cat([each.by_sample for _, each in trainer.forward(plan, model, make_batch(base), STEP, 0).items()])
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in adapter_parameters(model.transformer).items()}


def apart(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("base", BASES)
def test_a_step_on_our_kernels_is_the_stock_step(base, plan_maker):
    plan = plan_for(base, plan_maker)
    (losses, gradients), (true_losses, true_gradients) = (
        step(base, plan, kernels) for kernels in (everything("triton"), EAGER)
    )
    assert apart(losses, true_losses) <= LOSS_BOUND
    for name, truth in true_gradients.items():
        assert truth.norm() > 0, name
        assert apart(gradients[name], truth) <= GRADIENT_BOUND, name


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2.3"])
def test_in_bf16_with_weights_and_loras_in_one_matrix(base, plan_maker):
    """Our kernels are no further from the float64 step than the eager ones, over all gradients together."""
    plan = plan_for(base, plan_maker)
    found = {
        name: step(base, plan, kernels, dtype)
        for name, kernels, dtype in (
            ("ours", everything("triton"), torch.bfloat16),
            ("eager", EAGER, torch.bfloat16),
            ("truth", EAGER, torch.float32),
        )
    }
    flat = {name: torch.cat([g.flatten() for g in gradients.values()]) for name, (_, gradients) in found.items()}
    assert apart(found["ours"][0], found["truth"][0]) <= 1e-2
    assert apart(flat["ours"], flat["truth"]) <= 1.1 * apart(flat["eager"], flat["truth"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(dropout, plan_maker):
    base = "tiny/ltx-video"
    plan = plan_for(base, plan_maker, dropout)
    results = [step(base, plan, everything("triton"), torch.bfloat16, every) for every in (0, 1)]
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


BLOCKS = [
    (ltx_video, "tiny/ltx-video", "triton", 1),
    (ltx_video, "tiny/ltx-video", "eager", 1),
    (ltx2, "tiny/ltx2.3", "triton", 0),
    pytest.param(ltx2, "tiny/ltx2.3", "triton", 1, marks=pytest.mark.sweep),
    pytest.param(ltx2, "tiny/ltx2.3", "eager", 1, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("family", "base", "implementation", "checkpointing"), BLOCKS)
def test_a_block_is_one_graph(family, base, implementation, checkpointing, plan_maker, monkeypatch):
    """torch.compile finds no break in a block, and changes no bit of the step."""
    plan, kernels = plan_for(base, plan_maker), everything(implementation)
    plain = step(base, plan, kernels, torch.bfloat16)
    torch._dynamo.reset()
    whole = torch.compile(family.block_forward, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(family, "block_forward", whole)
    compiled = step(base, plan, kernels, torch.bfloat16, checkpointing)
    assert torch.equal(plain[0], compiled[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, compiled[1][name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_every_optimizer_s_update_reaches_the_next_forward(optimizer, plan_maker):
    """B's copy behind W follows what the optimiser wrote, however it wrote it: the losses are eager's."""
    base, found = "tiny/ltx-video", {}
    plan = plan_for(base, plan_maker)
    plan = dataclasses.replace(plan, optimizer=dataclasses.replace(plan.optimizer, name=optimizer, schedule="constant"))
    for kernels in (EAGER, everything("triton")):
        model = make_model(base, plan, kernels, torch.bfloat16)
        updates = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
        losses = []
        for _ in range(3):
            by_sample = trainer.forward(plan, model, make_batch(base), STEP, 0).video.by_sample
            by_sample.sum().backward()
            updates.step(0.05)
            losses.append(by_sample.detach())
        found[kernels] = torch.stack(losses)
    eager, ours = found.values()
    assert apart(eager[2], eager[0]) > 0.05, "nothing moved, so nothing is shown"
    assert apart(ours, eager) < 0.01


def test_a_model_that_moves_keeps_weights_and_loras_in_one_matrix(plan_maker):
    """To another dtype and back, as a sample moves it between devices."""
    plan = plan_for("tiny/ltx-video", plan_maker)
    model = make_model("tiny/ltx-video", plan, everything("triton"), torch.bfloat16)
    layers = [module for module in model.transformer.modules() if isinstance(module, LoraLinear)]
    before = [layer.base_layer.weight.clone() for layer in layers]
    model.transformer.to(torch.float32).to(torch.bfloat16)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight) and not layer.base_layer.weight.requires_grad
        assert layer.base_layer.weight.untyped_storage().data_ptr() == layer.augmented.untyped_storage().data_ptr()
        layer.refresh()
        (b,) = [each.weight for each in layer.lora_B.values()]
        assert torch.equal(layer.augmented[:, layer.in_features :][:, : b.shape[1]], b.to(torch.bfloat16))
    with pytest.raises(NotImplementedError, match="not merged"):
        layers[0].merge()
