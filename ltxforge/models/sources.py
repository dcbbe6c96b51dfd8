"""Where weights come from: one syntax for every source in a recipe, and local folders seen as trees of files.

    tiny/ltx-video                       a built-in model
    /models/ltx, ./ltx.safetensors       a folder or a single file
    org/name                             a Hub repository
    org/name:path/inside@revision        a folder or file in it, at a branch, tag or commit

Decides what a text means; local wins if it exists or looks like a path. Torch-free. The Hub's side is `hub.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from ltxforge.durable import file_digest, write_json
from ltxforge.errors import WeightsError
from ltxforge.models.weights import Header, read_header
from ltxforge.specs import SPECS, TINY

_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<inside>[^@\\]+))?(?:@(?P<revision>[\w./-]+))?"
)
_LOOKS_LOCAL = re.compile(r"[./~]|[A-Za-z]:[\\/]|.*\\")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A parsed source. `kind` is "builtin", "local" or "hub"; `revision` "" means the repository's default branch."""

    text: str
    kind: str
    path: Path = Path()
    repository: str = ""
    inside: str = ""
    revision: str = ""


def parse_source(text: str) -> Source:
    """Say what a recipe's source means. Raises WeightsError for a text that is none of the forms above."""
    text = text.strip()
    if text in TINY:
        return Source(text, "builtin")
    if text.startswith("tiny/"):
        raise WeightsError(f"there is no built-in model {text!r}", remedy=_nearest(text, list(TINY)))
    local = Path(text).expanduser() if text else Path()
    if text and (_LOOKS_LOCAL.match(text) or local.exists()):
        return Source(text, "local", path=local)
    if match := _HUB.fullmatch(text):
        inside = (match["inside"] or "").strip("/")
        if ".." not in PurePosixPath(inside).parts:
            return Source(text, "hub", repository=match["repository"], inside=inside, revision=match["revision"] or "")
    raise WeightsError(
        f"{text!r} is no source of weights: no such file or folder, and no Hub name",
        remedy="Write a path (./folder, C:/file.safetensors), a Hub repository as org/name, org/name:path/inside or "
        f"org/name@revision, or a built-in model: {', '.join(TINY)}.",
    )


def _nearest(text: str, known: list[str]) -> str:
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def known_repositories() -> list[str]:
    """The Hub repositories in which the versions are published."""
    return sorted({spec.hub.partition(":")[0] for spec in SPECS.values()})


class Tree(Protocol):
    """The files of one source, seen without fetching weights. Paths are relative to the tree's root, with slashes.

    `inside` is where the source points: "" for the root, else a folder or a file.
    """

    source: Source
    inside: str
    repository: str
    revision: str

    def files(self, folder: str) -> Mapping[str, int]:
        """The files directly in a folder: name → bytes. Empty if there is no such folder."""
        ...

    def read(self, path: str) -> bytes:
        """A small file's content."""
        ...

    def header(self, path: str) -> Header:
        """A safetensors file's header."""
        ...

    def digest(self, path: str) -> str:
        """SHA-256 of a file's content."""
        ...

    def local(self, path: str) -> Path | None:
        """Where a file or folder lies on this machine, or None while it is still on the Hub."""
        ...

    def describe(self, path: str) -> str:
        """The path as a person would write it."""
        ...


@dataclass(frozen=True)
class Digests:
    """SHA-256 of local files, remembered by (real path, size, modification time, inode) in `memo`, one file each.

    Hashing runs at about 2 GB/s and a 13B model has 26 GB. With no memo, every call hashes.
    """

    memo: Path | None = None

    def of(self, path: Path) -> str:
        real = path.resolve()
        if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):  # the Hub's cache names large files by digest
            return real.name
        if self.memo is None:
            return file_digest(real)
        status = real.stat()
        key = [str(real), status.st_size, status.st_mtime_ns, status.st_ino]
        record = self.memo / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
        if (known := self._recall(record, key)) is not None:
            return known
        digest = file_digest(real)
        write_json(record, {"file": key, "sha256": digest})
        return digest

    def _recall(self, record: Path, key: list) -> str | None:
        try:
            known = json.loads(record.read_bytes())
            return known["sha256"] if known["file"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class LocalTree:
    """A folder on this machine. For a snapshot in the Hub's cache, `repository` and `revision` say which it is."""

    source: Source
    root: Path
    inside: str
    digests: Digests = field(default_factory=Digests)
    repository: str = ""
    revision: str = ""

    def files(self, folder: str) -> Mapping[str, int]:
        directory = self.root / folder
        if not directory.is_dir():
            return {}
        return {entry.name: entry.stat().st_size for entry in sorted(directory.iterdir()) if entry.is_file()}

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise WeightsError(f"cannot be read: {error.strerror}", where=self.describe(path)) from error

    def header(self, path: str) -> Header:
        return read_header(self.root / path)

    def digest(self, path: str) -> str:
        return self.digests.of(self.root / path)

    def local(self, path: str) -> Path | None:
        return self.root / path

    def describe(self, path: str) -> str:
        return f"{self.repository}:{path}" if self.repository else str(self.root / path)


def open_local(source: Source, digests: Digests) -> LocalTree:
    """A local source as a tree rooted at its parent, so that sibling folders can be looked up."""
    path = source.path.absolute()
    if not path.exists():
        near = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise WeightsError(
            "there is no such file or folder",
            where=str(path),
            remedy=_nearest(path.name, near) if near else f"The folder {path.parent} does not exist either.",
        )
    return LocalTree(source, path.parent, path.name, digests)
