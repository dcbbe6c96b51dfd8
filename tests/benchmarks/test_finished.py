"""Going on behind an interrupted call: what stays, what is measured again, and in which order."""

from __future__ import annotations

import json

import pytest

from ltxforge.benchmarks.finished import Finished, differences, keep_aside, read_finished
from ltxforge.suites.kernels import KernelCase

HEAD = {
    "format": 2,
    "suite": "kernels",
    "device": {"kind": "cuda", "name": "x"},
    "versions": {"torch": "2"},
    "kernels": "abc",
}


def case(name: str, **changes: object) -> KernelCase:
    return KernelCase(**{"name": name, "op": "gelu", "tokens": 4, "width": 8, **changes})


def entry(of: KernelCase, outcome: str = "measured") -> dict:
    return json.loads(json.dumps({"name": of.name, "outcome": outcome, "case": of.settings()}))


def test_what_was_measured_stays_and_what_failed_comes_last():
    cases = [case("bad"), case("good"), case("new"), case("changed"), case("full")]
    entries = [
        entry(cases[0], "failed"),
        entry(cases[1]),
        entry(case("changed", tokens=5)),
        entry(cases[4], "out of memory"),
    ]
    finished = Finished({each["name"]: each for each in entries})
    assert list(finished.kept(cases)) == ["good", "full"]
    assert [each.name for each in finished.order(cases)] == ["new", "bad", "changed"]


def test_what_was_cut_off_comes_first_as_long_as_it_is_the_same_case():
    cases = [case("new"), case("cut"), case("smaller")]
    begun = {each.name: {"times": 1, "case": json.loads(json.dumps(each.settings()))} for each in cases[1:]}
    begun["smaller"]["case"]["tokens"] = 5
    finished = Finished(begun=begun)
    assert [each.name for each in finished.order(cases)] == ["cut", "new", "smaller"]
    assert [finished.times_begun(each) for each in cases] == [0, 1, 0]
    assert finished.without(["cut"]).times_begun(cases[1]) == 0


def written(path, **changes: object):
    head = {**HEAD, "ceilings": {"a": 1}, **changes}
    path.write_text(json.dumps({**head, "cases": [entry(case("a"))]}), encoding="utf-8")
    return path


@pytest.mark.parametrize(("changes", "told"), [
    ({"format": 1}, "format 1, here 2"),
    ({"suite": "step"}, "suite step, here kernels"),
    ({"device": {"kind": "cuda", "name": "y"}}, "device name y, here x"),
    ({"versions": {"torch": "1"}}, "torch 1, here 2"),
    ({"versions": {"torch": "2", "peft": "1"}}, "peft 1, here None"),
    ({"kernels": "old"}, "other sources of our kernels"),
])  # fmt: skip
def test_what_makes_results_old_is_named(tmp_path, changes, told):
    path = written(tmp_path / "kernels.json")
    same = read_finished(path, HEAD)
    assert list(same.entries) == ["a"] and same.head["ceilings"] == {"a": 1} and not same.differs
    assert read_finished(written(path, **changes), HEAD) == Finished(differs=(told,))


@pytest.mark.parametrize(("kind", "differs"), [
    ("cuda", ()), ("rocm", ()), ("cpu", ("cpu AVX2, here AVX512", "threads 2, here 8")),
])  # fmt: skip
def test_a_gpu_s_results_outlive_another_host(kind, differs):
    def head(memory: int, **versions: str) -> dict:
        return {**HEAD, "device": {"kind": kind, "name": "x", "memory_bytes": memory}, "versions": versions}

    old, new = head(1, torch="2", cpu="AVX2", threads="2"), head(2, torch="2", cpu="AVX512", threads="8")
    assert differences(old, new) == differs


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cases": 3}', '{"cases": [{}]}', "\x00"])
def test_a_damaged_file_holds_nothing(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text, encoding="utf-8")
    assert read_finished(path, HEAD) == Finished(differs=("it is no results file",))
    assert read_finished(tmp_path / "absent.json", HEAD) == Finished()


def test_what_is_kept_aside_replaces_nothing(tmp_path):
    path, head = tmp_path / "kernels.json", {"date": "2026-01-02T03:04:05+00:00"}
    found = []
    for text in ("one", "one", "two"):
        path.write_text(text, encoding="utf-8")
        found.append(keep_aside(path, head))
    assert [each.name for each in found] == ["kernels.2026-01-02T03-04-05.json"] * 2 + [
        "kernels.2026-01-02T03-04-05-2.json"
    ]
    assert [found[0].read_text(encoding="utf-8"), found[2].read_text(encoding="utf-8")] == ["one", "two"]
    assert keep_aside(path, {}).exists()
