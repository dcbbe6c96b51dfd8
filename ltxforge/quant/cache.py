"""Quantised weights of a base, kept for the next start: made once, verified at each start, never half there.

An entry is a folder: one safetensors file for each block, in the layouts that quantised models are published in, and a
manifest with all digests, the key and the report. Its key is all that the bits follow from: the transformer's own
digest, the format, and `VERSION`. What is damaged or another's is made again and said; what cannot be written costs the
next start its time and this one nothing. Reads no tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ltxforge.durable import make_folder, retire, staged_folder, sweep_leftovers, verify_folder
from ltxforge.errors import DiskFullError
from ltxforge.events import Emit, Note
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.keep import Keep
from ltxforge.quant.report import BaseReport
from ltxforge.quant.weights import QuantisedWeight, to_file
from ltxforge.tensor_files import save_tensors

FOLDER = "quantised"
# Raise it when the same weight would become other bits, or other tensors in a file.
VERSION = 1
LEFTOVER_SECONDS = 86400.0

Key = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What an earlier start kept: its files, and what became of every layer then."""

    files: tuple[Path, ...]
    report: BaseReport


def key_of(digest: str, keep: Keep) -> Key:
    """All that quantised weights follow from; `digest` is the transformer's own."""
    double = keep.double_quant and FORMATS[keep.base_precision].op == "nf4"
    return {"transformer": digest, "format": keep.base_precision, "double": double, "version": VERSION}


def folder_of(cache: Path, key: Key) -> Path:
    """Where the entry of this key stands, whether or not it does."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / FOLDER / name[:32]


def find(cache: Path, key: Key, emit: Emit) -> Entry | None:
    """The entry of a key, verified to the last byte; None, and out of the way, if it cannot be trusted."""
    folder = folder_of(cache, key)
    if not folder.exists():
        return None
    facts, reason = verify_folder(folder)
    try:
        if not reason and facts["key"] == key:
            return Entry(tuple(sorted(folder.glob("*.safetensors"))), BaseReport.from_json(facts["report"]))
        reason = reason or "it belongs to another key"
    except (KeyError, TypeError, ValueError) as error:
        reason = f"its facts are not those of an entry ({error!r})"
    emit(Note(f"quantised weights in {folder} cannot be used ({reason}); they are made again", "warning"))
    retire(folder)
    return None


class _Abandoned(Exception):
    """Ends a staging folder whose entry cannot be written."""


@dataclass
class Keeper:
    """Takes quantised weights, block after block; afterwards the entry stands whole, or not at all.

    What the system refuses, a full disk above all, ends the entry and not the run, and is said.
    """

    cache: Path
    key: Key
    emit: Emit
    _facts: dict[str, Any] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _staging: Path = Path()
    _block: int = -1
    _held: dict[str, Tensor] = field(default_factory=dict)
    _is_given_up: bool = False

    def __enter__(self) -> Keeper:
        self._attempt(self._open)
        return self

    def add(self, block: int, name: str, weight: QuantisedWeight) -> None:
        """One weight; when the next block begins, the last one is written and let go."""
        if block != self._block:
            self._attempt(self._write)
            self._block, self._held = block, {}
        if not self._is_given_up:
            self._held.update(to_file(weight, name))

    def finish(self, report: BaseReport) -> None:
        """The last block, and what became of every layer."""
        self._attempt(self._write)
        self._held = {}
        self._facts["report"] = report.to_json()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
        elif self._is_given_up:
            self._stack.__exit__(_Abandoned, _Abandoned(), None)
        else:
            self._attempt(self._stack.close)

    def _open(self) -> None:
        folder = folder_of(self.cache, self.key)
        make_folder(folder.parent)
        sweep_leftovers(folder.parent, older_than_seconds=LEFTOVER_SECONDS)
        self._facts["key"] = self.key
        self._staging = self._stack.enter_context(staged_folder(folder, self._facts))

    def _write(self) -> None:
        if self._held:
            path = self._staging / f"block-{self._block:03d}.safetensors"
            assert not path.exists(), f"block {self._block} came twice"
            save_tensors(path, self._held)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_given_up:
            return
        try:
            action()
        except (OSError, DiskFullError, SafetensorError) as error:
            self._is_given_up = True
            self.emit(Note(f"quantised weights are not kept for the next start: {error}", "warning"))
