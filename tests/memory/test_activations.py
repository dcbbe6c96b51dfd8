"""Activations on the host: what travels, what stays, what is held where and how long; the bits are the contract test's.

Streams are simulated: a copy comes as late as it may, and memory that is given up is NaN at once.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltxforge.memory.activations import ActivationOffload, HostBuffers, View, storages_of
from ltxforge.memory.simulated import SimulatedStreams
from ltxforge.memory.strategy import run_block_of
from ltxforge.memory.transfers import Plain, Transfers
from ltxforge.models.blocks import RunBlock, run_plainly
from ltxforge.plan import MemoryPlan

CPU, ROWS, WIDTH, BLOCKS = torch.device("cpu"), 24, 16, 5
HIDDEN = ROWS * WIDTH * 4


class Block(nn.Module):
    """Saves its input, a view of what it computes, twice the same tensor, its weight, and what all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(WIDTH))


def forward(block: Block, hidden: Tensor, shared: dict[str, Tensor]) -> Tensor:
    first, second = block.linear(torch.tanh(hidden)).chunk(2, dim=1)
    return hidden + first * second * block.scale + first.sin() * shared["table"]


def forward_both(block: Block, hidden: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: forward(block, each, shared) for name, each in hidden.items()}


def make_blocks() -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.ModuleList(Block() for _ in range(BLOCKS))


def strategy(checkpointed: tuple[int, ...], transfers: Transfers | None = None) -> tuple[RunBlock, ActivationOffload]:
    offload = ActivationOffload(CPU, BLOCKS - 1, transfers or SimulatedStreams(), least=1)
    return run_block_of(MemoryPlan(checkpointed, offload_activations=True), CPU, offload=offload), offload


def forward_pass(run: RunBlock, blocks: nn.ModuleList, rows: int = ROWS) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        hidden, shared = torch.randn(rows, WIDTH), {"table": torch.randn(rows, WIDTH)}
    for number, block in enumerate(blocks):
        hidden = run(number, forward, block, hidden, shared)
    return hidden.square().sum()


def gradients(run: RunBlock, blocks: nn.ModuleList, rows: int = ROWS) -> list[Tensor]:
    forward_pass(run, blocks, rows).backward()
    found = [block.scale.grad for block in blocks]
    for block in blocks:
        block.scale.grad = None
    return found


KINDS = {"inputs": tuple(range(BLOCKS)), "saved": (), "mixed": (1, 3)}


@pytest.mark.parametrize("transfers", [Plain, SimulatedStreams])
@pytest.mark.parametrize("checkpointed", KINDS.values(), ids=KINDS)
def test_the_same_bits_and_from_the_second_step_on_no_new_buffer(checkpointed, transfers):
    blocks = make_blocks()
    truth = gradients(run_plainly, blocks)
    run, offload = strategy(checkpointed, transfers())
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(gradients(run, blocks), truth, strict=True))
        made, held = offload.buffers.made, offload.buffers.bytes
    assert made >= BLOCKS - 1 and (offload.buffers.made, offload.buffers.bytes) == (made, held)
    if checkpointed == KINDS["inputs"]:
        assert held == (BLOCKS - 1) * HIDDEN, "the last block's input stays"


@pytest.mark.parametrize("transfers", [Plain, SimulatedStreams])
def test_streams_in_a_mapping(transfers):
    """As LTX-2's: each travels by itself, and comes back under its name."""
    blocks, shared = make_blocks(), {"table": torch.randn(ROWS, WIDTH)}
    start = {"video": torch.randn(ROWS, WIDTH), "audio": torch.randn(ROWS, WIDTH)}
    found = []
    for run in (run_plainly, strategy(KINDS["inputs"], transfers())[0]):
        hidden: Any = start
        for number, block in enumerate(blocks):
            hidden = run(number, forward_both, block, hidden, shared)
        (hidden["video"].sum() + 2 * hidden["audio"].square().sum()).backward()
        found.append([block.scale.grad for block in blocks])
        for block in blocks:
            block.scale.grad = None
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_weights_and_what_all_blocks_share_stay_and_a_tensor_travels_once():
    block, shared = Block(), {"table": torch.randn(ROWS, WIDTH)}
    offload = ActivationOffload(CPU, BLOCKS, Plain(), least=1)
    pack, unpack = offload.saved(0, storages_of(block) | storages_of((shared,)))
    kept: dict[int, Any] = {}

    def noted(tensor: Tensor) -> Any:
        packed = pack(tensor)
        kept[len(kept)] = (tensor.untyped_storage().data_ptr(), packed)
        return packed

    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(noted, unpack):
        forward(block, hidden, shared)
    travelled = {address for address, packed in kept.values() if isinstance(packed, View)}
    stayed = {address for address, packed in kept.values() if not isinstance(packed, View)}
    known = storages_of(block) | storages_of(shared)
    assert stayed == known and len(known) == 3 and not travelled & known
    times = sum(isinstance(packed, View) for _, packed in kept.values())
    assert times > len(travelled) == offload.buffers.made, "some were saved more than once, or as views"


