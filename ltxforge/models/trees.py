"""The files of one source, on this machine or on the Hub, seen alike: listed, read, digested.

Decides which files of a folder make up one model. `hub.py` holds the Hub's kind of tree. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.formats import logical
from ltxforge.models.weights import Header, read_header, refuse_format

WEIGHT_ENDINGS = ("safetensors", "safetensors.index.json")


class Tree(Protocol):
    """The files of one source, seen without fetching weights. Paths are relative to the tree's root, with slashes.

    `inside` is where the source points: "" for the root, else a folder or a file.
    """

    inside: str
    repository: str
    revision: str

    def files(self, folder: str) -> Mapping[str, int]:
        """The files directly in a folder: name → bytes. Empty if there is no such folder."""
        ...

    def is_file(self, path: str) -> bool:
        """Whether the path is a file, not a folder."""
        ...

    def size(self, path: str) -> int:
        """A file's bytes."""
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
        """Where a file lies on this machine, or None while it is still on the Hub."""
        ...

    def describe(self, path: str) -> str:
        """The path as a person would write it."""
        ...


@dataclass(frozen=True)
class LocalTree:
    """A folder on this machine. For a snapshot in the Hub's cache, `repository` and `revision` say which it is."""

    root: Path
    inside: str
    digests: FileDigests = field(default_factory=FileDigests)
    repository: str = ""
    revision: str = ""

    def files(self, folder: str) -> Mapping[str, int]:
        directory = self.root / folder
        if not directory.is_dir():
            return {}
        return {entry.name: entry.stat().st_size for entry in sorted(directory.iterdir()) if entry.is_file()}

    def is_file(self, path: str) -> bool:
        return (self.root / path).is_file()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

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


def join(folder: str, name: str) -> str:
    """`folder/name` where the root is ""."""
    return f"{folder}/{name}" if folder else name


def read_json(tree: Tree, path: str) -> dict[str, Any]:
    """A small JSON file. Raises WeightsError if it is damaged or no table."""
    try:
        value = json.loads(tree.read(path))
    except ValueError as error:
        raise WeightsError("is no JSON file", where=tree.describe(path)) from error
    if not isinstance(value, dict):
        raise WeightsError("holds no JSON table", where=tree.describe(path))
    return value


def weight_files(tree: Tree, folder: str) -> list[str]:
    """The names of the safetensors files in a folder that make up one model, following an index of shards."""
    names, where = tree.files(folder), tree.describe(folder)
    if chosen := _plainest([name for name in names if name.endswith(".safetensors.index.json")]):
        shards = _shards(tree, join(folder, chosen))
        if absent := [name for name in shards if name not in names]:
            raise WeightsError(f"{chosen} lists {len(shards)} files, and {', '.join(absent)} is missing", where=where)
        return shards
    files = [name for name in names if name.endswith(".safetensors")]
    if chosen := _plainest(files):
        return [chosen]
    if files:
        raise WeightsError(
            f"holds several weights files and no index that joins them: {', '.join(sorted(files)[:8])}",
            where=where,
            remedy="Name one file instead of the folder.",
        )
    for name in names:
        refuse_format(name, tree.describe(join(folder, name)))
    raise WeightsError("holds no .safetensors file", where=where)


def _plainest(names: list[str]) -> str | None:
    """The only name, or the one without a variant such as `.fp16`, or None."""
    if len(names) == 1:
        return names[0]
    usual = {f"{stem}.{ending}" for stem in ("diffusion_pytorch_model", "model") for ending in WEIGHT_ENDINGS}
    plain = [name for name in names if name in usual]
    return plain[0] if len(plain) == 1 else None


def _shards(tree: Tree, path: str) -> list[str]:
    try:
        shards = sorted(set(read_json(tree, path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError("is no index of weights files", where=tree.describe(path)) from error
    if any("/" in shard or "\\" in shard or not shard.endswith(".safetensors") for shard in shards):
        raise WeightsError("names a file outside its folder, or no .safetensors file", where=tree.describe(path))
    return shards


def whole_header(tree: Tree, inside: str) -> tuple[Header, dict[str, Any]]:
    """The header of a file, or of a folder's shards together, and the folder's `config.json`, or {}.

    Quantised weights are listed as they were before (`formats.logical`).
    """
    if tree.is_file(inside):
        return logical(tree.header(inside)), {}
    headers = [tree.header(join(inside, name)) for name in weight_files(tree, inside)]
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    path = join(inside, "config.json")
    config = read_json(tree, path) if "config.json" in tree.files(inside) else {}
    return logical(Header(tensors, headers[0].metadata)), config
