"""`[memory] fit`: of all ways to make a run fit, the one whose step takes the least time. A pure search; torch-free.

What may be chosen is in `Asked`, what each choice costs is told by `memory/costs.py`, what there is in `Budget`. Every
phase must fit. Steps whose seconds differ by less than `HAIR` count as equally fast, since the seconds are estimates;
of these the higher base precision wins, then float32 moments, then fewer moved parts. So with more memory no choice is
slower by more than a hair, and quality is given up only where time or memory demands it.

The search goes through base precisions, optimisers, disk and activation offload, and through the number of streamed
blocks; how many blocks must be computed again is found by halving, because with every block more a step takes less and
is slower. tests/fit/test_search.py holds it against going through everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

from ltxforge.cards import Card
from ltxforge.memory.costs import (
    CONTEXT_BYTES,
    Costs,
    Rates,
    load_phase,
    phases,
    reading_phases,
    reserved_bytes,
    sample_phases,
    save_phase,
    step_phase,
    step_seconds,
)
from ltxforge.memory.units import spread
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan

HAIR = 0.02
"""Differences of a step's estimated seconds that mean nothing."""
WORTH_TELLING = 0.1
"""How much faster the next choice is to be, where anything is so much faster."""
SYSTEM_BYTES = 2 * 2**30
"""What the operating system and a desktop keep of the host's memory."""
PINNED_SHARE = 0.5
"""How much of the host's memory a step may fill with what waits there for the device: it is pinned, so that the system
cannot swap it out and has to get along with the rest. Windows allows no more.
"""
UNLIMITED = 2**60
"""Bytes of a memory of which nobody said how large it is."""
BASE_PRECISIONS = ("bf16", "int8", "nf4")
"""What may be chosen, best first. fp8 and int8-w8a8 round activations as well: they must be asked for."""
OPTIMIZERS = ("adamw", "adamw8bit")
TEXT_ENCODERS = ("bf16", "int8", "nf4")


@dataclass(frozen=True)
class Budget:
    """Bytes that the phases of a run may take, margins taken off; `device` is None where it shares the host's memory.

    `step_host` bounds the host's part of a step. `whole_device` and `whole_host` are what there is with the margins, as
    far as the run may have it.
    `reserves` counts with a phase what the allocator holds beyond its tensors.
    """

    device: int | None
    host: int
    step_host: int = UNLIMITED
    whole_device: int = 0
    whole_host: int = 0
    reserves: bool = False

    def host_for(self, phase: PhasePlan) -> int:
        """What a phase may take of the host's memory."""
        return min(self.host, self.step_host) if phase.name == "step" else self.host

    def holds(self, phase: PhasePlan) -> bool:
        """Whether a phase fits."""
        return self.excess(phase) <= 0

    @property
    def hard(self) -> Budget:
        """What no run gets past: without the allocator's margin and the system's."""
        device = None if self.device is None else max(0, self.whole_device - CONTEXT_BYTES)
        return replace(self, device=device, host=self.whole_host, step_host=UNLIMITED, reserves=False)

    def on_device(self, phase: PhasePlan) -> int:
        """What a phase takes of the device."""
        return reserved_bytes(phase) if self.reserves else phase.device_bytes

    def excess(self, phase: PhasePlan) -> int:
        """By how many bytes a phase is too large, on the device or on the host; below 0 what is left."""
        on_host = phase.host_bytes - self.host_for(phase)
        return on_host if self.device is None else max(on_host, self.on_device(phase) - self.device)


def rates_of(card: Card) -> Rates:
    """A card's rates; what it has no units for runs as fp32 does."""
    half = card.bf16 or card.fp32, card.fp16 or card.fp32
    return Rates(*half, card.fp32, card.memory_gbs, card.bus_gbs, int8=card.int8, fp8=card.fp8)


CPU_RATES = Rates(bf16=0.5, fp16=0.25, fp32=0.5, memory=40, bus=20)
"""Of a usual CPU, by order of magnitude: only ratios are made of it."""