def test_what_is_small_stays():
    offload = ActivationOffload(CPU, BLOCKS - 1, Plain(), least=HIDDEN + 1)
    run = run_block_of(MemoryPlan((0, 2), offload_activations=True), CPU, offload=offload)
    blocks = make_blocks()
    truth = gradients(run_plainly, blocks)
    assert all(torch.equal(*pair) for pair in zip(gradients(run, blocks), truth, strict=True))
    assert offload.buffers.bytes % (2 * HIDDEN) == 0 and offload.buffers.made == 2, "the linear's results alone"


def test_on_the_device_are_two_inputs_at_a_time_and_the_last():
    """In the forward one goes while the next is used; in the backward pass one comes while another is used."""
    run, _ = strategy(KINDS["inputs"])
    blocks, alive, most = make_blocks(), set(), []

    def watched(block: Block, hidden: Tensor, shared: dict[str, Tensor]) -> Tensor:
        key = object()
        alive.add(id(key))
        weakref.finalize(hidden.untyped_storage(), lambda: (alive.discard(id(key)), key))
        most.append(len(alive))
        return forward(block, hidden, shared)

    gc.collect()
    gc.disable()
    try:
        hidden, shared = torch.randn(ROWS, WIDTH), {"table": torch.randn(ROWS, WIDTH)}
        for number, block in enumerate(blocks):
            hidden = run(number, watched, block, hidden, shared)
        assert len(alive) <= 2, "of all the blocks' inputs the last one stays, and its predecessor until it is told"
        hidden.sum().backward()
    finally:
        gc.enable()
    assert max(most[:BLOCKS]) <= 2 and max(most[BLOCKS:]) <= 2 and len(most) == 2 * BLOCKS


class Guarded(Plain):
    """Notes tensors of the device whose memory goes while a copy from or to it has not been waited for."""

    overlaps = True

    def __init__(self) -> None:
        self.waited: set[int] = set()
        self.copies, self.faults = 0, []

    def copy(self, begun: Tensor, source: Tensor) -> int:
        super().copy(begun, source)
        self.copies += 1
        for tensor in (begun, source):
            weakref.finalize(tensor.untyped_storage(), self._goes, self.copies, tensor.nbytes)
        return self.copies

    def wait(self, copied: int) -> None:
        self.waited.add(copied)

    def _goes(self, copied: int, nbytes: int) -> None:
        if copied not in self.waited:
            self.faults.append((copied, nbytes))


