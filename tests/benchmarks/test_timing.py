"""How a median comes about: turns, rotation, quantiles; and what the ceilings are."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from ltxforge_kernels.cases import Filler

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


def test_median_and_fifths():
    found = timing.timing([float(n) for n in range(1, 12)])
    assert (found.p20, found.median, found.p80) == (3.0, 6.0, 9.0)
    assert (found.graph, found.launches, found.peak_bytes) == (None, None, None)
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
