"""The choice of a run's memory in words: what binds, what was chosen, what it costs, what would be faster. Pure.

GB are 2^30 bytes here, as cards are sold. Decides nothing; torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from ltxforge.fit.search import HAIR, Budget, Search, Way
from ltxforge.memory.costs import phases
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan

LARGEST_PARTS = 4


def gigabytes(count: int) -> str:
    """`"3.1 GB"`, of 2^30 bytes."""
    return f"{count / 2**30:.1f} GB" if abs(count) >= 0.95 * 2**30 else f"{count / 2**20:.0f} MB"


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
        yield (
            f"everything resident does not fit: {worst.name} would take {gigabytes(_taken(search.budget, worst))},"
            f" {gigabytes(excess)} more than there is"
        )
    else:
        yield f"everything resident fits: {worst.name}, the largest phase, leaves {gigabytes(-excess)}"
    if (way.memory, way.optimizer) != (resident.memory, resident.optimizer):
        yield f"chosen: {describe(way, search.costs.blocks)}"
    share = way.seconds / resident.seconds
    yield (
        "a step takes as long as with everything resident" if share <= 1 + HAIR
        else f"a step takes about {share:.2f}x of the time that it takes with everything resident"
    ) + (f" (assumed, by the rates of {assumed})" if assumed else " (an estimate)")  # fmt: skip
    if (faster := search.next_faster(way)) is not None:
        yield next_faster(way, *faster, search.costs.blocks)


def next_faster(way: Way, other: Way, device: int, host: int, blocks: int) -> str:
    """What would be faster, and what it needs: "with 3.1 GB more on the device: no blocks swapped, 1.24x faster"."""
    places = (device, "on the device"), (host, "on the host")
    needed = [f"{gigabytes(more)} more {where}" for more, where in places if more]
    changes = ", ".join(_changes(way, other, blocks)) or "the same with fewer copies"
    return f"with {' and '.join(needed) or 'what there is'}: {changes}, {way.seconds / other.seconds:.2f}x faster"


def describe(way: Way, blocks: int) -> str:
    """A way in words: "nf4 base, 20 of 48 blocks swapped, all blocks computed again, adamw8bit"."""
    memory = way.memory
    parts = [
        f"{memory.base_precision} base" if memory.base_precision != "bf16" else "base not quantised",
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


def too_large(search_budget: Budget, phase: PhasePlan) -> str:
    """A phase that does not fit, with its parts."""
    parts = sorted(phase.parts.items(), key=lambda part: -part[1])[:LARGEST_PARTS]
    told = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts)
    on_host = search_budget.device is None or phase.host_bytes - search_budget.host_for(phase) > max(
        0, search_budget.on_device(phase) - search_budget.device
    )
    if on_host:
        return (
            f"{phase.name} would take {gigabytes(phase.host_bytes)} of the host's memory, of which a run may have"
            f" {gigabytes(search_budget.host_for(phase))}"
        ) + (f": {told}" if search_budget.device is None else "")
    return (
        f"{phase.name} would take {gigabytes(search_budget.on_device(phase))} on the device, of which a run may have"
        f" {gigabytes(search_budget.device or 0)}: {told}"
    )


def _changes(way: Way, other: Way, blocks: int) -> Iterator[str]:
    before, after = way.memory, other.memory
    if before.base_precision != after.base_precision:
        yield f"{after.base_precision} base"
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


def _taken(budget: Budget, phase: PhasePlan) -> int:
    if budget.device is None or phase.host_bytes - budget.host_for(phase) > budget.on_device(phase) - budget.device:
        return phase.host_bytes
    return budget.on_device(phase)
