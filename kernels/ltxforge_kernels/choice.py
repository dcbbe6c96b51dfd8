"""Which implementation an op has on a machine, and why: triton, compile or eager.

Pure: it decides from the facts that it is given, looks at nothing itself, and is called where a plan is made, never at
import. Without torch, so that the plan's layer can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Implementation = Literal["triton", "compile", "eager"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

# Ampere: the first with bf16 arithmetic and asynchronous copies, and the oldest that the compile-only tests cover.
OLDEST_CUDA_ARCH = 80
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Attributes:
        device: "cuda", "rocm", "mps" or "cpu".
        arch: compute capability as one number (90 for 9.0) on cuda, "gfx942" and the like on rocm, None elsewhere.
        triton: Triton's version, or None where it is not installed.
        interpreted: whether TRITON_INTERPRET is set: kernels then run in numpy, for tests.
    """

    device: str
    arch: int | str | None = None
    triton: str | None = None
    interpreted: bool = False


@dataclass(frozen=True)
class Choice:
    """One op's implementation and the reason, as a plan prints them."""

    op: str
    implementation: Implementation
    reason: str


class Unavailable(ValueError):
    """A recipe asks for an implementation that this machine cannot run; the message says what is missing."""


def choose(op: str, machine: Machine, dtype: str, override: str | None = None) -> Choice:
    """The implementation of an op.

    Args:
        op: the op's folder name.
        dtype: "bf16", "fp16" or "fp32", what the op's largest tensors hold.
        override: what the recipe asks for, if it does.

    Raises:
        Unavailable: the override cannot run here, or is no implementation.
    """
    if override is not None and override not in IMPLEMENTATIONS:
        raise Unavailable(f"{op} has no implementation {override!r}, only {', '.join(IMPLEMENTATIONS)}")
    obstacles = {"triton": why_no_triton(machine, dtype), "compile": why_no_compile(machine), "eager": None}
    if override is not None:
        if obstacles[override]:
            raise Unavailable(f"{op} cannot be {override} here: {obstacles[override]}")
        return Choice(op, override, "asked for in the recipe")
    if obstacles["triton"]:
        return Choice(op, "eager", obstacles["triton"])
    return Choice(op, "triton", f"Triton {machine.triton} on {arch_name(machine)}")


def why_no_triton(machine: Machine, dtype: str) -> str | None:
    """What stands against our kernels on this machine, or None."""
    if machine.device not in ("cuda", "rocm"):
        return f"our kernels need an NVIDIA or AMD GPU, and this is {machine.device}"
    if machine.triton is None:
        return "Triton is not installed"
    if machine.interpreted:
        return "TRITON_INTERPRET is set, so that Triton runs without the GPU"
    if machine.device == "cuda" and (not isinstance(machine.arch, int) or machine.arch < OLDEST_CUDA_ARCH):
        return f"our kernels start at sm_{OLDEST_CUDA_ARCH}, and this is {arch_name(machine)}"
    if dtype not in DTYPES:
        return f"our kernels hold {', '.join(DTYPES)}, not {dtype}"
    return None


def why_no_compile(machine: Machine) -> str | None:
    """What stands against torch.compile: on a GPU its code is Triton's."""
    if machine.device in ("cuda", "rocm") and machine.triton is None:
        return "torch.compile needs Triton on a GPU, and it is not installed"
    return None


def arch_name(machine: Machine) -> str:
    """`sm_90`, `gfx942`, or the device's kind where there is no more to tell."""
    if isinstance(machine.arch, int):
        return f"sm_{machine.arch}"
    return machine.arch or machine.device
