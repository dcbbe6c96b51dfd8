"""Writes tensors as safetensors so that equal content gives equal bytes, whoever writes it and when.

safetensors puts the header's metadata in an order that differs from one process to the next; here it is sorted. Decides
nothing about names; whole or absent, and under which mode, is `durable`'s part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

METADATA = "__metadata__"
LENGTH_BYTES = 8
"""A file begins with its header's length in so many bytes, little-endian; the header is JSON, filled up with spaces."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `path` anew.

    Args:
        tensors: on the host, contiguous, none sharing memory with another.
    """
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    if metadata and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Rewrite the header in place. It keeps its length, so the tensors' offsets stay true."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "safetensors writes its header more tightly than JSON allows"
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))
