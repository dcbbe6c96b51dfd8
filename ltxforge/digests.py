"""SHA-256 of files, remembered: hashing runs at about 2 GB/s, a 13B model has 26 GB, a dataset has thousands of clips.

A digest is remembered by (real path, size, modification time, inode). Anything unreadable in the memo counts as
absent; deleting it costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from ltxforge.durable import file_digest, write_json

# A file changed this recently could change again within its timestamp's resolution.
SETTLED_SECONDS = 2.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileDigests:
    """Digests remembered in one JSON file, or not at all. As a context manager it writes them at the end."""

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo
        self._known: dict[str, str] | None = None
        self._is_changed = False

    def of(self, path: Path) -> str:
        """The SHA-256 of a file's bytes, computed unless the same file was seen before."""
        real = Path(os.path.realpath(path))
        if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):  # the Hub's cache names large files by digest
            return real.name
        known = self._read()
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if key not in known:
            digest = file_digest(real)
            if time.time() - status.st_mtime < SETTLED_SECONDS:
                return digest
            known[key], self._is_changed = digest, True
        return known[key]

    def __enter__(self) -> FileDigests:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._memo is not None and self._is_changed:
            write_json(self._memo, self._known)
            self._is_changed = False

    def _read(self) -> dict[str, str]:
        """What the memo knows; a memo that cannot be read knows nothing."""
        if self._known is None:
            try:
                found = json.loads(self._memo.read_bytes()) if self._memo else {}
            except (OSError, ValueError):
                found = {}
            items = found.items() if isinstance(found, dict) else ()
            self._known = {key: value for key, value in items if isinstance(value, str)}
        return self._known


class NoDigests(FileDigests):
    """For plans that no run follows: nothing is hashed, read or remembered."""

    def of(self, path: Path) -> str:  # noqa: ARG002
        return ""
