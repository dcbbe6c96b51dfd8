"""Activations that wait in host memory from the forward to the backward pass.

Of a block that is computed again these are its inputs, of another one whatever large autograd saves in it. Each storage
travels once, whole, and gives back the bits that left; weights and what all blocks share stay. With streams copies run
beside the computation, in the backward pass one block ahead; without, they are made on the spot. What the last block
needs stays, because the backward pass begins with it. Decides nothing about which blocks there are.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ltxforge.memory.host_buffer import HostBuffer
from ltxforge.memory.recompute import Pack, Unpack
from ltxforge.memory.transfers import Transfers, transfers_for

LEAST_BYTES = 2**20  # what is smaller stays: a copy of it costs more than its room is worth


class HostBuffers:
    """Host memory that is lent and taken back: from the second step on none is allocated.

    `bytes` is all that was allocated, `made` how often that happened.
    """

    def __init__(self, device: torch.device, drain: Callable[[], None]) -> None:
        self._device, self._drain = device, drain
        self._free: list[HostBuffer] = []
        self.bytes = self.made = 0

    def lend(self, count: int) -> HostBuffer:
        """At least `count` bytes: the smallest free buffer, or a new one in the place of one that is too small."""
        by_size = sorted(self._free, key=lambda buffer: len(buffer.bytes))
        fitting = [buffer for buffer in by_size if len(buffer.bytes) >= count]
        if by_size:
            self._free.remove(fitting[0] if fitting else by_size[-1])
        if fitting:
            return fitting[0]
        self.bytes += count - (len(by_size[-1].bytes) if by_size else 0)
        self.made += 1
        return HostBuffer(count, self._device, self._drain)

    def take_back(self, buffer: HostBuffer) -> None:
        """The buffer may be lent again."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Give what is not lent back to the system, until it is asked for again."""
        self.bytes -= sum(len(buffer.bytes) for buffer in self._free)
        self._free.clear()


class Away:
    """One storage that waits on the host; its buffer is given back when nobody can ask for it any more.

    `leaving` is what left and its copy's mark, until `gone`.
    """

    leaving: tuple[Tensor, Any] | None = None
    _buffer: HostBuffer | None = None
    _back: Tensor | None = None
    _coming: tuple[Any] | None = None

    def __init__(
        self, storage: torch.UntypedStorage, device: torch.device, buffers: HostBuffers, transfers: Transfers
    ) -> None:
        self._bytes, self._device, self._buffers, self._transfers = storage.nbytes(), device, buffers, transfers
        self._buffer = buffers.lend(self._bytes)
        source = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # type: ignore[call-overload]
        self.leaving = source, transfers.copy(transfers.begin(self._buffer.bytes), source)

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._back is None:
            assert self._buffer is not None
            self._back = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
            begun = self._transfers.begin(self._back)
            self._coming = (self._transfers.copy(begun, self._buffer.bytes[: self._bytes]),)

    def storage(self) -> torch.UntypedStorage:
        """It, on the device."""
        self.fetch()
        self._settle()
        assert self._back is not None
        return self._back.untyped_storage()

    def gone(self) -> None:
        """What left may go from the device from here on."""
        if self.leaving is not None:
            self._transfers.wait(self.leaving[1])
            self.leaving = None

    def _settle(self) -> None:
        if self._coming is not None:
            self._transfers.wait(self._coming[0])
            self._coming = None

    def __del__(self) -> None:
        if self._buffer is not None:
            self.gone()
            self._settle()  # memory that a copy still fills is not given to anyone else
            self._buffers.take_back(self._buffer)


@dataclass(frozen=True)
class View:
    """A tensor whose storage is away."""

    away: Away
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, away: Away) -> View:
        return cls(
            away, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.requires_grad
        )  # fmt: skip

    def tensor(self) -> Tensor:
        """It, on the device, without its history."""
        storage = self.away.storage()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride).requires_grad_(self.requires_grad)  # type: ignore[call-overload]


