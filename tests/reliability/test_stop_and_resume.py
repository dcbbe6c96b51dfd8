"""Stopped by a signal and started again in a new process: the same bits as never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ltxforge


@pytest.mark.parametrize(
    ("family", "step", "number"),
    [
        ("ltx-video", 1, signal.SIGINT),
        ("ltx-video", 6, signal.SIGTERM),
        ("ltx-video", 8, signal.SIGHUP),
        ("ltx2", 6, signal.SIGTERM),
    ],
)
def test_a_stop_changes_nothing(step, number, work, reference):
    stopped = work.run(code=128 + number, signal_at={"at": {"event": "StepDone", "step": step}, "signal": number})
    assert f"stopped at step {step} of 12" in stopped.text and "same command" in stopped.text
    assert work.steps()[-1] == step and not (work.out() / "lora.safetensors").exists()
    resumed = work.run()
    assert f"resumed     after step {step}, from " in resumed.text
    reference.require(work.out())


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
def test_a_really_new_process_goes_on(work, reference):
    """Not forked: another interpreter with another hash seed, as a person starts it."""
    work.run(code=143, signal_at={"at": {"event": "StepDone", "step": 7}, "signal": signal.SIGTERM})
    command = [sys.executable, "-m", "ltxforge", "run", str(work.recipe), "--out", str(work.out()), "--plain"]
    root = Path(ltxforge.__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random", "PYTHONPATH": path}
    subprocess.run(command, cwd=work.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    reference.require(work.out())
