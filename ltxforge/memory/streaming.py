"""Streamed weights, which wait off the device and are in their modules only while these are called.

One streamer serves block swap and group offload. Weights come into a few slots on the device; a module's streamed
tensors are None at all other times, so that moving, saving or counting a model passes them by. What autograd would keep
of a slot is kept as its place in a unit, and brought again when it is asked for: no slot is read after it was
overwritten. Copies go one way; frozen weights are never written back. Whoever has autograd keep anything of a streamed
block must use `pack` and `unpack` (`strategy.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ltxforge.memory.ring import Moved, Ring, Slot
from ltxforge.memory.store import DiskStore, HostStore, Key, Store
from ltxforge.memory.transfers import Transfers, transfers_for
from ltxforge.memory.units import offsets, slot_count
from ltxforge.plan import StreamPlan

Result = TypeVar("Result")


class Description(NamedTuple):
    """A parked tensor, without its elements."""

    dtype: torch.dtype
    shape: torch.Size
    nbytes: int


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs in a model: an entry of a module's own table of parameters or buffers."""

    module: nn.Module
    name: str

    def fill(self, tensor: Tensor) -> None:
        """Put a tensor of one's own there, over the same memory: who keeps it can be seen (`Slot.is_held`)."""
        self._table[self.name] = nn.Parameter(tensor, requires_grad=False) if self._is_parameter else tensor.detach()

    def empty(self) -> None:
        self._table[self.name] = None

    @property
    def is_empty(self) -> bool:
        return self.name in self._table and self._table[self.name] is None

    @property
    def _is_parameter(self) -> bool:
        return self.name in self.module._parameters

    @property
    def _table(self) -> dict[str, Any]:
        return self.module._parameters if self._is_parameter else self.module._buffers


@dataclass(frozen=True)
class Piece:
    """A streamed tensor: of which block, where it belongs, and where it begins in its unit's bytes."""

    key: Key
    place: Place
    described: Description
    begin: int

    def of(self, slot: Slot) -> Tensor:
        """It, as it lies in a slot."""
        taken = slot.bytes[self.begin : self.begin + self.described.nbytes]
        return taken.view(self.described.dtype).view(self.described.shape)


@dataclass(frozen=True)
class Unit:
    """What travels together. The `used` bytes from its start are what training needs, `length` is all."""

    pieces: tuple[Piece, ...]
    used: int
    length: int


@dataclass(frozen=True, eq=False)
class Callee:
    """What is called with its weights in place: a block, or at "leaf" a layer; and its tensors, all of one unit."""

    unit: int
    pieces: tuple[Piece, ...]

    def views(self, slot: Slot, length: int) -> list[tuple[Place, Tensor]]:
        """Where each tensor belongs that lies in the slot's first `length` bytes, and it, as it lies there."""
        return slot.views(
            (self, length), lambda: [(piece.place, piece.of(slot)) for piece in self.pieces if piece.begin < length]
        )

    def empty(self) -> None:
        """Take the tensors out of their modules."""
        for piece in self.pieces:
            piece.place.empty()


@dataclass(frozen=True)
class Handle:
    """A saved tensor that lies in a slot: its place in a unit, from which it can be had again."""

    unit: int
    whole: bool
    dtype: torch.dtype
    begin: int
    size: torch.Size
    stride: tuple[int, ...]


