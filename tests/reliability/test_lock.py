"""One process per run directory, several per cache."""

from __future__ import annotations

import signal
import socket

STAND_STILL = {"at": {"event": "StepDone", "step": 4}, "signal": signal.SIGSTOP}


def test_a_second_process_is_refused_while_the_first_runs(work, reference):
    first = work.start(signal_at=STAND_STILL)
    first.until(lambda: len(work.events("StepDone")) == 4, "step 4")
    before = {path: path.read_bytes() for path in work.out().rglob("*") if path.is_file()}
    second = work.run(code=73)
    assert f"process {first.pid} on {socket.gethostname()}, started " in second.text and "--out" in second.text
    assert {path: path.read_bytes() for path in work.out().rglob("*") if path.is_file()} == before
    first.go_on()
    first.require(0)
    reference.require(work.out())


def test_the_lock_of_a_killed_process_is_no_obstacle(work, reference):
    first = work.start(signal_at=STAND_STILL)
    first.until(lambda: len(work.events("StepDone")) == 4, "step 4")
    first.signal(signal.SIGKILL)
    first.require(-signal.SIGKILL)
    assert (work.out() / "lock.json").exists()
    work.run()
    reference.require(work.out())
