"""What an earlier, interrupted call of `bench` has measured, so that the next one goes on behind it.

Decides when an old result may stay: same device, versions and sources of the kernels, and the same case to the last
setting. What failed is tried again, but last, so that one bad case never stands before the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxforge.suites.case import FAULTY, Case

SAME = ("format", "suite", "device", "versions", "kernels")
"""What of a results file's head a figure depends on."""


@dataclass(frozen=True)
class Finished:
    """Case name → its entry in the results file, and what else the file's head says."""

    entries: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)

    def has(self, case: Case) -> bool:
        """Whether the case's result may stay."""
        entry = self.entries.get(case.name)
        return entry is not None and entry["outcome"] not in FAULTY and entry["case"] == _as_json(case.settings())

    def kept(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """The entries that stay."""
        return {case.name: self.entries[case.name] for case in cases if self.has(case)}

    def order(self, cases: Sequence[Case]) -> list[Case]:
        """The cases still to be measured: new ones first, then those that failed."""
        todo = [case for case in cases if not self.has(case)]
        return sorted(todo, key=lambda case: case.name in self.entries)


def read_finished(path: Path, head: Mapping[str, Any]) -> Finished:
    """What a results file holds; nothing where there is none, it is no results file, or it is of something else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        same = all(told.get(key) == _as_json(head.get(key)) for key in SAME)
        entries = {entry["name"]: entry for entry in told.pop("cases")}
        return Finished(entries, told) if same else Finished()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Finished()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
