"""The bench's view of `nf4`: unpacking a double-quantised weight, and the linear layer over one. Peer: bitsandbytes.

With a LoRA on the layer: PEFT over bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.lora_linear import lora_branch
from ltxforge_kernels.nf4 import dequantise, nf4_linear, quantise
from ltxforge_kernels.nf4.inputs import LinearShape
from ltxforge_kernels.nf4.inputs import inputs as nf4_inputs
from ltxforge_kernels.nf4.weight import Nf4Weight
from torch import Tensor
from torch.nn import functional

from ltxforge.benchmarks.ops.linear import base_alone, peft_over, product_work
from ltxforge.benchmarks.subject import Bounds, Contender, PeerMissing, Subject, Unquantised, Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

try:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
except ImportError:  # not every system has it
    matmul_4bit = QuantState = dequantize_4bit = None

BLOCKSIZE = 64
# Half a byte a code, a byte for each block, four for each 256 blocks.
BYTES_PER_ELEMENT = 0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * 256)


@dataclass(frozen=True)
class Linear:
    """x [.., K], the weight [N, K] as it was and packed, a bias [N]."""

    x: Tensor
    weight: Tensor
    packed: Nf4Weight
    bias: Tensor


def dequantise_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """A weight [N, K] again, to the bit."""
    dtype = torch_dtype(case.dtype)
    elements = case.width * case.out

    def bitsandbytes() -> Contender:
        _require_bitsandbytes()
        return Contender(
            lambda prepared: dequantize_4bit(*prepared), lambda weight: (weight.packed, quant_state(weight))
        )

    return Subject(
        inputs=lambda fill: _packed(_weight(case, fill)),
        ours=lambda name: Contender(lambda weight: dequantise(weight, dtype, implementation=name)),
        work=Work(int(elements * (BYTES_PER_ELEMENT + dtype.itemsize))),
        peers={"bitsandbytes": bitsandbytes},
        bounds=Bounds(exact=True),
    )


def linear_subject(case: KernelCase, device: torch.device) -> Subject:
    """x·Wᵀ + bias over a packed weight; the gradient of x."""
    dtype = torch_dtype(case.dtype)

    def inputs(fill: Filler) -> Linear:
        weight = _weight(case, fill)
        x, bias = fill.normal(case.batch, case.tokens, case.width, dtype=dtype), fill.normal(case.out, dtype=dtype)
        return Linear(x, weight, _packed(weight), bias)

    def ours(implementation: str) -> Contender:
        return Contender(lambda given: nf4_linear(given.x, given.packed, given.bias, implementation=implementation))

    def bitsandbytes() -> Contender:
        _require_bitsandbytes()

        def call(prepared: tuple[Linear, Any]) -> Tensor:
            given, state = prepared
            return matmul_4bit(given.x, given.packed.packed, state, bias=given.bias)

        return Contender(call, lambda given: (given, quant_state(given.packed)))

    def unpacked() -> Contender:
        implementation = "triton" if device.type == "cuda" else "eager"

        def call(given: Linear) -> Tensor:
            whole = dequantise(given.packed, dtype, implementation=implementation)
            return functional.linear(given.x, whole, given.bias)

        return Contender(call)

    return Subject(
        inputs=inputs,
        ours=ours,
        work=product_work(case, weight_bytes=case.width * case.out * BYTES_PER_ELEMENT),
        leaves=("x",),
        peers={
            "bitsandbytes": bitsandbytes,
            "dequantise and cuBLAS": unpacked,
            "base alone": lambda: Contender(base_alone, is_whole=False),
        },
        # The truth multiplies the weight that is stored, which bf16 products see rounded to bf16.
        bounds=Bounds(output=2.6e-3, gradient=2.6e-3),
        unquantised=Unquantised("nf4", base_alone),
    )


@dataclass(frozen=True)
class LoraInputs(Linear):
    """Also a LoRA: A [R, K] and B [N, R], float32 masters, and its scale."""

    a: Tensor
    b: Tensor
    scale: float = 0.5


def lora_subject(case: KernelCase, device: torch.device) -> Subject:
    """x·Wᵀ + bias + scale·B·A·x over a packed weight; gradients of x, A and B."""
    alone, dtype = linear_subject(case, device), torch_dtype(case.dtype)

    def inputs(fill: Filler) -> LoraInputs:
        """A and B hold what they are rounded to at use, so that the truth is of the same LoRA."""
        a, b = fill.normal(case.rank, case.width) * case.width**-0.5, fill.normal(case.out, case.rank)
        return LoraInputs(**vars(alone.inputs(fill)), a=a.to(dtype).float(), b=b.to(dtype).float())

    def ours(implementation: str) -> Contender:
        base = alone.ours(implementation)

        def call(given: LoraInputs) -> Tensor:
            return lora_branch(given.x, base(given), given.a, given.b, given.scale, implementation=implementation)

        return Contender(call)

    def peft() -> Contender:
        _require_bitsandbytes()
        return peft_over(case, PeftLinear4bit, quantised_layer)

    def quantised_layer(given: LoraInputs) -> Any:
        layer = Linear4bit(case.width, case.out, compute_dtype=dtype, quant_type="nf4", device="meta")
        state = quant_state(given.packed)
        layer.weight = Params4bit(given.packed.packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
        layer.quant_state = state
        return layer

    return Subject(
        inputs=inputs,
        ours=ours,
        work=product_work(case, weight_bytes=case.width * case.out * BYTES_PER_ELEMENT),
        leaves=("x", "a", "b"),
        peers={"PEFT and bitsandbytes": peft, "base alone": alone.peers["base alone"]},
        bounds=alone.bounds,
    )


def _require_bitsandbytes() -> None:
    if QuantState is None:
        raise PeerMissing("bitsandbytes is not installed")


def quant_state(weight: Nf4Weight) -> Any:
    """How bitsandbytes says what a packed weight is."""
    nested = QuantState(
        weight.nested_absmax,
        code=weight.nested_quant_map,
        blocksize=weight.nested_blocksize,
        dtype=torch.float32,
    )
    return QuantState(
        weight.absmax,
        shape=torch.Size(weight.shape),
        code=weight.quant_map,
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.nested_offset,
        state2=nested,
    )


def _weight(case: KernelCase, fill: Filler) -> Tensor:
    shape = LinearShape(case.name, 0, case.out, case.width)
    return nf4_inputs(shape, fill, torch_dtype(case.dtype)).weight


def _packed(weight: Tensor) -> Nf4Weight:
    return quantise(weight, BLOCKSIZE, double=True, implementation="eager")