class Streamer:
    """The streamed weights of one transformer.

    While it is loaded its parked tensors go to `park`; `attach` then takes its modules. `run` computes a block with its
    weights in place; blocks and layers that are called themselves, as diffusers' own forward does when it samples,
    bring theirs by hooks. `pack` and `unpack` are hooks for what autograd saves meanwhile.
    """

    def __init__(self, plan: StreamPlan, device: torch.device, transfers: Transfers | None = None) -> None:
        """
        Raises:
            PlanError: nothing can be written in the folder that the plan names.
        """
        self._plan, self._device = plan, device
        self._transfers = transfers or transfers_for(plan.overlapped, device)
        self._store: Store = (
            DiskStore(Path(plan.disk), device, self._transfers) if plan.disk else HostStore(device, self._transfers)
        )
        self._parked: dict[Key, Description] = {}
        self._units: list[Unit] = []
        self._blocks: dict[int, Callee] = {}
        self._ring: Ring | None = None
        self._hooks: list[Any] = []

    def park(self, block: int, name: str, tensor: Tensor) -> None:
        """Take a block's tensor, on the host, by its name within the block; see `quant.keep.Park`.

        Raises:
            DiskFullError: it waits on a disk, which is full.
        """
        key = block, name
        assert block in self._plan.blocks and key not in self._parked, f"block {block} has no {name} to park"
        self._parked[key] = Description(tensor.dtype, tensor.shape, tensor.nbytes)
        self._store.put(key, tensor)

    def attach(self, transformer: nn.Module, unused: Iterable[nn.Module] = ()) -> None:
        """Take the modules that the parked tensors belong to, once adapters are injected.

        Args:
            unused: modules that training never computes. Their weights come only when a block itself is called; a
                layer that travels alone never is.
        """
        left_out = {id(each) for module in unused for each in module.modules()} if self._plan.level == "block" else ()
        blocks = transformer.transformer_blocks
        places = {key: place_of(blocks[key[0]], key[1]) for key in self._parked}
        assert all(place.is_empty for place in places.values()), "a parked tensor's place in its module is empty"
        is_used = {key: id(place.module) not in left_out for key, place in places.items()}
        for keys in self._grouped():
            keys.sort(key=is_used.__getitem__, reverse=True)
            begins = offsets([self._parked[key].nbytes for key in keys])
            pieces = tuple(
                Piece(key, places[key], self._parked[key], at) for key, at in zip(keys, begins, strict=False)
            )
            self._units.append(Unit(pieces, begins[sum(map(is_used.__getitem__, keys))], begins[-1]))
        used, whole = [unit.used for unit in self._units], [unit.length for unit in self._units]
        self._store.seal([[(piece.key, piece.begin) for piece in unit.pieces] for unit in self._units], whole)
        slots = slot_count(self._plan, len(whole))
        self._ring = Ring(self._store, self._transfers, self._device, slots, used, whole)
        self._hook(blocks)

    def _grouped(self) -> list[list[Key]]:
        """The parked tensors of each unit: of its blocks, or of one layer."""
        found: dict[Any, list[Key]] = {}
        unit_of = {number: index for index, unit in enumerate(self._plan.units) for number in unit}
        for key in self._parked:
            found.setdefault(layer_of(key) if self._plan.level == "leaf" else unit_of[key[0]], []).append(key)
        assert {number for number, _ in self._parked} == self._plan.blocks, "each planned block has something parked"
        return list(found.values())

    def _hook(self, blocks: nn.ModuleList) -> None:
        """Whatever is called by itself brings its weights: a block, or at "leaf" the layer, with its adapter."""
        for index, unit in enumerate(self._units):
            if self._plan.level == "leaf":
                number, path = layer_of(unit.pieces[0].key)
                self._hook_one(blocks[number].get_submodule(path), Callee(index, unit.pieces))
                continue
            for number in sorted({piece.key[0] for piece in unit.pieces}):
                callee = Callee(index, tuple(piece for piece in unit.pieces if piece.key[0] == number))
                self._blocks[number] = callee
                self._hook_one(blocks[number], callee)

    def _hook_one(self, module: nn.Module, callee: Callee) -> None:
        def before(*_: Any) -> None:
            self._fill(callee, whole=True)

        def after(*_: Any) -> None:
            callee.empty()

        self._hooks += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]

    def run(self, number: int, call: Callable[[], Result]) -> Result:
        """`call()`, which computes a block, with what training needs of its weights in place."""
        callee = self._blocks.get(number)
        if callee is None:
            return call()
        self._fill(callee, whole=False)
        try:
            return call()
        finally:
            callee.empty()

    def _fill(self, callee: Callee, whole: bool) -> None:
        """Bring a callee's tensors and put them into their modules; without those that training does not need unless
        `whole`.
        """
        slot = self._brought.bring(callee.unit, whole)
        unit = self._units[callee.unit]
        for place, view in callee.views(slot, unit.length if whole else unit.used):
            place.fill(view)

    def pack(self, tensor: Tensor) -> Handle | Tensor:
        """What is kept of a saved tensor: where it comes from if it lies in a slot, else itself without its history."""
        slot = self._brought.holder(tensor)
        if slot is None or slot.unit is None:
            return tensor.detach()
        begin = tensor.data_ptr() - slot.bytes.data_ptr()
        whole = slot.length > self._units[slot.unit].used
        return Handle(slot.unit, whole, tensor.dtype, begin, tensor.shape, tensor.stride())

    def unpack(self, packed: Handle | Tensor) -> Tensor:
        """The saved tensor. One in a slot is there until two other units were asked for."""
        if not isinstance(packed, Handle):
            return packed
        slot = self._brought.bring(packed.unit, packed.whole)
        rest = len(slot.bytes) - packed.begin
        elements = slot.bytes[packed.begin : packed.begin + rest // packed.dtype.itemsize * packed.dtype.itemsize]
        return elements.view(packed.dtype).as_strided(packed.size, packed.stride)

    @property
    def _brought(self) -> Ring:
        assert self._ring is not None, "attach() comes first"
        return self._ring

    @property
    def moved(self) -> Moved:
        """What was copied to the device so far."""
        return self._brought.moved

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(self._units)

    @property
    def bytes_per_pass(self) -> int:
        """What one forward or one backward pass of training copies at most."""
        return sum(unit.used for unit in self._units)

    @property
    def slot_bytes(self) -> int:
        """On the device, now."""
        return self._brought.slot_bytes

    @property
    def host_bytes(self) -> int:
        """Of host memory, for what waits there."""
        return self._store.host_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        return self._store.notes

    def clear(self) -> None:
        """Give the slots' memory back to the device, until the next block is computed."""
        self._brought.clear()

    def close(self) -> None:
        """Let go of modules, slots and what waits. The transformer cannot be computed any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            if self._ring is not None:
                self._ring.clear()
        finally:  # a disk that failed in reading fails once more when what it reads is waited for
            self._store.close()


def layer_of(key: Key) -> tuple[int, str]:
    """The block of a tensor, and the path of its layer within it."""
    return key[0], key[1].rpartition(".")[0]


def place_of(block: nn.Module, name: str) -> Place:
    """Where a tensor of a block belongs, by its name before adapters were injected."""
    path, _, last = name.rpartition(".")
    module = block.get_submodule(path)
    return Place(getattr(module, "base_layer", module), last)
