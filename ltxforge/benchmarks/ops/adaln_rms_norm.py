"""The bench's view of `adaln_rms_norm`. Peers: diffusers' own chain with a modulation per token, and Liger's kernel.

The per-token peers get what diffusers gets, [B, T, 6·D] from the timestep's embedding, already made; adding the learned
rows to it and the norm are theirs.
"""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.adaln_rms_norm import adaln_rms_norm
from ltxforge_kernels.adaln_rms_norm.inputs import Inputs, inputs
from torch import Tensor

from ltxforge.benchmarks.ops.tokens import learned_of, per_token, shape_of, spread_rows, traffic
from ltxforge.benchmarks.subject import Contender, PeerMissing, Subject, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

try:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
except ImportError:
    LigerModulatedRMSNormFunction = None

SHIFT, SCALE, EPS = 0, 1, 1e-6


def subject(case: KernelCase, device: torch.device) -> Subject:
    """Two distinct timesteps, tokens drawn among them; frozen rows, as in LoRA training."""
    shape, dtype = shape_of(case), torch_dtype(case.dtype)
    norm = RMSNorm(case.width, eps=EPS, elementwise_affine=False).to(device)

    def ours(implementation: str) -> Contender:
        return Contender(
            lambda given: adaln_rms_norm(
                given.hidden, given.table, given.index, SHIFT, SCALE, EPS, implementation=implementation
            )
        )

    def chain(prepared: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden, learned, embedded = prepared
        rows = spread_rows(learned, embedded)
        return norm(hidden) * (1 + rows[SCALE]) + rows[SHIFT]

    diffusers = Contender(chain, _spread)
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype),
        ours=ours,
        work=traffic(case, 2, 3),
        leaves=("hidden",),
        peers={"diffusers": lambda: diffusers, "compile per token": lambda: compiled(diffusers), "Liger": _liger},
    )


def _spread(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.hidden, learned_of(given.table), per_token(given.table, given.index, given.hidden)


def _liger() -> Contender:
    """Scale and shift of every token, since its rows must repeat evenly; what it says of itself is not assumed."""
    if LigerModulatedRMSNormFunction is None:
        raise PeerMissing("liger_kernel with a modulated RMSNorm is not installed")

    def prepare(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        rows = given.table if given.index is None else given.table[given.index]
        if given.index is None:
            return given.hidden, rows[:, SCALE].contiguous(), rows[:, SHIFT].contiguous()
        flat = rows.flatten(0, 1)
        return given.hidden, flat[:, SCALE].contiguous(), flat[:, SHIFT].contiguous()

    def call(prepared: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden, scale, shift = prepared
        return LigerModulatedRMSNormFunction.apply(hidden, None, scale, shift, EPS, 0.0, "llama", False)

    return Contender(call, prepare)
