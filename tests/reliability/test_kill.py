"""Killed with SIGKILL at chosen moments: nothing to repair, the same bits. Random ones: `test_sweeps.py`."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

KILLED = -signal.SIGKILL


def kill_at(**event):
    return {"at": event, "signal": signal.SIGKILL}


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
@pytest.mark.parametrize(
    ("event", "goes_on_from"),
    [
        pytest.param({"event": "StepDone", "step": 2}, 0, marks=pytest.mark.sweep),
        ({"event": "StepDone", "step": 9}, 6),  # before its checkpoint
        pytest.param({"event": "CheckpointSaved", "step": 9}, 9, marks=pytest.mark.sweep),
        ({"event": "PhaseAdvanced", "phase": "validate", "done": 1}, 6),  # in the sample of step 8
    ],
)
def test_a_kill_changes_nothing(event, goes_on_from, work, reference):
    work.run("validation.every=8", code=KILLED, signal_at=kill_at(**event))
    resumed = work.run("validation.every=8")
    assert (f"resumed     after step {goes_on_from}," in resumed.text) == bool(goes_on_from)
    reference.require(work.out())


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(work, reference):
    work.run(code=KILLED, die_in=["checkpoint.py:save", 25])
    assert work.steps() == [] and list((work.out() / "checkpoints").glob(".step-000003.partial-*"))
    work.run(code=KILLED, signal_at=kill_at(event="StepDone", step=5))
    assert work.steps() == [3] and not list((work.out() / "checkpoints").glob(".*"))
    work.run(code=KILLED, die_in=["checkpoint.py:save", 25])
    assert work.steps() == [3]
    work.run()
    reference.require(work.out())


@pytest.mark.parametrize(
    ("family", "phase", "done", "whole"),
    [
        ("ltx-video", "latents", {"latents": 3}, {"latents": 7}),
        ("ltx2", "prompts", {"prompts": 4}, {"prompts": 7, "latents": 7, "audio": 6}),
        ("ltx2", "audio", {"prompts": 7, "latents": 7, "audio": 3}, {"prompts": 7, "latents": 7, "audio": 6}),
    ],
)
def test_an_interrupted_caching_goes_on_where_it_stopped(phase, done, whole, fresh, reference):
    fresh.run(code=KILLED, signal_at=kill_at(event="PhaseAdvanced", phase=phase, done=done[phase]))
    before = entries(fresh.folder / "cache")
    assert done.items() <= Counter(kind for kind, _ in before).items()
    fresh.run()
    after = entries(fresh.folder / "cache")
    assert {path: after[path] for path in before} == before, "a finished entry was made again"
    assert whole.items() <= Counter(kind for kind, _ in after).items()
    reference.require(fresh.out())


def entries(cache):
    """Every entry's inode and time of writing, by kind and name."""
    found = [path for kind in ("latents", "audio", "prompts") for path in (cache / kind).rglob("*.safetensors")]
    return {(path.parts[-3], path.name): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_leftovers_of_kills_are_swept(work):
    """Partial files of a killed process go at the next start, wherever in the run directory they lie."""
    at_10 = {"at": {"event": "StepDone", "step": 10}, "signal": signal.SIGTERM}
    work.run("validation.every=8", code=143, signal_at=at_10)
    work.run(code=KILLED, die_in=["checkpoint.py:save", 25])
    [left] = (work.out() / "checkpoints").glob(".*")
    suffix = left.name.split(".partial-")[1]
    for folder in ("", "checkpoints", "samples/step-000008"):
        (work.out() / folder / f".lora.safetensors.partial-{suffix}").write_bytes(b"half")
    (work.out() / "mine.partial-1").write_bytes(b"a user's file")
    work.run()
    assert not list(work.out().rglob(".*")) and (work.out() / "mine.partial-1").exists()
