"""The formats in which a base weight can be kept: what is stored, in how many bytes, of which layers. Torch-free.

Decides which layers are quantised at all, by their names and sizes, so that a plan knows before anything is loaded.
Whether a layer's own numbers then bear it is measured (`linear.py`, `guard.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ltxforge_kernels.floors import FLOORS

from ltxforge.model_spec import BLOCKS

# Layers with a narrower side than this stay as they are: there is nothing to save, and gates of heads are among them.
NARROW = 64
# bitsandbytes' defaults, which its own loaders expect: elements per block of NF4, and blocks per nested block.
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
SIZES = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float32": 4}


@dataclass(frozen=True)
class Format:
    """A way to keep a base weight.

    Attributes:
        name: as recipes write it.
        op: of ltxforge_kernels, which multiplies with it.
        floor: dB of signal to quantisation noise that it leaves of Gaussian data, product included.
        weight_floor: dB that it must leave of a weight; a layer below stays as it is.
        quantises_activations: whether a product is computed in 8 bits; otherwise the weight is made whole for it.
        multiple: what both sides of a weight must be multiples of.
        loss_error: how far, relatively, a step's loss may be from that of the base as it was.
        gradient_cosine: how small the cosine between both adapters' gradients may be.
    """

    name: str
    op: str
    floor: float
    weight_floor: float
    quantises_activations: bool
    multiple: int
    loss_error: float
    gradient_cosine: float


# Weights have heavier tails than Gaussian data, of which NF4 leaves 20.7 dB: of Laplace's it leaves 19.7, of
# Student's t with three degrees of freedom 18.2. A floor is for layers that are worse than any of these.
FORMATS = {
    format.name: format
    for format in (
        Format("fp8", "fp8", FLOORS["fp8"], 25.0, True, 16, 0.02, 0.99),
        Format("int8", "int8", FLOORS["w8a8"], 25.0, False, 1, 0.005, 0.999),
        Format("int8-w8a8", "int8", FLOORS["w8a8"], 25.0, True, 1, 0.005, 0.999),
        Format("nf4", "nf4", FLOORS["nf4"], 15.0, False, 1, 0.05, 0.95),
    )
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a quantised weight: `dtype` is torch's name of it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def stored_tensors(
    format: str, rows: int, columns: int, double: bool = False, blocksize: int = BLOCKSIZE
) -> dict[str, StoredTensor]:
    """What a quantised weight [rows, columns] consists of, by name: all that is copied where it is needed.

    Args:
        format: one of `FORMATS`.
        rows: N, the layer's out_features.
        columns: K, its in_features.
        double: of "nf4": its scales are quantised too.
        blocksize: of "nf4".
    """
    if FORMATS[format].op != "nf4":
        dtype = "int8" if FORMATS[format].op == "int8" else "float8_e4m3fn"
        return {"values": StoredTensor(dtype, (rows, columns)), "scale": StoredTensor("float32", (rows,))}
    blocks = -(-rows * columns // blocksize)
    packed = StoredTensor("uint8", (-(-rows * columns // 2), 1))
    if not double:
        return {"packed": packed, "absmax": StoredTensor("float32", (blocks,))}
    return {
        "packed": packed,
        "absmax": StoredTensor("uint8", (blocks,)),
        "nested_absmax": StoredTensor("float32", (-(-blocks // NESTED_BLOCKSIZE),)),
        "nested_offset": StoredTensor("float32", ()),
    }


def stored_bytes(format: str, rows: int, columns: int, double: bool = False, blocksize: int = BLOCKSIZE) -> int:
    """Bytes of `stored_tensors`."""
    return sum(tensor.nbytes for tensor in stored_tensors(format, rows, columns, double, blocksize).values())


def constant_bytes(format: str, double: bool = False) -> int:
    """Bytes that a layer has beside them, on its device at all times: what codes stand for."""
    if FORMATS[format].op != "nf4":
        return 0
    return (16 + (256 if double else 0)) * SIZES["float32"]


def why_not(layer: str, rows: int, columns: int, format: str) -> str:
    """Why a linear layer of this name and size is not quantised; "" if it is."""
    if not layer.startswith(BLOCKS):
        return "outside the blocks"
    if min(rows, columns) < NARROW:
        return f"narrower than {NARROW}"
    multiple = FORMATS[format].multiple
    if rows % multiple or columns % multiple:
        return f"{rows} x {columns} are no multiples of {multiple}"
    return ""


def quantisable(layers: Mapping[str, tuple[int, int]], format: str) -> dict[str, tuple[int, int]]:
    """Those of a transformer's linear layers, name → (in_features, out_features), that are quantised."""
    return {name: size for name, size in layers.items() if not why_not(name, size[1], size[0], format)}
