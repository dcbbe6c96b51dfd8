"""The worker process under attack: it hangs, crashes, eats memory, or loses its parent; we go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ltxforge.media.supervisor import Supervisor, WorkerFault

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals and pipes")


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A named pipe that nobody writes to: opening it never returns."""
    os.mkfifo(tmp_path / "endless.mp4")
    return tmp_path / "endless.mp4"


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_hang_ends_at_the_limit(supervisor: Supervisor, endless: Path, make_video, counter_frames) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerFault, match="took longer than 1 s"):
        supervisor.inspect(endless, 1.0)
    assert time.monotonic() - began < 3
    assert supervisor.inspect(make_video("next.mp4", counter_frames(3)))["codec"] == "h264"


def test_a_crash_is_a_fault_and_the_next_file_is_served(
    supervisor: Supervisor, endless: Path, make_video, counter_frames
) -> None:
    path = make_video("next.mp4", counter_frames(3))
    supervisor.inspect(path)
    crash = threading.Timer(0.3, os.kill, (supervisor.process_id, signal.SIGSEGV))
    crash.start()
    with pytest.raises(WorkerFault, match="crashed on it \\(SIGSEGV\\)"):
        supervisor.inspect(endless)
    assert supervisor.inspect(path)["codec"] == "h264"


def test_a_worker_that_died_between_questions_is_replaced(supervisor: Supervisor, make_video, counter_frames) -> None:
    path = make_video("next.mp4", counter_frames(3))
    supervisor.inspect(path)
    first = supervisor.process_id
    os.kill(first, signal.SIGKILL)
    while supervisor._child.poll() is None:
        time.sleep(0.01)
    assert supervisor.inspect(path)["codec"] == "h264"
    assert supervisor.process_id != first


def test_an_interrupted_question_leaves_no_answers_behind(
    supervisor: Supervisor, make_video, counter_frames, monkeypatch
) -> None:
    path = make_video("next.mp4", counter_frames(20))

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ltxforge.media.supervisor._fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            supervisor.frames(path, [0.0, 0.4], (32, 32))
    assert supervisor.frames(path, [0.0, 0.4], (32, 32)).shape == (2, 32, 32, 3)


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(supervisor: Supervisor, make_video, counter_frames) -> None:
    path = make_video("next.mp4", counter_frames(3))
    supervisor.inspect(path)
    served_by = supervisor.process_id
    os.kill(served_by, signal.SIGINT)
    time.sleep(0.1)
    supervisor.inspect(path)
    assert supervisor.process_id == served_by


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits bind on Linux")
def test_memory_is_limited(make_video, counter_frames) -> None:
    """A picture that does not fit becomes a refusal, and the worker answers the next question."""
    path = str(make_video("next.mp4", counter_frames(3)))
    lowered = "import ltxforge.media.worker as worker; worker.MEMORY_BYTES = 600 << 20; worker.main()"
    with subprocess.Popen([sys.executable, "-c", lowered], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for request in (
            {"do": "frames", "path": path, "timestamps": [0.0], "size": [9_000, 9_000], "seconds": 60.0},
            {"do": "inspect", "path": path, "seconds": 60.0},
        ):
            process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.close()
        refused, answered = (json.loads(line) for line in process.stdout)
    assert "memory" in refused["fault"]
    assert answered["done"]["codec"] == "h264"


def test_the_terminal_stays_clean(supervisor: Supervisor, make_video, capfd) -> None:
    noise = list(np.random.default_rng(1).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8))
    path = make_video("cut.mkv", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    supervisor.inspect(path)
    assert capfd.readouterr() == ("", "")


def start_worker() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ltxforge.media.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_the_worker_ends_with_its_input() -> None:
    with start_worker() as process:
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def test_a_hanging_worker_ends_by_itself_when_the_parent_is_gone(endless: Path) -> None:
    with start_worker() as process:
        # GRACE_SECONDS after the request's own limit: one second from now.
        request = {"do": "inspect", "path": str(endless), "seconds": -4.0}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=20) != 0


def test_the_worker_dies_with_a_killed_parent(make_video, counter_frames) -> None:
    path = make_video("next.mp4", counter_frames(3))
    script = (
        "import sys, time; from pathlib import Path; from ltxforge.media.supervisor import worker\n"
        "worker().inspect(Path(sys.argv[1])); print(worker().process_id, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as parent:
        process_id = int(parent.stdout.readline())
        assert is_alive(process_id)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(process_id) and time.monotonic() < deadline:
        if Path(f"/proc/{process_id}/stat").exists() and " Z " in Path(f"/proc/{process_id}/stat").read_text():
            return  # ended; nobody collects it here
        time.sleep(0.05)
    assert not is_alive(process_id)


@pytest.mark.parametrize("module", ["media.worker", "media.decode", "media.write", "media.demo", "dataset.scan"])
def test_no_torch(module: str) -> None:
    code = f"import sys, ltxforge.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
