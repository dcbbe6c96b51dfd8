"""Activation checkpointing (arXiv 1604.06174): a block keeps nothing for its backward pass and is computed again there.

What autograd would keep is only counted, and made again when the backward pass first asks for one of it. Draws inside
the block are the same both times, because torch's generators are put back. The second computation ends with the last
tensor that is needed, keeps none whose graph is gone, and each goes when it was used: no more is alive than with
`torch.utils.checkpoint`. A graph is gone through once, and blocks are not recomputed within each other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")
Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]
Around = Callable[[Callable[[], Result]], Result]

_here = threading.local()  # the backward pass of a GPU has a thread of its own


def keep(tensor: Tensor) -> Tensor:
    """What is kept of a saved tensor by default: itself, without its history."""
    return tensor.detach()


def nothing_around(call: Callable[[], Result]) -> Result:
    """The default of `around`."""
    return call()


def recomputed(
    call: Callable[[], Result],
    device: torch.device,
    pack: Pack = keep,
    unpack: Unpack = keep,
    around: Around[Any] = nothing_around,
) -> Result:
    """`call()`, whose saved tensors are made again in the backward pass by a second `call()`.

    Args:
        call: holds its inputs; computes the same both times. The second time it may be broken off by an exception.
        device: whose generator it may draw from, beside the CPU's.
        pack, unpack: what is kept of a tensor that the second call saves, until its own backward pass asks for it.
        around: is given each of the two calls to make: fetches before what they need. No exception of ours passes it.
    """
    if not torch.is_grad_enabled():
        return around(call)
    again = _Again(call, device, pack, unpack, around)

    def first() -> Result:
        with _alone(), saved_tensors_hooks(again.count, again.take):
            return call()

    return around(first)


class _Place:
    """Stands for a saved tensor in the graph, and dies with its node."""

    __slots__ = ("__weakref__",)


class _Enough(Exception):
    """All that the backward pass needs was made."""


class _Again:
    """The saved tensors of one call, by the order in which they were saved."""

    def __init__(
        self, call: Callable[[], object], device: torch.device, pack: Pack, unpack: Unpack, around: Around[Any]
    ) -> None:
        self._call: Callable[[], object] | None = call
        self._device, self._pack, self._unpack, self._around = device, pack, unpack, around
        self._random = _random_state(device)
        self._places: list[weakref.ref[_Place]] = []
        self._made: weakref.WeakKeyDictionary[_Place, Any] = weakref.WeakKeyDictionary()

    def count(self, _tensor: Tensor) -> _Place:
        place = _Place()
        self._places.append(weakref.ref(place))
        return place

    def take(self, place: _Place) -> Tensor:
        if self._call is not None:
            call, self._call = self._call, None  # the inputs go as soon as the second call needs them no more
            self._make(call)
        assert place in self._made, "a saved tensor was asked for twice: a graph is gone through once"
        return self._unpack(self._made.pop(place))

    def _make(self, call: Callable[[], object]) -> None:
        now = _random_state(self._device)
        _put_back(self._random, self._device)
        try:
            self._around(lambda: self._until_enough(call))
        except BaseException:
            self._made.clear()
            raise
        finally:
            _put_back(now, self._device)

    def _until_enough(self, call: Callable[[], object]) -> None:
        saved = 0

        def keep_next(tensor: Tensor) -> None:
            nonlocal saved
            place, saved = self._places[saved](), saved + 1
            if place is not None:
                self._made[place] = self._pack(tensor)
            if saved == len(self._places):
                raise _Enough

        try:
            with _alone(), torch.enable_grad(), saved_tensors_hooks(keep_next, _never):
                call()
        except _Enough:
            return
        raise AssertionError(f"a block saved {saved} tensors when it was computed again, not {len(self._places)}")


def _never(_packed: Any) -> Tensor:
    raise AssertionError("the second call's own graph is never gone through")


@contextmanager
def _alone() -> Iterator[None]:
    assert not getattr(_here, "recomputing", False), "recomputed blocks do not nest"
    _here.recomputing = True
    try:
        yield
    finally:
        _here.recomputing = False


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU, about 1 µs and 5 kB, and of the device: a seed and an offset on a GPU, which waits for nothing."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _put_back(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
