"""What the linear layers of the bench share: work of their products, and LoRA as others write it.

Peers train A and B in the dtype of x, which is the fastest that they are run with: no cast is timed of them. Ours round
float32 masters at use, which is part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional

from ltxforge.benchmarks.subject import Contender, Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def product_work(case: KernelCase, ceiling: str = "", *, weight_bytes: float | None = None) -> Work:
    """Of x·Wᵀ and, both ways, ∂/∂x; with the LoRA's products where there is a rank."""
    rows, width, out, rank = case.batch * case.tokens, case.width, case.out, case.rank or 0
    size = torch_dtype(case.dtype).itemsize
    base, branch = 2 * rows * width * out, 2 * rows * rank * (width + out)
    ways = {"forward": 1, "backward": 1, "both": 2}[case.timed]
    flops = ways * base + branch * {"forward": 1, "backward": 2, "both": 3}[case.timed]
    stored = width * out * size if weight_bytes is None else int(weight_bytes)
    return Work(ways * (rows * (width + out) * size + stored), flops, ceiling or f"{case.dtype} matmul")


def base_alone(given: Any) -> Tensor:
    """The frozen layer by PyTorch, without a LoRA: the floor of every LoRA layer."""
    return functional.linear(given.x, given.weight, given.bias)


def peft_linear(case: KernelCase) -> Contender:
    """PEFT's own layer over the same weights, without dropout: one for each set of inputs, made beforehand."""

    def base(given: Any) -> nn.Module:
        layer = nn.Linear(case.width, case.out, bias=True, device="meta", dtype=given.x.dtype)
        layer.weight = nn.Parameter(given.weight.contiguous(), requires_grad=False)
        return layer

    return peft_over(case, PeftLinear, base)


def peft_over(case: KernelCase, kind: Callable[..., Any], base_of: Callable[[Any], nn.Module]) -> Contender:
    """A layer of PEFT's over what a set of inputs makes a base layer of; A, B and the bias are the set's."""
    config = LoraConfig(r=case.rank, lora_alpha=case.rank)

    def prepare(given: Any) -> tuple[nn.Module, Tensor]:
        base = base_of(given)
        base.bias = nn.Parameter(given.bias, requires_grad=False)
        layer = kind(base, "default", config, r=case.rank, lora_alpha=case.rank)
        layer.scaling["default"] = given.scale
        layer.lora_A["default"].weight = nn.Parameter(in_dtype_of_x(given.a, given))
        layer.lora_B["default"].weight = nn.Parameter(in_dtype_of_x(given.b, given))
        return layer, given.x

    def wanted(prepared: tuple[nn.Module, Tensor]) -> tuple[Tensor, ...]:
        layer, x = prepared
        return x, layer.lora_A["default"].weight, layer.lora_B["default"].weight

    return Contender(lambda prepared: prepared[0](prepared[1]), prepare, wanted=wanted)


def in_dtype_of_x(master: Tensor, given: Any) -> Tensor:
    """A or B as a peer holds it: a leaf of its own."""
    return master.detach().to(given.x.dtype)


class AddmmLora(torch.autograd.Function):
    """base + scale·(x·Aᵀ)·Bᵀ, the branch added in place by one `addmm_`: how hand-written trainers do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return functional.linear(x, weight, bias).addmm_(x @ a.T, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        through_b = upstream @ b
        of_x = (upstream @ weight).addmm_(through_b, a, alpha=ctx.scale)
        of_a = ctx.scale * (through_b.T @ x)
        of_b = ctx.scale * (upstream.T @ (x @ a.T))
        return of_x, None, None, of_a, of_b, None


@dataclass(frozen=True)
class Prepared:
    """What `AddmmLora` takes, contiguous and in one dtype; A and B are leaves."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    scale: float


def addmm_per_projection() -> Contender:
    """`AddmmLora` over contiguous weights."""

    def prepare(given: Any) -> Prepared:
        a, b = (in_dtype_of_x(each, given).requires_grad_() for each in (given.a, given.b))
        return Prepared(given.x, given.weight.contiguous(), given.bias, a, b, given.scale)

    def call(made: Prepared) -> Tensor:
        return AddmmLora.apply(made.x, made.weight, made.bias, made.a, made.b, made.scale)

    return Contender(call, prepare, wanted=lambda made: (made.x, made.a, made.b))
