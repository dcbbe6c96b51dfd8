"""Suites of training steps: what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/step.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ltxforge.modalities import has
from ltxforge.model_spec import ModelSpec
from ltxforge.recipe.schema import Count, Fps, Memory, Optimizers, Target
from ltxforge.shapes import ClipShape
from ltxforge.suites.case import Case, Gate, Result
from ltxforge.suites.sizes import EXAMPLES, MODELS, Models, Size, parse_shape

EAGER_PEER, COMPILED_PEER = "diffusers + PEFT", "diffusers + PEFT, compiled"
NF4_PEER = "diffusers + PEFT + bitsandbytes"
PEERS = (EAGER_PEER, COMPILED_PEER)
"""Stock diffusers with PEFT's LoRA and gradient checkpointing, eager, and with its repeated blocks compiled; and over
bitsandbytes' NF4.
"""


class TrainingCase(Case):
    """A training step: which model, on what, and how it is trained."""

    model: Models  # type: ignore[valid-type]
    size: Size
    fps: Fps | None = Field(None, description="Default: the version's.")
    modalities: Literal["video", "audio", "both"] | None = Field(None, description="Default: all the model has.")
    batch_size: Annotated[int, Field(ge=1, le=100_000_000)] = 1
    accumulate: Annotated[int, Field(ge=1, le=1000)] = 1
    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    targets: Annotated[list[Target], Field(min_length=1, max_length=256)] = Field(["attention", "feed_forward"])
    checkpointing: Annotated[int, Field(ge=0, le=1000)] = Field(1, description="0 off, n every n-th block.")
    precision: Literal["bf16", "fp32"] = "bf16"
    base_precision: Literal["bf16", "fp8", "int8", "int8-w8a8", "nf4"] = "bf16"
    double_quant: bool = True
    block_swap: Annotated[int, Field(ge=0, le=1000)] = 0
    group_offload: Literal["block_level", "leaf_level"] | None = None
    blocks_per_group: Annotated[int, Field(ge=1, le=1000)] = 1
    use_stream: bool | None = None
    offload_activations: bool = False
    compile: bool = False
    optimizer: Optimizers = "adamw"
    kernels: Literal["triton", "compile", "eager"] | None = Field(
        None, description="How every op is carried out. Default: as the planner chooses on this machine."
    )
    steps: Count = 20
    warmup_steps: Annotated[int, Field(ge=1, le=1000)] = Field(3, description="Not timed: the first steps set up.")

    known_peers: ClassVar[tuple[str, ...]] = (*PEERS, NF4_PEER)
    examples: ClassVar[dict[str, str]] = EXAMPLES

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return MODELS[self.model]

    @property
    def shape(self) -> ClipShape:
        """`size`, parsed."""
        return parse_shape(self.size)

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.fps or self.spec.default_fps

    @property
    def trained(self) -> str:
        """Which modalities are computed and trained."""
        return self.modalities or ("both" if self.spec.has_audio else "video")

    @property
    def memory(self) -> Memory:
        """As a recipe's [memory] says it."""
        return Memory(
            base_precision=self.base_precision,
            double_quant=self.double_quant if self.base_precision == "nf4" else None,
            checkpointing=self.checkpointing or False,
            block_swap=self.block_swap,
            group_offload=self.group_offload,
            blocks_per_group=self.blocks_per_group,
            use_stream=self.use_stream,
            offload_activations=self.offload_activations,
        )

    def settings(self) -> dict[str, Any]:
        """With the model's defaults."""
        return {**super().settings(), "fps": self.rate, "modalities": self.trained}

    def contradictions(self) -> Iterator[tuple[str, str, str]]:
        """Also: sound from a model that makes none, and peers for one modality of two."""
        yield from super().contradictions()
        if has(self.trained, "audio") and not self.spec.has_audio:
            yield "modalities", f"{self.model} makes no sound", 'write "video", or leave it out'
        elif self.peers and self.spec.has_audio and self.trained != "both":
            yield "peers", "diffusers always computes picture and sound together", "leave `peers` or `modalities` out"


class StepCase(TrainingCase):
    """One training step to measure: its quality first, then its speed."""

    overfit_steps: Annotated[int, Field(ge=0, le=10_000)] = Field(
        200, description="Length of the overfit curve that is compared with the peer's before any timing; 0 is none."
    )


@dataclass(frozen=True)
class PeerStep:
    """What a peer's steps took: as the fields of `StepResult` of the same names."""

    step_seconds: tuple[float, ...]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    launches: int | None = None


@dataclass(frozen=True)
class StepResult(Result):
    """What measuring one step gave.

    `step_seconds` are whole steps, each from one synchronisation with the device to the next; `phase_seconds` the
    medians of their parts, on the device's own clock. `peak_bytes` is of the steps, `build_peak_bytes` of building
    model and adapter before them: "allocated" and "reserved" by PyTorch on the device, "resident" of the process.
    `model_flops` are one step's, see `benchmarks.step.count_flops`; `launches` the kernels that one step starts.
    `gates` were checked before anything was timed; if one is red, nothing was. `peers` are timed in turns with ours;
    `unavailable` says why one was not. `kernels` is how each op was carried out.
    """

    parameters: int | None = None
    trained_parameters: int | None = None
    weights_bytes: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    build_seconds: float | None = None
    build_peak_bytes: dict[str, int] = field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    model_flops: int | None = None
    losses: tuple[float, ...] = ()
    launches: int | None = None
    gates: tuple[Gate, ...] = ()
    peers: dict[str, PeerStep] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """The median step."""
        return {"step": statistics.median(self.step_seconds)} if self.step_seconds else {}

    def faults(self) -> list[str]:
        """A loss that is not finite is told with what to do."""
        if self.outcome != "not finite":
            return super().faults()
        remedy = 'random weights should never give that: try precision = "fp32", and report it'
        return [f"the loss or gradient was NaN or infinite, its seconds would mean nothing; {remedy}"]

    def entry(self) -> dict[str, Any]:
        """With shortest, longest and median step and the fifths at both ends, and the rate at the median."""
        entry = {**super().entry(), **spread(self.step_seconds)}
        for name, peer in self.peers.items():
            entry["peers"][name] |= spread(peer.step_seconds)
        if self.step_seconds:
            rate = None if self.model_flops is None else self.model_flops / entry["step_seconds_median"] / 1e12
            entry["tflops_per_second"] = rate
        return entry


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """`step_seconds_min`, `_p20`, `_median`, `_p80` and `_max`; nothing of nothing."""
    if not seconds:
        return {}
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else list(seconds) * 4
    found = {"min": min(seconds), "p20": fifths[0], "median": statistics.median(seconds), "p80": fifths[-1]}
    return {f"step_seconds_{name}": value for name, value in {**found, "max": max(seconds)}.items()}
