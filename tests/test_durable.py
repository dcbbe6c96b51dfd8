"""Files that are whole or absent, names that stay inside, and one process per directory."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ltxforge import durable
from ltxforge.errors import RunError
from ltxforge.lock import RunLock
from ltxforge.signals import StopRequest


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    durable.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


POSIX_MODES = pytest.mark.skipif(os.name != "posix", reason="files have no mode bits here")


@POSIX_MODES
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with durable.staged_file(tmp_path / "cache" / "entry") as partial:
            partial.unlink()  # as safetensors does: a new file of its own, for its owner alone
            partial.touch(0o600)
        with durable.staged_folder(tmp_path / "step", {}) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "tensors").touch(0o600)
        durable.write_json(tmp_path / "plan.json", {})
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(("entry", "tensors", durable.MANIFEST, "plan.json"), mode)


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "step"
    with pytest.raises(RuntimeError), durable.staged_folder(final, {}) as folder:
        (folder / "half").write_text("x", encoding="utf-8")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with durable.staged_folder(final, {"step": 1}) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x", encoding="utf-8")
        assert not final.exists()
    assert durable.verify_folder(final) == ({"step": 1}, "")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x"])
def test_paths_that_lead_out_are_refused(name, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="leads out"):
        durable.inside(root, name)


@pytest.mark.parametrize("name", ["red-disc", "a", "0_1", "x" * 64])
def test_safe_names(name):
    assert durable.is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "..", "a/b", "a\\b", "A", "a b", "-a", "_a", "con", "aux", "com1", "lpt9", "a.", "x" * 65, "ä", "a\0", "a\n"],
)
def test_unsafe_names(name):
    assert not durable.is_safe_name(name)


HOLD = """
import sys, time
from pathlib import Path
from ltxforge.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_and_the_lock_dies_with_its_owner(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {holder.pid} on ") as refused, RunLock(tmp_path):
        pass
    assert "--out" in str(refused.value)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_a_signal_is_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.requested and stop.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


# A shell starts background jobs with SIGINT ignored, and that is inherited: the child begins like a job in front.
TWICE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ltxforge.signals import StopRequest
with StopRequest():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


NOHUP = """
import os, signal
from ltxforge.signals import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
"""


def test_what_nohup_ignores_stays_ignored():
    assert subprocess.run([sys.executable, "-c", NOHUP], check=False).returncode == 0


def test_a_second_signal_means_now():
    child = subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.3)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=5) == 128 + signal.SIGINT
    child.stdout.close()
