"""Going on behind an interrupted call: what stays, what is measured again, and in which order."""

from __future__ import annotations

import json

import pytest

from ltxforge.benchmarks.finished import Finished, read_finished
from ltxforge.suites.kernels import KernelCase

HEAD = {"format": 2, "suite": "kernels", "device": {"name": "x"}, "versions": {"torch": "2"}, "kernels": "abc"}


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


@pytest.mark.parametrize("key", HEAD)
def test_results_of_something_else_are_measured_again(tmp_path, key):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({**HEAD, "ceilings": {"a": 1}, "cases": [entry(case("a"))]}), encoding="utf-8")
    same = read_finished(path, HEAD)
    assert list(same.entries) == ["a"] and same.head["ceilings"] == {"a": 1}
    assert read_finished(path, {**HEAD, key: "other"}) == Finished()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cases": 3}', '{"cases": [{}]}', "\x00"])
def test_a_damaged_file_holds_nothing(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text, encoding="utf-8")
    assert read_finished(path, HEAD) == Finished()
    assert read_finished(tmp_path / "absent.json", HEAD) == Finished()
