"""Makes Triton's interpreter honest: casts that round as a GPU does, and no access outside the tensors it was given.

Without it bf16 arithmetic runs on bit patterns, casts to bf16 truncate, those to fp8 round wrongly, and a missing mask
reads what lies behind a tensor. Works with Triton 3.6 to 3.9; changes the interpreter of this process, once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

# Addresses [begin, end) of the storages that the kernel under way was given.
ranges: list[tuple[int, int]] = []
# What the kernel under way has put in place of Triton's language, by the modules of it that a function sees.
patches: dict[frozenset[int], object] = {}


class OutOfBounds(IndexError):
    """A kernel touches memory outside its arguments."""


def install() -> None:
    """Repair the interpreter, unless that is done."""
    if hasattr(InterpreterBuilder, "repaired"):
        return
    InterpreterBuilder.repaired = True
    InterpreterBuilder.cast_impl = casting(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = converting(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = widening(InterpreterBuilder.create_dot)
    InterpreterBuilder.binary_op = refusing(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = refusing(InterpreterBuilder.unary_op)
    InterpreterBuilder.create_masked_load = bounded(InterpreterBuilder.create_masked_load, "load", mask_at=0)
    InterpreterBuilder.create_masked_store = bounded(InterpreterBuilder.create_masked_store, "store", mask_at=1)
    GridExecutor.__call__ = recording(GridExecutor.__call__)
    interpreter._patch_lang_tensor = indexable(interpreter._patch_lang_tensor)
    interpreter._patch_lang = once(interpreter._patch_lang)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """bf16 (held as uint16 bit patterns) as the float32 of the same value; anything else as it is."""
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_fp8_bits(values: np.ndarray) -> np.ndarray:
    """As PyTorch rounds to e4m3, which is what the GPU's instruction does up to the largest value."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def converting(original: Callable) -> Callable:
    def convert(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, rounding: object) -> TensorHandle:
        if to.scalar == tl.float8e4nv and source.dtype.scalar == tl.float32:
            return TensorHandle(to_fp8_bits(source.data), tl.float8e4nv)
        return original(self, source, to, rounding)

    return convert


def casting(original: Callable) -> Callable:
    def cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return TensorHandle(to_bf16_bits(source.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(source) and to.scalar != tl.bfloat16:
            source = widened(source)
            return source if to.scalar == tl.float32 else original(self, source, to)
        return original(self, source, to)

    return cast


def widening(original: Callable) -> Callable:
    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, sum_to: TensorHandle, *rest: object) -> object:
        return original(self, widened(a), widened(b), sum_to, *rest)

    return dot


def refusing(original: Callable) -> Callable:
    """The house's rule for kernels: load bf16, compute float32, cast on store."""

    def operate(self: InterpreterBuilder, first: TensorHandle, *rest: object) -> object:
        if is_bf16(first):
            raise TypeError("bf16 arithmetic in a kernel: cast to float32 first")
        return original(self, first, *rest)

    return operate


def bounded(original: Callable, what: str, mask_at: int) -> Callable:
    def access(self: InterpreterBuilder, pointers: TensorHandle, *rest: object, **more: object) -> object:
        require_inside(pointers, rest[mask_at], what)
        return original(self, pointers, *rest, **more)

    return access


def require_inside(pointers: TensorHandle, mask: TensorHandle, what: str) -> None:
    """Every active lane's element must lie wholly in one storage."""
    addresses = np.asarray(pointers.data)
    active = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)].astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(active.shape, bool)
    for begin, end in ranges:
        inside |= (active >= begin) & (active + size <= end)
    if inside.all():
        return
    first = int(active[~inside][0])
    begin, end = min(ranges, key=lambda span: min(abs(first - span[0]), abs(first - span[1])))
    raise OutOfBounds(
        f"{what}: {int((~inside).sum())} lanes out of bounds, "
        f"the first {first - end:+} bytes from the end of a tensor of {end - begin} bytes"
    )


def recording(original: Callable) -> Callable:
    """Remember the storages of a launch's tensors before it runs."""

    @wraps(original)
    def call(self: GridExecutor, *arguments: object, **named: object) -> object:
        ranges.clear()
        patches.clear()
        for argument in (*arguments, *named.values()):
            tensor = getattr(argument, "base", argument)
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return original(self, *arguments, **named)

    return call


def once(original: Callable) -> Callable:
    """Patch the language once a launch: functions that a kernel calls find it patched, and would take half the time."""

    def patch(function: Callable) -> object:
        seen = frozenset(id(module) for module in (tl, tl.core) if module in function.__globals__.values())
        if seen not in patches:
            patches[seen] = original(function)
        return patches[seen]

    return patch


def indexable(original: Callable) -> Callable:
    """Scalars of a kernel as loop bounds: Triton 3.6 with numpy 2.4 makes arrays of one element of them."""

    def patch(tensor: type, *rest: object) -> None:
        original(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    return patch
