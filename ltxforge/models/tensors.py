"""Reads a checkpoint's tensors one after the other, and fills modules with them, so that nothing lies in memory twice.

Each tensor's bytes are read into the memory that the module will use. A memory map is not used: the pages that it
brought in would count as the process's own beside what was copied from them. Decides that every tensor of a module must
be in the file, in its shape, and nothing else; says which are not. Knows no model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from ltxforge_kernels.choice import EAGER
from ltxforge_kernels.fp8 import Fp8Weight
from ltxforge_kernels.int8 import Int8Weight
from ltxforge_kernels.nf4.state_dict import from_state_dict
from torch import Tensor, nn

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.formats import FLOAT8, NF4, NF4_PARTS, fits, logical, plain_name, scale_of
from ltxforge.models.trees import LocalTree, join, weight_files
from ltxforge.models.weights import Header, TensorEntry, read_header
from ltxforge.quant.weights import Stored, whole

Module = TypeVar("Module", bound=nn.Module)
NAMED_IN_ERRORS = 6
DAMAGED = "Download or copy the file again."
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def fill(
    module: Module,
    source: Path | Sequence[Path],
    names: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
) -> Module:
    """Put a checkpoint's tensors into a module that has none.

    The peak is the module's own size and one tensor; a file that changes later changes nothing.

    Args:
        module: its parameters on the meta device.
        source: a single file, a folder of one or several, or the files themselves.
        names: the module's name → the file's own name, of all tensors that belong to it.
    """
    require_same_tensors(module, source, names, "model")
    wanted = {original: name for name, original in names.items()}
    tensors = {
        wanted[original]: whole(stored, dtype, device, EAGER) for original, stored in Checkpoint(source).read(wanted)
    }
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


class Checkpoint:
    """The tensors of one or several safetensors files: listed as they were before any quantisation, read as stored."""

    def __init__(self, source: Path | Sequence[Path]) -> None:
        """See `files_of` for `source`."""
        self.places: dict[str, tuple[Path, TensorEntry]] = {}
        metadata: dict[str, str] = {}
        for file in files_of(source):
            header = read_header(file)
            self.places.update({name: (file, entry) for name, entry in header.tensors.items()})
            metadata.update(header.metadata)
        own = {plain_name(name): name for name in self.places}
        self.header = logical(Header({name: entry for name, (_, entry) in self.places.items()}, metadata))
        self._own = {name: own.get(name, name) for name in self.header.tensors}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Stored]]:
        """The wanted tensors as they are stored, on the host: block after block, and in the files' order otherwise."""
        order = {file: number for number, file in enumerate(dict.fromkeys(file for file, _ in self.places.values()))}

        def place(name: str) -> tuple[int, int, int]:
            file, entry = self.places[self._own[name]]
            return _block_of(name), order[file], entry.begin

        wanted = sorted((name for name in self.header.tensors if name in names), key=place)
        with contextlib.ExitStack() as stack:
            self._files = {file: stack.enter_context(file.open("rb")) for file in order}
            for name in wanted:
                yield name, self._stored(name)

    def _stored(self, name: str) -> Stored:
        entry = self.header.tensors[name]
        if entry.dtype == NF4:
            return self._nf4(name)
        value = self._tensor(name)
        scale = scale_of(self.header.tensors, name) if entry.dtype in (*FLOAT8, "I8") else None
        factor = self._tensor(scale).float() if scale else None
        if value.ndim == 2 and entry.dtype in ("F8_E4M3", "I8") and not (factor is None and entry.dtype == "I8"):
            rows = value.shape[0]
            by_row = torch.ones(rows) if factor is None else factor.reshape(-1).expand(rows).contiguous()
            return (Int8Weight if entry.dtype == "I8" else Fp8Weight)(value, by_row)
        if factor is None:
            return value
        return value.float() * _by_row(factor, value)

    def _nf4(self, name: str) -> Stored:
        parts = {part: self._tensor(part) for each in NF4_PARTS if (part := name + each) in self.places}
        try:
            return from_state_dict({name: self._tensor(name), **parts}, name)
        except ValueError as error:
            where = str(self.places[name][0])
            raise WeightsError(f"is no NF4 that can be read: {error}", where=where, remedy=DAMAGED) from error

    def _tensor(self, name: str) -> Tensor:
        file, entry = self.places[self._own.get(name, name)]
        return read_tensor(self._files[file], entry, f"{file}: {name}")


def _block_of(name: str) -> int:
    """The number of the block that a tensor is in; -1 outside."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else -1


def files_of(source: Path | Sequence[Path]) -> list[Path]:
    """The weights files of a single file, of a folder with shards, or of several of these."""
    if not isinstance(source, Path):
        return [file for each in source for file in files_of(each)]
    if source.is_file():
        return [source]
    tree = LocalTree(source.parent, source.name, FileDigests())
    return [source.parent / join(source.name, name) for name in weight_files(tree, source.name)]


def read_tensors(
    path: Path, names: Collection[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of one file, on the device and in the dtype; what is in few bits made whole."""
    for name, stored in Checkpoint(path).read(names):
        yield name, whole(stored, dtype, device, EAGER)


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale for the whole tensor, or one per row, in a shape that multiplies the weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.reshape(())


def read_tensor(file: BinaryIO, entry: TensorEntry, where: str) -> Tensor:
    """One tensor as it is stored, in memory of its own on the CPU."""
    value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if value.nbytes != entry.end - entry.begin:
        raise WeightsError("its bytes do not fit its shape", where=where, remedy=DAMAGED)
    if value.nbytes:
        file.seek(entry.begin)
        if file.readinto(value.reshape(-1).view(torch.uint8).numpy().data) != value.nbytes:
            raise WeightsError("the file ends early", where=where, remedy=DAMAGED)
    return value


def require_same_tensors(module: nn.Module, source: Path | Sequence[Path], names: Mapping[str, str], noun: str) -> None:
    """Refuse files whose tensors are not the module's, by names and shapes, before a byte of data is read.

    Args:
        module, source, names: as for `fill`.
        noun: what the module is, for the message.
    """
    checkpoint = Checkpoint(source)
    stored = checkpoint.header.tensors
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in names],
        "not part of the model": [original for name, original in names.items() if name not in expected],
        "of another shape": [
            f"{original} {stored[original].shape} for {expected[name]}"
            for name, original in names.items()
            if name in expected and not fits(stored[original], expected[name])
        ],
    }
    if found := [_said(kind, tensors) for kind, tensors in problems.items() if tensors]:
        raise WeightsError(
            f"tensors do not fit the {noun}: " + "; ".join(found),
            where=str(source if isinstance(source, Path) else files_of(source)[0]),
            remedy="The file is incomplete or of another model; download it again or name another.",
        )


def _said(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
    return f"{kind}: {', '.join(sorted(names)[:NAMED_IN_ERRORS])}{more}"
