"""What must not change a bit of the result, and files that must not change at all."""

from __future__ import annotations

import os
import pty
import shutil
import threading
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "sets",
    [
        pytest.param(["validation.every=8"], marks=pytest.mark.sweep),
        ["validation.every=5", "validation.at_start=true", "validation.guidance=3"],
        ["memory.checkpointing=true"],
        pytest.param(["checkpoint.every=1", "checkpoint.keep=2"], marks=pytest.mark.sweep),
        pytest.param(["memory.checkpointing=2"], marks=pytest.mark.sweep),
    ],
)
def test_what_surrounds_training_changes_no_bit(sets, work, reference):
    work.run(*sets)
    reference.require(work.out())


def test_a_live_display_changes_no_bit(work, reference):
    """Without --plain, in a terminal."""
    leader, follower = pty.openpty()
    shown = bytearray()
    reader = threading.Thread(target=drain, args=(leader, shown))
    reader.start()
    child = work.start_in_terminal(os.ttyname(follower))
    child.wait()
    os.close(follower)
    reader.join()
    os.close(leader)
    assert child.code == 0, shown.decode("utf-8", "replace")
    assert b"\x1b[" in shown, "it drew nothing"
    reference.require(work.out())


def drain(descriptor: int, into: bytearray) -> None:
    """Read a terminal until its other side is closed."""
    try:
        while data := os.read(descriptor, 65536):
            into += data
    except OSError:  # how Linux says it
        pass


@pytest.mark.sweep
def test_the_built_in_clips_stopped_and_resumed(fresh):
    """The quickstart's data: rendered, cached, stopped, resumed, compared with a run that was not stopped."""
    fresh.change('path = "clips"', 'path = "builtin/shapes"')
    sets = ("run.steps=5", "validation.every=0")
    fresh.run(*sets, out="whole")
    fresh.run(*sets, code=143, signal_at={"at": {"event": "StepDone", "step": 2}, "signal": 15})
    fresh.run(*sets)
    assert fresh.outcome(step=5) == fresh.outcome("whole", step=5)


def test_the_user_s_files_stay_as_they_are(fresh):
    """Bytes, times, modes and names, with a clip and a caption that are refused among them."""
    link = fresh.folder / "clips"
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    (link / "broken.mp4").write_bytes(b"no video")
    (link / "broken.txt").write_text("A caption.\n", encoding="utf-8")
    (link / "clip3.mp4").chmod(0o444)
    before = state(link)
    fresh.run(code=143, signal_at={"at": {"event": "StepDone", "step": 2}, "signal": 15})
    fresh.run(code=-9, signal_at={"at": {"event": "StepDone", "step": 5}, "signal": 9})
    fresh.run()
    assert state(link) == before


def state(folder: Path) -> dict:
    """All that a file system tells about a folder's files, but the time of last reading."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_ino,
                    path.read_bytes() if path.is_file() else None)
        for path in paths
    }  # fmt: skip
