"""Counts the memory that tensors take while code runs over the meta device: live bytes, and the peak of each stretch.

A tensor counts from the op that makes its storage until nothing refers to that any more, as on a device. What an op
takes and gives back inside of itself is not seen there and stands in `WORKSPACES`; attention, which falls back to a
T x T matrix on the meta device, is stood in for by the op that a device of the given kind would run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._meta_registrations
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GRAIN = {"cpu": 1}
"""What an allocation is rounded up to; CUDA's caching allocator counts multiples of 512."""
USUAL_GRAIN = 512
REDUCED_ROWS = 512
"""Rows of a chunk in the kernels that sum a LoRA's gradients, the smallest of `configurations.py`: each chunk has sums
of its own until all are added.
"""


@dataclass
class Stretch:
    """Bytes while something ran: live when it began, and the most until it ended. Both read 0 at the ledger's start.

    `small` are those of `began` that lie in storages below the ledger's `least`.
    """

    name: str
    began: int
    peak: int
    small: int = 0
    read_and_written: int = 0


class Ledger(TorchDispatchMode):
    """Counts storages of the meta device while it is entered. What was there before is free of charge.

    Attributes:
        live: bytes that are held now.
        stretches: one for each `mark`, in order.
        read: storages that were there before and were read, by `_cdata`; only of use while they live.
    """

    def __init__(self, kind: str, least: int = 0) -> None:
        super().__init__()
        self.least = least
        self._workspaces = {**WORKSPACES, "aten::convolution": _columns if kind == "cpu" else _other_layout}
        self.grain = GRAIN.get(kind, USUAL_GRAIN)
        self.live = 0
        self.stretches = [Stretch("start", 0, 0)]
        self.read: set[int] = set()
        self._held: dict[int, int] = {}

    def mark(self, name: str) -> None:
        """Begin a stretch."""
        small = sum(size for size in self._held.values() if size < self.least)
        self.stretches.append(Stretch(name, self.live, self.live, small))

    def stretch(self, name: str) -> Stretch:
        """The stretch of a name."""
        (found,) = [each for each in self.stretches if each.name == name]
        return found

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _of_shapes((args, tuple(kwargs.values()) if kwargs else ()))
        for tensor in given:
            self._meet(tensor)
        result = func(*args, **(kwargs or {}))
        made = _of_shapes((result,))
        is_fresh = sum(self._count(tensor) for tensor in made) > 0  # each is counted
        name = func.name().split(".")[0]
        workspace = self._workspaces.get(name)
        inside = workspace(*args) if workspace else 0
        now = self.stretches[-1]
        now.peak = max(now.peak, self.live + inside)
        if name not in PRODUCTS and (is_fresh or func._schema.is_mutable):
            now.read_and_written += sum(tensor.nbytes for tensor in (*made, *given))
        return result

    def _meet(self, tensor: Tensor) -> None:
        """What is read and was never seen made was there before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._hold(storage, 0)
            self.read.add(storage._cdata)

    def _count(self, tensor: Tensor) -> bool:
        """Whether a result is new memory, which is then counted."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            return False
        self._hold(storage, -(-storage.nbytes() // self.grain) * self.grain)
        return True

    def _hold(self, storage: torch.UntypedStorage, size: int) -> None:
        self._held[storage._cdata] = size
        self.live += size
        weakref.finalize(storage, self._let_go, storage._cdata)

    def _let_go(self, key: int) -> None:
        self.live -= self._held.pop(key)


def _of_shapes(values: Iterable[Any]) -> list[Tensor]:
    """The meta tensors among an op's arguments or results, lists opened."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _of_shapes(value)
    return found


class DeviceAttention(TorchFunctionMode):
    """Fused ops in place of what falls to pieces on the meta device: attention, and on a GPU the norm of queries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._is_cpu = kind == "cpu"

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.rms_norm and not self._is_cpu:
            return _FusedNorm.apply(*_norm_arguments(*args, **kwargs))
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        aten, given = torch.ops.aten, (query, key, value)
        if enable_gqa and key.shape[1] != query.shape[1]:
            times = query.shape[1] // key.shape[1]
            given = (query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))
        if self._is_cpu:
            flash = aten._scaled_dot_product_flash_attention_for_cpu
            return flash(*given, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(*given, dropout_p, is_causal, scale=scale)[0]
        rows, columns = query.shape[2], key.shape[2]
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:2], rows, columns)
        needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        return aten._scaled_dot_product_efficient_attention(*given, bias, needs, dropout_p, is_causal, scale=scale)[0]


def _norm_arguments(
    given: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,  # noqa: ARG001
) -> tuple[Tensor, int, Tensor | None]:
    """Those of `rms_norm` that say what is kept. As there, `input` is only ever given by its place."""
    return given, len(normalized_shape), weight


