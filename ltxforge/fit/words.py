"""The choice of a run's memory in words: what binds, what was chosen, what it costs, what would be faster. Pure.

GB are 2^30 bytes here, as cards are sold. Decides nothing; torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from ltxforge.fit.search import HAIR, SYSTEM_BYTES, UNLIMITED, WORTH_TELLING, Budget, Search, Way
from ltxforge.memory.costs import HOST_BASELINE, HOST_CONTEXT, phases
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan

LARGEST_PARTS = 4
LIBRARIES = "Python, torch and their libraries"


def gigabytes(count: int) -> str:
    """`"3.1 GB"`, of 2^30 bytes."""
    return f"{count / 2**30:.1f} GB" if abs(count) >= 0.95 * 2**30 else f"{count / 2**20:.0f} MB"


def is_told(count: int) -> bool:
    """Whether `gigabytes` has more to say than "0 MB"."""
    return round(count / 2**20) > 0


def words_on(search: Search, way: Way, assumed: str) -> tuple[str, ...]:
    """Why this way, what it costs in time, and the next faster one.

    Args:
        assumed: whose rates the seconds follow from, "" where they are the device's own.
    """
    return tuple(_words_on(search, way, assumed))


def _words_on(search: Search, way: Way, assumed: str) -> Iterator[str]:
    resident = search.resident()
    worst = _binding(search, resident)
    if (excess := search.budget.excess(worst)) > 0:
        taken, there = _taken(search.budget, worst)
        yield (
            f"everything resident does not fit: {worst.name} would take {taken}, {gigabytes(excess)} more than a"
            f" run may have, {there}"
        )
    else:
        yield f"everything resident fits: {worst.name}, the largest phase, leaves {gigabytes(-excess)}"
    if (way.memory, way.optimizer) != (resident.memory, resident.optimizer):
        yield f"chosen: {describe(way, search.costs.blocks, search.costs.dtype)}"
    share = way.seconds / resident.seconds
    yield (
        "a step takes as long as with everything resident" if share <= 1 + HAIR
        else f"a step takes about {share:.2f}x of the time that it takes with everything resident"
    ) + (f" (assumed, by the rates of {assumed})" if assumed else " (an estimate)")  # fmt: skip
    if (faster := search.next_faster(way)) is not None:
        yield next_faster(way, *faster, search.costs.blocks, search.costs.dtype)


def next_faster(way: Way, other: Way, device: int, host: int, blocks: int, dtype: str = "bf16") -> str:
    """What would be faster, and what it needs: "with 3.1 GB more on the device: no blocks swapped, 1.24x faster".

    Where more than the first step would be faster still, that is said.
    """
    places = (device, "on the device"), (host, "on the host")
    needed = [f"{gigabytes(more)} more {where}" for more, where in places if is_told(more)]
    changes = ", ".join(_changes(way, other, blocks, dtype)) or "the same with fewer copies"
    faster, first = way.seconds / other.seconds, 1 + WORTH_TELLING
    step = f" (the first step of about {first:.1f}x)" if faster < first + HAIR else ""
    return f"with {' and '.join(needed) or 'what there is'}: {changes}, {faster:.2f}x faster{step}"


def base(precision: str, dtype: str) -> str:
    """How the base is kept: "nf4 base", "base not quantised", "base not quantised, fp32"."""
    if precision != "bf16":
        return f"{precision} base"
    return "base not quantised" + (f", {dtype}" if dtype != "bf16" else "")


def describe(way: Way, blocks: int, dtype: str = "bf16") -> str:
    """A way in words: "nf4 base, 20 of 48 blocks swapped, all blocks computed again, adamw8bit".

    Args:
        dtype: what is computed in, and the base is kept in where it is not quantised.
    """
    memory = way.memory
    parts = [
        base(memory.base_precision, dtype),
        swapped(memory.stream, blocks),
        recomputed(memory, blocks),
        "activations on the host" if memory.offload_activations else "",
        way.optimizer,
        f"samples decoded in tiles of {memory.decode_tile} pixels" if memory.decode_tile else "",
        f"text encoder in {memory.text_encoder_precision}" if memory.text_encoder_precision != "bf16" else "",
    ]
    return ", ".join(filter(None, parts))


def swapped(stream: StreamPlan | None, blocks: int) -> str:
    """What is streamed, and from where."""
    if stream is None:
        return "no blocks swapped"
    where = "on disk" if stream.disk else "on the host"
    count = len(stream.blocks)
    return f"{'all' if count == blocks else f'{count} of {blocks}'} blocks wait {where}"


def recomputed(memory: MemoryPlan, blocks: int) -> str:
    """Which blocks are computed again in the backward pass."""
    count = len(memory.checkpointed)
    return {0: "no block computed again", blocks: "all blocks computed again"}.get(
        count, f"{count} of {blocks} blocks computed again"
    )


def too_large(budget: Budget, phase: PhasePlan) -> str:
    """A phase that does not fit, with what there is and its parts, which add up."""
    taken, there = _taken(budget, phase)
    parts = sorted(_parts(budget, phase).items(), key=lambda part: -part[1])
    named = [part for place, part in enumerate(parts) if place < LARGEST_PARTS or part[0] == LIBRARIES]
    rest = sum(size for _, size in parts) - sum(size for _, size in named)
    told = ", ".join(f"{name} {gigabytes(size)}" for name, size in [*named, ("other parts", rest)] if is_told(size))
    return f"{phase.name} would take {taken}, of which a run may have {there}: {told}"


def _parts(budget: Budget, phase: PhasePlan) -> dict[str, int]:
    """What a phase is made of where it lacks room."""
    if not _lacks_host(budget, phase):
        return phase.parts | {"held back by the allocator": budget.on_device(phase) - phase.device_bytes}
    libraries = HOST_BASELINE + (HOST_CONTEXT if budget.device is not None else 0)
    if budget.device is None:
        return phase.parts | {LIBRARIES: libraries, "what is read": phase.host_bytes - phase.device_bytes - libraries}
    return {LIBRARIES: libraries, "what waits there": phase.host_bytes - libraries}


def _lacks_host(budget: Budget, phase: PhasePlan) -> bool:
    """Whether the host's memory is what a phase lacks most."""
    if budget.device is None:
        return True
    return phase.host_bytes - budget.host_for(phase) > max(0, budget.on_device(phase) - budget.device)