@pytest.mark.parametrize("checkpointed", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_broken_off", [False, True])
def test_no_memory_goes_while_a_copy_needs_it(is_broken_off, checkpointed):
    """On a GPU it would be given to something else while the copying stream still reads or fills it."""
    transfers = Guarded()
    run, offload = strategy(checkpointed, transfers)
    blocks = make_blocks()
    for _ in range(2):
        gradients(run, blocks)
    if is_broken_off:
        loss = forward_pass(run, blocks)
        hook = blocks[2].scale.register_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            loss.backward()
        hook.remove()
        del loss
        gradients(run, blocks)  # only now autograd lets go of what it had not come to
    assert transfers.copies > 2 * (BLOCKS - 1) and not transfers.faults
    del run, offload, blocks
    gc.collect()
    assert not transfers.faults


def stop(_gradient: Tensor) -> Tensor:
    raise RuntimeError("stop")


class Told(Plain):
    """Notes the order in which copies begin and are waited for."""

    overlaps = True

    def __init__(self, names: dict[int, str]) -> None:
        self.names, self.told = names, []

    def copy(self, begun: Tensor, source: Tensor) -> Any:
        super().copy(begun, source)
        name = "to the host" if source.data_ptr() in self.names else "back"
        self.told.append(name)
        return name

    def wait(self, copied: Any) -> None:
        self.told.append(f"wait {copied}")


def test_the_backward_pass_fetches_one_block_ahead():
    blocks, shared = make_blocks(), {"table": torch.randn(ROWS, WIDTH)}
    names: dict[int, str] = {}
    transfers = Told(names)
    run, _ = strategy(KINDS["inputs"], transfers)
    hidden = torch.randn(ROWS, WIDTH)
    for number, block in enumerate(blocks):
        names[hidden.data_ptr()] = "input"
        hidden = run(number, forward, block, hidden, shared)
    loss = hidden.sum()
    transfers.told.clear()
    loss.backward()
    backward = [each for each in transfers.told if "back" in each]
    # The last block, whose input stayed, begins the one before; that begins the next before its own is awaited.
    assert backward == ["back", *["back", "wait back"] * 3, "wait back"]


@pytest.mark.parametrize("checkpointed", KINDS.values(), ids=KINDS)
def test_a_forward_without_its_backward_gives_its_buffers_back(checkpointed):
    """As a step that a stop breaks off; the next one has the right bits in the same buffers."""
    run, offload = strategy(checkpointed)
    blocks = make_blocks()
    truth = gradients(run_plainly, blocks)
    gradients(run, blocks)
    made = offload.buffers.made
    loss = forward_pass(run, blocks)
    del loss
    assert all(torch.equal(*pair) for pair in zip(gradients(run, blocks), truth, strict=True))
    assert offload.buffers.made == made


@pytest.mark.parametrize("checkpointed", KINDS.values(), ids=KINDS)
def test_sizes_may_change_and_the_largest_are_what_is_held(checkpointed):
    run, offload = strategy(checkpointed)
    blocks = make_blocks()
    for rows in (ROWS, 3 * ROWS, 2 * ROWS):
        truth = gradients(run_plainly, blocks, rows)
        assert all(torch.equal(*pair) for pair in zip(gradients(run, blocks, rows), truth, strict=True))
        if rows == 3 * ROWS:
            largest = offload.buffers.bytes
    alone, only = strategy(checkpointed)
    gradients(alone, blocks, 3 * ROWS)
    assert offload.buffers.bytes == largest == only.buffers.bytes


def test_a_branch_that_nobody_asks_for_comes_back_never():
    """Its graph is gone, and with it what waited: nothing is copied for it."""
    transfers = SimulatedStreams()
    run, offload = strategy((), transfers)
    blocks, shared = make_blocks(), {"table": torch.randn(ROWS, WIDTH)}
    hidden: Any = {"video": torch.randn(ROWS, WIDTH), "audio": torch.randn(ROWS, WIDTH)}
    for number, block in enumerate(blocks):
        hidden = run(number, forward_both, block, hidden, shared)
    held = len(offload.buffers._free)
    del hidden["audio"]
    free = len(offload.buffers._free)
    assert free > held, "what the branch kept is free as soon as its graph is gone"
    hidden["video"].sum().backward()
    assert all(torch.isfinite(block.scale.grad).all() for block in blocks)


def test_buffers_fit_and_grow():
    buffers = HostBuffers(CPU, lambda: None)
    small, large = buffers.lend(100), buffers.lend(1000)
    buffers.take_back(small)
    buffers.take_back(large)
    assert buffers.lend(90) is small and buffers.lend(90) is large and buffers.bytes == 1100
    buffers.take_back(large)
    assert len(buffers.lend(2000).bytes) == 2000 and (buffers.bytes, buffers.made) == (2100, 3)


def test_buffers_that_nothing_is_in_make_room():
    """A sample finds the host's memory; what is lent stays, and a step asks for the rest again."""
    buffers = HostBuffers(CPU, lambda: None)
    lent, idle = buffers.lend(100), buffers.lend(1000)
    gone = weakref.ref(idle)
    buffers.take_back(idle)
    del idle
    buffers.clear()
    assert gone() is None and buffers.bytes == 100 == len(lent.bytes)
    assert len(buffers.lend(1000).bytes) == 1000 and buffers.bytes == 1100
