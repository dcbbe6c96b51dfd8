"""A content-addressed store of tensors. The key is everything that the content follows from; every read is verified.

An entry is one safetensors file named by the SHA-256 of its key. Its metadata holds the key itself and a digest of the
tensors; an entry whose key or digest does not agree is treated as absent and said to be damaged, so stale or broken
data is made again and never trained on. Several runs may share a store: files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ltxforge.durable import staged_file, sweep_leftovers
from ltxforge.events import Emit, Note
from ltxforge.tensor_files import save_tensors

Key = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What the store gave back: the tensors, and the digest of their names, shapes, dtypes and bytes."""

    tensors: dict[str, Tensor]
    digest: str


def key_text(key: Key) -> str:
    """A key as canonical JSON: equal keys give equal texts."""
    return json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Cache:
    """The store in `directory`, one folder per kind of entry ("latents", "prompts")."""

    def __init__(self, directory: Path, emit: Emit) -> None:
        self.directory, self._emit = directory, emit

    def path(self, kind: str, key: Key) -> Path:
        """Where the entry of this key stands, whether or not it exists."""
        name = hashlib.sha256(key_text(key).encode()).hexdigest()
        return self.directory / kind / name[:2] / f"{name}.safetensors"

    def read(self, kind: str, key: Key) -> Entry | None:
        """The entry, verified; None when it is absent or cannot be trusted (then a warning is emitted)."""
        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has its own error type for each kind of damage
            return self._distrust(path, str(error))
        if metadata.get("key") != key_text(key):
            return self._distrust(path, "it belongs to another key")
        digest = content_digest(tensors)
        if metadata.get("content") != digest:
            return self._distrust(path, "its content is not what was written")
        return Entry(tensors, digest)

    def write(self, kind: str, key: Key, tensors: Mapping[str, Tensor]) -> Entry:
        """Store tensors under a key, replacing what stands there. Tensors are moved to the host."""
        path = self.path(kind, key)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        entry = Entry(held, content_digest(held))
        with staged_file(path) as partial:
            save_tensors(partial, held, {"key": key_text(key), "content": entry.digest})
        return entry

    def sweep(self) -> None:
        """Remove what killed processes left half written; a day's grace for those that are at work."""
        for kind in self.directory.glob("*"):
            for folder in (kind, *kind.glob("*/")):
                sweep_leftovers(folder, older_than_seconds=86400.0)

    def _distrust(self, path: Path, reason: str) -> None:
        self._emit(Note(f"cache entry {path.name[:12]}… is damaged ({reason}); it is made again", "warning"))
