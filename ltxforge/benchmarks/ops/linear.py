"""What the linear layers of the bench share: work of their products, and LoRA as others write it.

Peers get A and B in the dtype of x, which is the fastest that they are run with; ours round float32 masters at use.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.func import functional_call
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


def peft_linear(case: KernelCase, device: torch.device) -> Contender:
    """PEFT's own layer over the same weights, without dropout."""
    dtype = torch_dtype(case.dtype)
    base = nn.Linear(case.width, case.out, bias=True, device=device, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank)
    layer = PeftLinear(base, "default", config, r=case.rank, lora_alpha=case.rank).to(device, dtype)

    def prepare(given: Any) -> tuple[Any, Tensor]:
        layer.scaling["default"] = given.scale
        return given, given.weight.contiguous()

    def call(prepared: tuple[Any, Tensor]) -> Tensor:
        given, weight = prepared
        parameters = {
            "base_layer.weight": weight,
            "base_layer.bias": given.bias,
            "lora_A.default.weight": given.a.to(given.x.dtype),
            "lora_B.default.weight": given.b.to(given.x.dtype),
        }
        return functional_call(layer, parameters, (given.x,))

    return Contender(call, prepare)


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


def addmm_per_projection() -> Contender:
    """`AddmmLora` over contiguous weights."""

    def call(prepared: tuple[Any, Tensor]) -> Tensor:
        given, weight = prepared
        dtype = given.x.dtype
        return AddmmLora.apply(given.x, weight, given.bias, given.a.to(dtype), given.b.to(dtype), given.scale)

    return Contender(call, lambda given: (given, given.weight.contiguous()))
