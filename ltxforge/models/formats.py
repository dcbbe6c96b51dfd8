"""How a checkpoint's numbers are stored: which formats are read, and which are refused with the reason.

Read: floats of 16 bits and more; floats of 8 bits, as they are (a plain cast) or with a scale beside them, one for the
tensor or one per row. Refused: what is packed in other ways (4 bits, integers, scales per block): a base must be the
numbers that the model was made of. Looks at names, dtypes and shapes; reads no tensor. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ltxforge.errors import WeightsError
from ltxforge.models.weights import TensorEntry

PLAIN = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
# Lightricks' and diffusers' files say `weight_scale`, ComfyUI's older ones `scale_weight`.
SCALES = (".weight_scale", ".scale_weight")
# What stands beside a quantised weight; scales of inputs and markers have no meaning for a weight that is made whole.
_COMPANIONS = (*SCALES, ".input_scale", ".scale_input", ".comfy_quant", ".weight_scale_2", ".weight_scale_inv")
_MARKER = "scaled_fp8"


def is_companion(name: str) -> bool:
    """Whether a tensor belongs to the format of another one, and not to the model."""
    return name.endswith(_COMPANIONS) or name.rpartition(".")[2] == _MARKER


def scale_of(tensors: Mapping[str, TensorEntry], name: str) -> str | None:
    """The name of the scale of an 8-bit weight, in the file's own words; None for a plain cast."""
    stem = name.removesuffix(".weight")
    return next((stem + ending for ending in SCALES if stem + ending in tensors), None)


def require_readable(tensors: Mapping[str, TensorEntry], names: Iterable[str], where: str) -> None:
    """Refuse a part whose weights are packed in a way that is not read.

    Args:
        tensors: all of the file or folder.
        names: the part's own, in the file's words.
    """
    for name in names:
        if reason := _unreadable(tensors, name):
            raise WeightsError(
                f"{reason} ({name}), and a base must be the full weights",
                where=where,
                remedy="Use the bf16 file of the same model, or its fp8 one.",
            )


def _unreadable(tensors: Mapping[str, TensorEntry], name: str) -> str:
    entry, stem = tensors[name], name.removesuffix(".weight")
    if f"{stem}.weight_scale_2" in tensors or entry.dtype.startswith("F4"):
        return "is packed in 4 bits (NVFP4)"
    if entry.dtype in FLOAT8:
        return _unreadable_float8(tensors, name, entry)
    if entry.dtype in PLAIN:
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
    if scale.dtype not in PLAIN or scale.shape not in ((), (1,), entry.shape[:1], (*entry.shape[:1], 1)):
        return "is in fp8 with a scale per block"
    return ""
