"""One process per run directory. The lock is the operating system's, so it dies with its owner, kill −9 included.

The lock file names its owner (pid, host, start time) for the message that a second process shows.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import IO

from ltxforge.durable import make_folder
from ltxforge.errors import RunError

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[str]) -> None:
        file.seek(2**20)  # a byte far behind the text, so that others can still read who holds it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
else:
    import fcntl

    def _try_lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """Holds a run directory for this process; `with RunLock(directory): …`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock.json"
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        make_folder(self.path.parent)
        file = self.path.open("a+", encoding="utf-8")
        try:
            _try_lock(file)
        except OSError as error:
            owner = self._owner(file)
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise RunError(
                    f"this file system cannot lock files ({error.strerror})",
                    where=str(self.path.parent),
                    remedy="Put the run directory on a local disk with --out.",
                ) from error
            raise RunError(
                f"another ltxforge is using this run directory: {owner}",
                where=str(self.path.parent),
                remedy="Wait for it, stop it, or give this run a directory of its own with --out.",
            ) from None
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, file)
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def _owner(file: IO[str]) -> str:
        try:
            file.seek(0)
            owner = json.loads(file.read())
            return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "a process that is just starting"
