"""A process that imports ltxforge once and then forks a child for each command line: 0.02 s instead of 4 s a start.

Started by `conftest.py` with `python fork_server.py`; orders come as JSON lines on standard input, answers go to
standard output. Forking is safe here because this process never computes: once torch has run a parallel operation, its
thread pool exists in the parent only, and a forked child waits for it forever; likewise the media worker's pipes would
be shared. So nothing but imports happens before the fork, with one thread everywhere, and `start` refuses otherwise.

A child is what a person starts: `ltxforge.cli.main()` with its own arguments, folder, log file and process group. On
request it signals itself when it has logged an event, or dies just before one of the system's file calls.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import gc
import io
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import ltxforge.run
from ltxforge.cli import main
from ltxforge.events import Event, to_json
from ltxforge.trackers.jsonl import EventLog


class SignallingLog(EventLog):
    """An event log that signals its own process after the first event whose fields have the wanted values.

    `order` is {"at": {field: value}, "signal": number, "times": how often, "group": whether the whole process group
    gets it, as from a terminal}; `at` may hold "number", counting the events of this process from 1.
    """

    def __init__(self, order: dict[str, Any], path: Any) -> None:
        super().__init__(path)
        self._order, self._number, self._is_done = order, 0, False

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self._number += 1
        fields = to_json(event) | {"number": self._number}
        if self._is_done or any(fields.get(name) != value for name, value in self._order["at"].items()):
            return
        self._is_done = True
        for _ in range(self._order.get("times", 1)):
            if self._order.get("group"):
                os.killpg(os.getpgrp(), self._order["signal"])
            else:
                os.kill(os.getpid(), self._order["signal"])


FILE_CALLS = {
    builtins.open, io.open, os.open, os.mkdir, os.rename, os.replace, os.rmdir, os.unlink, os.remove,
    os.fsync, os.scandir, os.stat, os.lstat,
}  # fmt: skip
FILE_METHODS = {"write", "truncate", "flush", "close"}


class DeathBeforeCall:
    """Kills its process just before the `call`-th file call (from 1) made inside the first call of `function`.

    The function is named as `file.py:name`. Calls are seen by the interpreter's profiler, so no module is touched.
    With `call` 0 it kills nothing and prints how many there were.
    """

    def __init__(self, function: str, call: int) -> None:
        self._file, self._name = function.split(":")
        self._wanted, self._count, self._frame, self._is_over = call, 0, None, False

    def __call__(self, frame: Any, kind: str, argument: Any) -> None:
        if self._is_over:
            return
        if self._frame is None:
            code = frame.f_code
            if kind == "call" and code.co_name == self._name and code.co_filename.endswith(self._file):
                self._frame = frame
        elif kind == "return" and frame is self._frame:
            self._is_over = True
            sys.setprofile(None)
            sys.stdout.write(f"file calls: {self._count}\n")
        elif kind == "c_call" and self._is_file_call(argument):
            self._count += 1
            if self._count == self._wanted:
                os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _is_file_call(function: Any) -> bool:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, io.IOBase):
            return function.__name__ in FILE_METHODS
        return function in FILE_CALLS or function.__name__ in ("serialize_file", "_save_file_to_disk")


def start(
    arguments: list[str],
    folder: str,
    log: str,
    environment: dict[str, str],
    signal_at: dict[str, Any] | None = None,
    die_in: list[Any] | None = None,
    constants: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Fork a child that runs `ltxforge <arguments>` in `folder`; returns its process id.

    `constants` sets constants of modules in the child: {module: {name: value}}.
    """
    assert threading.active_count() == 1, "a process with threads must not fork"
    pid = os.fork()
    if pid:
        return {"pid": pid}
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.update(environment)
        redirect(log)
        sys.argv = ["ltxforge", *arguments]
        if signal_at:
            ltxforge.run.EventLog = functools.partial(SignallingLog, signal_at)
        for module, values in (constants or {}).items():
            for name, value in values.items():
                assert hasattr(sys.modules[module], name)
                setattr(sys.modules[module], name, value)
        if die_in:
            sys.setprofile(DeathBeforeCall(*die_in))
        code = exit_status()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(log: str) -> None:
    """Standard input from nowhere, output to the log file."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def exit_status() -> int:
    """Run the command line to its end, exit handlers included."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        atexit._run_exitfuncs()
    return 0


def wait(pid: int, block: bool) -> dict[str, Any]:
    """A child's exit status, negative for the signal that killed it; None while it lives."""
    done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if done else None}


def serve() -> None:
    """Answer orders until standard input closes."""
    gc.freeze()  # what is imported stays: children that collect garbage need not look at it
    tasks = Path("/proc/self/task")
    tell({"threads": len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()})
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"start": start, "wait": wait}[order.pop("do")](**order)
        tell(answer)


def tell(answer: dict[str, Any]) -> None:
    """One answer as a line on standard output."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # A shell starts background jobs with SIGINT ignored, and what is ignored stays so: runs begin like a job in front.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    serve()
