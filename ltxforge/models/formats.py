"""How a checkpoint's numbers are stored: which formats are read, and which are refused with the reason.

Read: floats of 16 bits and more; floats of 8 bits, as they are (a plain cast) or with a scale beside them, one for the
tensor or one per row; bitsandbytes' NF4. Refused: what is packed in other ways: a base must be the numbers that the
model was made of, and only a format of ours may stand for them. A weight of several tensors is seen here as one, by
the name that it had before. Looks at names, dtypes and shapes; reads no tensor. Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ltxforge.errors import WeightsError
from ltxforge.models.weights import Header, TensorEntry

PLAIN = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
# Lightricks' and diffusers' files say `weight_scale`, ComfyUI's older ones `scale_weight`.
SCALES = (".weight_scale", ".scale_weight")
# bitsandbytes' names for the parts of a weight in NF4: a JSON that describes it, its scales and what its codes mean.
NF4, NF4_DESCRIPTION = "NF4", ".quant_state.bitsandbytes__nf4"
NF4_PARTS = (NF4_DESCRIPTION, ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FP4_DESCRIPTION, _LLM_INT8_SCALE = ".quant_state.bitsandbytes__fp4", ".SCB"
# Packed bytes may be stored as another dtype, for the sake of sharding.
_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
# What stands beside a quantised weight; scales of inputs and markers have no meaning for a weight that is made whole.
_COMPANIONS = (
    *SCALES, *NF4_PARTS, ".input_scale", ".scale_input", ".comfy_quant", ".weight_scale_2", ".weight_scale_inv",
    _FP4_DESCRIPTION, _LLM_INT8_SCALE, ".weight_format",
)  # fmt: skip
_MARKER = "scaled_fp8"
BASE_REMEDY = (
    "Use the bf16 file of the same model, its fp8 one, or one in bitsandbytes' NF4. A bf16 base is quantised here by "
    "`memory.base_precision`, which keeps the result."
)
# torchao's tensor classes, as diffusers and transformers save them: `to_q._weight_qdata` is a part of `to_q.weight`.
_FLATTENED = re.compile(r"(.*\.)_weight_(qdata|scale)")
# Where the numbers of transformers are that are published quantised.
_BLOCK = "transformer_blocks."


def logical(header: Header) -> Header:
    """A checkpoint whose quantised weights are seen as one tensor each, under the name and shape that they had.

    NF4's dtype is then `NF4`; its shape follows from its bias and its size; without a bias it is the bytes'.
    torchao's parts have the names of everyone else's fp8 weights and scales.
    """
    if not any(name.endswith(NF4_DESCRIPTION) or _FLATTENED.fullmatch(name) for name in header.tensors):
        return header
    packed = {name.removesuffix(NF4_DESCRIPTION) for name in header.tensors if name.endswith(NF4_DESCRIPTION)}
    parts = {name + ending for name in packed for ending in NF4_PARTS}
    tensors = {}
    for name, entry in header.tensors.items():
        if name in packed:
            tensors[name] = replace(entry, dtype=NF4, shape=_unpacked_shape(header.tensors, name))
        elif name not in parts:
            tensors[plain_name(name)] = entry
    return Header(tensors, header.metadata)


def plain_name(name: str) -> str:
    """What torchao's parts are called elsewhere; all other names as they are."""
    found = _FLATTENED.fullmatch(name)
    return name if found is None else f"{found[1]}weight{'_scale' if found[2] == 'scale' else ''}"


def _unpacked_shape(tensors: Mapping[str, TensorEntry], name: str) -> tuple[int, ...]:
    size = math.prod(tensors[name].shape) * _BYTES.get(tensors[name].dtype, 1)
    bias = tensors.get(name.removesuffix("weight") + "bias")
    if bias is None or len(bias.shape) != 1 or not bias.shape[0] or 2 * size % bias.shape[0]:
        return (size, 1)
    return (bias.shape[0], 2 * size // bias.shape[0])


def fits(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be one of this shape; NF4's own description is only read with it."""
    if entry.dtype == NF4:
        return entry.shape == shape or math.prod(entry.shape) == -(-math.prod(shape) // 2)
    return entry.shape == shape


def stored_format(tensors: Mapping[str, TensorEntry], names: Iterable[str]) -> str:
    """In which of our formats a transformer's blocks are stored, "nf4" or "fp8"; "" where they are whole.

    Args:
        tensors: all of a `logical` checkpoint.
        names: the transformer's own, in the file's words.
    """
    dtypes = {tensors[name].dtype for name in names if _BLOCK in name and name.endswith(".weight")}
    return "nf4" if NF4 in dtypes else "fp8" if "F8_E4M3" in dtypes else ""


def is_companion(name: str) -> bool:
    """Whether a tensor belongs to the format of another one, and not to the model."""
    return name.endswith(_COMPANIONS) or name.rpartition(".")[2] == _MARKER


def scale_of(tensors: Mapping[str, TensorEntry], name: str) -> str | None:
    """The name of the scale of an 8-bit weight, in the file's own words; None for a plain cast."""
    stem = name.removesuffix(".weight")
    return next((stem + ending for ending in SCALES if stem + ending in tensors), None)


def require_readable(
    tensors: Mapping[str, TensorEntry], names: Iterable[str], where: str, remedy: str = BASE_REMEDY
) -> None:
    """Refuse a part whose weights are packed in a way that is not read.

    Args:
        tensors: all of a `logical` file or folder.
        names: the part's own, in the file's words.
    """
    for name in names:
        if reason := _unreadable(tensors, name):
            raise WeightsError(f"{reason} ({name}), which is not read", where=where, remedy=remedy)


def _unreadable(tensors: Mapping[str, TensorEntry], name: str) -> str:
    entry, stem = tensors[name], name.removesuffix(".weight")
    if f"{stem}.weight_scale_2" in tensors or entry.dtype.startswith("F4"):
        return "is packed in 4 bits (NVFP4)"
    if f"{name}{_FP4_DESCRIPTION}" in tensors:
        return "is packed in 4 bits (bitsandbytes' FP4; its NF4 is read)"
    if f"{stem}{_LLM_INT8_SCALE}" in tensors:
        return "is quantised to 8-bit integers (bitsandbytes' LLM.int8)"
    if entry.dtype in FLOAT8:
        return _unreadable_float8(tensors, name, entry)
    if entry.dtype in (*PLAIN, NF4):
        return ""
    if entry.dtype == "I8":
        return "is quantised to 8-bit integers (int8, with or without ConvRot)"
    return f"is packed as {entry.dtype}, which only its own kernels can read"


def _unreadable_float8(tensors: Mapping[str, TensorEntry], name: str, entry: TensorEntry) -> str:
    if f"{name.removesuffix('.weight')}.weight_scale_inv" in tensors:
        return "is in fp8 with a scale per block"
    scale = tensors.get(scale_of(tensors, name) or "")
    if scale is None:
        return ""
    if scale.dtype not in PLAIN or scale.shape not in ((), (1,), (1, 1), entry.shape[:1], (*entry.shape[:1], 1)):
        return "is in fp8 with a scale per block"
    return ""