def budget_of(device: int, host: int, *, shared: bool) -> Budget:
    """What a run may take of a device and a host of so many bytes.

    Args:
        shared: whether the device's memory is the host's, as a CPU's is; then the smaller of both counts.
    """
    free = max(0, host - SYSTEM_BYTES)
    if shared:
        allowed = device or host
        return Budget(None, min(free, allowed), whole_host=min(host, allowed))
    own = max(0, device - CONTEXT_BYTES)
    return Budget(own, free, round(PINNED_SHARE * host), device, host, reserves=True)


@dataclass(frozen=True)
class Asked:
    """What the recipe asks for, and what it leaves open.

    Attributes:
        memory: the plan where nothing is chosen; what is fixed stands in it.
        base_precisions, optimizers, text_encoders: what may be taken, best first; one where it is said.
        streams: whether the number of streamed blocks may be chosen.
        overlapped: whether streamed weights are copied beside the computation.
        disks: where streamed weights may wait: "" is host memory, else a folder; the first one is preferred.
        recomputes: whether the blocks that are computed again may be chosen.
        offloads: whether saved activations may wait on the host: (False, True), or what is said.
        tiles: (tile, frames) in which samples may be decoded, (0, 0) for whole; the first one is preferred.
        double_quant: whether nf4 has its scales quantised.
    """

    memory: MemoryPlan
    base_precisions: tuple[str, ...]
    optimizers: tuple[str, ...]
    text_encoders: tuple[str, ...] = ("bf16",)
    streams: bool = False
    overlapped: bool = True
    disks: tuple[str, ...] = ("",)
    recomputes: bool = False
    offloads: tuple[bool, ...] = (False,)
    tiles: tuple[tuple[int, int], ...] = ((0, 0),)
    double_quant: bool = True


@dataclass(frozen=True)
class Way:
    """One complete choice: the memory's plan, the optimiser, and how many seconds a step would take."""

    memory: MemoryPlan
    optimizer: str
    seconds: float

    @property
    def streamed(self) -> int:
        """How many blocks come and go."""
        return len(self.memory.stream.blocks) if self.memory.stream else 0

    @property
    def moved_parts(self) -> tuple[bool, bool, int]:
        """What is moved about, the worst first: through a disk, activations, blocks."""
        on_disk = bool(self.memory.stream and self.memory.stream.disk)
        return on_disk, self.memory.offload_activations, self.streamed


_spread = cache(spread)


@cache
def recomputed_blocks(count: int, blocks: int) -> tuple[int, ...]:
    """Which blocks are computed again where so many are: those that are kept lie as far apart as they can."""
    kept = {number for unit in spread(blocks - count, blocks) for number in unit} if count < blocks else set()
    return tuple(number for number in range(blocks) if number not in kept)


