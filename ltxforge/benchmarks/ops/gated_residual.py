"""The bench's view of `gated_residual`: alone, with the next norm, and with it modulated twice.

Peers: diffusers' chain, eager and compiled.
"""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_twice
from ltxforge_kernels.gated_residual.inputs import Inputs, inputs
from torch import Tensor

from ltxforge.benchmarks.ops.tokens import learned_of, per_token, shape_of, spread_rows, traffic
from ltxforge.benchmarks.subject import Contender, Outputs, Subject, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

GATE, SHIFT, SCALE, EPS = 2, 3, 4, 1e-6
SECOND_SHIFT, SECOND_SCALE = 0, 1
Prepared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def alone_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """x + a·gate."""

    def ours(given: Inputs, implementation: str) -> Tensor:
        gated = (given.gates, given.gate_index, GATE)
        return gated_residual(given.hidden, given.branch, *gated, implementation=implementation)

    def chain(prepared: Prepared) -> Tensor:
        hidden, branch, learned, gates, _ = prepared
        return hidden + branch * spread_rows(learned, gates)[GATE]

    # Backward: the gradient of x is the one that arrives.
    return _subject(case, ours, chain, traffic(case, 3, 2))


def norm_subject(case: KernelCase, device: torch.device) -> Subject:
    """x' = x + a·gate and the next norm of it, modulated."""
    norm = RMSNorm(case.width, eps=EPS, elementwise_affine=False).to(device)

    def ours(given: Inputs, implementation: str) -> Outputs:
        gated = (given.gates, given.gate_index, GATE)
        modulated = (given.table, given.index, SHIFT, SCALE, EPS)
        return gated_residual_norm(given.hidden, given.branch, *gated, *modulated, implementation=implementation)

    def chain(prepared: Prepared) -> Outputs:
        hidden, branch, learned, gates, table = prepared
        total = hidden + branch * spread_rows(learned, gates)[GATE]
        rows = spread_rows(learned, table)
        return total, norm(total) * (1 + rows[SCALE]) + rows[SHIFT]

    return _subject(case, ours, chain, traffic(case, 4, 5))


def twice_subject(case: KernelCase, device: torch.device) -> Subject:
    """x' = x + a·gate and the next norm of it, modulated once as a query and once as a context."""
    norm = RMSNorm(case.width, eps=EPS, elementwise_affine=False).to(device)

    def ours(given: Inputs, implementation: str) -> Outputs:
        gated = (given.gates, given.gate_index, GATE)
        modulated = (given.table, given.index, (SHIFT, SCALE), (SECOND_SHIFT, SECOND_SCALE), EPS)
        return gated_residual_norm_twice(given.hidden, given.branch, *gated, *modulated, implementation=implementation)

    def chain(prepared: Prepared) -> Outputs:
        hidden, branch, learned, gates, table = prepared
        total = hidden + branch * spread_rows(learned, gates)[GATE]
        rows, normed = spread_rows(learned, table), norm(total)
        query = normed * (1 + rows[SCALE]) + rows[SHIFT]
        return total, query, normed * (1 + rows[SECOND_SCALE]) + rows[SECOND_SHIFT]

    return _subject(case, ours, chain, traffic(case, 5, 6))


def _subject(case: KernelCase, ours: object, chain: object, work: object) -> Subject:
    shape, dtype = shape_of(case), torch_dtype(case.dtype)
    diffusers = Contender(chain, _spread)
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype),
        ours=lambda name: Contender(lambda given: ours(given, name)),
        work=work,
        leaves=("hidden", "branch"),
        peers={"diffusers": lambda: diffusers, "compile per token": lambda: compiled(diffusers)},
    )


def _spread(given: Inputs) -> Prepared:
    gates = per_token(given.gates, given.gate_index, given.hidden)
    table = per_token(given.table, given.index, given.hidden)
    return given.hidden, given.branch, learned_of(given.table), gates, table
