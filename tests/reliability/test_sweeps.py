"""Counted sweeps: a stop at every step and event, kills at random moments and at every file call, races.

Each ends in the same question: are the final tensors, moments and logged losses those of an undisturbed run, to the
last bit? The counts are printed at the end of the tests.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest

from ltxforge.durable import verify_folder
from ltxforge.trackers.jsonl import read_events

pytestmark = pytest.mark.sweep
QUICK = ("validation.every=0",)
KILLED = -signal.SIGKILL


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
@pytest.mark.parametrize("half", [0, 1])
def test_stopped_after_every_step(half, family, primed, reference, count):
    points = range(1 + half, 12, 2)
    for step in points:
        out = f"stopped-{step}"
        stop = {"at": {"event": "StepDone", "step": step}, "signal": signal.SIGTERM}
        primed.run(*QUICK, code=143, out=out, signal_at=stop)
        resumed = primed.run(*QUICK, out=out)
        assert f"resumed     after step {step}," in resumed.text
        reference.require(primed.out(out))
    count(f"{family}: stop after a step, resume in a new process: {len(points)} of {len(points)} runs bit-identical")


LONG = ("run.steps=30", "validation.every=12", "optimizer.warmup_steps=3")


@pytest.mark.parametrize(
    ("family", "seed"), [*(("ltx-video", seed) for seed in (1, 2, 3, 4)), *(("ltx2", seed) for seed in (1, 2, 3))]
)
def test_killed_at_random_moments(family, seed, clean, count):
    """Restarted until it is done, and again, until at least ten kills have hit a living run. Caching included."""
    draw = random.Random(seed)
    began = time.monotonic()
    clean.run(*LONG, 'cache.directory="cache-whole"', out="whole")
    length = time.monotonic() - began
    wanted = clean.outcome("whole", step=30)
    kills = rounds = 0
    hit: Counter[str] = Counter()
    while kills < 10:
        rounds += 1
        out, cache = f"run-{rounds}", f'cache.directory="cache-{rounds}"'
        while True:
            child = clean.start(*LONG, cache, out=out)
            time.sleep(length * draw.random())
            child.signal(signal.SIGKILL)
            if child.wait().code == 0:
                break
            assert child.code == KILLED and "Traceback" not in child.text, child.text
            assert "damaged" not in child.text, child.text
            kills += 1
            phases = [event["phase"] for event in clean.events("PhaseStarted", out) if "phase" in event]
            hit[phases[-1] if phases else "start"] += 1
        assert clean.outcome(out, step=30) == wanted
    count(
        f"{family}: SIGKILL at random moments, seed {seed}: {kills} kills and restarts in {rounds} runs of 30 steps"
        f" (last phase begun: {', '.join(f'{phase} {times}' for phase, times in hit.items())}), 0 manual steps,"
        " 0 differing bits"
    )


@pytest.mark.parametrize("family", ["ltx2"])
@pytest.mark.parametrize("phase", ["prompts", "latents", "audio"])
def test_killed_at_random_moments_of_caching(phase, family, clean, count):
    """Six times in a row, each time somewhere in what is left of the phase; then no entry is missing or damaged."""
    short, draw = ("run.steps=3", "validation.every=0"), random.Random(phase)
    clean.run(*short, 'cache.directory="cache-whole"', out="whole")
    wanted = clean.outcome("whole", step=3)
    [length] = [event["seconds"] for event in clean.events("PhaseEnded", "whole") if event["phase"] == phase]
    kills = 0
    for _ in range(6):
        begun = len(phases_begun(clean, phase))
        child = clean.start(*short)
        child.until(lambda begun=begun: len(phases_begun(clean, phase)) > begun, phase)
        time.sleep(length * draw.random() / 2)
        child.signal(signal.SIGKILL)
        kills += child.wait().code == KILLED
        assert "Traceback" not in child.text and "damaged" not in child.text, child.text
    ended = clean.run(*short)
    assert "damaged" not in ended.text
    assert clean.outcome(step=3) == wanted
    assert kills
    count(f"{family}: SIGKILL at random moments of caching {phase}: {kills} kills in a row, 0 differing bits")


def phases_begun(work, phase):
    """Every beginning of a phase that the log has."""
    return [event for event in work.events("PhaseStarted") if event.get("phase") == phase]


@pytest.fixture
def about_to_save(primed):
    """A run with checkpoints of steps 3 and 5, whose next save is that of step 6 and retires one."""
    primed.run(*QUICK, code=143, signal_at={"at": {"event": "StepDone", "step": 5}, "signal": signal.SIGTERM})
    assert primed.steps() == [3, 5]
    primed.out().rename(primed.out("base"))
    return primed


def require_restorable(work, reference, out):
    """The newest checkpoint that verifies is of step 5 or 6, and the run ends as if nothing had happened."""
    whole = [s for s in work.steps(out) if not verify_folder(work.out(out) / "checkpoints" / f"step-{s:06d}")[1]]
    assert whole == work.steps(out), "a half-written checkpoint has its final name"
    assert whole[-1] in (5, 6)
    resumed = work.run(*QUICK, out=out)
    assert f"resumed     after step {whole[-1]}," in resumed.text and "damaged" not in resumed.text
    reference.require(work.out(out))
    assert not list(work.out(out).rglob(".*")), "leftovers"
    shutil.rmtree(work.out(out))
    return whole[-1]


@pytest.mark.parametrize("half", [0, 1])
def test_killed_before_every_file_call_of_a_save(half, about_to_save, reference, count):
    work = about_to_save
    shutil.copytree(work.out("base"), work.out("counted"))
    counted = work.run(*QUICK, out="counted", die_in=["checkpoint.py:save", 0])
    calls = int(re.search(r"file calls: (\d+)", counted.text)[1])
    assert calls > 30
    found = {5: 0, 6: 0}
    for call in range(1 + half, calls + 1, 2):
        shutil.copytree(work.out("base"), work.out(f"call-{call}"))
        work.run(*QUICK, out=f"call-{call}", code=KILLED, die_in=["checkpoint.py:save", call])
        found[require_restorable(work, reference, f"call-{call}")] += 1
    assert found[5] and found[6]
    count(
        f"SIGKILL before a file call of one save ({calls} calls, half {half + 1}): {sum(found.values())} kills,"
        f" {found[5]} restored the step before, {found[6]} the new one, 0 differing bits"
    )


CALLS = "openat,write,pwrite64,ftruncate,fallocate,fsync,rename,renameat,renameat2,mkdir,unlink,unlinkat,rmdir,mmap"


def traced(child, log, *options):
    """Attach strace to a child that stands still, and let it go on."""
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={CALLS}", *options, "-p", str(child.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    if "attached" not in tracer.stderr.readline():
        tracer.kill()
        tracer.communicate()
        child.signal(signal.SIGKILL)
        pytest.skip("no right to trace processes")
    child.signal(signal.SIGCONT)
    child.wait()
    tracer.communicate()


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("part", [0, 1])
def test_killed_at_every_system_call_of_a_save(part, about_to_save, reference, count):
    """Below Python too: inside safetensors' writing, between a rename and the sync of its folder."""
    work = about_to_save
    stand_still = {"at": {"event": "StepDone", "step": 6}, "signal": signal.SIGSTOP}

    def upto_save(out):
        shutil.copytree(work.out("base"), work.out(out))
        child = work.start(*QUICK, out=out, signal_at=stand_still)
        child.until(lambda: 6 in [event["step"] for event in work.events("StepDone", out)], "step 6")
        return child

    traced(upto_save("counted"), work.folder / "trace.txt")
    lines = (work.folder / "trace.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    calls = next(number for number, line in enumerate(lines) if "checkpoint  step 6" in line)
    assert calls > 30
    found = {5: 0, 6: 0}
    for call in range(1 + part, calls + 1, 2):
        child = upto_save(f"call-{call}")
        traced(child, "/dev/null", "-e", f"inject={CALLS}:signal=SIGKILL:when={call}")
        assert child.code == KILLED
        found[require_restorable(work, reference, f"call-{call}")] += 1
    assert found[5] and found[6]
    count(
        f"SIGKILL at a system call of one save ({calls} calls, half {part + 1}): {sum(found.values())} kills,"
        f" {found[5]} restored the step before, {found[6]} the new one, 0 differing bits"
    )


SHORT = ("run.steps=4", "checkpoint.every=2", "validation.every=3")


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_at_every_event_of_a_whole_run(number, family, clean, count):
    """From the scan of the clips to the LoRA file, with an empty cache at each start."""
    clean.run(*SHORT, 'cache.directory="cache-whole"', out="whole")
    wanted = clean.outcome("whole", step=4)
    events = len(list(read_events(clean.out("whole") / "events.jsonl")))
    ended = {}
    for event in range(1, events + 1):
        out, cache = f"event-{event}", f'cache.directory="cache-{event}"'
        stopped = clean.start(*SHORT, cache, out=out, signal_at={"at": {"number": event}, "signal": number}).wait()
        assert stopped.code in ((143, 0) if number == signal.SIGTERM else (KILLED,)), stopped.text
        assert "Traceback" not in stopped.text, stopped.text
        ended[stopped.code] = ended.get(stopped.code, 0) + 1
        clean.run(*SHORT, cache, out=out)
        assert clean.outcome(out, step=4) == wanted
        shutil.rmtree(clean.out(out))
    assert ended.get(0, 0) <= 1  # at the last event there is nothing left to stop
    count(f"{family}: {number.name} at every event of a whole run: {events} of {events} resumed bit-identical")


def test_ten_races_for_one_directory(primed, count):
    primed.run(*QUICK, "run.steps=3", out="whole")
    wanted = primed.outcome("whole", step=3)
    for race in range(10):
        both = [primed.start(*QUICK, "run.steps=3", out=f"race-{race}") for _ in range(2)]
        codes = sorted(child.wait().code for child in both)
        assert codes == [0, 73], [child.text for child in both]
        loser = next(child for child in both if child.code == 73)
        assert "another ltxforge is using this run directory" in loser.text
        assert len(primed.events("StepDone", f"race-{race}")) == 3
        assert primed.outcome(f"race-{race}", step=3) == wanted
    count("two processes started in one directory: 10 races, exactly one ran in each")


@pytest.mark.parametrize(("family", "seed"), [("ltx-video", 1), ("ltx-video", 2), ("ltx2", 1)])
def test_two_runs_fill_one_cache_and_one_is_killed(family, seed, clean, reference, count):
    draw = random.Random(seed)
    kills = 0
    for race in range(4):
        cache = f'cache.directory="cache-{race}"'
        living, victim = (clean.start(*QUICK, cache, out=f"{name}-{race}") for name in ("living", "victim"))
        time.sleep(draw.random() * 1.5)
        victim.signal(signal.SIGKILL)
        kills += victim.wait().code == KILLED
        living.require(0)
        again = clean.run(*QUICK, cache, out=f"victim-{race}")
        assert "damaged" not in living.text + again.text
        for name in ("living", "victim"):
            reference.require(clean.out(f"{name}-{race}"))
    assert kills
    count(f"{family}: two runs filling one cache, seed {seed}: 4 races, {kills} kills, 0 damaged entries and bits")
