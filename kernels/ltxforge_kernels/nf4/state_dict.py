"""NF4 weights among a model's tensors, by bitsandbytes' keys: `name` itself, `name.absmax`, `name.quant_map`, …

What is no tensor stands as JSON in a tensor of bytes. Reading checks all of it and says what is wrong where; it reads
no file itself. What is written here bitsandbytes loads, to the byte what its own `Linear4bit` would have written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ltxforge_kernels.nf4.tables import nf4_map
from ltxforge_kernels.nf4.weight import BLOCKSIZES, DTYPES, Nf4Weight, block_count, packed_size

DESCRIPTION = "quant_state.bitsandbytes__nf4"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# What bitsandbytes itself lets pass as the same map; it computes with its own constants, as we do.
NEAR = 1e-6


def holds_nf4(keys: Collection[str], name: str) -> bool:
    """Whether the weight of this name is in NF4: "….to_q.weight", say."""
    return f"{name}.{DESCRIPTION}" in keys


def to_state_dict(weight: Nf4Weight, name: str) -> dict[str, Tensor]:
    """The tensors that `from_state_dict` and bitsandbytes read, by key; the large ones are not copied."""
    described: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {name: weight.packed, f"{name}.absmax": weight.absmax, f"{name}.quant_map": weight.quant_map}
    if weight.double:
        described["nested_blocksize"] = weight.nested_blocksize
        described["nested_dtype"] = "float32"
        described["nested_offset"] = weight.nested_offset.item()
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_quant_map
    written = json.dumps(described).encode("utf-8")
    tensors[f"{name}.{DESCRIPTION}"] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor], name: str) -> Nf4Weight:
    """The weight of this name, on the device of its codes; tensors of other names are not looked at.

    Raises:
        ValueError: something is missing or is not what the format says; the message names the key.
    """
    described = description(part(tensors, f"{name}.{DESCRIPTION}", torch.uint8), f"{name}.{DESCRIPTION}")
    shape, blocksize = described["shape"], described["blocksize"]
    packed = codes(part(tensors, name), shape, name)
    double = f"{name}.nested_absmax" in tensors
    blocks = block_count(shape, blocksize)
    absmax = part(tensors, f"{name}.absmax", torch.uint8 if double else torch.float32, blocks)
    quant_map = part(tensors, f"{name}.quant_map", torch.float32, 16)
    own = nf4_map(packed.device)
    if not torch.allclose(quant_map, own, rtol=0, atol=NEAR):
        raise ValueError(f"{name}.quant_map holds other values than NF4's")
    known = (own, blocksize, shape, described["dtype"])
    if not double:
        return Nf4Weight(packed, absmax, *known)
    if "nested_offset" not in described:
        raise ValueError(f"{name}.{DESCRIPTION} does not describe {name}.nested_absmax")
    nested_blocks = -(-blocks // described["nested_blocksize"])
    nested_absmax = part(tensors, f"{name}.nested_absmax", torch.float32, nested_blocks)
    nested_map = part(tensors, f"{name}.nested_quant_map", torch.float32, 256)
    offset = torch.tensor(described["nested_offset"], dtype=torch.float32, device=packed.device)
    return Nf4Weight(packed, absmax, *known, nested_absmax, nested_map, offset, described["nested_blocksize"])


def part(
    tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype | None = None, length: int | None = None
) -> Tensor:
    """A tensor that must be there, flat, of this dtype and length; numbers must be finite."""
    if key not in tensors:
        raise ValueError(f"{key} is missing")
    tensor = tensors[key]
    if dtype is None:
        return tensor
    if tensor.dtype != dtype or (length is not None and tensor.numel() != length):
        size = "" if length is None else f" of {length} elements"
        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}, not {dtype}{size}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{key} holds numbers that are not finite")
    return tensor.reshape(-1)


def codes(tensor: Tensor, shape: tuple[int, int], key: str) -> Tensor:
    """The codes as bytes [⌈N·K/2⌉, 1]; bitsandbytes may store them as another dtype, for the sake of sharding."""
    expected = packed_size(shape)
    if tensor.nbytes != expected or not tensor.is_contiguous():
        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}, not the {expected} bytes of {list(shape)}")
    return tensor.reshape(-1).view(torch.uint8)[:, None]


def description(tensor: Tensor, key: str) -> dict:
    """What the JSON says, checked, with `shape` and `dtype` as we hold them."""
    try:
        found = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{key} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key} is no JSON object")

    def require(field: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{key}: {field} is {found.get(field)!r}, not {wanted}")

    def whole(value: object) -> bool:
        return type(value) is int and value > 0

    shape, blocksize = found.get("shape"), found.get("blocksize")
    require("quant_type", found.get("quant_type") == "nf4", "'nf4'")
    require("blocksize", type(blocksize) is int and blocksize in BLOCKSIZES, f"one of {list(BLOCKSIZES)}")
    require("dtype", str(found.get("dtype")) in DTYPE_NAMES, f"one of {list(DTYPE_NAMES)}")
    require("shape", isinstance(shape, list) and len(shape) == 2 and all(map(whole, shape)), "two whole numbers")
    if "nested_offset" in found:
        offset = found["nested_offset"]
        require("nested_offset", type(offset) in (int, float) and math.isfinite(offset), "a finite number")
        require("nested_blocksize", whole(found.get("nested_blocksize")), "a whole number")
        require("nested_dtype", found.get("nested_dtype") == "float32", "'float32'")
    return {**found, "shape": tuple(shape), "dtype": DTYPE_NAMES[found["dtype"]]}
