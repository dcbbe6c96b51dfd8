"""A weight as files and memory hold it: plain, or in few bits with its scales; and its tensors' names in a file.

NF4 has bitsandbytes' names, fp8 and int8 a `weight_scale` beside the weight, as Lightricks' and diffusers' files say.
Decides no format and reads no file.
"""

from __future__ import annotations

import torch
from ltxforge_kernels import fp8, int8, nf4
from ltxforge_kernels.choice import Implementation, Kernels
from ltxforge_kernels.fp8 import Fp8Weight
from ltxforge_kernels.int8 import Int8Weight
from ltxforge_kernels.nf4 import state_dict as nf4_files
from ltxforge_kernels.nf4.weight import DTYPES, Nf4Weight
from torch import Tensor

from ltxforge.quant.formats import FORMATS

QuantisedWeight = Nf4Weight | Fp8Weight | Int8Weight
Stored = Tensor | QuantisedWeight
SCALE = "_scale"
"""What follows a weight's name in its scale's name, in a file."""


def op_of(weight: QuantisedWeight) -> str:
    """The op that multiplies with it: "nf4", "fp8" or "int8"."""
    return {Nf4Weight: "nf4", Fp8Weight: "fp8", Int8Weight: "int8"}[type(weight)]


def is_in(stored: Stored, format: str) -> bool:
    """Whether a weight is stored in one of `FORMATS` already."""
    return not isinstance(stored, Tensor) and op_of(stored) == FORMATS[format].op


def shape_of(stored: Stored) -> tuple[int, ...]:
    """The weight's own shape, [N, K]."""
    return tuple(stored.values.shape if isinstance(stored, Fp8Weight | Int8Weight) else stored.shape)


def quantised(weight: Tensor, op: str, double: bool, kernels: Kernels) -> QuantisedWeight:
    """A weight [N, K] in few bits, on its device: the same bits wherever that is.

    What is not of 16 or 32 bits is quantised from float32. The largest values of NF4's blocks are always made into
    codes on the host: their mean is the device's own.
    """
    weight = weight if weight.dtype in DTYPES else weight.float()
    if op == "fp8":
        return fp8.quantise(weight)
    if op == "int8":
        return int8.quantise(weight)
    plain = nf4.quantise(weight, implementation=once("nf4", kernels, weight.device))
    return _doubled(plain) if double else plain


def _doubled(plain: Nf4Weight) -> Nf4Weight:
    device = plain.packed.device
    nested = nf4.compress(plain.absmax.cpu())
    return plain.replace(
        absmax=nested.codes.to(device), nested_absmax=nested.absmax.to(device),
        nested_quant_map=nested.quant_map.to(device), nested_offset=nested.offset.to(device),
    )  # fmt: skip


def dequantised(weight: QuantisedWeight, dtype: torch.dtype, kernels: Kernels) -> Tensor:
    """The weight [N, K] again, on its device."""
    implementation = once(op_of(weight), kernels, _first(weight).device)
    if isinstance(weight, Nf4Weight):
        return nf4.dequantise(weight, dtype, implementation=implementation)
    return (fp8 if isinstance(weight, Fp8Weight) else int8).dequantise(weight, dtype, implementation=implementation)


def whole(stored: Stored, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> Tensor:
    """The weight itself, on a device; what is in few bits travels as such and is made whole there."""
    if isinstance(stored, Tensor):
        return stored.to(device, dtype)
    return dequantised(moved(stored, device), dtype, kernels)


def moved(weight: QuantisedWeight, device: torch.device) -> QuantisedWeight:
    """The same weight on a device."""
    if isinstance(weight, Nf4Weight):
        return weight.to(device)
    return type(weight)(*(part.to(device) for part in weight))


def to_file(weight: QuantisedWeight, name: str) -> dict[str, Tensor]:
    """Its tensors by their names in a file, on the host; `name` is the weight's ("….to_q.weight")."""
    on_host = moved(weight, torch.device("cpu"))
    if isinstance(on_host, Nf4Weight):
        return nf4_files.to_state_dict(on_host, name)
    return {name: on_host.values, name + SCALE: on_host.scale}


def once(op: str, kernels: Kernels, device: torch.device) -> Implementation:
    """How something is computed once, to the same bits: as the run has it on a GPU, eagerly on a host."""
    return "triton" if device.type == "cuda" and kernels.of(op) == "triton" else "eager"


def _first(weight: QuantisedWeight) -> Tensor:
    return weight.packed if isinstance(weight, Nf4Weight) else weight.values
