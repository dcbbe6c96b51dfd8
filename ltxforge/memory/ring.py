"""A few slots on the device that streamed units take turns in, and what is brought before it is asked for.

Knows no module: a unit is a number. Decides which slot is given up, the one that was asked for longest ago, and what
comes next: what came next the last time that the same two units were asked for in the same kind of pass. So one rule
serves the forward, the backward pass with its recomputation, and sampling, whichever way each goes through the model;
the first pass of a kind is the one that it learns from. A slot is never overwritten while somebody has a tensor in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ltxforge.memory.store import Store
from ltxforge.memory.transfers import Transfers


@dataclass
class Moved:
    """What was copied to the device so far.

    `waited` counts the units that were asked for before they were on their way, `left` the slots whose memory was left
    to somebody who still had a tensor in it.
    """

    units: int = 0
    bytes: int = 0
    waited: int = 0
    left: int = 0


Views = TypeVar("Views")


class Slot:
    """A place on the device. `length` bytes of `unit` are in it, or on their way while `arrival` is not None."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` is uint8, a storage of its own."""
        self.bytes = memory
        self.unit: int | None = None
        self.length = 0
        self.arrival: Callable[[], Any] | None = None
        self._views: dict[Any, Any] = {}
        self._storage = memory.untyped_storage()
        self._known = self._uses()

    def views(self, key: Any, make: Callable[[], Views]) -> Views:
        """`make()`, tensors that lie in this slot, made once and kept as long as the slot is."""
        if key not in self._views:
            before = self._uses()
            self._views[key] = make()
            self._known += self._uses() - before
        return self._views[key]

    @property
    def is_held(self) -> bool:
        """Whether somebody else still has a tensor that lies in it."""
        return self._uses() > self._known

    def _uses(self) -> int:
        """How many tensors lie in its storage."""
        return torch._C._storage_Use_Count(self._storage._cdata)


class Ring:
    """`bring` is the one way in. Slots are made when they are first needed, and again after `clear`.

    Args:
        count: how many slots there are.
        used: bytes of each unit, from its start, that training needs.
        whole: bytes of each unit.
    """

    def __init__(
        self,
        store: Store,
        transfers: Transfers,
        device: torch.device,
        count: int,
        used: Sequence[int],
        whole: Sequence[int],
    ) -> None:
        self._store, self._transfers, self._device = store, transfers, device
        self._count, self._lengths = count, (used, whole)
        self._slots: list[Slot] = []  # the one that was asked for longest ago comes first
        self._follows: dict[Any, int] = {}
        self._trail: tuple[Any, int | None, int | None] = (None, None, None)
        self.moved = Moved()

    @property
    def slot_bytes(self) -> int:
        """On the device, now."""
        return sum(slot.bytes.nbytes for slot in self._slots)

    def bring(self, unit: int, whole: bool = False) -> Slot:
        """The slot in which a unit, or what training needs of it, is for all that is computed from here on.

        Until two other units were asked for; what is brought ahead takes a place too.
        """
        self._learn(unit, whole)
        length = self._lengths[whole][unit]
        self._make_room(whole)
        slot = self._holder(unit, length)
        if slot is None:
            self.moved.waited += 1
            slot = self._begin(unit, length)
        self._arrived(slot)
        self._slots.remove(slot)
        self._slots.append(slot)
        following = self._follows.get(self._trail)
        if following is not None and self._transfers.overlaps and self._count > 1:
            ahead = self._lengths[whole][following]
            if self._holder(following, ahead) is None:
                self._begin(following, ahead)
        return slot

    def holder(self, tensor: Tensor) -> Slot | None:
        """The slot that a tensor is a view of."""
        address = tensor.untyped_storage().data_ptr()
        return next((slot for slot in self._slots if slot.bytes.data_ptr() == address), None)

    def clear(self) -> None:
        """Give the slots' memory back, until a unit is asked for."""
        for slot in self._slots:
            if slot.arrival is not None:
                slot.arrival()
        self._transfers.drain()
        self._slots.clear()

    def _learn(self, unit: int, whole: bool) -> None:
        _, _, current = self._trail
        if unit != current:
            self._follows[self._trail] = unit
            kind = (whole, "backward" if in_backward() else torch.is_grad_enabled())
            self._trail = kind, current, unit

    def _make_room(self, whole: bool) -> None:
        """Slots of the size that this kind of pass needs."""
        size = max(self._lengths[whole])
        if self._slots and len(self._slots[0].bytes) != size:
            self.clear()
        if not self._slots:
            made = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self._count)]
            self._slots = [Slot(each) for each in made]

    def _holder(self, unit: int, length: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit and slot.length >= length), None)

    def _begin(self, unit: int, length: int) -> Slot:
        """Start bringing a unit into the slot that was asked for longest ago."""
        if self._slots[0].is_held:
            # Tensors that autograd keeps pass `pack`, but what a Function keeps by itself does not: torch.compile's
            # backends without AOTAutograd, for one. Overwritten they would be wrong without a word.
            self._slots[0] = Slot(torch.empty_like(self._slots[0].bytes))
            self.moved.left += 1
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.unit, slot.arrival = None, None
        begun = self._transfers.begin(slot.bytes)
        slot.arrival = self._store.send(unit, length, partial(self._transfers.copy, begun))
        slot.unit, slot.length = unit, length
        self.moved.units += 1
        self.moved.bytes += length
        return slot

    def _arrived(self, slot: Slot) -> None:
        if slot.arrival is None:
            return
        arrival, slot.arrival = slot.arrival, None
        try:
            self._transfers.wait(arrival())
        except BaseException:
            slot.unit = None
            raise


def in_backward() -> bool:
    """Whether autograd is going through a graph in this thread."""
    return torch._C._current_graph_task_id() != -1