def _taken(budget: Budget, phase: PhasePlan) -> tuple[str, str]:
    """What a phase takes where it lacks most, and what there is: "11.3 GB of 12.0 GB, after context and desktop"."""
    if not _lacks_host(budget, phase):
        there = _there(budget.device or 0, budget.whole_device, "after context and desktop")
        return f"{gigabytes(budget.on_device(phase))} on the device", there
    limit = budget.host_for(phase)
    kept = f"after {gigabytes(SYSTEM_BYTES)} kept for the system"
    why = kept if limit == budget.host else "as a step may fill it with what is pinned"
    return f"{gigabytes(phase.host_bytes)} of the host's memory", _there(limit, budget.whole_host, why)


def _there(limit: int, whole: int, why: str) -> str:
    return f"{gigabytes(limit)} of {gigabytes(whole)}, {why}" if limit < whole < UNLIMITED else gigabytes(limit)


def _changes(way: Way, other: Way, blocks: int, dtype: str) -> Iterator[str]:
    before, after = way.memory, other.memory
    if before.base_precision != after.base_precision:
        yield base(after.base_precision, dtype)
    if before.stream != after.stream:
        yield swapped(after.stream, blocks)
    if before.checkpointed != after.checkpointed:
        yield recomputed(after, blocks)
    if before.offload_activations != after.offload_activations:
        yield "activations on the host" if after.offload_activations else "activations on the device"
    if way.optimizer != other.optimizer:
        yield other.optimizer


def _binding(search: Search, way: Way) -> PhasePlan:
    """The phase that leaves least, or lacks most."""
    return max(phases(search.costs, way.memory, way.optimizer), key=search.budget.excess)
