"""Times functions against each other: interleaved, over rotated inputs, on the device's own clock.

Decides how a median comes about. All contenders take turns within a round, so that a clock that drifts drifts for all;
each call gets the next set of inputs, and the sets together are larger than the L2 cache, so that nothing is timed with
its inputs still there. On a GPU the device is given other work before each call, so that the host has enqueued all of
the call before the device begins with it: what is between the two events is then the device's time, and none of the
host's, which is a figure of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ltxforge.hardware import is_out_of_memory, moment, peak_bytes, reset_peak, seconds_between, synchronize
from ltxforge.suites.case import Timing

WARMUP_ROUNDS = 3
GRAPH_REPLAYS = 10
HOST_CALLS = 10
HEAD_START_BYTES = 256 << 20
"""Larger than every L2 cache, which writing them also clears."""
MOST_HEAD_STARTS = 64
"""Some milliseconds: a call that takes the host longer waits for the device."""
MOST_SETS = 24
CPU_CACHE_BYTES = 32 << 20
NO_KERNELS = ("Memcpy", "Memset")
ANNOTATIONS = ("## Call CompiledFxGraph", "Optimizer.", "ProfilerStep", "Torch-Compiled Region")
"""How ranges begin that PyTorch itself draws over a device's kernels."""

Call = Callable[[], Any]
Calls = Sequence[Call]
"""The same work over each set of inputs."""


def sets_needed(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs make a rotation: at least three, twice the L2 cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES
    return min(MOST_SETS, max(3, math.ceil(2 * cache / max(set_bytes, 1))))


class HeadStart:
    """Work for a GPU to do while the host enqueues what is timed: a large buffer, zeroed often enough.

    Attributes:
        late: the contenders whose first event the device had reached before their call was enqueued, in some timed
            round: their time is at least in part the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(HEAD_START_BYTES, dtype=torch.uint8, device=device)
        self.times = 1
        self.late: set[str] = set()

    def give(self) -> None:
        """Enqueue the work."""
        for _ in range(self.times):
            self.buffer.zero_()

    def fit(self, calls: Calls) -> None:
        """Give as much that the host is done with each of these calls first, if it can be done with them."""
        device = self.buffer.device
        for call in calls:
            synchronize(device)
            while not self._is_enough_for(call) and self.times < MOST_HEAD_STARTS:
                self.times *= 2
                synchronize(device)

    def _is_enough_for(self, call: Call) -> bool:
        self.give()
        began = moment(self.buffer.device)
        call()
        return not began.query()

    def check(self, name: str, began: Any) -> None:
        """Right after a contender's call: is the device still busy with what came before it?"""
        if began.query():
            self.late.add(name)


def head_start(device: torch.device) -> HeadStart | None:
    """What a device needs for its own time to be measured: nothing where the host computes."""
    return HeadStart(device) if device.type == "cuda" else None


def time_against_each_other(
    contenders: Mapping[str, Calls],
    rounds: int,
    device: torch.device,
    is_stopped: Callable[[], bool] = bool,
    ahead: HeadStart | None = None,
) -> dict[str, list[float]]:
    """Contender → seconds of each round's call. `is_stopped` is asked between rounds; what was timed is returned.

    Args:
        ahead: None times the host with the device, as whoever waits for the result sees it.
    """
    for turn in range(WARMUP_ROUNDS):
        for calls in contenders.values():
            calls[turn % len(calls)]()
    synchronize(device)
    if ahead:
        for calls in contenders.values():
            ahead.fit(calls[:WARMUP_ROUNDS])
    synchronize(device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    turn = 0
    for _ in range(rounds):
        if is_stopped():
            break
        for name, calls in contenders.items():
            call = calls[turn % len(calls)]
            turn += 1
            if ahead:
                synchronize(
                    device
                )  # else the launch queue fills up in time, and the host waits in the middle of a call
                ahead.give()
            began = moment(device)
            call()
            marks[name].append((began, moment(device)))
            if ahead:
                ahead.check(name, began)
    synchronize(device)
    return {name: [seconds_between(*pair) for pair in pairs] for name, pairs in marks.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """The median, and the fifths at both ends."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
    return Timing(statistics.median(seconds), fifths[0], fifths[-1])


def with_details(found: Timing, calls: Calls, device: torch.device, *, graph: bool) -> Timing:
    """Also what only a GPU tells: the host's time, launches and peak of a call; as a CUDA graph if asked for."""
    if device.type != "cuda":
        return found
    return replace(
        found,
        host=host_seconds(calls, device),
        graph=graph_seconds(calls, device) if graph else None,
        launches=launches(calls[0], device),
        peak_bytes=call_peak(calls[0], device),
    )


def launches(call: Call, device: torch.device) -> int | None:
    """How many kernels a call launches, as the profiler counts them; None where it sees none at all."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as watched:
        call()
        synchronize(device)
    return sum(map(is_kernel, watched.events())) or None


def is_kernel(event: Any) -> bool:
    """Whether a profiler's event is a kernel, not a copy, nor a range drawn over kernels on the device's own line."""
    if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith((*NO_KERNELS, *ANNOTATIONS))


def host_seconds(calls: Calls, device: torch.device) -> float:
    """The median of how long the host is busy with one call while the device waits for work."""
    found = []
    for turn in range(HOST_CALLS):
        synchronize(device)
        began = time.perf_counter()
        calls[turn % len(calls)]()
        found.append(time.perf_counter() - began)
    synchronize(device)
    return statistics.median(found)


def call_peak(call: Call, device: torch.device) -> int:
    """What a call allocates at its peak beside what was there before, its results included."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    reset_peak(device)
    result = call()
    synchronize(device)
    del result
    return max(0, peak_bytes(device) - before)


def graph_seconds(calls: Calls, device: torch.device) -> float | None:
    """One call's time in a CUDA graph that holds a call over every set of inputs; None where it cannot be captured."""
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for call in calls:
                call()
        recorded.replay()
        synchronize(device)
        marks = []
        for _ in range(GRAPH_REPLAYS):
            began = moment(device)
            recorded.replay()
            marks.append((began, moment(device)))
        synchronize(device)
        return statistics.median(seconds_between(*pair) for pair in marks) / len(calls)
    except RuntimeError as error:  # some op asks the host, or there is no room for the graph's own pool
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
        return None