@dataclass(eq=False)
class _Block:
    """What one block sent away, in order. `lag` is how many blocks later its copies are waited for."""

    number: int
    lag: int
    sent: list[weakref.ref[Away]] = field(default_factory=list)
    wanted: bool = False

    def alive(self) -> list[Away]:
        return [away for away in (each() for each in self.sent) if away is not None]

    def gone(self) -> None:
        for away in self.alive():
            away.gone()

    def fetch(self) -> None:
        for away in reversed(self.alive()):
            away.fetch()


class ActivationOffload:
    """What a run's blocks keep for the backward pass, on the host."""

    def __init__(
        self, device: torch.device, last: int, transfers: Transfers | None = None, least: int = LEAST_BYTES
    ) -> None:
        """`last` is the number of the last block; `least` the fewest bytes that travel."""
        self._device, self._last, self._least = device, last, least
        self._transfers = transfers or transfers_for(True, device)
        self.buffers = HostBuffers(device, self._transfers.drain)
        self._blocks: list[_Block] = []

    def inputs(self, number: int, hidden: Any) -> Callable[[], Any]:
        """Send a block's inputs away, a tensor or a mapping of tensors.

        The result gives them: the first time themselves, then what has come back.
        """
        block = self._begin(number, lag=0)
        if number == self._last:
            waiting: Any = hidden
        elif isinstance(hidden, Mapping):
            waiting = {name: self._view(each, block) for name, each in hidden.items()}
        else:
            waiting = self._view(hidden, block)
        first = [hidden]

        def given() -> Any:
            if first:
                return first.pop()
            self._arrive(block)
            if isinstance(waiting, Mapping):
                return {name: _tensor(each) for name, each in waiting.items()}
            return _tensor(waiting)

        return given

    def saved(self, number: int, staying: Iterable[int]) -> tuple[Pack, Unpack]:
        """Hooks for what autograd saves in a block. `staying` are the addresses of storages that do not travel."""
        block, stay = self._begin(number, lag=1), frozenset(staying)
        seen: dict[int, weakref.ref[Away]] = {}

        def pack(tensor: Tensor) -> Any:
            if number == self._last or _address(tensor) in stay:
                return tensor.detach()
            return self._view(tensor, block, seen)

        def unpack(kept: Any) -> Tensor:
            self._arrive(block)
            return _tensor(kept)

        return pack, unpack

    def _view(self, tensor: Tensor, block: _Block, seen: dict[int, weakref.ref[Away]] | None = None) -> View | Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._least:
            return tensor.detach().requires_grad_(tensor.requires_grad)
        known = seen.get(storage.data_ptr()) if seen is not None else None
        away = known() if known is not None else None
        if away is None:  # of one that leaves the memory, and so the address, is still its own
            with torch.no_grad():
                away = Away(storage, self._device, self.buffers, self._transfers)
            block.sent.append(weakref.ref(away))
            if seen is not None:
                seen[storage.data_ptr()] = block.sent[-1]
        return View.of(tensor, away)

    def _begin(self, number: int, lag: int) -> _Block:
        """A block's forward begins: what left long enough ago may go."""
        if self._blocks and number <= self._blocks[-1].number:
            self._all_gone()
            self._blocks.clear()
        for before in self._blocks:
            if before.number < number - before.lag:
                before.gone()
        self._blocks.append(_Block(number, lag))
        return self._blocks[-1]

    def _arrive(self, block: _Block) -> None:
        """The backward pass has come to a block: what it needs is fetched, and what comes next begins to."""
        if block.wanted:
            return
        block.wanted = True
        self._all_gone()
        block.fetch()
        if block in self._blocks:
            place = self._blocks.index(block)
            if place:
                self._blocks[place - 1].fetch()
            del self._blocks[place:]

    def _all_gone(self) -> None:
        for block in self._blocks:
            block.gone()


def _tensor(kept: View | Tensor) -> Tensor:
    return kept.tensor() if isinstance(kept, View) else kept


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storages_of(value: Any) -> set[int]:
    """The addresses of all storages in a module, a tensor, or dataclasses, mappings and sequences of them."""
    if isinstance(value, Tensor):
        return {_address(value)}
    if isinstance(value, nn.Module):
        return {_address(each) for each in (*value.parameters(), *value.buffers())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return set()
    return set().union(*map(storages_of, value))
