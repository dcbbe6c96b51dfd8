"""What was once found out about a clip and need not be found out again: its digest, and the probe of that content.

Likewise of a sound file: its digest, and the facts of its sound. What was found is remembered by digest and
PROBE_VERSION. Anything unreadable in the memo counts as absent; deleting the folder costs time and nothing else.
Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ltxforge import durable, plan
from ltxforge.digests import FileDigests
from ltxforge.errors import RunError
from ltxforge.media.probe import PROBE_VERSION, Probe, ProbeError, Sound

CLIP_DIGESTS = "clips.json"
Facts = TypeVar("Facts", Probe, Sound)


class Memo:
    """The remembered facts in one folder. Use as a context manager: digests are written at the end."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.digests = FileDigests(None if directory is None else directory / CLIP_DIGESTS)

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.digests.__exit__(*exception)
        except OSError as error:
            raise _not_writable(error, self._directory) from error

    def probe(self, digest: str, path: Path, compute: Callable[[Path], Probe]) -> Probe:
        """The probe of this content, computed unless known. Raises ProbeError, remembered ones included."""
        return self._facts(Probe, "probes", digest, path, compute)

    def sound(self, digest: str, path: Path, compute: Callable[[Path], Sound]) -> Sound:
        """The facts of this content's sound, computed unless known. Raises ProbeError, remembered ones included."""
        return self._facts(Sound, "sounds", digest, path, compute)

    def _facts(
        self, kind: type[Facts], folder: str, digest: str, path: Path, compute: Callable[[Path], Facts]
    ) -> Facts:  # fmt: skip
        memo = None if self._directory is None else self._directory / folder / f"{digest}-{PROBE_VERSION}.json"
        if memo is not None and (known := _recall(kind, _read_json(memo), path)):
            return known
        try:
            found = compute(path)
        except ProbeError as error:
            if memo is not None and error.is_certain:
                _write(memo, {"refused": error.reason})
            raise
        if memo is not None:
            facts = dataclasses.asdict(found)
            del facts["path"]
            _write(memo, {"probe": facts})
        return found


def _recall(kind: type[Facts], remembered: dict[str, Any], path: Path) -> Facts | None:
    if "refused" in remembered:
        raise ProbeError(str(remembered["refused"]))
    try:
        return plan.from_json(kind, {"path": str(path), **remembered["probe"]})
    except (KeyError, TypeError):
        return None


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        durable.write_json(path, value)
    except OSError as error:
        raise _not_writable(error, path.parent) from error


def _not_writable(error: OSError, folder: Path | None) -> RunError:
    """Not to be taken for a fault of the clip."""
    reason = f"cannot write into the cache ({(error.strerror or str(error)).lower()})"
    return RunError(reason, where=str(folder), remedy="Choose a writable cache directory.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
