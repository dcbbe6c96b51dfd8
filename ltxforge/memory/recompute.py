"""Activation checkpointing (arXiv 1604.06174): a block keeps nothing for its backward pass and is computed again there.

What autograd would keep is counted instead, and made again when the backward pass first asks for one of it. Everything
that a strategy moves (weights that are streamed, inputs that wait on the host) is fetched inside the call, so that the
second one fetches it too. Draws inside the block are the same in both, because torch's generators are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")
Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


def keep(tensor: Tensor) -> Tensor:
    """What is kept of a saved tensor by default: itself, without its history."""
    return tensor.detach()


def recomputed(call: Callable[[], Result], device: torch.device, pack: Pack = keep, unpack: Unpack = keep) -> Result:
    """`call()`, whose saved tensors are made again in the backward pass by a second `call()`.

    Args:
        call: holds its inputs; the same both times.
        device: whose generator it may draw from, beside the CPU's.
        pack, unpack: what is kept of a tensor that the second call saves, until its own backward pass asks for it.
    """
    if not torch.is_grad_enabled():
        return call()
    again = _Again(call, device, pack, unpack)
    with saved_tensors_hooks(again.count, again.take):
        return call()


class _Again:
    """The saved tensors of one call, by the order in which they were saved."""

    def __init__(self, call: Callable[[], object], device: torch.device, pack: Pack, unpack: Unpack) -> None:
        self._call, self._device, self._pack, self._unpack = call, device, pack, unpack
        self._random = _random_state(device)
        self._counted = 0
        self._made: dict[int, Any] = {}
        self._is_made = False

    def count(self, _tensor: Tensor) -> int:
        self._counted += 1
        return self._counted - 1

    def take(self, number: int) -> Tensor:
        if not self._is_made:
            self._make()
        assert number in self._made, "a saved tensor was asked for twice: a graph is gone through once"
        return self._unpack(self._made.pop(number))

    def _make(self) -> None:
        def keep_next(tensor: Tensor) -> None:
            self._made[len(self._made)] = self._pack(tensor)

        now = _random_state(self._device)
        _put_back(self._random, self._device)
        try:
            with torch.enable_grad(), saved_tensors_hooks(keep_next, _never):
                self._call()
        finally:
            _put_back(now, self._device)
        assert len(self._made) == self._counted, "a block saved other tensors when it was computed again"
        self._is_made = True
        del self._call


def _never(_packed: Any) -> Tensor:
    raise AssertionError("the second call's own graph is never gone through")


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return (
        states if device.type in ("cpu", "meta") else [*states, torch.get_device_module(device).get_rng_state(device)]
    )


def _put_back(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
