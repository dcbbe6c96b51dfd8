"""Suites of single ops: which ops the bench knows, what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/kernels.py`; how an op is called and by what it is judged, in `benchmarks/ops/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from ltxforge.suites.case import Case, Gate, Result, Timing

Timed = Literal["forward", "backward", "both"]
Side = Annotated[int, Field(ge=1, le=10_000_000)]
Implementation = Literal["triton", "compile", "eager"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


@dataclass(frozen=True)
class Op:
    """What a case of an op must say, and against what it may be measured besides its own implementations."""

    needs: tuple[str, ...]
    peers: tuple[str, ...] = ()
    timed: tuple[Timed, ...] = ("forward",)


BOTH_WAYS: tuple[Timed, ...] = ("forward", "backward", "both")
LINEAR = ("tokens", "width", "out")
CONVOLUTIONS = ("cuDNN NCDHW", "cuDNN NDHWC", "cuDNN NDHWC, benchmark", "torch.compile")
OPS = {
    "flow_matching_noise": Op(("tokens", "width")),
    "flow_matching_loss": Op(("tokens", "width"), timed=("forward", "both")),
    "flow_matching_noise_and_loss": Op(("tokens", "width"), timed=("forward", "both")),
    "adaln_rms_norm": Op(("tokens", "width"), ("diffusers", "compile per token", "Liger"), BOTH_WAYS),
    "gated_residual": Op(("tokens", "width"), ("diffusers", "compile per token"), BOTH_WAYS),
    "gated_residual_norm": Op(("tokens", "width"), ("diffusers", "compile per token"), BOTH_WAYS),
    "gated_residual_norm_twice": Op(("tokens", "width"), ("diffusers", "compile per token"), BOTH_WAYS),
    "qk_norm_rope": Op(("tokens", "width", "head_width", "layout"), ("diffusers", "compile diffusers"), BOTH_WAYS),
    "gelu": Op(("tokens", "width"), ("PyTorch",), BOTH_WAYS),
    "lora_linear": Op(
        (*LINEAR, "rank"), ("base alone", "PEFT", "PEFT compiled", "addmm per projection"), ("forward", "both")
    ),
    "nf4_dequantise": Op(("width", "out"), ("bitsandbytes",)),
    "nf4_linear": Op(LINEAR, ("bitsandbytes", "dequantise and cuBLAS", "base alone"), ("forward", "both")),
    "nf4_lora": Op((*LINEAR, "rank"), ("PEFT and bitsandbytes", "base alone"), ("forward", "both")),
    "int8_dequantise": Op(("width", "out")),
    "int8_linear": Op(LINEAR, ("base alone",), ("forward", "both")),
    "int8_w8a8": Op(
        (*LINEAR, "rank"),
        ("base alone", "_int_mm and rescale", "_scaled_mm rowwise", "addmm per projection"),
        ("forward", "both"),
    ),
    "fp8_linear": Op(LINEAR, ("base alone",), ("forward", "both")),
    "causal_conv3d": Op(("width", "out", "extent"), (*CONVOLUTIONS, "three conv2d")),
    "causal_conv3d_activated": Op(("width", "out", "extent"), CONVOLUTIONS),
    "attention": Op(
        ("tokens", "width", "head_width"), ("math", "efficient", "flash", "cudnn"), ("forward", "both")
    ),
    "matmul": Op(LINEAR, ("K + 64", "int8", "fp8 rowwise")),
}  # fmt: skip
"""The ops that the bench can measure. The last two are PyTorch's own: what our designs assume of it."""
Ops = Literal[tuple(OPS)]  # type: ignore[valid-type]


