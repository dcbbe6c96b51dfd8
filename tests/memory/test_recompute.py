"""Own activation checkpointing against torch's: the same bits, no more that is alive, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ltxforge.memory.recompute import recomputed

CPU = torch.device("cpu")
BLOCKS, ROWS, WIDTH = 5, 32, 64
Call = Callable[[nn.Module, Tensor], Any]


class Block(nn.Module):
    """Two branches of unlike length, with draws, and a custom function among them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.nn.functional.dropout(torch.tanh(self.up(hidden)), 0.25)
        return hidden + self.down(Swish.apply(inner)) * 0.5


class Swish(torch.autograd.Function):
    """x·sigmoid(x), which keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return upstream * gate * (1 + x * (1 - gate))


def make_blocks() -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.ModuleList(Block() for _ in range(BLOCKS))


def plainly(block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden)


def ours(block: nn.Module, hidden: Tensor) -> Tensor:
    return recomputed(lambda: block(hidden), CPU)


def torchs(block: nn.Module, hidden: Tensor) -> Tensor:
    return checkpoint(block, hidden, use_reentrant=False)


def gradients(call: Call, blocks: nn.ModuleList | None = None) -> list[Tensor]:
    blocks = make_blocks() if blocks is None else blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        start = hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
        for block in blocks:
            hidden = call(block, hidden)
        torch.rand(7)  # what the block drew in the backward pass must not move this
        loss = (hidden * torch.rand(ROWS, WIDTH)).sum()
        loss.backward()
        return [start.grad, torch.rand(3), *(each.grad for each in blocks.parameters())]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_same_bits_as_torch_s_and_as_without(every):
    def some(call: Call) -> Call:
        numbers = iter(range(BLOCKS))
        return lambda block, hidden: (call if next(numbers) % every == 0 else plainly)(block, hidden)

    plain, stock, own = gradients(plainly), gradients(some(torchs)), gradients(some(ours))
    for truth, other, found in zip(plain, stock, own, strict=True):
        assert torch.equal(truth, other) and torch.equal(truth, found)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages made while it is entered, as long as each lives; those of `before` are not."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {each.untyped_storage()._cdata for each in before}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def alive(call: Call) -> tuple[int, int, int]:
    """Bytes at the peak, after the forward, and after the backward, with nobody collecting cycles."""
    blocks = make_blocks()
    for each in blocks.parameters():
        each.grad = torch.zeros_like(each)
    before = [tensor for each in blocks.parameters() for tensor in (each, each.grad)]
    gc.collect()
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]), Alive(before) as counted:
            hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
            for block in blocks:
                hidden = call(block, hidden)
            loss = hidden.sum()
            del hidden
            kept = counted.now
            loss.backward()
            del loss
            return counted.peak, kept, counted.now
    finally:
        gc.enable()


def test_no_more_is_alive_than_with_torch_s_and_nothing_stays():
    plain, stock, own = alive(plainly), alive(torchs), alive(ours)
    assert own[0] <= stock[0] < plain[0]
    assert own[1] == BLOCKS * ROWS * WIDTH * 4 + 4, "a block's input each, and the loss"
    assert own[1] <= stock[1] < plain[1] / 3
    assert own[2] <= min(stock[2], plain[2])


def test_of_a_graph_that_is_gone_nothing_is_made_again():
    """A branch of which nothing is asked, as that of a modality without a loss, keeps nothing in the backward pass."""
    kept = []
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def both() -> tuple[Tensor, Tensor]:
        return torch.tanh(one(hidden)), torch.tanh(other(hidden))

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor.detach()

    hidden = torch.randn(ROWS, WIDTH)
    asked, left = recomputed(both, CPU, pack)
    del left
    asked.sum().backward()
    assert one.weight.grad is not None and other.weight.grad is None
    assert len(kept) == 2  # the linear's input and tanh's result, each of one branch


def test_what_a_strategy_makes_of_saved_tensors_is_asked_for_in_the_backward_pass_alone():
    told: list[str] = []
    block = Block()

    def around(call: Callable[[], Any]) -> Any:
        told.append("fetch")
        return call()

    def pack(tensor: Tensor) -> Tensor:
        told.append("pack")
        return tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        told.append("unpack")
        return tensor

    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    loss = recomputed(lambda: block(hidden), CPU, pack, unpack, around).sum()
    assert told == ["fetch"]
    loss.backward()
    assert told[1] == "fetch" and told.count("pack") == told.count("unpack") > 3
    assert told.index("unpack") > len(told) - told[::-1].index("pack") - 1, "all is made before the first is taken"


def test_an_error_in_the_second_call_leaves_no_trace():
    blocks, calls = make_blocks(), []

    def fails_again(block: nn.Module, hidden: Tensor) -> Tensor:
        def call() -> Tensor:
            calls.append(1)
            if len(calls) == BLOCKS + 1:
                raise RuntimeError("the disk is gone")
            return block(hidden)

        return recomputed(call, CPU)

    state = torch.get_rng_state()
    hidden = torch.randn(ROWS, WIDTH)
    for block in blocks:
        hidden = fails_again(block, hidden)
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        hidden.sum().backward()
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)
    assert all(torch.equal(*pair) for pair in zip(gradients(plainly), gradients(ours), strict=True))


def test_a_block_that_saves_something_else_the_second_time_is_refused():
    calls = []

    def call() -> Tensor:
        calls.append(1)
        return hidden.tanh() if len(calls) == 2 else hidden.tanh().exp()

    hidden = torch.randn(4, requires_grad=True)
    loss = recomputed(call, CPU).sum()
    with pytest.raises(AssertionError, match="saved 1 tensors when it was computed again, not 2"):
        loss.backward()


def test_blocks_are_not_recomputed_within_each_other():
    hidden = torch.randn(4, requires_grad=True)
    with pytest.raises(AssertionError, match="do not nest"):
        recomputed(lambda: recomputed(hidden.tanh, CPU), CPU)
    assert recomputed(hidden.tanh, CPU).requires_grad, "the refusal is over"


def test_a_graph_is_gone_through_once():
    hidden = torch.randn(4, requires_grad=True)
    loss = recomputed(hidden.tanh, CPU).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a graph is gone through once"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_call(mode):
    block, told = Block(), []

    def around(call: Callable[[], Any]) -> Any:
        told.append(1)
        return call()

    with mode():
        hidden = torch.randn(ROWS, WIDTH)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            found = recomputed(lambda: block(hidden), CPU, around=around)
            torch.manual_seed(1)
            assert torch.equal(found, block(hidden))
    assert told == [1] and not found.requires_grad
