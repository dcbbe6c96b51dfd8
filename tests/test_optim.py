"""Optimisers against torch and bitsandbytes used directly, and state that survives a save to the last bit."""

import dataclasses

import bitsandbytes.optim
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ltxforge.errors import RunError
from ltxforge.moments import LEAST_8BIT, LEAST_PAGED, MOMENTS, optimizer_bytes, paged_bytes, saved_bytes, tensor_bytes
from ltxforge.optim import BITSANDBYTES, SLOW_BETA, SLOW_WEIGHT, Optimizer
from ltxforge.plan import OptimizerPlan
from ltxforge.tensor_files import LENGTH_BYTES, save_tensors

PLAN = OptimizerPlan("adamw", 1e-2, (0.9, 0.99), 1e-8, 0.01, "constant", 0, 10, 0.0, 2.0)
# From 4096 numbers on bitsandbytes keeps 8-bit moments; 4355 is no whole number of its blocks.
SIZES = {"a.lora_A.weight": (4, 32), "b.lora_B.weight": (128, 64), "c.lora_A.weight": (67, 65)}
LATE = "c.lora_A.weight"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="pages are a GPU's")


def plan_of(name: str) -> OptimizerPlan:
    return dataclasses.replace(PLAN, name=name)


def parameters(device: str = "cpu", sizes=SIZES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(size, generator=generator).to(device)) for name, size in sizes.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """Anew for every step; one parameter gets none in the first four, as sound does in batches without any."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        if name != LATE or step >= 4:
            parameter.grad = gradient.to(parameter.device)


def run(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(optimizer.parameters, step)
        optimizer.step(1e-2 / (1 + step))


def saved_and_loaded(optimizer: Optimizer, path) -> dict[str, torch.Tensor]:
    save_file({name: value.cpu().clone().contiguous() for name, value in optimizer.state().items()}, path)
    return load_file(path)


def resumed(name: str, first: Optimizer, path) -> Optimizer:
    """Another optimiser with what the first one saved, over copies of its parameters."""
    second = Optimizer(plan_of(name), {k: nn.Parameter(v.detach().clone()) for k, v in first.parameters.items()})
    second.load_state(saved_and_loaded(first, path))
    return second


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
        reference.zero_grad()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in ours)
    assert all(parameter.grad is None for parameter in ours.values())


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw8bit", "AdamW8bit", {"eps": 1e-8}),
        ("paged_adamw8bit", "AdamW8bit", {"eps": 1e-8}),
        ("lion8bit", "Lion8bit", {}),
        ("paged_lion8bit", "Lion8bit", {}),
        ("ademamix8bit", "AdEMAMix8bit", {"eps": 1e-8, "betas": (0.9, 0.99, SLOW_BETA), "alpha": SLOW_WEIGHT}),
    ],
)
def test_each_name_is_bitsandbytes_own(name, kind, options):
    """To the last bit; a paged one on a CPU is the plain one, without a warning."""
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(plan_of(name), ours)
    options = {"betas": (0.9, 0.99), "weight_decay": 0.01} | options
    reference = getattr(bitsandbytes.optim, kind)(theirs.values(), lr=1.0, **options)
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(1e-2 / (1 + step))
        reference.param_groups[0]["lr"] = 1e-2 / (1 + step)
        reference.step()
        reference.zero_grad()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(ours[LATE], parameters()[LATE])


def test_lion_is_the_paper_s():
    """arXiv:2302.06675, algorithm 2, in float64, where moments are float32: x −= lr·(sign(β₁m + (1 − β₁)g) + λx)."""
    ours = parameters(sizes={"a": (4, 32)})
    x, m = ours["a"].detach().double().clone(), torch.zeros(4, 32, dtype=torch.float64)
    optimizer = Optimizer(plan_of("lion8bit"), ours)
    for step in range(5):
        give_gradients(ours, step)
        gradient = ours["a"].grad.double().clone()
        optimizer.step(1e-2)
        x -= 1e-2 * (torch.sign(0.9 * m + 0.1 * gradient) + 0.01 * x)
        m = 0.99 * m + 0.01 * gradient
    assert torch.allclose(ours["a"].double(), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize("name", MOMENTS)
def test_saved_state_continues_bit_for_bit(name, stop, tmp_path):
    """Saved before and after a parameter has its first gradient."""
    straight, first = (Optimizer(plan_of(name), parameters()) for _ in range(2))
    run(straight, 0, 8)
    run(first, 0, stop)
    second = resumed(name, first, tmp_path / "optimizer.safetensors")
    before, after = first.state(), second.state()
    assert before.keys() == after.keys() and any(LATE in key for key in after) == (stop > 4)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    run(second, stop, 8)
    for key, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[key])
    assert all(torch.equal(value, second.state()[key]) for key, value in straight.state().items())


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_8bit_moments_are_really_8bit(name):
    optimizer = Optimizer(plan_of(name), parameters())
    run(optimizer, 0, 1)
    found = {key: value.dtype for key, value in optimizer.state().items() if "/state" in key}
    states = [f"state{number}" for number in range(1, 1 + MOMENTS[name].maps)]
    kept = {"a.lora_A.weight": torch.float32, "b.lora_B.weight": torch.uint8}  # the third had no gradient yet
    assert found == {f"{owner}/{state}": dtype for owner, dtype in kept.items() for state in states}


@pytest.mark.parametrize("sizes", [(1,), (LEAST_8BIT - 1,), (LEAST_8BIT,), (LEAST_8BIT + 1, 300, 100_001)])
@pytest.mark.parametrize("name", MOMENTS)
def test_bytes_are_those_of_the_real_state(name, sizes, tmp_path):
    """In memory, storage by storage, before and after a restore; and in the file that a checkpoint has."""
    first = Optimizer(plan_of(name), parameters(sizes={f"p{n}": (size,) for n, size in enumerate(sizes)}))
    give_gradients(first.parameters, 5)
    first.step(1e-3)
    for optimizer in (first, resumed(name, first, tmp_path / "loaded.safetensors")):
        tensors = [value for state in optimizer._engine.state.values() for value in state.values()]
        storages = {value.untyped_storage().data_ptr(): value.nbytes for value in tensors if torch.is_tensor(value)}
        assert sum(storages.values()) == optimizer_bytes(name, sizes)
        assert optimizer_bytes(name, sizes) >= sum(tensor_bytes(name, size) for size in sizes)
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(path, {key: value.clone() for key, value in first.state().items()})
    header = int.from_bytes(path.read_bytes()[:LENGTH_BYTES], "little")
    assert path.stat().st_size - LENGTH_BYTES - header == saved_bytes(name, sizes)


def test_what_can_be_paged():
    sizes = (LEAST_PAGED - 1, LEAST_PAGED, 3 * LEAST_PAGED)
    assert paged_bytes("adamw8bit", sizes) == 0
    assert paged_bytes("paged_lion8bit", sizes) == 4 * LEAST_PAGED
    assert paged_bytes("paged_adamw8bit", sizes) == 8 * LEAST_PAGED


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("b.lora_B.weight/absmax1"),
        lambda saved: saved.update({"b.lora_B.weight/absmax1": torch.zeros(4)}),
        lambda saved: saved.update({"b.lora_B.weight/state1": torch.zeros(128, 64)}),
        lambda saved: saved.update({"elsewhere/step": torch.zeros(())}),
    ],
)
def test_another_optimiser_s_state_is_refused(change):
    """A version of bitsandbytes with other blocks, say: never cast, never half taken."""
    first = Optimizer(plan_of("adamw8bit"), parameters())
    run(first, 0, 2)
    saved = {key: value.clone() for key, value in first.state().items()}
    change(saved)
    with pytest.raises(RunError, match="does not fit the optimiser"):
        Optimizer(plan_of("adamw8bit"), parameters()).load_state(saved)


@needs_gpu
@pytest.mark.parametrize("name", [name for name, moments in MOMENTS.items() if moments.paged])
def test_paged_moments_are_paged_again_after_a_restore(name, tmp_path):
    """And the numbers are those of the optimiser that pages nothing, to the last bit, with a stop between."""
    sizes = {"a": (LEAST_PAGED // 100, 101), "b": (64, 64)}
    plain = Optimizer(plan_of(name.removeprefix("paged_")), parameters("cuda", sizes))
    run(plain, 0, 8)
    first = Optimizer(plan_of(name), parameters("cuda", sizes))
    run(first, 0, 3)
    second = resumed(name, first, tmp_path / "optimizer.safetensors")
    run(second, 3, 8)
    for key, value in second.state().items():
        is_large = key.startswith("a/state")
        assert getattr(value, "is_paged", False) == is_large, key
        assert torch.equal(value.cpu(), plain.state()[key].cpu())
    assert all(torch.equal(plain.parameters[key], value) for key, value in second.parameters.items())


def test_masters_must_be_float32():
    with pytest.raises(AssertionError, match="float32"):
        Optimizer(PLAN, {"a": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))})
