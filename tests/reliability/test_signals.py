"""Signals in every phase: an end within a unit of work, the right exit status, no traceback, nothing lost."""

from __future__ import annotations

import os
import shutil
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
    require_stop(fresh, reference, event, signal.SIGTERM)


@pytest.mark.parametrize("family", ["ltx2"])
@pytest.mark.parametrize(
    ("event", "number"),
    [
        ({"event": "PhaseAdvanced", "phase": "audio", "done": 2}, signal.SIGTERM),
        *(
            pytest.param(event, number, marks=pytest.mark.sweep)
            for event, number in [
                ({"event": "PhaseStarted", "phase": "audio"}, signal.SIGINT),
                ({"event": "PhaseEnded", "phase": "audio"}, signal.SIGINT),
                ({"event": "PhaseAdvanced", "phase": "latents", "done": 3}, signal.SIGINT),
                *((event, signal.SIGTERM) for event in PHASES),
            ]
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.name,
)
def test_a_stop_in_any_phase_with_sound(event, number, fresh, reference):
    require_stop(fresh, reference, event, number)


@pytest.mark.parametrize("family", ["ltx2"])
def test_a_stop_while_gemma_and_the_connectors_take_turns(fresh, reference):
    """As with more captions than the host's memory holds of Gemma's states: here one is the limit. What was connected
    stays, and whether they took turns shows in no bit.
    """
    turns = {"ltxforge.models.ltx2_video": {"LEAST_HELD_BYTES": 1, "HOST_SHARE_HELD": 0}}
    at = {"event": "PhaseAdvanced", "phase": "prompts", "done": 3}
    stopped = fresh.run(code=130, signal_at={"at": at, "signal": signal.SIGINT}, constants=turns)
    assert "stopped while caching prompts" in stopped.text
    assert len(list((fresh.folder / "cache/prompts").rglob("*.safetensors"))) == 3
    fresh.run(constants=turns)
    reference.require(fresh.out())


def require_stop(fresh, reference, event, number):
    """A stop at this event ends the run in order, and the same command comes to the same bits."""
    at = {"at": event, "signal": number}
    stopped = fresh.run("validation.at_start=true", code=128 + number, signal_at=at)
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
    ("family", "phase", "number"),
    [
        ("ltx-video", "latents", signal.SIGINT),
        ("ltx-video", "scan", signal.SIGTERM),
        pytest.param("ltx-video", "scan", signal.SIGINT, marks=pytest.mark.sweep),
        pytest.param("ltx-video", "latents", signal.SIGTERM, marks=pytest.mark.sweep),
        ("ltx2", "audio", signal.SIGINT),
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


def lose_worker(fresh, *sets: str, times: int, out: str = "run", phase: str = "latents"):
    """Run, and kill the worker that often while it is asked for the first missing clip, or sound."""
    began = {"event": "PhaseStarted", "phase": phase}
    child = fresh.start(*sets, signal_at={"at": began, "signal": signal.SIGSTOP}, out=out)
    child.until(child.stands_still, "caching")
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
@pytest.mark.parametrize(("family", "phase"), [("ltx-video", "latents"), ("ltx2", "audio")])
def test_a_worker_killed_for_memory_costs_no_clip(phase, fresh, reference):
    lose_worker(fresh, times=1, phase=phase).require(0)
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


CONSTANT = ("optimizer.schedule=constant", "validation.every=0")


@linux
@pytest.mark.parametrize("family", ["ltx2"])
def test_a_run_keeps_to_the_sound_it_began_with(fresh):
    """Sound that could not be decoded at first and can be later stays out; the picture trains from the start."""
    whole = lose_worker(fresh, *CONSTANT, "run.steps=6", times=2, out="whole", phase="audio").require(0)
    assert "cannot be decoded" in whole.text and "picture alone" in whole.text
    lose_worker(fresh, *CONSTANT, "run.steps=4", times=2, phase="audio").require(0)
    resumed = fresh.run(*CONSTANT, "run.steps=6")
    assert "the sound of 1 samples that had none when this run began stays out of it" in resumed.text
    assert fresh.outcome(step=6) == fresh.outcome("whole", step=6)


@linux
@pytest.mark.parametrize("family", ["ltx2"])
def test_sound_that_a_run_began_with_and_that_is_lost_ends_it(work):
    work.run(*CONSTANT, "run.steps=6", out="whole")
    work.run(*CONSTANT, "run.steps=4")
    shutil.rmtree(work.folder / "cache/audio")
    refused = lose_worker(work, *CONSTANT, "run.steps=6", times=2, phase="audio").require(73)
    assert "1 samples' sound that this run began with cannot be decoded any more" in refused.text
    assert len(work.events("StepDone")) == 4, "it trained"
    work.run(*CONSTANT, "run.steps=6")
    assert work.outcome(step=6) == work.outcome("whole", step=6)
