"""What was once found out about a file and need not be found out again: its digest, and the probe of that content.

A digest is remembered by (real path, size, mtime, inode), a probe by digest and PROBE_VERSION. Anything unreadable in
the memo counts as absent; deleting the folder costs time and nothing else. Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltxforge import durable, plan
from ltxforge.errors import RunError
from ltxforge.media.probe import PROBE_VERSION, Probe, ProbeError

# A file changed this recently could change again within its timestamp's resolution.
_SETTLED_SECONDS = 2.0


class Memo:
    """The remembered facts in one folder. Use as a context manager: digests are written at the end."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._digests: dict[str, str] = {}
        self._is_changed = False

    def __enter__(self) -> Memo:
        if self._directory is not None:
            found = _read_json(self._directory / "clips.json")
            self._digests = {key: value for key, value in found.items() if isinstance(value, str)}
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._directory is not None and self._is_changed:
            _write(self._directory / "clips.json", self._digests)

    def digest(self, path: Path, compute: Callable[[], str]) -> str:
        """The file's SHA-256, computed unless the same file was seen before."""
        status = path.stat()
        key = f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if key not in self._digests:
            digest = compute()
            if time.time() - status.st_mtime < _SETTLED_SECONDS:
                return digest
            self._digests[key], self._is_changed = digest, True
        return self._digests[key]

    def probe(self, digest: str, path: Path, compute: Callable[[Path], Probe]) -> Probe:
        """The probe of this content, computed unless known. Raises ProbeError, remembered ones included."""
        memo = None if self._directory is None else self._directory / "probes" / f"{digest}-{PROBE_VERSION}.json"
        if memo is not None and (known := _recall(_read_json(memo), path)):
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


def _recall(remembered: dict[str, Any], path: Path) -> Probe | None:
    if "refused" in remembered:
        raise ProbeError(str(remembered["refused"]))
    try:
        return plan.from_json(Probe, {"path": str(path), **remembered["probe"]})
    except (KeyError, TypeError):
        return None


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        durable.write_json(path, value)
    except OSError as error:  # not to be taken for a fault of the clip
        reason = f"cannot write into the cache ({(error.strerror or str(error)).lower()})"
        raise RunError(reason, where=str(path.parent), remedy="Choose a writable cache directory.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
