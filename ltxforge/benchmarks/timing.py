"""Times functions against each other: interleaved, over rotated inputs, on the device's own clock.

Decides how a median comes about. All contenders take turns within a round, so that a clock that drifts drifts for all;
each call gets the next set of inputs, and the sets together are larger than the L2 cache, so that nothing is timed with
its inputs still there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ltxforge.hardware import is_out_of_memory, moment, peak_bytes, reset_peak, seconds_between, synchronize
from ltxforge.suites.kernels import Timing

WARMUP_ROUNDS = 3
GRAPH_REPLAYS = 10
MOST_SETS = 24
CPU_CACHE_BYTES = 32 << 20
NO_KERNELS = ("Memcpy", "Memset")

Call = Callable[[], Any]
Calls = Sequence[Call]
"""The same work over each set of inputs."""


def sets_needed(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs make a rotation: at least three, twice the L2 cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES
    return min(MOST_SETS, max(3, math.ceil(2 * cache / max(set_bytes, 1))))


def time_against_each_other(
    contenders: Mapping[str, Calls], rounds: int, device: torch.device, is_stopped: Callable[[], bool] = bool
) -> dict[str, list[float]]:
    """Contender → seconds of each round's call. `is_stopped` is asked between rounds; what was timed is returned."""
    for turn in range(WARMUP_ROUNDS):
        for calls in contenders.values():
            calls[turn % len(calls)]()
    synchronize(device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    turn = 0
    for _ in range(rounds):
        if is_stopped():
            break
        for name, calls in contenders.items():
            call = calls[turn % len(calls)]
            turn += 1
            began = moment(device)
            call()
            marks[name].append((began, moment(device)))
    synchronize(device)
    return {name: [seconds_between(*pair) for pair in pairs] for name, pairs in marks.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """The median, and the fifths at both ends."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
    return Timing(statistics.median(seconds), fifths[0], fifths[-1])


def with_details(found: Timing, calls: Calls, device: torch.device, *, graph: bool) -> Timing:
    """Also what only a GPU tells: launches of a call, its peak, and its time as a CUDA graph if asked for."""
    if device.type != "cuda":
        return found
    return replace(
        found,
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
    kernels = [event for event in watched.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(NO_KERNELS) for event in kernels) or None


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
