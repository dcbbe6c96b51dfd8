"""The bench's view of `flow_matching`: noising, and the masked velocity loss with its gradient. No peers."""

from __future__ import annotations

from dataclasses import replace

import torch
from ltxforge_kernels.cases import TokenShape
from ltxforge_kernels.flow_matching import noise, velocity_loss
from ltxforge_kernels.flow_matching.inputs import Inputs, inputs

from ltxforge.benchmarks.subject import Bounds, Contender, Subject, Work
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def noise_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Noised tokens in the model's dtype, from float32 latents and draws."""
    shape, dtype = _shape(case), torch_dtype(case.dtype)

    def call(given: Inputs, implementation: str) -> torch.Tensor:
        return noise(given.latents, given.draws, given.sigma, dtype, implementation=implementation)

    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype),
        ours=lambda name: Contender(lambda given: call(given, name)),
        work=Work(_elements(shape) * (8 + dtype.itemsize)),
        bounds=Bounds(exact=True),
    )


def loss_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """The loss of each sample; both ways also its gradient, which the forward pass prepares."""
    shape, dtype = _shape(case), torch_dtype(case.dtype)

    def call(given: Inputs, implementation: str) -> torch.Tensor:
        return velocity_loss(given.prediction, given.latents, given.draws, given.weight, implementation=implementation)

    each = 8 + dtype.itemsize + (4 + 4 + dtype.itemsize if case.timed == "both" else 0)
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype),
        ours=lambda name: Contender(lambda given: call(given, name)),
        work=Work(_elements(shape) * each),
        leaves=("prediction",),
    )


def noise_and_loss_subject(case: KernelCase, device: torch.device) -> Subject:
    """What a step does of both: noised tokens before its model, and the loss of what that gives. Told is the loss."""
    noising, losing = noise_subject(case, device), loss_subject(case, device)

    def ours(implementation: str) -> Contender:
        before, after = noising.ours(implementation), losing.ours(implementation)
        return Contender(lambda given: (before(given), after(given))[1])

    return replace(losing, ours=ours, work=Work(noising.work.bytes_moved + losing.work.bytes_moved))


def _shape(case: KernelCase) -> TokenShape:
    return TokenShape(case.name, case.batch, case.tokens, case.width)


def _elements(shape: TokenShape) -> int:
    return shape.batch * shape.tokens * shape.width
