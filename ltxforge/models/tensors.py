"""Fills a module with a checkpoint's tensors, one after the other, so that nothing lies in memory twice.

Each tensor's bytes are read into the memory that the module will use. A memory map is not used: the pages that it
brought in would count as the process's own beside what was copied from them. Decides that every tensor of a module must
be in the file, in its shape, and nothing else; says which are not. Knows no model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.formats import FLOAT8, scale_of
from ltxforge.models.trees import LocalTree, join, weight_files
from ltxforge.models.weights import Header, TensorEntry, read_header

Module = TypeVar("Module", bound=nn.Module)
NAMED_IN_ERRORS = 6
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
    headers = require_same_tensors(module, source, names, "model")
    wanted = {original: name for name, original in names.items()}
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for original, value in read_tensors(file, header, wanted.keys(), device, dtype):
            tensors[wanted[original]] = value
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def files_of(source: Path | Sequence[Path]) -> list[Path]:
    """The weights files of a single file, of a folder with shards, or of several of these."""
    if not isinstance(source, Path):
        return [file for each in source for file in files_of(each)]
    if source.is_file():
        return [source]
    tree = LocalTree(source.parent, source.name, FileDigests())
    return [source.parent / join(source.name, name) for name in weight_files(tree, source.name)]


def read_tensors(
    path: Path, header: Header, names: Container[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of one file, in the file's order, on the device and in the dtype; 8 bits made whole."""
    entries = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    with path.open("rb") as file:
        for name, entry in entries:
            if name not in names:
                continue
            value = read_tensor(file, entry, f"{path}: {name}")
            if entry.dtype in FLOAT8 and (scale := scale_of(header.tensors, name)):
                factor = read_tensor(file, header.tensors[scale], f"{path}: {scale}").float()
                value = value.float() * _by_row(factor, value)
            yield name, value.to(device, dtype)


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale for the whole tensor, or one per row, in a shape that multiplies the weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.reshape(())


def read_tensor(file: BinaryIO, entry: TensorEntry, where: str) -> Tensor:
    """One tensor as it is stored, in memory of its own on the CPU."""
    value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if value.nbytes != entry.end - entry.begin:
        raise WeightsError("its bytes do not fit its shape", where=where, remedy="Download or copy the file again.")
    if value.nbytes:
        file.seek(entry.begin)
        if file.readinto(value.reshape(-1).view(torch.uint8).numpy().data) != value.nbytes:
            raise WeightsError("the file ends early", where=where, remedy="Download or copy the file again.")
    return value


def require_same_tensors(
    module: nn.Module, source: Path | Sequence[Path], names: Mapping[str, str], noun: str
) -> dict[Path, Header]:
    """Refuse files whose tensors are not the module's, by names and shapes, before a byte of data is read.

    Args:
        module, source, names: as for `fill`.
        noun: what the module is, for the message.

    Returns:
        The files and their headers.
    """
    files = files_of(source)
    headers = {file: read_header(file) for file in files}
    stored = {name: entry.shape for header in headers.values() for name, entry in header.tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in names],
        "not part of the model": [original for name, original in names.items() if name not in expected],
        "of another shape": [
            f"{original} {stored[original]} for {expected[name]}"
            for name, original in names.items()
            if name in expected and stored[original] != expected[name]
        ],
    }
    if found := [_said(kind, tensors) for kind, tensors in problems.items() if tensors]:
        raise WeightsError(
            f"tensors do not fit the {noun}: " + "; ".join(found),
            where=str(source if isinstance(source, Path) else files[0]),
            remedy="The file is incomplete or of another model; download it again or name another.",
        )
    return headers


def _said(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
    return f"{kind}: {', '.join(sorted(names)[:NAMED_IN_ERRORS])}{more}"
