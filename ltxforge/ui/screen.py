"""Chooses the screen: the live display where a terminal can show it, plain lines everywhere else. Torch-free."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console

from ltxforge.ui.plain import Plain
from ltxforge.ui.progress import Progress

Screen = Plain | Progress
"""A consumer of events that shows a run; `show(table)` prints a table between them."""


def screen_for(stream: TextIO, plain: bool = False) -> Screen:
    """The screen for `stream`; `plain` forces plain lines."""
    console = Console(file=stream, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")
    if plain or not live or not _can_show(stream, "━╸…"):
        return Plain(stream)
    return Progress(console)


def _can_show(stream: TextIO, characters: str) -> bool:
    try:
        characters.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
