"""What travels together when weights are streamed, and how many bytes that takes where. Torch-free.

Decides which blocks are streamed and in which groups, how a unit's tensors lie in its one buffer, and how many slots,
buffers and stages there are; the planner counts with the same functions as the streamer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from ltxforge.plan import StreamPlan

# Where a tensor may begin in a unit's buffer: any dtype can be viewed there, and loads are as wide as they can be.
ALIGNMENT = 256
# A buffer on the host has pages of its own.
PAGE = 4096
# With copies beside the computation one unit is computed with while the next one arrives, and read while one leaves.
SLOTS, STAGES = 2, 2


def spread(count: int, blocks: int) -> tuple[tuple[int, ...], ...]:
    """The units of a block swap: `count` of `blocks` blocks, each alone, as far apart as they can be.

    So every copy has the blocks before it to hide behind; the last block is always one, the first only where all are.
    """
    assert 0 <= count <= blocks, f"{count} of {blocks} blocks"
    return tuple((-(-(number + 1) * blocks // count) - 1,) for number in range(count))


def groups(blocks: int, per_group: int) -> tuple[tuple[int, ...], ...]:
    """The units of a group offload: all blocks, so many together; the last unit may be smaller."""
    return tuple(tuple(range(first, min(first + per_group, blocks))) for first in range(0, blocks, per_group))


def aligned(size: int) -> int:
    """The bytes that a tensor takes in a unit's buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each tensor of a unit begins; one more at the end, the unit's length."""
    return list(accumulate(map(aligned, sizes), initial=0))


def slot_count(stream: StreamPlan, units: int) -> int:
    """The places on the device, each as large as the largest of so many units."""
    return min(SLOTS if stream.overlapped else 1, units)


def slot_bytes(stream: StreamPlan, lengths: Sequence[int]) -> int:
    """Bytes on the device that streaming takes, of units of these lengths.

    The lengths are those of what is computed: a run on one modality copies only that one's weights, until it samples.
    """
    return slot_count(stream, len(lengths)) * max(lengths, default=0)


def host_bytes(stream: StreamPlan, lengths: Iterable[int]) -> int:
    """Bytes of host memory that waiting units take, of these whole lengths; on a disk, those of its stages."""
    held = [-(-length // PAGE) * PAGE for length in lengths]
    if not stream.disk:
        return sum(held)
    return min(STAGES if stream.overlapped else 1, len(held)) * max(held, default=0)