class _FusedNorm(torch.autograd.Function):
    """The memory of CUDA's fused RMSNorm, whose op falls to pieces on the meta device: a float32 a row beside x."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, normed: int, weight: Tensor | None) -> Tensor:
        if weight is not None:
            weight = weight.detach()  # an op reads it
        reciprocal = given.new_empty(given.shape[:-normed], dtype=torch.float32)
        ctx.save_for_backward(given, weight, reciprocal)
        return torch.empty_like(given)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return torch.empty_like(upstream), None, None


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _chunk_sums(tensor: Tensor, rank: int) -> int:
    """The sums of a LoRA's gradient over one factor, of all chunks and of all together, in float32."""
    return (-(-_rows(tensor) // REDUCED_ROWS) + 1) * rank * tensor.shape[-1] * 4


def _linear(x: Tensor, stored: Tensor, _bias: Any, a: Tensor, *rest: Any) -> int:
    """[act(x) | h], and A in the dtype of x."""
    activation, augmented = rest[-2:]
    packed = _rows(x) * stored.shape[1] * x.element_size() if augmented or activation == "gelu" else 0
    return packed + a.numel() * x.element_size()


def _linear_backward(upstream: Tensor, x: Tensor, stored: Tensor, a: Tensor, _b: Any, _branch: Any, *rest: Any) -> int:
    """What the frozen product gives to ∂/∂x and ∂/∂h, and the sums."""
    base = _rows(x) * stored.shape[1] * x.element_size() if rest[-1] else 0
    return base + max(_chunk_sums(x, a.shape[0]), _chunk_sums(upstream, a.shape[0]))


def _branch_backward(upstream: Tensor, x: Tensor, a: Tensor, *_rest: Any) -> int:
    inner = _rows(upstream) * a.shape[0] * x.element_size()
    return inner + max(_chunk_sums(x, a.shape[0]), _chunk_sums(upstream, a.shape[0]))


def _nf4(x: Tensor, _bias: Any, *weight: Any) -> int:
    """The weight made whole."""
    return math.prod(weight[4]) * x.element_size()


def _nf4_backward(upstream: Tensor, *weight: Any) -> int:
    return math.prod(weight[4]) * upstream.element_size()


def _eight_bits(x: Tensor, values: Tensor, *_rest: Any) -> int:
    """x in 8 bits, and a float32 scale for each row."""
    return _rows(x) * (x.shape[-1] + 4) + values.shape[0] * 4


def _fp8_backward(upstream: Tensor, values: Tensor, *_rest: Any) -> int:
    """∂/∂y in 8 bits, and the weight turned around."""
    return _rows(upstream) * (upstream.shape[-1] + 4) + values.numel()


def _w8a8_backward(upstream: Tensor, _values: Any, _scale: Any, a: Tensor | None, *rest: Any) -> int:
    """∂/∂y in 8 bits, what goes to the LoRA, and the sums."""
    codes = _rows(upstream) * (upstream.shape[-1] + 4)
    if a is None:
        return codes
    inner = 2 * _rows(upstream) * a.shape[0] * upstream.element_size()
    return codes + inner + max(_chunk_sums(rest[3], a.shape[0]), _chunk_sums(upstream, a.shape[0]))


def _attention_backward(_upstream: Tensor, query: Tensor, *_rest: Any) -> int:
    """∂/∂q is summed in float32, and each row's product of gradient and result kept."""
    return query.numel() * 4 + _rows(query) * 4


def _index(_given: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Numbers of 32 bits are made 64 wide first."""
    return sum(index.numel() * 8 for index in indices if index is not None and index.dtype == torch.int32)


SMALL_CONVOLUTION = 20480
"""Of up to so many numbers, the last side not counted, torch computes a float32 convolution on a CPU by columns."""


def _columns(given: Tensor, weight: Tensor, _bias: Any, stride: Sequence[int], padding: Sequence[int], *_: Any) -> int:
    """Each pixel's neighbours side by side, where oneDNN is not asked: one sample, a small picture and kernel."""
    kernel = weight.shape[2:]
    is_small = math.prod(given.shape[:-1]) <= SMALL_CONVOLUTION and given.shape[0] == 1 and max(kernel) <= 3
    if given.dtype != torch.float32 or not is_small or math.prod(kernel) == 1:
        return 0
    sides = zip(given.shape[2:], kernel, stride, padding, strict=True)
    pixels = math.prod((side + 2 * pad - size) // step + 1 for side, size, step, pad in sides)
    return given.shape[1] * math.prod(kernel) * pixels * given.element_size()


def _other_layout(given: Tensor, weight: Tensor, _bias: Any, stride: Sequence[int], *_: Any) -> int:
    """cuDNN's tensor cores want channels innermost: copies of pixels, weight and result. An assumption."""
    if given.dtype == torch.float32:
        return 0
    made = given.numel() // given.shape[1] // math.prod(stride) * weight.shape[0]
    return (given.numel() + weight.numel() + made) * given.element_size()


WORKSPACES: Mapping[str, Callable[..., int]] = {
    "ltxforge::lora_linear": _linear,
    "ltxforge::lora_linear_backward": _linear_backward,
    "ltxforge::lora_branch_backward": _branch_backward,
    "ltxforge::nf4_linear": _nf4,
    "ltxforge::nf4_linear_backward": _nf4_backward,
    "ltxforge::fp8_linear": _eight_bits,
    "ltxforge::fp8_linear_backward": _fp8_backward,
    "ltxforge::w8a8_lora_linear_backward": _w8a8_backward,
    "aten::index": _index,
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
}
"""What ops take inside of themselves: of ours from their launches, of torch's from its published source."""
PRODUCTS = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "aten::_int_mm"}
    | {
        f"aten::_scaled_dot_product_{kind}{end}"
        for kind in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
        for end in ("", "_backward")
    }
)
"""Ops whose time is not the bytes that they read and write: their FLOPs are counted for themselves."""
