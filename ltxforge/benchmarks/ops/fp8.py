"""The bench's view of `fp8`: a frozen linear layer whose products are fp8's where the chip has them. Peer: the base."""

from __future__ import annotations

import torch
from ltxforge_kernels.fp8 import fp8_linear
from ltxforge_kernels.fp8.inputs import inputs

from ltxforge.benchmarks.ops.linear import base_alone, product_work
from ltxforge.benchmarks.subject import Bounds, Contender, Subject, Unquantised
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def linear_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """x·Wᵀ + bias, x quantised per token; the gradient of x."""
    dtype = torch_dtype(case.dtype)

    def ours(implementation: str) -> Contender:
        return Contender(lambda given: fp8_linear(given.x, given.quantised, given.bias, implementation=implementation))

    return Subject(
        inputs=lambda fill: inputs(case.batch * case.tokens, case.width, case.out, fill, dtype),
        ours=ours,
        work=product_work(case, "fp8 matmul", weight_bytes=case.width * case.out),
        leaves=("x",),
        peers={"base alone": lambda: Contender(base_alone, is_whole=False)},
        # The product is PyTorch's: how it sums is the chip's, and a gradient may fall beside a rounding.
        bounds=Bounds(output=4e-3, gradient=8e-3, beside_eager=False),
        unquantised=Unquantised("fp8", base_alone),
    )