@dataclass(frozen=True)
class Search:
    """The search of one run's ways. `costs`, `rates` and `asked` say what can be had, `budget` what may be taken."""

    costs: Costs
    asked: Asked
    budget: Budget
    rates: Rates

    def best(self) -> Way | None:
        """The way to take, or None if no way fits."""
        if self.text_encoder is None:
            return None
        found: dict[tuple[str, str], list[Way]] = {}
        least = math.inf
        for base, optimizer in product(self.asked.base_precisions, self.asked.optimizers):
            found[base, optimizer] = self._ways(base, optimizer, least)
            least = min([least, *(way.seconds for way in found[base, optimizer])])
        if least == math.inf:
            return None
        bound = least * (1 + HAIR)
        # The dictionary's order is that of quality.
        quick = next(near for ways in found.values() if (near := [way for way in ways if way.seconds <= bound]))
        return self._finished(min(quick, key=lambda way: (way.moved_parts, way.seconds)))

    @cached_property
    def text_encoder(self) -> str | None:
        """How the text encoder is kept: as exact as fits while captions are read. Nothing else depends on it."""
        for name in self.asked.text_encoders:
            memory = replace(self.asked.memory, text_encoder_precision=name)
            if self._all_fit(reading_phases(self.costs, memory)):
                return name
        return None

    def next_faster(self, way: Way) -> tuple[Way, int, int] | None:
        """The faster way of no lower quality that needs least beside what there is, and how many bytes more it needs
        on the device and on the host; None where nothing is faster by more than a hair.

        More of the device is looked for first, more of the host where the device is not what is missing.
        """
        least = self.resident().seconds
        if least * (1 + HAIR) >= way.seconds:
            return None
        bound = max(way.seconds / (1 + WORTH_TELLING), least)
        faster = list(self._ways_within(way, bound))
        with_host = [(need, other) for need, other in faster if need[1] <= 0]
        with_device = [(need, other) for need, other in faster if need[0] <= 0]
        chosen = with_host or with_device or faster
        if not chosen:
            return None
        need, other = min(chosen, key=lambda each: (max(0, each[0][0]) + max(0, each[0][1]), each[1].moved_parts))
        return self._finished(other), max(0, need[0]), max(0, need[1])

    def plain(self) -> Way:
        """What is asked for, with nothing chosen."""
        return self._way(self.asked.optimizers[0], self.asked.memory)

    def resident(self) -> Way:
        """Everything at its best and in its place, as far as that is open."""
        asked = self.asked
        memory = replace(
            self.memory(asked.base_precisions[0], asked.disks[0], asked.offloads[0], 0, 0),
            decode_tile=asked.tiles[0][0],
            decode_frames=asked.tiles[0][1],
            text_encoder_precision=asked.text_encoders[0],
        )
        return self._way(asked.optimizers[0], memory)

    def leanest(self) -> Way:
        """The way that takes least of the device: what a refusal speaks of."""
        asked, (offload, disk) = self.asked, self._places()[-1]
        memory = self.memory(asked.base_precisions[-1], disk, offload, self._counts()[-1], self._most_again)
        return self._way(asked.optimizers[-1], memory)

    def fits(self, way: Way) -> bool:
        """Whether every phase fits."""
        return self._all_fit(phases(self.costs, way.memory, way.optimizer))

    def memory(self, base: str, disk: str, offload: bool, streamed: int, again: int) -> MemoryPlan:
        """One choice, by its numbers, decoding in the least memory; what is fixed stays as it is said."""
        asked, blocks, memory = self.asked, self.costs.blocks, self.asked.memory
        stream = replace(memory.stream, disk=disk) if memory.stream else None
        if asked.streams:
            stream = StreamPlan(_spread(streamed, blocks), "block", asked.overlapped, disk) if streamed else None
        return replace(
            memory,
            base_precision=base,
            double_quant=base == "nf4" and asked.double_quant,
            stream=stream,
            offload_activations=offload,
            checkpointed=recomputed_blocks(again, blocks) if asked.recomputes else memory.checkpointed,
            decode_tile=asked.tiles[-1][0],
            decode_frames=asked.tiles[-1][1],
            text_encoder_precision=self.text_encoder or asked.text_encoders[-1],
        )

    def _ways(self, base: str, optimizer: str, least: float) -> list[Way]:
        """For each number of streamed blocks the fastest way that fits, if one does and is not much slower than
        `least`.
        """
        found = []
        for offload, disk in self._places():
            if disk != self.asked.disks[0] and self._host_holds_all(base, optimizer, offload):
                continue  # a disk makes nothing faster
            for streamed in self._counts():
                way = self._fastest(base, optimizer, disk, offload, streamed, least * (1 + HAIR))
                if way is not None:
                    found.append(way)
                    least = min(least, way.seconds)
        return found

    def _fastest(self, base: str, optimizer: str, disk: str, offload: bool, streamed: int, bound: float) -> Way | None:
        """The fastest way with so many streamed blocks; None if none fits, or if all take longer than `bound`."""

        def way(again: int) -> Way:
            return self._way(optimizer, self.memory(base, disk, offload, streamed, again))

        def fits(again: int) -> bool:
            memory = self.memory(base, disk, offload, streamed, again)
            return self.budget.holds(step_phase(self.costs, memory, optimizer))

        plain = self._way(optimizer, self.memory(base, disk, False, streamed, 0))
        if plain.seconds > bound or not self._rest_fits(base, optimizer, disk, offload, streamed):
            return None  # nothing with as many streamed blocks is faster than that
        if offload:
            # What is kept must travel, so that keeping less may be faster; one block in transit blurs what it takes.
            each = sorted(map(way, range(self._most_again + 1)), key=lambda found: found.seconds)
            quick = (found for found in each if found.seconds <= bound)
            return next((found for found in quick if fits(len(found.memory.checkpointed))), None)
        again = self._least(fits)
        return None if again is None or way(again).seconds > bound else way(again)

    def _places(self) -> list[tuple[bool, str]]:
        """Whether activations wait on the host, and where weights do. Weights do not make room on a disk for
        activations: that would be read from end to end in every step.
        """
        asked = self.asked
        places = product(asked.offloads, asked.disks)
        return [(offload, disk) for offload, disk in places if not offload or disk == asked.disks[0]]

    def _way(self, optimizer: str, memory: MemoryPlan) -> Way:
        return Way(memory, optimizer, step_seconds(self.costs, memory, optimizer, self.rates))

    def _counts(self) -> range:
        return range(self.costs.blocks + 1) if self.asked.streams else range(1)

    @property
    def _most_again(self) -> int:
        return self.costs.blocks if self.asked.recomputes else 0

    def _host_holds_all(self, base: str, optimizer: str, offload: bool) -> bool:
        """Whether the host's memory is enough whatever waits in it."""
        memory = self.memory(base, self.asked.disks[0], offload, self._counts()[-1], 0)
        return all(phase.host_bytes <= self.budget.host_for(phase) for phase in phases(self.costs, memory, optimizer))

    def _rest_fits(self, base: str, optimizer: str, disk: str, offload: bool, streamed: int) -> bool:
        """Whether the phases beside the step fit, which do not ask which blocks are computed again."""
        memory = self.memory(base, disk, offload, streamed, self._most_again)
        around = (
            load_phase(self.costs, memory),
            *sample_phases(self.costs, memory, optimizer),
            save_phase(self.costs, memory, optimizer),
        )
        return self._all_fit(around)

    def _least(self, fits: Callable[[int], bool]) -> int | None:
        """The fewest blocks that must be computed again, so that a step fits; None if it never does.

        What the last block keeps is used at once: to compute it again too may even take more.
        """
        ends = [most for most in (self._most_again, self._most_again - 1) if most >= 0 and fits(most)]
        if not ends:
            return None
        low, high = 0, ends[0]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return low

    def _ways_within(self, way: Way, seconds: float) -> Iterator[tuple[tuple[int, int], Way]]:
        """Ways of this quality or a higher one with steps of so many seconds, and what they need beside the budget."""
        asked = self.asked
        bases = asked.base_precisions[: asked.base_precisions.index(way.memory.base_precision) + 1]
        optimizers = asked.optimizers[: asked.optimizers.index(way.optimizer) + 1]
        waits = {asked.disks[0], way.memory.stream.disk if way.memory.stream else asked.disks[0]}
        places = [place for place in self._places() if place[1] in waits]  # nobody asked for another disk
        for base, optimizer, (offload, disk) in product(bases, optimizers, places):
            for streamed in self._counts():
                if other := self._leanest_within(base, optimizer, disk, offload, streamed, seconds):
                    yield self._need(other), other

    def _leanest_within(
        self, base: str, optimizer: str, disk: str, offload: bool, streamed: int, seconds: float
    ) -> Way | None:
        """The way that computes as many blocks again as so many seconds allow; None if even none is too slow."""

        def way(again: int) -> Way:
            return self._way(optimizer, self.memory(base, disk, offload, streamed, again))

        if offload:
            ways = map(way, range(self._most_again, -1, -1))
            return next((other for other in ways if other.seconds <= seconds), None)
        low, high = 0, self._most_again
        if way(0).seconds > seconds:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if way(middle).seconds <= seconds else (low, middle - 1)
        return way(low)

    def _need(self, way: Way) -> tuple[int, int]:
        """By how many bytes a way is too large for the device and for the host; below 0 what is left."""
        found = phases(self.costs, way.memory, way.optimizer)
        on_host = max(phase.host_bytes - self.budget.host_for(phase) for phase in found)
        if self.budget.device is None:
            return -1, on_host
        return max(map(self.budget.on_device, found)) - self.budget.device, on_host

    def _finished(self, way: Way) -> Way:
        """The way with samples decoded in the first manner that fits."""
        for tile, frames in self.asked.tiles:
            memory = replace(way.memory, decode_tile=tile, decode_frames=frames)
            if self._all_fit(sample_phases(self.costs, memory, way.optimizer)):
                return replace(way, memory=memory)
        return way

    def _all_fit(self, found: Iterable[PhasePlan]) -> bool:
        return all(map(self.budget.holds, found))
