"""A linear layer whose frozen weight is kept in few bits: y = W·x + b, alone or with a LoRA on top.

The stored tensors are buffers, because they are no parameters and nothing may cast them. While a layer is parked they
are None; whoever streams it puts a view of other memory there, of the same dtype and shape, before each use. Computes
nothing itself: products are the ops of ltxforge_kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from ltxforge_kernels import fp8, int8
from ltxforge_kernels.choice import EAGER, HIGHEST_LORA_RANK, Kernels
from ltxforge_kernels.fp8 import Fp8Weight
from ltxforge_kernels.int8 import Int8Weight
from ltxforge_kernels.lora_linear import lora_branch
from ltxforge_kernels.nf4 import dequantise as dequantise_nf4
from ltxforge_kernels.nf4 import nf4_linear
from ltxforge_kernels.nf4.tables import dynamic_map, nf4_map
from ltxforge_kernels.nf4.weight import Nf4Weight
from torch import Tensor, nn

from ltxforge.quant.formats import BLOCKSIZE, FORMATS, NESTED_BLOCKSIZE, stored_tensors
from ltxforge.quant.weights import QuantisedWeight, once, quantised

# A product of the weight made whole, or one in 8 bits of weight and activations.
STORED, IN_8_BITS = "stored", "8 bits"
# What NF4's codes stand for. Every layer has its own few bytes of it, so that each moves alone.
TABLES = {"quant_map": nf4_map, "nested_quant_map": dynamic_map}


class QuantisedLinear(nn.Module):
    """A frozen linear layer in one of `FORMATS`.

    Attributes:
        format, double_quant, blocksize: how the weight is stored; the latter two of "nf4" alone.
        product: `STORED` or `IN_8_BITS`, which only formats that quantise activations have; see `guard.py`.
        kernels: how its op is carried out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: str,
        double: bool = False,
        bias: Tensor | None = None,
        kernels: Kernels = EAGER,
        blocksize: int = BLOCKSIZE,
    ) -> None:
        """A layer without a weight: what is stored is None until `hold`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.op = FORMATS[format].op
        self.format, self.double_quant, self.blocksize = format, double and self.op == "nf4", blocksize
        self.product = IN_8_BITS if FORMATS[format].quantises_activations else STORED
        self.kernels = kernels
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        for name in self.stored_names(format, self.double_quant):
            self.register_buffer(name, None)
        for name in TABLES if self.double_quant else ["quant_map"] if self.op == "nf4" else []:
            self.register_buffer(name, None, persistent=False)

    @staticmethod
    def stored_names(format: str, double: bool = False) -> tuple[str, ...]:
        """The names of the stored tensors: all that a product needs beside bias and constants."""
        return tuple(stored_tensors(format, 1, 1, double))

    @classmethod
    def quantise(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        format: str,
        double: bool = False,
        kernels: Kernels = EAGER,
    ) -> QuantisedLinear:
        """The layer of a weight [N, K] of 16 or 32 bits, on the weight's device; it is read and let go."""
        return cls.of_weight(quantised(weight.detach(), FORMATS[format].op, double, kernels), bias, format, kernels)

    @classmethod
    def of_stored(
        cls,
        stored: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        format: str,
        double: bool = False,
        kernels: Kernels = EAGER,
        blocksize: int = BLOCKSIZE,
    ) -> QuantisedLinear:
        """The layer of a weight that is quantised already.

        Raises:
            ValueError: the tensors are not those of the format and size.
        """
        return cls(in_features, out_features, format, double, bias, kernels, blocksize).hold(stored)

    @classmethod
    def of_weight(
        cls,
        weight: QuantisedWeight,
        bias: Tensor | None,
        format: str,
        kernels: Kernels = EAGER,
    ) -> QuantisedLinear:
        """The layer of a weight of ltxforge_kernels, whose memory it takes over.

        Raises:
            ValueError: the weight is not in this format, or its codes stand for other numbers than bitsandbytes'.
        """
        if not isinstance(weight, Nf4Weight):
            rows, columns = weight.values.shape
            stored = {"values": weight.values, "scale": weight.scale}
            return cls.of_stored(stored, columns, rows, bias, format, False, kernels)
        rows, columns = weight.shape
        stored = {"packed": weight.packed, "absmax": weight.absmax}
        if weight.double:
            size = weight.nested_blocksize
            if size != NESTED_BLOCKSIZE or not torch.equal(weight.nested_quant_map.cpu(), dynamic_map()):
                raise ValueError(f"scales in blocks of {size}, or in codes that stand for other numbers than ours")
            stored |= {"nested_absmax": weight.nested_absmax, "nested_offset": weight.nested_offset}
        return cls.of_stored(stored, columns, rows, bias, format, weight.double, kernels, weight.blocksize)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        format: str,
        double: bool = False,
        kernels: Kernels = EAGER,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> QuantisedLinear:
        """A layer to be filled later, of uninitialised memory on a device ("meta" too); `dtype` is the bias's."""
        zeros = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        layer = cls(in_features, out_features, format, double, zeros, kernels)
        described = stored_tensors(format, out_features, in_features, layer.double_quant)
        return layer.hold(
            {
                name: torch.empty(part.shape, dtype=getattr(torch, part.dtype), device=device)
                for name, part in described.items()
            }
        )

    def hold(self, stored: Mapping[str, Tensor]) -> QuantisedLinear:
        """Take the stored tensors, and constants onto their device.

        Raises:
            ValueError: they are not those of the format and size.
        """
        described = stored_tensors(self.format, self.out_features, self.in_features, self.double_quant, self.blocksize)
        wanted = {name: f"{part.dtype} {list(part.shape)}" for name, part in described.items()}
        found = {name: f"{str(part.dtype)[6:]} {list(part.shape)}" for name, part in stored.items()}
        if found != wanted:
            raise ValueError(f"a weight in {self.format} is stored as {wanted}, not {found}")
        for name, tensor in stored.items():
            self._buffers[name] = tensor
        device = next(iter(stored.values())).device
        self._buffers.update({name: make(device) for name, make in TABLES.items() if name in self._buffers})
        return self

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name; none while the layer is parked."""
        names = self.stored_names(self.format, self.double_quant)
        return {name: part for name in names if (part := self._buffers[name]) is not None}

    def park(self) -> dict[str, Tensor]:
        """Let the stored tensors go, and return them; constants and bias stay."""
        stored = self.stored
        self._buffers.update(dict.fromkeys(stored))
        return stored

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] again, as products see it, in the dtype."""
        implementation = once(self.op, self.kernels, next(iter(self.stored.values())).device)
        if self.op == "nf4":
            return dequantise_nf4(self._nf4(), dtype, implementation=implementation)
        dequantise = int8.dequantise if self.op == "int8" else fp8.dequantise
        return dequantise(self._by_rows(), dtype, implementation=implementation)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features], in x's dtype; differentiable in x."""
        return self.product_of(x, self.bias, self.product, self.kernels.on(self.op, x.shape))

    def product_of(self, x: Tensor, bias: Tensor | None, product: str, implementation: str) -> Tensor:
        """`forward` with this bias, product and implementation."""
        if self.op == "nf4":
            return nf4_linear(x, self._nf4(), None if bias is None else bias.to(x.dtype), implementation=implementation)
        if self.op == "int8":
            linear = int8.w8a8_lora_linear if product == IN_8_BITS else int8.int8_linear
        else:
            linear = fp8.fp8_linear if product == IN_8_BITS else fp8.stored_linear
        return linear(x, self._by_rows(), bias, implementation=implementation)

    def with_lora(self, x: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float) -> Tensor:
        """`forward` plus scale·B·A·dropout(x); differentiable in x, a and b. Arguments as in the op `lora_linear`.

        W8A8 has the LoRA in its own product, so that x is kept in int8; up to the rank that our kernel takes, whatever
        the implementation, because the LoRA then sees x in int8, too.
        """
        if self.op == "int8" and self.product == IN_8_BITS and a.shape[0] <= HIGHEST_LORA_RANK:
            return int8.w8a8_lora_linear(
                x, self._by_rows(), self.bias, a, b, scale, kept, keep, implementation=self.kernels.on("int8", x.shape)
            )
        implementation = self.kernels.on("lora_linear", x.shape)
        return lora_branch(x, self(x), a, b, scale, kept, keep, implementation=implementation)

    def extra_repr(self) -> str:
        double = " double" if self.double_quant else ""
        return f"{self.in_features}, {self.out_features}, {self.format}{double}, product={self.product}"

    def _nf4(self) -> Nf4Weight:
        known = (self.quant_map, self.blocksize, (self.out_features, self.in_features), torch.bfloat16)
        if not self.double_quant:
            return Nf4Weight(self.packed, self.absmax, *known)
        return Nf4Weight(
            self.packed, self.absmax, *known, self.nested_absmax, self.nested_quant_map, self.nested_offset
        )

    def _by_rows(self) -> Int8Weight | Fp8Weight:
        return (Int8Weight if self.op == "int8" else Fp8Weight)(self.values, self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Moves everything, casts the bias alone: the rest is shown as bytes, which no cast touches."""
        held = dict(self._buffers)
        self._buffers.update(dict.fromkeys(held))
        super()._apply(fn, recurse)
        self._buffers.update({name: part if part is None else _as_bytes(part, fn) for name, part in held.items()})
        return self


def _as_bytes(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn of the tensor's bytes, as the same dtype and shape again."""
    return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).reshape(tensor.shape)
