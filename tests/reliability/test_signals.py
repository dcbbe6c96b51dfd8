"""Signals in every phase: an end within a unit of work, the right exit status, no traceback, nothing lost."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

try:
    import fcntl
    import termios
except ImportError:  # Windows, where all this is skipped
    pass

PHASES = [
    {"event": "PhaseStarted", "phase": "scan"},
    {"event": "PhaseAdvanced", "phase": "scan", "done": 2},
    {"event": "PhaseEnded", "phase": "scan"},
    {"event": "PhaseStarted", "phase": "prompts"},
    {"event": "PhaseAdvanced", "phase": "latents", "done": 3},
    {"event": "LoraInjected"},
    {"event": "PhaseAdvanced", "phase": "validate", "done": 1},
    {"event": "CheckpointSaved", "step": 3},
]


@pytest.mark.sweep
@pytest.mark.parametrize("event", PHASES, ids=lambda event: "-".join(map(str, event.values())))
def test_a_stop_in_any_phase(event, fresh, reference):
    stopped = fresh.run("validation.at_start=true", code=143, signal_at={"at": event, "signal": signal.SIGTERM})
    assert "stopped" in stopped.text.splitlines()[-2]
    fresh.run()
    reference.require(fresh.out())


def test_a_second_signal_means_now(work, reference):
    now = {"at": {"event": "StepDone", "step": 7}, "signal": signal.SIGINT, "times": 2}
    work.run(code=130, signal_at=now)
    assert work.steps() == [3, 6]
    work.run()
    reference.require(work.out())


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("latents", signal.SIGINT),
        ("scan", signal.SIGTERM),
        pytest.param("scan", signal.SIGINT, marks=pytest.mark.sweep),
        pytest.param("latents", signal.SIGTERM, marks=pytest.mark.sweep),
    ],
)
def test_a_signal_to_the_whole_group_spares_the_clip_at_work(phase, number, fresh, reference):
    """As a terminal sends Ctrl-C and a service manager SIGTERM: to the media worker too."""
    at = {"event": "PhaseAdvanced", "phase": phase, "done": 1}
    stopped = fresh.run(code=128 + number, signal_at={"at": at, "signal": number, "group": True})
    assert "crashed" not in stopped.text and {event["verdict"] for event in fresh.events("ClipJudged")} == {"ok"}
    fresh.run()
    reference.require(fresh.out())


def workers(pid: int) -> list[int]:
    """Child processes of a process, by Linux's own list."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(number) for number in path.read_text(encoding="ascii").split()]
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_ctrl_c_while_the_media_worker_starts(fresh, reference):
    child = fresh.start()
    child.until(lambda: workers(child.pid), "a worker")
    os.killpg(child.pid, signal.SIGINT)
    child.require(130)
    assert "crashed" not in child.text and {event["verdict"] for event in fresh.events("ClipJudged")} == {"ok"}
    fresh.run()
    reference.require(fresh.out())


def lose_worker(fresh, *sets: str, times: int, out: str = "run"):
    """Run, and kill the worker that often while it is asked for the first missing clip."""
    stand_still = {"at": {"event": "PhaseStarted", "phase": "latents"}, "signal": signal.SIGSTOP}
    child = fresh.start(*sets, signal_at=stand_still, out=out)
    child.until(lambda: [e for e in fresh.events("PhaseStarted", out) if e["phase"] == "latents"], "caching")
    known = set(workers(child.pid))
    for worker in known:  # none where every clip's facts are remembered
        os.kill(worker, signal.SIGSTOP)
    os.kill(child.pid, signal.SIGCONT)
    for worker in known:
        child.until(lambda pid=worker: asked(pid), "a question")
        os.kill(worker, signal.SIGKILL)
    for _ in range(times - len(known)):  # the next ones get their question while they start
        new: set[int] = set()
        child.until(lambda new=new: new.update(set(workers(child.pid)) - known) or new, "another worker")
        known.update(new)
        os.kill(new.pop(), signal.SIGKILL)
    return child


def asked(pid: int) -> bool:
    """Whether something waits in a process's standard input."""
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        return any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))


@linux
def test_a_worker_killed_for_memory_costs_no_clip(fresh, reference):
    lose_worker(fresh, times=1).require(0)
    reference.require(fresh.out())


@linux
def test_a_run_keeps_to_the_samples_it_began_with(fresh):
    """A clip that could not be decoded at first and can be later stays out: it would change every batch."""
    sets = ("optimizer.schedule=constant", "validation.every=0")
    whole = lose_worker(fresh, *sets, "run.steps=6", times=2, out="whole").require(0)
    assert "crashed" in whole.text
    lose_worker(fresh, *sets, "run.steps=4", times=2).require(0)
    resumed = fresh.run(*sets, "run.steps=6")
    assert "1 samples that could not be decoded when this run began stay out of it" in resumed.text
    assert fresh.outcome(step=6) == fresh.outcome("whole", step=6)
