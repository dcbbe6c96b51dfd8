"""Keeps the worker process: starts it, asks it, watches the clock, and starts another one after a fault.

Decides how long a file may take. A crash, a hang or a memory bomb in the worker becomes a WorkerFault with a reason in
plain words; it never reaches this process. Torch-free.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

import ltxforge

Answer = TypeVar("Answer")
SECONDS = 60.0
# What is read or decoded from end to end gets more time; even slow machines do more than this a second.
BYTES_PER_SECOND = 4 * 2**20
# A group of its own, so that Ctrl-C, which a terminal sends to all of a group, reaches the trainer alone.
_OUT_OF_THE_TERMINAL: dict[str, Any] = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {"process_group": 0}
)


class WorkerFault(Exception):
    """The worker died or had to be killed; it says nothing certain about the file. `good` frames had arrived.

    `overstayed` is True where the clock ran out.
    """

    def __init__(self, reason: str, good: int = 0, overstayed: bool = False) -> None:
        self.reason, self.good, self.overstayed = reason, good, overstayed
        super().__init__(reason)


class Refused(Exception):
    """The worker's own verdict: the file, or the wanted part of it, cannot be used. `good` frames had arrived."""

    def __init__(self, reason: str, good: int = 0) -> None:
        self.reason, self.good = reason, good
        super().__init__(reason)


class Supervisor:
    """One worker process, started at the first question. Threads take turns."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._messages: BinaryIO | None = None
        self._turn = threading.Lock()

    def inspect(self, path: Path, seconds: float = SECONDS) -> dict[str, Any]:
        """The facts of a video file. Raises Refused or WorkerFault."""
        with self._turn:
            return self._ask({"do": "inspect", "path": _name(path)}, seconds)

    def inspect_sound(self, path: Path, seconds: float = SECONDS) -> dict[str, Any]:
        """The facts of a file's sound. Raises Refused or WorkerFault."""
        with self._turn:
            return self._ask({"do": "inspect_sound", "path": _name(path)}, seconds)

    def frames(
        self, path: Path, timestamps: list[float], size: tuple[int, int], seconds: float = SECONDS
    ) -> np.ndarray:
        """The frames shown at `timestamps` as uint8 [N, H, W, 3]. Raises Refused or WorkerFault."""
        frames = np.empty((len(timestamps), size[1], size[0], 3), np.uint8)
        request = {"do": "frames", "path": _name(path), "timestamps": timestamps, "size": list(size)}
        with self._turn:
            self._ask(request, seconds, frames)
        return frames

    def audio(
        self, path: Path, start: float, length: float, rate: int, channels: int, on_picture_time: bool,
        seconds: float = SECONDS,
    ) -> np.ndarray | None:  # fmt: skip
        """A stretch of sound as float32 [channels, round(length · rate)], or None. Raises Refused or WorkerFault."""
        samples = np.empty((1, channels, round(length * rate)), np.float32)
        request = {"do": "audio", "path": _name(path), "start": start, "length": length, "rate": rate}
        request |= {"channels": channels, "on_picture_time": on_picture_time}
        with self._turn:
            has_sound = self._ask(request, seconds, samples)["has_sound"]
        return samples[0] if has_sound else None

    @property
    def process_id(self) -> int | None:
        """The worker's process id, None before the first question and after a fault."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the worker. The next question would start another one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, self._messages):
            with contextlib.suppress(OSError):  # unsent bytes for a dead worker
                pipe.close()

    def _ask(self, request: dict[str, Any], seconds: float, frames: np.ndarray | None = None) -> dict[str, Any]:
        """Send a request, fill `frames` with what comes, and return the last answer.

        Whatever interrupts this, a fault or an exception of ours, ends the worker, since it would be out of step.
        """
        child, good, last = self._running(), 0, None
        overstayed = threading.Event()
        watchdog = threading.Timer(seconds, lambda: (overstayed.set(), child.kill()))
        watchdog.daemon = True
        watchdog.start()
        try:
            child.stdin.write(json.dumps(request | {"seconds": seconds}).encode("ascii") + b"\n")
            child.stdin.flush()
            while "frame" in (head := json.loads(child.stdout.readline() or _ended())):
                _fill(child.stdout, frames[good])
                good += 1
            last = head
        except (OSError, EOFError, ValueError) as error:
            late = overstayed.is_set()
            raise WorkerFault(self._cause(child, seconds if late else None), good, late) from error
        finally:
            watchdog.cancel()
            if last is None or overstayed.is_set():
                self.close()
        if "fault" in last:
            raise Refused(last["fault"], last["good"])
        return last["done"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ltxforge.media.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=_environment(),
            **_OUT_OF_THE_TERMINAL,
        )
        return self._child

    def _cause(self, child: subprocess.Popen[bytes], overstayed_seconds: float | None) -> str:
        if overstayed_seconds is not None:
            return f"decoding it took longer than {overstayed_seconds:.0f} s and was stopped"
        try:
            code = child.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "the decoder answered nonsense"
        name = signal.Signals(-code).name if code < 0 and -code in set(signal.Signals) else f"exit status {code}"
        return f"the decoder crashed on it ({name}){self._last_words()}"

    def _last_words(self) -> str:
        """The last line that the worker wrote to standard error."""
        if self._messages is None:
            return ""
        self._messages.seek(0)
        lines = self._messages.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


def worker() -> Supervisor:
    """This process's supervisor; its worker ends with the process."""
    return _SUPERVISOR


def once_more(ask: Callable[[], Answer]) -> Answer:
    """Ask again if the worker died, once: what kills processes (memory shortage, a service being stopped) may have
    had nothing against the file, and a verdict must not depend on it. A file that overstayed gets no second chance.
    """
    try:
        return ask()
    except WorkerFault as fault:
        if fault.overstayed:
            raise
        return ask()


def _name(path: Path) -> str:
    # Absolute, because ffmpeg takes `a:b.mp4` for a protocol `a`.
    return os.fspath(Path(path).absolute())


def _ended() -> bytes:
    raise EOFError("the worker's output ended")


def _fill(pipe: BinaryIO, frame: np.ndarray) -> None:
    view = memoryview(frame).cast("B")
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            _ended()
        view = view[count:]


def _environment() -> dict[str, str]:
    """Ours, with this package importable, and without thread pools that a decoder does not use."""
    root = os.fspath(Path(ltxforge.__file__).resolve().parent.parent)
    search = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return os.environ | single | {"PYTHONPATH": search, "PYTHONUTF8": "1"}


_SUPERVISOR = Supervisor()
atexit.register(_SUPERVISOR.close)
