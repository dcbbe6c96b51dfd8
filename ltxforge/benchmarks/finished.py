"""What an earlier call of `bench` has measured, so that the next one goes on behind it and loses nothing.

Decides when an old result may stay: same device, versions and sources of the kernels, and the same case to the last
setting. What failed is tried again, but last, so that one bad case never stands before the others; what was cut off
comes first, with a whole call's time before it, and is given up where that was not enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ltxforge.durable import write_file
from ltxforge.suites.case import FAULTY, Case

SAME = ("format", "suite", "device", "versions", "kernels")
"""What of a results file's head a figure depends on."""
NEVER = ("device memory_bytes",)
"""What does not change a figure: how much memory is beside what a case takes."""
HOST = ("versions cpu", "versions threads")
"""What changes no figure where a GPU computes."""
TRIES = 2
"""How often a case may begin without coming to its end."""


@dataclass(frozen=True)
class Finished:
    """An earlier results file.

    Attributes:
        entries: case name → its entry. Empty where the file is of something else.
        head: what else the file says; likewise.
        differs: what makes it a file of something else, one line each.
        begun: case name → {"times", "case"}: how often a case began and did not end, and its settings then.
    """

    entries: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    begun: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, case: Case) -> bool:
        """Whether the case's result may stay."""
        entry = self.entries.get(case.name)
        return entry is not None and entry["outcome"] not in FAULTY and entry["case"] == _as_json(case.settings())

    def kept(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """The entries that stay."""
        return {case.name: self.entries[case.name] for case in cases if self.has(case)}

    def order(self, cases: Sequence[Case]) -> list[Case]:
        """The cases still to be measured: what was cut off, then new ones, then those that failed."""
        todo = [case for case in cases if not self.has(case)]
        return sorted(todo, key=lambda case: (not self.times_begun(case), case.name in self.entries))

    def times_begun(self, case: Case) -> int:
        """How often the case, as it is now, began without coming to its end."""
        before = self.begun.get(case.name, {})
        return before["times"] if before.get("case") == _as_json(case.settings()) else 0

    def without(self, names: Collection[str]) -> Finished:
        """The same as if these cases had never begun."""
        entries = {name: entry for name, entry in self.entries.items() if name not in names}
        begun = {name: before for name, before in self.begun.items() if name not in names}
        return Finished(entries, self.head, self.differs, begun)

    def would_lose(self, staying: Collection[str]) -> bool:
        """Whether something was measured that is not among these cases."""
        entries = self.entries.items()
        return any(name not in staying and entry["outcome"] not in FAULTY for name, entry in entries)


def read_finished(path: Path, head: Mapping[str, Any]) -> Finished:
    """What a results file holds; nothing where there is none, or where it differs from what this call's head says."""
    if not path.exists():
        return Finished()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        entries = {entry["name"]: entry for entry in told.pop("cases") if entry["outcome"]}
        begun = {name: {**each, "times": int(each["times"])} for name, each in told.pop("begun", {}).items()}
        differs = differences(told, head)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Finished(differs=("it is no results file",))
    return Finished(differs=differs) if differs else Finished(entries, told, begun=begun)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """What two heads say differently of what a figure depends on: one line each."""
    before, now = _facts(old), _facts(new)
    ignored = {*NEVER, *(HOST if now.get("device kind") in ("cuda", "rocm") else ())}
    names = [name for name in {**before, **now} if name not in ignored and before.get(name) != now.get(name)]
    return tuple(_told(name, before.get(name), now.get(name)) for name in names)


def keep_aside(path: Path, head: Mapping[str, Any]) -> Path:
    """Copy an earlier results file beside itself, under the date when it was written last; gives its new name."""
    content = path.read_bytes()
    date = head.get("date") or datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
    stem = f"{path.stem}.{re.sub('[^0-9T]+', '-', str(date)[:19])}"
    number, aside = 1, path.with_name(f"{stem}{path.suffix}")
    while aside.exists() and aside.read_bytes() != content:
        number += 1
        aside = path.with_name(f"{stem}-{number}{path.suffix}")
    write_file(aside, content)
    return aside


def _facts(head: Mapping[str, Any]) -> dict[str, Any]:
    """`SAME` of a head, a table's keys behind its name: "versions torch"."""
    found: dict[str, Any] = {}
    for key in SAME:
        value = _as_json(head.get(key))
        found |= {f"{key} {name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _told(name: str, before: Any, now: Any) -> str:
    if name == "kernels":
        return "other sources of our kernels"
    return f"{name.removeprefix('versions ')} {before}, here {now}"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
