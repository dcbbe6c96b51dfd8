"""Which implementation an op has on a machine, and why: triton, compile or eager.

Pure: it decides from the facts that it is given and a committed table of measurements, looks at nothing itself, and is
called where a plan is made, never at import. Without torch, so that the plan's layer can use it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from ltxforge_kernels import profiles

Implementation = Literal["triton", "compile", "eager"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

# In the order in which a sample meets them: encoding, the step's noise, the blocks.
OPS = ("causal_conv3d", "flow_matching", "adaln_rms_norm", "gated_residual", "qk_norm_rope", "gelu", "lora_linear")
# Of quantised base weights: a run has one of them at most.
QUANTISED_OPS = ("nf4", "int8", "fp8")

# What our kernels are configured for: the tests compile every one of them for each of these. Ampere is the first with
# bf16 arithmetic and asynchronous copies.
CHIPS: tuple[int | str, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
# Chips that take another one's configurations: the same generation, with as much shared memory at least.
LIKE: dict[int | str, int | str] = {87: 86, 103: 100, 121: 120}
HIGHEST_LORA_RANK = 256
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Attributes:
        device: "cuda", "rocm", "mps" or "cpu".
        arch: compute capability as one number (90 for 9.0) on cuda, "gfx942" and the like on rocm, None elsewhere.
        triton: Triton's version, or None where it is not installed.
        interpreted: whether TRITON_INTERPRET is set: kernels then run in numpy, for tests.
        triton_lacks: what Triton needs besides itself and does not find here, in words; "" if nothing.
        compile_lacks: the same of torch.compile.
    """

    device: str
    arch: int | str | None = None
    triton: str | None = None
    interpreted: bool = False
    triton_lacks: str = ""
    compile_lacks: str = ""


@dataclass(frozen=True)
class TokenRange:
    """Tensors of `least` to `most` tokens (None: without end) and this width have another implementation.

    Tokens are all rows of a tensor: T of each sample, times the samples of a micro-batch; of a convolution the pixels
    that it reads, whose channels are the width. `source` names the measurement.
    """

    least: int
    most: int | None
    width: int
    implementation: Implementation
    source: str

    def holds(self, tokens: int | None, width: int | None) -> bool:
        """Whether a tensor is one of these. One of unknown width counts as one, of unknown tokens only if all are."""
        if tokens is None:
            return width == self.width and (self.least, self.most) == (0, None)
        return self.least <= tokens and (self.most is None or tokens <= self.most) and width in (None, self.width)


@dataclass(frozen=True)
class Choice:
    """One op's implementation and the reason, as a plan prints them; where another one was measured to be faster."""

    op: str
    implementation: Implementation
    reason: str
    exceptions: tuple[TokenRange, ...] = ()

    @property
    def implementations(self) -> frozenset[Implementation]:
        """All that the op may run as, exceptions included."""
        return frozenset((self.implementation, *(each.implementation for each in self.exceptions)))

    def of(self, tokens: int | None = None, width: int | None = None) -> Implementation:
        """The implementation for a tensor, by what is told of it."""
        for exception in self.exceptions:
            if exception.holds(tokens, width):
                return exception.implementation
        return self.implementation


@dataclass(frozen=True)
class Kernels:
    """The choices of a run, as forwards ask for them. An op that is not among them is eager."""

    choices: tuple[Choice, ...] = ()

    def of(self, op: str, tokens: int | None = None, width: int | None = None) -> Implementation:
        """The implementation of an op, for a tensor of this many tokens (B·T) and this width where they are told.

        Raises:
            KeyError: there is no such op.
        """
        return self.choice(op).of(tokens, width)

    def choice(self, op: str) -> Choice:
        """What was chosen for an op.

        Raises:
            KeyError: there is no such op.
        """
        for choice in self.choices:
            if choice.op == op:
                return choice
        if op not in OPS and op not in QUANTISED_OPS:
            raise KeyError(f"there is no op {op!r}, only {', '.join((*OPS, *QUANTISED_OPS))}")
        return Choice(op, "eager", "not chosen")

    def on(self, op: str, shape: Sequence[int]) -> Implementation:
        """The implementation of an op for a tensor of this shape, [..., width]."""
        *rows, width = shape
        return self.of(op, prod(rows), width)


EAGER = Kernels()


def everything(implementation: Implementation) -> Kernels:
    """Every op the same way, asked for and not chosen: for tests and the bench."""
    return Kernels(tuple(Choice(op, implementation, "asked for") for op in (*OPS, *QUANTISED_OPS)))


