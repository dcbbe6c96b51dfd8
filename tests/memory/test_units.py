"""Which blocks travel, how a unit lies in its buffer, and what that takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ltxforge.memory.units import PAGE, groups, host_bytes, offsets, slot_bytes, spread
from ltxforge.plan import StreamPlan


@pytest.mark.parametrize("blocks", [1, 4, 28, 48])
def test_swapped_blocks_lie_as_far_apart_as_they_can(blocks):
    for count in range(blocks + 1):
        numbers = [number for (number,) in spread(count, blocks)]
        assert len(set(numbers)) == count and all(0 <= number < blocks for number in numbers)
        assert numbers == sorted(numbers) and (0 not in numbers) == (count < blocks)
        between = [after - before for before, after in zip([-1, *numbers], numbers, strict=False)]
        assert not between or max(between) - min(between) <= 1
        assert sum(between) == (blocks if count else 0), "the last block is one of them"


def test_groups_hold_every_block_once():
    assert groups(7, 3) == ((0, 1, 2), (3, 4, 5), (6,))
    assert groups(4, 1) == ((0,), (1,), (2,), (3,)) and groups(4, 9) == ((0, 1, 2, 3),)
    assert [number for unit in groups(48, 5) for number in unit] == list(range(48))


def test_tensors_begin_where_any_dtype_can():
    assert offsets([1, 256, 257, 0]) == [0, 256, 512, 1024, 1024]
    assert offsets([]) == [0]


def test_bytes_of_slots_and_of_the_host():
    lengths = [512, PAGE, PAGE + 256]
    overlapped, plain = StreamPlan(groups(3, 1)), StreamPlan(groups(3, 1), overlapped=False)
    assert slot_bytes(overlapped, lengths) == 2 * (PAGE + 256) == 2 * slot_bytes(plain, lengths)
    assert slot_bytes(overlapped, lengths[:1]) == 512, "a second slot would never be filled"
    assert host_bytes(overlapped, lengths) == host_bytes(plain, lengths) == 4 * PAGE
    disk = StreamPlan(groups(3, 1), disk="/fast")
    assert host_bytes(disk, lengths) == 4 * PAGE
    assert host_bytes(StreamPlan(groups(3, 1), overlapped=False, disk="/fast"), lengths) == 2 * PAGE


def test_counting_needs_no_torch():
    code = "import sys; import ltxforge.memory.units; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
