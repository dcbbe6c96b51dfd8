"""Three implementations behind one call: eager (the reference), compile (torch.compile of it) and triton (our launch).

It carries a choice out and makes none.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch

from ltxforge_kernels.choice import IMPLEMENTATIONS

HAS_TRITON = importlib.util.find_spec("triton") is not None

# A model calls one reference with every shape that its layers have; PyTorch would give up at the ninth.
MOST_SHAPES = 256

Function = TypeVar("Function", bound=Callable)


@functools.cache
def compiled(reference: Function) -> Function:
    """torch.compile of a reference, one per process; it compiles when it is first called, again for new shapes."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # since torch 2.13
        return torch.compile(reference, fullgraph=True, recompile_limit=MOST_SHAPES)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    return torch.compile(reference, fullgraph=True)


def pick(implementation: str, reference: Function, launch: Callable | None) -> Function:
    """The function that carries an implementation out.

    Raises:
        RuntimeError: triton was chosen where it is not installed; a plan never does.
    """
    if implementation == "eager":
        return reference
    if implementation == "compile":
        # Within something that is compiled as a whole it is compiled with that.
        return reference if torch.compiler.is_compiling() else compiled(reference)
    if implementation != "triton":
        raise ValueError(f"{implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if launch is None:
        raise RuntimeError("this implementation needs Triton, which is not installed")
    return launch
