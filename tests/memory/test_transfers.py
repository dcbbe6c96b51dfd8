"""The order that transfers promise, and that the simulation breaks whatever does not keep it."""

from __future__ import annotations

import pytest
import torch

from ltxforge.memory.simulated import POISON, SimulatedStreams
from ltxforge.memory.transfers import Plain, transfers_for

CPU = torch.device("cpu")


def numbers(first: int, count: int = 4) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.uint8)


def test_without_a_stream_a_copy_has_been_made_when_it_returns():
    slot, plain = torch.zeros(6, dtype=torch.uint8), Plain()
    copied = plain.copy(plain.begin(slot), numbers(1))
    plain.wait(copied)
    plain.finish(copied)
    plain.drain()
    assert slot.tolist() == [1, 2, 3, 4, 0, 0] and not plain.overlaps


@pytest.mark.parametrize("overlapped", [True, False])
def test_a_cpu_has_no_streams(overlapped):
    assert isinstance(transfers_for(overlapped, CPU), Plain)


def test_simulated_copies_come_as_late_as_they_may():
    streams = SimulatedStreams()
    first, second, third = (torch.zeros(4, dtype=torch.uint8) for _ in range(3))
    copies = [streams.copy(streams.begin(slot), numbers(at)) for slot, at in ((first, 1), (second, 5), (third, 9))]
    assert {int(value) for slot in (first, second, third) for value in slot} == {POISON}
    streams.wait(copies[1])
    assert first.tolist() == [1, 2, 3, 4] and second.tolist() == [5, 6, 7, 8], "copies of one stream are in order"
    assert set(third.tolist()) == {POISON}
    streams.drain()
    assert third.tolist() == [9, 10, 11, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_a_slot_that_is_given_up_is_nan(dtype):
    slot = torch.zeros(64, dtype=torch.uint8)
    SimulatedStreams().begin(slot)
    assert slot.view(dtype).float().isnan().all()


def test_a_source_that_is_overwritten_too_soon_shows():
    streams, source, slot = SimulatedStreams(), numbers(1), torch.zeros(4, dtype=torch.uint8)
    copied = streams.copy(streams.begin(slot), source)
    source.zero_()
    streams.wait(copied)
    assert slot.tolist() == [0, 0, 0, 0]
    copied = streams.copy(streams.begin(slot), source)
    streams.finish(copied)
    source.fill_(7)
    streams.wait(copied)
    assert slot.tolist() == [0, 0, 0, 0]


def test_a_slot_is_filled_once_for_each_time_it_is_given_up():
    streams = SimulatedStreams()
    begun = streams.begin(torch.zeros(4, dtype=torch.uint8))
    streams.copy(begun, numbers(1))
    with pytest.raises(AssertionError):
        streams.copy(begun, numbers(1))