class KernelCase(Case):
    """One op at one shape."""

    op: Ops  # type: ignore[valid-type]
    timed: Timed = "forward"
    implementations: Annotated[list[Implementation], Field(min_length=1, max_length=3)] = Field(
        [*IMPLEMENTATIONS], description="Of ours; triton is left out where it cannot run."
    )
    device: Literal["gpu", "cpu"] = Field("gpu", description="Where the case is measured; elsewhere it is skipped.")
    dtype: Literal["bf16", "fp32"] = "bf16"
    batch: Side = 1
    tokens: Side | None = Field(None, description="T, of each sample.")
    width: Side | None = Field(None, description="D, or K of a matrix, or the channels that a convolution reads.")
    out: Side | None = Field(None, description="N of a matrix, or the channels that a convolution writes.")
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    head_width: Side | None = None
    layout: Literal["interleaved", "split"] | None = None
    extent: Annotated[list[Side], Field(min_length=3, max_length=3)] | None = Field(
        None, description="Frames, height, width of what a convolution reads."
    )
    rounds: Annotated[int, Field(ge=3, le=10_000)] = Field(40, description="Calls of each that are timed.")

    examples: ClassVar[dict[str, str]] = {
        "name": 'for example name = "adaln-forward-4096"',
        "op": 'for example op = "adaln_rms_norm"',
    }

    @property
    def rows(self) -> int | None:
        """T of each sample; of a convolution the pixels that it reads."""
        return prod(self.extent) if self.extent else self.tokens

    @property
    def known_to(self) -> Op:
        """What the op is to the bench."""
        return OPS[self.op]

    def contradictions(self) -> Iterator[tuple[str, str, str]]:
        """Also: a shape that lacks what the op needs, or says more than it has; what the op does not do."""
        op = self.known_to
        for peer in self.peers:
            if peer not in op.peers:
                yield "peers", f'{self.op} has no peer "{peer}"', f"legal here: {', '.join(op.peers) or 'none'}"
        for peer in self.floors:
            if peer not in (*self.implementations, *self.peers):
                yield "floors", f'"{peer}" has a floor and is not measured', "add it to `peers`"
        if self.timed not in op.timed:
            yield "timed", f"{self.op} has no {self.timed} of its own", f"legal here: {', '.join(op.timed)}"
        for key in ("tokens", "width", "out", "rank", "head_width", "layout", "extent"):
            if (getattr(self, key) is None) != (key not in op.needs):
                told = f"{self.op} needs `{key}`" if key in op.needs else f"{self.op} has no `{key}`"
                yield (key if key not in op.needs else "op"), told, f"it needs {', '.join(op.needs)}"


@dataclass(frozen=True)
class KernelResult(Result):
    """What measuring one op at one shape gave.

    Attributes:
        arch: "sm_90" and the like; "cpu".
        tokens: T of each sample; of a convolution the pixels that it reads.
        width: D, or K of a matrix, or the channels that a convolution reads.
        ours: the implementation that `ratios` are about: triton where it runs.
        times: implementation or peer → its times; `medians` the same, medians alone.
        gates: what was checked first. If one is red, nothing was timed.
        unavailable: peer or implementation → why it was not measured.
        bytes_moved, flops: of one call, the least that the op's definition allows.
        shares: ours against what this machine reached in the same run: "copy bandwidth", "bf16 matmul" and the like.
    """

    op: str = ""
    arch: str = ""
    dtype: str = ""
    tokens: int | None = None
    width: int | None = None
    ours: str = ""
    medians: dict[str, float] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    unavailable: dict[str, str] = field(default_factory=dict)
    bytes_moved: int | None = None
    flops: int | None = None
    shares: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Medians of ours; a peer that got slower is no fault of ours."""
        return {name: self.medians[name] for name in IMPLEMENTATIONS if name in self.medians}

    def entry(self) -> dict[str, Any]:
        """With the rates at the median."""
        median = self.medians.get(self.ours)
        rates = {}
        if median:
            rates = {
                "terabytes_per_second": self.bytes_moved / median / 1e12 if self.bytes_moved else None,
                "tflops_per_second": self.flops / median / 1e12 if self.flops else None,
            }
        return {**super().entry(), **rates}
