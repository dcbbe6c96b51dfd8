"""The bench's view of `qk_norm_rope`: the pair of a self-attention. Peers: diffusers' chain over full tables.

The tables are made beforehand for everyone, ours along the axes, theirs for every token.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from ltxforge_kernels.qk_norm_rope import qk_norm_rope
from ltxforge_kernels.qk_norm_rope.inputs import Inputs, inputs
from torch import Tensor
from torch.nn import functional

from ltxforge.benchmarks.ops.tokens import shape_of, traffic
from ltxforge.benchmarks.subject import Contender, Outputs, Subject, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase

EPS = 1e-6
Prepared = tuple[Inputs, tuple[Tensor, Tensor]]


def subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Queries and keys of the same tokens, with the same tables; the norms' weights are frozen."""
    shape, dtype, heads = shape_of(case), torch_dtype(case.dtype), case.width // case.head_width
    rotate = apply_rotary_emb if case.layout == "interleaved" else apply_split_rotary_emb

    def ours(implementation: str) -> Contender:
        def call(given: Inputs) -> Outputs:
            sides = (given.query, given.key, given.query_weight, given.key_weight, given.query_rope, given.key_rope)
            return qk_norm_rope(*sides, given.heads, EPS, implementation=implementation)

        return Contender(call)

    def chain(prepared: Prepared) -> Outputs:
        given, tables = prepared
        query = functional.rms_norm(given.query, given.query.shape[2:], given.query_weight, EPS)
        key = functional.rms_norm(given.key, given.key.shape[2:], given.key_weight, EPS)
        return rotate(query, tables), rotate(key, tables)

    diffusers = Contender(chain, lambda given: (given, given.query_rope.full))
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype, heads=heads, layout=case.layout),
        ours=ours,
        work=traffic(case, 4, 6),
        leaves=("query", "key"),
        peers={"diffusers": lambda: diffusers, "compile diffusers": lambda: compiled(diffusers)},
    )
