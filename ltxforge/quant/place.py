"""Puts a transformer's tensors where they stay, one after the other: quantised, parked, or whole on the device.

A linear layer's weight that can be quantised is, is judged by the noise in it, and becomes a `QuantisedLinear`, or
stays whole if that is too much. Of blocks that are parked, these layers' weights go to whoever streams them; biases,
norms and tables never do. Nothing is held twice: beside what stays there is one weight at a time. Reads no file.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from ltxforge_kernels.nf4.weight import Nf4Weight
from ltxforge_kernels.precision import sqnr
from torch import Tensor, nn

from ltxforge.events import PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.quant.formats import FORMATS, stored_bytes, why_not
from ltxforge.quant.keep import Keep
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.quant.report import BaseReport, LayerReport
from ltxforge.quant.weights import (
    QuantisedWeight,
    Stored,
    dequantised,
    is_in,
    moved,
    op_of,
    quantised,
    shape_of,
    whole,
)

HOST = torch.device("cpu")
PHASE = "quantise"
NOT_QUANTISED = "bf16"
FROM_FILE = "weights came in {} from the file: how far they are from the original ones is not known"
NOBODY_PARKS = "blocks are parked, and nobody takes their weights"
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

Named = Iterable[tuple[str, Stored]]
OnQuantised = Callable[[int, str, QuantisedWeight], None]
"""Hears of a quantised weight before its tensors go anywhere: its block, its name, itself."""


def block_and_rest(name: str) -> tuple[int, str] | None:
    """A name's block and what follows it: (3, "attn1.to_q.weight"); None outside the blocks."""
    found = _BLOCK.match(name)
    return (int(found[1]), found[2]) if found else None


def place(
    module: nn.Module, tensors: Named, keep: Keep, known: BaseReport | None = None, heard: OnQuantised | None = None
) -> BaseReport:
    """Fill a module that waits for its tensors.

    Args:
        module: a transformer, its parameters on the meta device or already what `tensors` gives.
        tensors: each of its parameters by name, in any order; quantised ones as they are stored.
        keep: where and how each stays.
        known: what is known of the layers that come quantised, instead of asking files that do not say.
        heard: hears of each quantised layer.
    """
    placer = _Placer(module, keep, known, heard)
    for name, stored in tensors:
        placer.put(name, stored)
    return placer.report()


@dataclass
class _Progress:
    """Tells how far quantising is, block by block; nothing of a load that quantises nothing."""

    keep: Keep
    total: int
    done: int = 0
    block: int = -1
    began: float = 0.0

    def advance(self, block: int) -> None:
        """One more layer, of this block."""
        if not self.done:
            self.began = time.monotonic()
            detail = f"to {self.keep.base_precision} on {self.keep.quantise_on}"
            self.keep.emit(PhaseStarted(PHASE, self.total, detail))
        self.done += 1
        if block != self.block:
            self.block = block
            self.keep.emit(PhaseAdvanced(PHASE, self.done))

    def end(self) -> None:
        """No layer follows."""
        if self.done:
            self.keep.emit(PhaseEnded(PHASE, time.monotonic() - self.began))


