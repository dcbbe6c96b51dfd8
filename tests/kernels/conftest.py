"""Kernels run in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0; every fresh tensor is full of NaN.

`tests/conftest.py` sets TRITON_INTERPRET before anything can import Triton, which reads it when kernels are defined.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# On a GPU, deterministic matrix products want it before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    import interpreter_repair

    interpreter_repair.install()


@pytest.fixture
def device() -> str:
    """Where kernels run in this process."""
    if triton.knobs.runtime.interpret:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 runs the kernels on a GPU, and there is none")
    return "cuda"


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers), so that an element which no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
