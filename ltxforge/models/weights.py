"""Safetensors files as their headers describe them: names, shapes and metadata, without torch and without the data.

Decides whether a file is whole as far as its header and size can tell. Digests, not headers, prove contents; this
module reads no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ltxforge.errors import WeightsError

# The format's own limit on a header.
LARGEST_HEADER_BYTES = 100_000_000
PICKLE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE_REMEDY = (
    "Such files hold Python pickles, which can run code when they are opened, so ltxforge never opens them. "
    "Use the .safetensors file of the same weights."
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header lists it; `dtype` in the format's own spelling: BF16, F32, F8_E4M3.

    Its bytes are `begin` to `end` of its own file, counted from the file's start; both 0 where the file is not here.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


@dataclass(frozen=True)
class Header:
    """All tensors of a file, or of all shards of a model, and the file's metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration that Lightricks embeds as JSON under `config`; empty if there is none."""
        try:
            value = json.loads(self.metadata.get("config", "{}"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def read_header(path: Path) -> Header:
    """The header of a local file. Raises WeightsError if the file is no whole safetensors file."""
    refuse_format(path.name, str(path))
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size, str(path))
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def refuse_format(name: str, where: str) -> None:
    """Refuse a weights file in a format that can run code, or that holds packed numbers alone."""
    if name.lower().endswith(PICKLE_ENDINGS):
        raise WeightsError("weights in a pickle format are not read", where=where, remedy=PICKLE_REMEDY)
    if name.lower().endswith(".gguf"):
        raise WeightsError(
            "is a GGUF file, whose weights are packed in few bits, and a base must be the full weights",
            where=where,
            remedy="Use the bf16 .safetensors file of the same model.",
        )


def _read(file: BinaryIO, size: int, where: str) -> Header:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(LARGEST_HEADER_BYTES, size - 8):
        raise _damaged(f"is no safetensors file, or its start is damaged ({size} bytes)", where)
    try:
        listing = json.loads(file.read(length))
        metadata = listing.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("the format's metadata are texts")
        start = 8 + length
        tensors = {name: _entry(listed, start) for name, listed in listing.items()}
        whole = max((entry.end for entry in tensors.values()), default=start)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged("is no safetensors file: its header is not the JSON that the format asks for", where) from error
    if whole != size:
        kind = "ends early" if size < whole else "is longer than its header says"
        raise _damaged(f"{kind}: it has {size} of {whole} bytes", where)
    return Header(tensors, metadata)


def _entry(listed: Mapping[str, Any], start: int) -> TensorEntry:
    begin, end = listed["data_offsets"]
    return TensorEntry(listed["dtype"], tuple(listed["shape"]), start + begin, start + end)


def _damaged(what: str, where: str) -> WeightsError:
    return WeightsError(
        what, where=where, remedy="Download or copy the file again; an interrupted copy looks like this."
    )
