"""PyTorch's own attention and matrix products, as the bench measures them: what the design of our ops assumes.

Attention by each of its backends; one product at K against K + 64, the premise of augmented-K, and against the formats
with fewer bits. Ours, here, is what PyTorch picks by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ltxforge_kernels.cases import Filler
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltxforge.benchmarks.ceilings import FP8
from ltxforge.benchmarks.ops.linear import product_work
from ltxforge.benchmarks.subject import Bounds, Contender, Subject, Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# In bf16 the backends round the probabilities in between.
LOOSE = Bounds(output=0.02, gradient=0.03, beside_eager=False)


@dataclass(frozen=True)
class Attention:
    """q, k and v [B, H, T, K]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Product:
    """x [M, K] and W [N, K]; the same with 64 more columns."""

    x: Tensor
    weight: Tensor
    wide_x: Tensor
    wide_weight: Tensor


def attention_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Self-attention without a mask."""
    heads = case.width // case.head_width
    shape, dtype = (case.batch, heads, case.tokens, case.head_width), torch_dtype(case.dtype)

    def attend(given: Attention) -> Tensor:
        return functional.scaled_dot_product_attention(given.query, given.key, given.value)

    def by(backend: SDPBackend) -> Contender:
        def call(given: Attention) -> Tensor:
            with sdpa_kernel(backend):
                return attend(given)

        return Contender(call)

    flops = 4 * case.batch * case.tokens**2 * case.width
    ways = {"forward": 1, "both": 3.5}[case.timed]  # backward: five products for the forward's two
    size = case.batch * case.tokens * case.width * dtype.itemsize
    return Subject(
        inputs=lambda fill: Attention(*(fill.normal(*shape, dtype=dtype) for _ in range(3))),
        ours=lambda _: Contender(attend),
        work=Work(4 * size, int(ways * flops), f"{case.dtype} matmul"),
        leaves=("query", "key", "value"),
        peers={name: lambda backend=backend: by(backend) for name, backend in BACKENDS.items()},
        bounds=LOOSE,
    )


def product_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """x·Wᵀ, W as a transformer stores it."""
    dtype = torch_dtype(case.dtype)

    def inputs(fill: Filler) -> Product:
        x = fill.normal(case.tokens, case.width + 64, dtype=dtype)
        weight = (fill.normal(case.out, case.width + 64) * case.width**-0.5).to(dtype)
        return Product(x[:, : case.width].contiguous(), weight[:, : case.width].contiguous(), x, weight)

    return Subject(
        inputs=inputs,
        ours=lambda _: Contender(lambda given: given.x @ given.weight.T),
        work=product_work(case),
        peers={"K + 64": _wider, "int8": _int8, "fp8 rowwise": _fp8},
        bounds=Bounds(output=0.01, beside_eager=False),
    )


def _wider() -> Contender:
    return Contender(lambda given: given.wide_x @ given.wide_weight.T, is_whole=False)


def _int8() -> Contender:
    """The product alone: what quantises its operands is no part of it."""

    def prepare(given: Product) -> tuple[Tensor, Tensor]:
        largest = [each.abs().max().item() / 127 for each in (given.x, given.weight)]
        codes = [
            (each / step).round().to(torch.int8) for each, step in zip((given.x, given.weight), largest, strict=True)
        ]
        return codes[0], codes[1].T

    return Contender(lambda prepared: torch._int_mm(*prepared), prepare, is_whole=False)


def _fp8() -> Contender:
    """The product alone, with a scale per row and column."""

    def prepare(given: Product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scales = [each.float().abs().amax(1, keepdim=True) / FP8 for each in (given.x, given.weight)]
        codes = [
            (each.float() / scale).to(torch.float8_e4m3fn)
            for each, scale in zip((given.x, given.weight), scales, strict=True)
        ]
        return codes[0], codes[1].T, scales[0], scales[1].T

    return Contender(lambda prepared: torch._scaled_mm(*prepared, out_dtype=torch.bfloat16), prepare, is_whole=False)
