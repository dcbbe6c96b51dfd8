"""events.jsonl: one line of JSON per event, appended; and the readers of such a file.

Decides what a line holds besides the event: UTC time and the number of the attempt, so that the lines of a resumed run
can be told apart. Never rewrites a line. A line torn by a kill or a power cut is skipped by the readers, and ended
when the file is next opened so that it cannot swallow its successor. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ltxforge.durable import make_folder, write_file
from ltxforge.events import Event, to_json


class EventLog:
    """A consumer of events that appends each to `path`. Each line reaches the operating system before the call returns.

    `attempt` counts the starts of the run from 1; by default it follows the last one in the file.
    """

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.attempt = next_attempt(path) if attempt is None else attempt
        make_folder(path.parent)
        self._path = path
        self._file = path.open("ab+", buffering=0)
        self._end_torn_line()
        self._begin = self._file.seek(0, 2)

    def begin_anew(self) -> None:
        """Drop what stood in the file before this attempt: it was another run's, which never saved anything."""
        self._file.seek(self._begin)
        own = self._file.read()
        self._file.close()
        write_file(self._path, own)
        self._file, self._begin = self._path.open("ab+", buffering=0), 0

    def __call__(self, event: Event) -> None:
        """Append one event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "attempt": self.attempt, **to_json(event)}, allow_nan=False)
        self._file.write(line.encode() + b"\n")  # ASCII only, so half a surrogate from a file name cannot fail

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _end_torn_line(self) -> None:
        size = self._file.seek(0, 2)
        if size == 0:
            return
        self._file.seek(size - 1)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file in order, torn ones skipped; nothing if the file is missing."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                event = json.loads(line.strip(b"\0 \r\n"))  # a power cut can leave NULs where a line was
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


def last_per_step(events: Iterable[dict[str, Any]], kind: str = "StepDone") -> dict[int, dict[str, Any]]:
    """The last event of one kind for each step, by step: what a resumed run repeated replaces what was there."""
    last = {event["step"]: event for event in events if event["event"] == kind and isinstance(event.get("step"), int)}
    return dict(sorted(last.items()))


def next_attempt(path: Path) -> int:
    """The number that the next start of the run in this file has."""
    attempts = (event.get("attempt") for event in read_events(path))
    return 1 + max((number for number in attempts if isinstance(number, int)), default=0)
