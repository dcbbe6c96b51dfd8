"""Optimisers against torch and bitsandbytes used directly, and state that survives a save to the last bit."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ltxforge.optim import Optimizer
from ltxforge.plan import OptimizerPlan

PLAN = OptimizerPlan("adamw", 1e-2, (0.9, 0.99), 1e-8, 0.01, "constant", 0, 10, 0.0, 2.0)
NAMES = ["adamw", "adamw8bit"]


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # The second is large enough (≥ 4096) for bitsandbytes to keep 8-bit moments.
    sizes = {"a.lora_A.weight": (4, 32), "b.lora_B.weight": (128, 64)}
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(optimizer.parameters, step)
        optimizer.step(1e-2 / (1 + step))


def test_adamw_is_torch_s():
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(PLAN, ours)
    reference = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(1e-2 / (1 + step))
        reference.param_groups[0]["lr"] = 1e-2 / (1 + step)
        reference.step()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in ours)
    assert all(parameter.grad is None for parameter in ours.values())


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_continues_bit_for_bit(name, tmp_path):
    plan = dataclasses.replace(PLAN, name=name)
    straight = Optimizer(plan, parameters())
    run(straight, 0, 8)

    first = Optimizer(plan, parameters())
    run(first, 0, 3)
    save_file({k: v.clone().contiguous() for k, v in first.state().items()}, tmp_path / "optimizer.safetensors")
    second = Optimizer(plan, {k: nn.Parameter(v.detach().clone()) for k, v in first.parameters.items()})
    second.load_state(load_file(tmp_path / "optimizer.safetensors"))
    run(second, 3, 8)
    for key, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[key])
    assert all(torch.equal(value, second.state()[key]) for key, value in straight.state().items())


def test_8bit_moments_are_really_8bit():
    optimizer = Optimizer(dataclasses.replace(PLAN, name="adamw8bit"), parameters())
    run(optimizer, 0, 1)
    dtypes = {key.rpartition("/")[2]: value.dtype for key, value in optimizer.state().items() if key.startswith("b.")}
    assert dtypes["state1"] == dtypes["state2"] == torch.uint8


def test_masters_must_be_float32():
    with pytest.raises(AssertionError, match="float32"):
        Optimizer(PLAN, {"a": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))})
