"""Comparing with an earlier result: same device, same settings, and a stated tolerance."""

from __future__ import annotations

import json

import pytest

from ltxforge.benchmarks.against import TOLERANCE, compare, read_baseline
from ltxforge.errors import PlanError

DEVICE = {"kind": "cuda", "name": "NVIDIA H200"}
HEAD = {"suite": "kernels", "device": DEVICE}


def entry(seconds: dict[str, float], name: str = "a", **settings: object) -> dict:
    return {"name": name, "case": {"tokens": 8, "peers": [], "floors": {}, **settings}, "seconds": seconds}


def baseline(path, *entries: dict, **changes: object):
    path.write_text(json.dumps({**HEAD, "cases": entries, **changes}), encoding="utf-8")
    return path


def test_old_new_and_ratio(tmp_path):
    old = read_baseline(baseline(tmp_path / "b.json", entry({"triton": 1.0, "eager": 3.0})), HEAD)
    found = compare(old, [entry({"triton": 0.5, "eager": 3.3, "compile": 1.0}, peers=["PEFT"]), entry({"x": 1.0}, "b")])
    assert [(each.what, each.ratio, each.is_slower) for each in found] == [
        ("triton", 2.0, False), ("eager", pytest.approx(1 / 1.1), True),
    ]  # fmt: skip
    assert found[1].told() == "a: eager takes 1.10 times the baseline's time"


def test_other_settings_are_not_compared(tmp_path):
    old = read_baseline(baseline(tmp_path / "b.json", entry({"triton": 1.0})), HEAD)
    assert compare(old, [entry({"triton": 9.0}, tokens=16)]) == []


@pytest.mark.parametrize(("new", "slower"), [(1 + TOLERANCE, False), (1.001 + TOLERANCE, True), (0.1, False)])
def test_the_tolerance(tmp_path, new, slower):
    old = read_baseline(baseline(tmp_path / "b.json", entry({"triton": 1.0})), HEAD)
    assert compare(old, [entry({"triton": new})])[0].is_slower is slower


@pytest.mark.parametrize(("changes", "message"), [
    ({"suite": "step"}, "another suite: step, here kernels"),
    ({"device": {"kind": "cpu", "name": "NVIDIA H200"}}, "another kind of device: cpu, here cuda"),
    ({"device": {"kind": "cuda", "name": "NVIDIA H100"}}, "another device: NVIDIA H100, here NVIDIA H200"),
    ({"device": None}, "no results file"),
    ({"cases": [{"name": "a"}]}, "no results file"),
])  # fmt: skip
def test_another_machine_s_figures_are_refused(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        read_baseline(baseline(tmp_path / "b.json", **changes), HEAD)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_nothing_takes_are_refused(tmp_path, seconds):
    path = baseline(tmp_path / "b.json", entry({"eager": 1.0, "triton": seconds}))
    with pytest.raises(PlanError, match="a: triton has .* seconds, which nothing takes"):
        read_baseline(path, HEAD)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_baseline(tmp_path / "b.json", HEAD)
