"""A file system that refuses: full, or something in the way. One message, nothing lost, and it goes on afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 16 MiB, which `fill` fills. Needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0777", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all space but `leave` bytes."""
    ballast = disk / "ballast"
    free = int(subprocess.run(["df", "--output=avail", "-B1", disk], capture_output=True, text=True).stdout.split()[1])
    ballast.write_bytes(b"x" * max(0, free - leave))
    return ballast


@pytest.mark.parametrize("leave", [60_000, *(pytest.param(n, marks=pytest.mark.sweep) for n in (0, 250_000, 420_000))])
def test_a_full_disk_costs_nothing_that_was_saved(leave, small_disk, work, reference):
    """Full from step 7 on, with room for none, some or most of a checkpoint; then there is space again."""
    run = small_disk / "run"
    child = work.start(out="disk/run", signal_at={"at": {"event": "StepDone", "step": 7}, "signal": signal.SIGSTOP})
    child.until(lambda: len(work.events("StepDone", "disk/run")) == 7, "step 7")
    ballast = fill(small_disk, leave)
    child.go_on()
    child.require(75)
    assert "no space left" in child.text and "Free some space" in child.text and str(run) in child.text
    assert work.steps("disk/run") == [3, 6] and not list(run.glob("checkpoints/.*"))
    ballast.unlink()
    resumed = work.run(out="disk/run")
    assert "resumed     after step 6" in resumed.text and "damaged" not in resumed.text
    reference.require(run)


@pytest.mark.parametrize(
    ("family", "phase", "leave"),
    [
        ("ltx-video", "prompts", 8_000),
        *(pytest.param("ltx-video", "prompts", leave, marks=pytest.mark.sweep) for leave in (0, 40_000)),
        *(pytest.param("ltx2", "audio", leave, marks=pytest.mark.sweep) for leave in (0, 8_000)),
    ],
)
def test_a_full_disk_while_caching(phase, leave, small_disk, fresh, reference):
    stand_still = {"at": {"event": "PhaseStarted", "phase": phase}, "signal": signal.SIGSTOP}
    cache = f'cache.directory="{small_disk / "cache"}"'
    child = fresh.start(cache, signal_at=stand_still)
    child.until(lambda: [e for e in fresh.events("PhaseStarted") if e["phase"] == phase], "caching")
    ballast = fill(small_disk, leave)
    child.go_on()
    child.require(75)
    assert "no space left" in child.text and not list((small_disk / "cache").rglob(".*"))
    ballast.unlink()
    assert "damaged" not in fresh.run(cache).text
    reference.require(fresh.out())


def test_a_full_disk_at_the_start(small_disk, work, reference):
    ballast = fill(small_disk, 0)
    refused = work.run(out="disk/run", code=75)
    assert "no space left" in refused.text
    ballast.unlink()
    work.run(out="disk/run")
    reference.require(small_disk / "run")


@pytest.mark.parametrize(
    "place",
    ["run", "run/plan.json", *(pytest.param(p, marks=pytest.mark.sweep) for p in ("run/checkpoints", "cache/latents"))],
)
def test_something_in_the_way_is_named(place, fresh, reference):
    """A file where a folder should be, or a folder where a file should be."""
    path = fresh.folder / place
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if path.suffix else path.write_text("a user's file", encoding="utf-8")
    refused = fresh.run(code=73)
    assert place in refused.text
    assert path.is_dir() if path.suffix else path.read_text(encoding="utf-8") == "a user's file"
    path.rmdir() if path.suffix else path.unlink()
    fresh.run()
    reference.require(fresh.out())


def test_a_run_directory_that_vanishes_is_told(work):
    child = work.start(signal_at={"at": {"event": "StepDone", "step": 4}, "signal": signal.SIGSTOP})
    child.until(lambda: len(work.events("StepDone")) == 4, "step 4")
    work.out().rename(work.out("taken-away"))
    child.go_on()
    child.wait()
    assert "Traceback" not in child.text
    assert child.code in (0, 73), child.text
