"""Compares results with an earlier file of the same GPU: old, new and their ratio for everything that was timed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxforge.errors import PlanError

TOLERANCE = 0.05
"""How much slower than the baseline a median may be: less is a machine's own unrest."""


@dataclass(frozen=True)
class Baseline:
    """An earlier results file: (case, what was timed) → (settings, seconds)."""

    seconds: Mapping[tuple[str, str], tuple[dict[str, Any], float]]


@dataclass(frozen=True)
class Compared:
    """One median, before and now, in seconds."""

    case: str
    what: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """How many times as fast as before; below 1 it is slower."""
        return self.old / self.new

    @property
    def is_slower(self) -> bool:
        """By more than the tolerance."""
        return self.new > self.old * (1 + TOLERANCE)

    def told(self) -> str:
        """The fault in words."""
        return f"{self.case}: {self.what} takes {self.new / self.old:.2f} times the baseline's time"


def read_baseline(path: Path, head: Mapping[str, Any]) -> Baseline:
    """Read an earlier results file.

    Raises:
        PlanError: it is none, of another kind of suite, of another device, or says seconds that nothing takes.
    """
    remedy = "Name a results file that `ltxforge bench` wrote for this suite on this device."
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        seconds = {
            (entry["name"], what): (entry["case"], float(value))
            for entry in told["cases"]
            for what, value in entry["seconds"].items()
        }
        found = (told["suite"], told["device"]["kind"], told["device"]["name"])
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}", where=str(path), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlanError("is no results file of this version of ltxforge", where=str(path), remedy=remedy) from None
    here = (head["suite"], head["device"]["kind"], head["device"]["name"])
    for name, theirs, ours in zip(("suite", "kind of device", "device"), found, here, strict=True):
        if theirs != ours:
            raise PlanError(f"was measured with another {name}: {theirs}, here {ours}", where=str(path), remedy=remedy)
    for (case, what), (_, value) in seconds.items():
        if not (math.isfinite(value) and value > 0):
            told = f"{case}: {what} has {value:g} seconds, which nothing takes"
            raise PlanError(told, where=str(path), remedy="Measure this baseline again.")
    return Baseline(seconds)


def compare(baseline: Baseline, entries: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Everything that both have timed under the same settings; entries as a results file holds them."""
    found = []
    for entry in entries:
        for what, new in entry["seconds"].items():
            settings, old = baseline.seconds.get((entry["name"], what), (None, 0.0))
            if settings is not None and _timed(settings) == _timed(entry["case"]):
                found.append(Compared(entry["name"], what, old, new))
    return found


def _timed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a median depends on: neither peers nor floors."""
    return {key: value for key, value in settings.items() if key not in ("peers", "floors")}
