"""What became of each clip, as a table: rejected first, then dropped, then used with warnings; the rest is counted.

Decides the order, and how many good clips are listed by name. Counts nothing against limits. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ltxforge.events import ClipJudged, Event
from ltxforge.printable import printable
from ltxforge.ui.text import counted

STYLES = {"rejected": "red", "dropped": "yellow", "ok": "green"}


class Verdicts:
    """A consumer that keeps the last verdict of each dataset's clips, in the order in which they were first judged."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], ClipJudged] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event; all but `ClipJudged` are ignored."""
        if isinstance(event, ClipJudged):
            self._found[event.dataset, event.path] = event

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def judged(self) -> list[ClipJudged]:
        """The verdicts."""
        return list(self._found.values())


def verdict_table(judged: Sequence[ClipJudged], list_ok: int = 20) -> RenderableType:
    """The table and a line that sums it up.

    Args:
        list_ok: up to this many clips that are ok without a warning are listed; more are only counted.
    """
    plain_ok = [clip for clip in judged if clip.verdict == "ok" and not clip.warnings]
    shown = [clip for clip in judged if clip not in plain_ok]
    shown.sort(key=lambda clip: list(STYLES).index(clip.verdict))
    shown += plain_ok if len(plain_ok) <= list_ok else []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("clip", overflow="fold", ratio=2, max_width=48)
    table.add_column("verdict", no_wrap=True, min_width=8)
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=3)
    names = _short_names([clip.path for clip in shown])
    for clip, name in zip(shown, names, strict=True):
        why = "; ".join(filter(None, (clip.reason, *clip.warnings)))
        samples = str(clip.samples) if clip.verdict == "ok" else "-"
        table.add_row(Text(name), Text(clip.verdict, STYLES[clip.verdict]), samples, Text(printable(why)))
    summary = Text(summary_line(judged))
    return Group(table, summary) if shown else summary


def summary_line(judged: Sequence[ClipJudged]) -> str:
    """One line: "17 clips: 12 ok (31 samples, 2 with warnings), 1 dropped, 4 rejected"."""
    ok = [clip for clip in judged if clip.verdict == "ok"]
    warned = sum(bool(clip.warnings) for clip in ok)
    about = counted(sum(clip.samples for clip in ok), "sample") + (f", {warned} with warnings" if warned else "")
    parts = [f"{len(ok):,} ok ({about})"]
    for verdict in ("dropped", "rejected"):
        if count := sum(clip.verdict == verdict for clip in judged):
            parts.append(f"{count:,} {verdict}")
    return f"{counted(len(judged), 'clip')}: {', '.join(parts)}"


def _short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folder that they share, safe to print."""
    try:
        shared = os.path.commonpath([str(Path(path).parent) for path in paths]) if paths else ""
    except ValueError:  # absolute and relative ones, or two Windows drives
        shared = ""
    return [printable(str(Path(path).relative_to(shared)) if shared else path) for path in paths]
