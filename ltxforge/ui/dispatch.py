"""Hands every event to every consumer; a consumer that fails is taken out and the run goes on.

Decides nothing about what is shown. Exceptions of consumers end here; a stop request (KeyboardInterrupt) does not.
Torch-free.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ltxforge.events import Emit, Event, Note


class Dispatcher:
    """An `Emit` for many consumers. As a context manager it enters and leaves those consumers that are one."""

    def __init__(self, consumers: Iterable[Emit]) -> None:
        self._consumers = list(consumers)

    def __call__(self, event: Event) -> None:
        """Pass one event on, in the order in which the consumers were given."""
        for consumer in tuple(self._consumers):
            try:
                consumer(event)
            except Exception as error:
                self._take_out(consumer, error)

    def __enter__(self) -> Dispatcher:
        for consumer in tuple(self._consumers):
            try:
                _call(consumer, "__enter__")
            except Exception as error:
                self._take_out(consumer, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for consumer in reversed(self._consumers):
            with contextlib.suppress(Exception):
                _call(consumer, "__exit__", kind, error, trace)

    def _take_out(self, consumer: Any, error: Exception) -> None:
        """Remove a consumer for good, let it restore the terminal if it can, and say so once."""
        if consumer not in self._consumers:
            return
        self._consumers.remove(consumer)
        with contextlib.suppress(Exception):
            _call(consumer, "__exit__", type(error), error, error.__traceback__)
        if isinstance(error, BrokenPipeError):  # `ltxforge plan | head`: nobody is left to be told
            return
        name = getattr(consumer, "__name__", type(consumer).__name__)
        text = f"{name} failed and is off from here on; the run goes on ({type(error).__name__}: {error})"
        if self._consumers:
            self(Note(text, "warning"))
        else:
            with contextlib.suppress(Exception):
                sys.stderr.write(f"warning: {text}\n")


def _call(consumer: Any, method: str, *arguments: Any) -> None:
    # Looked up on the type as `with` does; a plain function has neither method.
    found = getattr(type(consumer), method, None)
    if found is not None:
        found(consumer, *arguments)
