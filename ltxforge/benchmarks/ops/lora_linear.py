"""The bench's view of `lora_linear` over a bf16 base: augmented-K. Peers: PEFT, hand-written LoRA, the base alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.lora_linear import lora_linear
from ltxforge_kernels.lora_linear.inputs import Inputs, LayerShape, inputs

from ltxforge.benchmarks.ops.linear import addmm_per_projection, base_alone, peft_linear, product_work
from ltxforge.benchmarks.subject import Contender, Subject, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Without dropout and activation; gradients of x, A and B."""
    shape, dtype = LayerShape(case.name, case.tokens, case.width, case.out, case.rank), torch_dtype(case.dtype)
    leading = (case.batch, case.tokens) if case.batch > 1 else None

    def ours(given: Inputs, implementation: str) -> torch.Tensor:
        return lora_linear(*given.layer, implementation=implementation)

    def made(fill: Filler) -> Inputs:
        """A and B hold what they are rounded to at use, so that the truth is of the same LoRA."""
        given = inputs(shape, fill, dtype, augmented=True, leading=leading)
        return replace(given, a=given.a.to(dtype).float(), b=given.b.to(dtype).float())

    def alone() -> Contender:
        """W contiguous, as without a LoRA, and not a view of [W | B]."""
        return Contender(base_alone, lambda given: replace(given, weight=given.weight.contiguous()), is_whole=False)

    return Subject(
        inputs=made,
        ours=lambda name: Contender(lambda given: ours(given, name)),
        work=product_work(case),
        leaves=("x", "a", "b"),
        peers={
            "base alone": alone,
            "PEFT": lambda: peft_linear(case),
            "PEFT compiled": lambda: compiled(peft_linear(case)),
            "addmm per projection": addmm_per_projection,
        },
    )
