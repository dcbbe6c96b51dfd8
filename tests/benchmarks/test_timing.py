"""How a median comes about: turns, rotation, quantiles; and what the ceilings are."""

from __future__ import annotations

import itertools
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from ltxforge_kernels.cases import Filler
from torch.autograd import DeviceType

from ltxforge.benchmarks import ceilings, timing
from ltxforge.benchmarks.subject import DeviceFiller

CPU = torch.device("cpu")


def test_contenders_take_turns_and_no_call_sees_the_inputs_of_the_one_before():
    made: list[tuple[str, int]] = []
    calls = {name: [lambda n=name, k=k: made.append((n, k)) for k in range(4)] for name in ("ours", "peer", "other")}
    seconds = timing.time_against_each_other(calls, 8, CPU)
    assert {name: len(each) for name, each in seconds.items()} == {"ours": 8, "peer": 8, "other": 8}
    timed = made[timing.WARMUP_ROUNDS * 3 :]
    assert [name for name, _ in timed] == ["ours", "peer", "other"] * 8
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(timed))
    assert {k for name, k in timed if name == "ours"} == {0, 1, 2, 3}


def test_a_stop_is_noticed_between_rounds():
    rounds = []
    seconds = timing.time_against_each_other({"a": [lambda: rounds.append(1)]}, 50, CPU, lambda: len(rounds) > 5)
    assert 0 < len(seconds["a"]) < 50


def test_what_takes_longer_is_told_to_take_longer():
    work = torch.randn(256, 256)
    calls = {"once": [lambda: work @ work], "often": [lambda: [work @ work for _ in range(20)]]}
    seconds = timing.time_against_each_other(calls, 15, CPU)
    assert statistics.median(seconds["often"]) > 3 * statistics.median(seconds["once"]) > 0


class Simulated:
    """A GPU and its host on one clock: what is enqueued runs in order, and the host goes on meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0
        monkeypatch.setattr(timing, "moment", lambda _device: Event(self))
        monkeypatch.setattr(timing, "synchronize", self.synchronize)
        monkeypatch.setattr(timing, "seconds_between", lambda first, last: last.at - first.at)
        monkeypatch.setattr(timing, "HEAD_START_BYTES", 16)
        monkeypatch.setattr(timing.HeadStart, "give", lambda ahead: self.enqueue(70.0 * ahead.times))

    def enqueue(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def synchronize(self, _device: torch.device) -> None:
        self.host = max(self.host, self.free)

    def call(self, kernels: int, host: float, each: float) -> timing.Call:
        def run() -> None:
            for _ in range(kernels):
                self.host += host
                self.enqueue(each)

        return run


class Event:
    def __init__(self, device: Simulated) -> None:
        self.device, self.at = device, max(device.host, device.free)

    def query(self) -> bool:
        return self.device.host >= self.at


def test_launches_on_the_host_are_no_part_of_a_device_s_time(monkeypatch):
    device = Simulated(monkeypatch)
    contenders = {"ours": [device.call(1, 10, 25)], "chain": [device.call(40, 10, 2)]}
    without = timing.time_against_each_other(contenders, 5, CPU)
    assert min(without["chain"]) > 370, "the host's time, nearly all of it"
    ahead = timing.HeadStart(CPU)
    seconds = timing.time_against_each_other(contenders, 5, CPU, ahead=ahead)
    assert seconds == {"ours": [25.0] * 5, "chain": [80.0] * 5}
    assert ahead.times == 8 and ahead.late == set(), "8 · 70 is the first that 400 fits into"


def test_a_call_that_the_device_waits_for_all_the_same_is_told(monkeypatch):
    device = Simulated(monkeypatch)
    contenders = {"ours": [device.call(1, 10, 25)], "slow": [device.call(1, 1e6, 2)]}
    ahead = timing.HeadStart(CPU)
    timing.time_against_each_other(contenders, 5, CPU, ahead=ahead)
    assert ahead.times == timing.MOST_HEAD_STARTS and ahead.late == {"slow"}


def test_the_host_has_a_time_of_its_own_and_its_work_makes_way_for_the_device_s():
    assert timing.head_start(CPU) is None, "nothing runs beside the host there"
    assert timing.host_seconds([lambda: time.sleep(0.002)], CPU) >= 0.002
    with timing.profile(activities=[timing.ProfilerActivity.CPU], acc_events=True) as watched:
        torch.ones(3) + 1
    assert not any(map(timing.is_kernel, watched.events())), "the host's own"


@pytest.mark.parametrize(
    ("name", "annotation", "counts"),
    [
        ("void at::native::vectorized_elementwise_kernel<4>", False, True),
        ("triton_poi_fused_add_0", None, True),
        ("## Call CompiledFxGraph abc ##", None, False),
        ("Optimizer.step#AdamW.step", None, False),
        ("my own range", True, False),
        ("Memcpy HtoD (Pinned -> Device)", False, False),
    ],
)
def test_only_kernels_are_launches(name, annotation, counts):
    event = SimpleNamespace(name=name, device_type=DeviceType.CUDA)
    if annotation is not None:  # older PyTorch does not know
        event.is_user_annotation = annotation
    assert timing.is_kernel(event) is counts
    event.device_type = DeviceType.CPU
    assert not timing.is_kernel(event)


def test_median_and_fifths():
    found = timing.timing([float(n) for n in range(1, 12)])
    assert (found.p20, found.median, found.p80) == (3.0, 6.0, 9.0)
    assert (found.host, found.graph, found.launches, found.peak_bytes, found.is_late) == (None, None, None, None, False)
    single = timing.timing([2.0])
    assert (single.p20, single.median, single.p80) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("size", "count"), [(1, timing.MOST_SETS), (8 << 20, 8), (1 << 30, 3)])
def test_sets_together_exceed_the_cache(size, count):
    assert timing.sets_needed(size, CPU) == count


def test_a_machine_has_ceilings_of_its_own(monkeypatch):
    monkeypatch.setattr(ceilings, "SMALL", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)
    found = ceilings.measure_ceilings(CPU)
    assert found.keys() == {"copy bandwidth", "bf16 matmul", "fp32 matmul", "int8 matmul", "fp8 matmul"}
    assert min(found.values()) > 0


def test_products_of_every_format_are_the_product():
    products = ceilings.matrix_products(CPU, 32, 64, 48)
    results = {name: product() for name, product in products.items()}
    assert {name: tuple(each.shape) for name, each in results.items()} == dict.fromkeys(products, (32, 48))
    assert results["int8"].dtype == torch.int32 and results["fp8"].dtype == torch.bfloat16


def test_the_device_s_filler_fills_as_the_kernels_own_does():
    ours, theirs = DeviceFiller(CPU, 3), Filler("cpu", 3)
    assert torch.equal(ours.normal(4, 5, dtype=torch.bfloat16), theirs.normal(4, 5, dtype=torch.bfloat16))
    assert torch.equal(ours.uniform(7), theirs.uniform(7))
    assert torch.equal(ours.integers(9, 20), theirs.integers(9, 20))
