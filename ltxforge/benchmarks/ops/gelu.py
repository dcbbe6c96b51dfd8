"""The bench's view of `gelu`. Peer: PyTorch's own, which computes in the dtype of its input on a GPU as we do."""

from __future__ import annotations

import torch
from ltxforge_kernels.gelu import gelu
from ltxforge_kernels.gelu.inputs import inputs
from torch.nn import functional

from ltxforge.benchmarks.ops.tokens import shape_of, traffic
from ltxforge.benchmarks.subject import Contender, Subject
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


def subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """The tanh approximation, between the two layers of a feed-forward."""
    shape, dtype = shape_of(case), torch_dtype(case.dtype)
    return Subject(
        inputs=lambda fill: inputs(shape, fill, dtype),
        ours=lambda name: Contender(lambda given: gelu(given.x, implementation=name)),
        work=traffic(case, 2, 3),
        leaves=("x",),
        peers={"PyTorch": lambda: Contender(lambda given: functional.gelu(given.x, approximate="tanh"))},
    )