class Unavailable(ValueError):
    """A recipe asks for an implementation that this machine cannot run; the message says what is missing."""


def choose(
    op: str,
    machine: Machine,
    dtype: str,
    override: str | None = None,
    widths: Collection[int] | None = None,
    measured: Iterable[profiles.Measured] = profiles.TABLE,
    rank: int = 0,
) -> Choice:
    """The implementation of an op.

    Args:
        op: the op's folder name.
        dtype: "bf16", "fp16" or "fp32", what the op's largest tensors hold.
        override: what the recipe asks for, if it does; it holds for every shape, whatever was measured.
        widths: the tensors' widths that a run has; by default all that were measured.
        rank: of the LoRA, for an op that has one.

    Raises:
        Unavailable: the override cannot run here, or is no implementation.
    """
    if override is not None and override not in IMPLEMENTATIONS:
        raise Unavailable(f"{op} has no implementation {override!r}, only {', '.join(IMPLEMENTATIONS)}")
    if override is not None:
        if obstacle := why_not(override, machine, dtype, rank):
            raise Unavailable(f"{op} cannot be {override} here: {obstacle}")
        return Choice(op, override, "asked for in the recipe")
    if obstacle := why_not("triton", machine, dtype, rank):
        return Choice(op, "eager", obstacle)
    rows = [
        row for row in profiles.of_machine(op, machine.arch, dtype, measured) if widths is None or row.width in widths
    ]
    return _measured(op, f"Triton {machine.triton} on {arch_name(machine)}", rows, widths)


def _measured(op: str, reason: str, rows: list[profiles.Measured], widths: Collection[int] | None) -> Choice:
    """triton with the exceptions that were measured, or the one that is the fastest everywhere."""
    winners = {row.implementation for row in rows}
    all_widths_measured = {row.width for row in rows} >= set(widths or ())
    if len(winners) == 1 and "triton" not in winners and all_widths_measured:
        (winner,) = winners
        return Choice(op, winner, f"the fastest at every size that was measured ({_sources(rows)})")
    slower = [row for row in rows if row.implementation != "triton"]
    exceptions = tuple(TokenRange(row.least, row.most, row.width, row.implementation, row.source) for row in slower)
    return Choice(op, "triton", reason, exceptions)


def _sources(rows: Iterable[profiles.Measured]) -> str:
    return ", ".join(sorted({row.source for row in rows}))


def why_not(implementation: str, machine: Machine, dtype: str, rank: int = 0) -> str | None:
    """What stands against an implementation on this machine, or None; `rank` for an op that has a LoRA."""
    if implementation == "triton":
        return why_no_triton(machine, dtype, rank)
    return why_no_compile(machine) if implementation == "compile" else None


def why_no_triton(machine: Machine, dtype: str, rank: int = 0) -> str | None:
    """What stands against our kernels on this machine, or None."""
    if machine.device not in ("cuda", "rocm"):
        return f"our kernels need an NVIDIA or AMD GPU, and this is {machine.device}"
    if machine.triton is None:
        return "Triton is not installed"
    if machine.triton_lacks:
        return f"Triton needs {machine.triton_lacks}"
    if machine.interpreted:
        return "TRITON_INTERPRET is set, so that Triton runs without the GPU"
    if machine.arch not in CHIPS and machine.arch not in LIKE:
        chips = ", ".join(chip_name(chip) for chip in (*CHIPS, *LIKE))
        return f"our kernels are configured for {chips}, and this is {arch_name(machine)}"
    if dtype not in DTYPES:
        return f"our kernels hold {', '.join(DTYPES)}, not {dtype}"
    if rank > HIGHEST_LORA_RANK:
        return f"our kernel takes a rank of {HIGHEST_LORA_RANK} at most, and this is {rank}"
    return None


def why_no_compile(machine: Machine) -> str | None:
    """What stands against torch.compile: on a GPU its code is Triton's, elsewhere C++."""
    if machine.device not in ("cuda", "rocm"):
        return f"torch.compile needs {machine.compile_lacks}" if machine.compile_lacks else None
    if machine.triton is None:
        return "torch.compile needs Triton on a GPU, and it is not installed"
    return f"torch.compile needs Triton, which needs {machine.triton_lacks}" if machine.triton_lacks else None


def arch_name(machine: Machine) -> str:
    """`sm_90`, `gfx942`, or the device's kind where there is no more to tell."""
    return machine.device if machine.arch is None else chip_name(machine.arch)


def chip_name(arch: int | str) -> str:
    """`sm_90` for 90; AMD's names are names already."""
    return f"sm_{arch}" if isinstance(arch, int) else arch