@dataclass
class _Placer:
    """The module that is being filled, and what became of its layers."""

    module: nn.Module
    keep: Keep
    known: BaseReport | None
    heard: OnQuantised | None
    layers: dict[str, LayerReport] = field(default_factory=dict)
    came_in: set[str] = field(default_factory=set)
    progress: _Progress = field(init=False)

    def __post_init__(self) -> None:
        waiting = {id(each) for each in self.keep.waiting(self.module)}
        names = [name for name, each in self.module.named_modules() if id(each) in waiting]
        self._waiting = tuple(f"{name}." for name in names)
        self._order = {name: place for place, (name, _) in enumerate(self.module.named_modules())}
        self._before = {layer.name: layer for layer in self.known.layers} if self.known else {}
        self.progress = _Progress(self.keep, sum(map(self._is_to_quantise, self.module.named_modules())))

    def _is_to_quantise(self, named: tuple[str, nn.Module]) -> bool:
        name, layer = named
        return isinstance(layer, nn.Linear) and not self._why_not(name, layer.out_features, layer.in_features)

    def put(self, name: str, stored: Stored) -> None:
        """One tensor where it stays."""
        layer_name, _, leaf = name.rpartition(".")
        layer = self.module.get_submodule(layer_name)
        if leaf == "weight" and isinstance(layer, nn.Linear):
            self._put_weight(layer_name, layer, stored)
        else:
            self._set(layer, leaf, whole(stored, self.keep.dtype, self._device(name), self.keep.kernels))

    def _put_weight(self, name: str, layer: nn.Linear, stored: Stored) -> None:
        self._note_source(stored)
        rows, columns = shape_of(stored)
        reason, format = self._why_not(name, rows, columns), self.keep.base_precision
        if reason:
            self._tell(name, "", reason, None, (rows, columns))
            self._put_whole(name, layer, stored)
        elif self.keep.device.type == "meta":
            self._replace(name, self._empty(layer))
        elif is_in(stored, format) and self._is_ours(stored):
            self._tell(name, format, "", None, (rows, columns), stored)
            self._settle(name, layer, stored)
        else:
            self._quantise(name, layer, stored)

    def _why_not(self, name: str, rows: int, columns: int) -> str:
        """Why a layer stays whole; "" if it is quantised, or has yet to be tried."""
        format, before = self.keep.base_precision, self._before.get(name)
        if before is not None and not before.format:
            return before.reason
        return why_not(name, rows, columns, format) if format in FORMATS else NOT_QUANTISED

    def _is_ours(self, stored: QuantisedWeight) -> bool:
        """Whether a weight can be taken as it is: its codes may stand for other numbers than ours."""
        try:
            QuantisedLinear.of_weight(stored, None, self.keep.base_precision)
        except ValueError:
            return False
        return True

    def _quantise(self, name: str, layer: nn.Linear, stored: Stored) -> None:
        keep, format = self.keep, FORMATS[self.keep.base_precision]
        weight = whole(stored, _dtype_of(stored), keep.quantise_on, keep.kernels)
        made = quantised(weight, format.op, keep.double_quant, keep.kernels)
        left = sqnr(weight, dequantised(made, torch.float32, keep.kernels))
        if left >= format.weight_floor:  # NaN is no reason to
            self._tell(name, format.name, "", left, weight.shape, made)
            del weight
            self._settle(name, layer, made)
        else:
            del made
            self._tell(name, "", f"below {format.weight_floor:g} dB", left, weight.shape)
            self._put_whole(name, layer, weight)
        self.progress.advance((block_and_rest(name) or (-1, ""))[0])

    def _put_whole(self, name: str, layer: nn.Linear, stored: Stored) -> None:
        """A weight in the run's precision, parked if its block is and it is one of the large ones."""
        place = block_and_rest(f"{name}.weight")
        if place and place[0] in self.keep.parked and not self._is_small(name, shape_of(stored)):
            assert self.keep.park is not None, NOBODY_PARKS
            layer.weight = None
            self.keep.park(*place, whole(stored, self.keep.dtype, HOST, self.keep.kernels))
        else:
            weight = whole(stored, self.keep.dtype, self._device(f"{name}.weight"), self.keep.kernels)
            self._set(layer, "weight", weight)

    @staticmethod
    def _is_small(name: str, shape: tuple[int, ...]) -> bool:
        """What no format would take by its size is not worth a transfer either."""
        return bool(why_not(name, *shape, "int8"))

    def _settle(self, name: str, layer: nn.Linear, weight: QuantisedWeight) -> None:
        """A quantised weight's tensors to the device, or to whoever streams them."""
        keep = self.keep
        block, rest = block_and_rest(name) or (-1, name)
        if self.heard:
            self.heard(block, f"{name}.weight", weight)
        parked = block in keep.parked
        on_device = moved(weight, HOST if parked else self._device(f"{name}."))
        made = QuantisedLinear.of_weight(on_device, None, keep.base_precision, keep.kernels)
        if parked:
            assert keep.park is not None, NOBODY_PARKS
            for part, tensor in made.park().items():
                keep.park(block, f"{rest}.{part}", tensor)
            made.to(self._device(f"{name}."))
        made.bias = layer.bias  # perhaps still without memory: it comes when it comes
        self._replace(name, made)

    def _empty(self, layer: nn.Linear) -> QuantisedLinear:
        """A layer of shapes alone."""
        keep, has_bias = self.keep, layer.bias is not None
        double = keep.double_quant and keep.base_precision == "nf4"
        return QuantisedLinear.empty(
            layer.in_features, layer.out_features, has_bias, keep.base_precision, double, keep.kernels,
            device=keep.device, dtype=keep.dtype,
        )  # fmt: skip

    def _replace(self, name: str, layer: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        setattr(self.module.get_submodule(parent), own, layer)

    def _device(self, name: str) -> torch.device:
        """Where a tensor of this name goes: modules that wait do so on the host."""
        waits = name.startswith(self._waiting) and self.keep.device.type != "meta"
        return HOST if waits else self.keep.device

    @staticmethod
    def _set(layer: nn.Module, leaf: str, tensor: Tensor) -> None:
        is_parameter = leaf in layer._parameters
        setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def _note_source(self, stored: Stored) -> None:
        if not isinstance(stored, Tensor):
            self.came_in.add(op_of(stored))

    def _tell(
        self,
        name: str,
        format: str,
        reason: str,
        left: float | None,
        shape: tuple[int, ...],
        made: Stored | None = None,
    ) -> None:
        keep, numbers = self.keep, math.prod(shape)
        if keep.base_precision not in FORMATS:
            return
        if name in self._before and self._before[name].format == format:
            self.layers[name] = self._before[name]
            return
        after = numbers * keep.dtype.itemsize
        if made is not None:
            known = (made.double, made.blocksize) if isinstance(made, Nf4Weight) else ()
            after = stored_bytes(format, *shape, *known)
        floor = FORMATS[keep.base_precision].weight_floor
        self.layers[name] = LayerReport(name, format, reason, left, floor, 2 * numbers, after)

    def report(self) -> BaseReport:
        """What became of the layers, in the module's order."""
        self.progress.end()
        keep = self.keep
        layers = tuple(sorted(self.layers.values(), key=lambda layer: self._order[layer.name]))
        came = not self.known and layers and any(layer.format and layer.sqnr is None for layer in layers)
        notes = () if self.known else tuple(FROM_FILE.format(each) for each in sorted(self.came_in))
        source = "cache" if self.known else "file" if came else ""
        return BaseReport(keep.base_precision, DTYPE_NAMES[keep.dtype], layers, source, notes)


def _dtype_of(stored: Stored) -> torch.dtype:
    """In which dtype a weight is quantised: its own, float32 where it has none or a wider one."""
    narrow = isinstance(stored, Tensor) and stored.dtype in (torch.bfloat16, torch.float16)
    return stored.dtype if narrow else torch.float32
