"""Suites of VAE encoding: what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/encode.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ltxforge.model_spec import ModelSpec
from ltxforge.shapes import ClipShape
from ltxforge.suites.case import Case, Gate, Result, Timing
from ltxforge.suites.sizes import EXAMPLES, MODELS, Models, Size, parse_shape

OURS = "ltxforge"
WHOLE, CHANNELS_LAST = "diffusers", "diffusers, channels last"
FRAMEWISE, TILED = "diffusers, framewise", "diffusers, tiled"
ANOTHER_FUNCTION = (FRAMEWISE, TILED)
"""They blend overlapping pieces, which is not the latent of the clip: faster or smaller, it is no peer to beat."""


class EncodeCase(Case):
    """One clip through a version's VAE encoder, of random weights."""

    model: Models  # type: ignore[valid-type]
    size: Size
    precision: Literal["bf16", "fp32"] = "bf16"
    kernels: Literal["triton", "compile", "eager"] | None = Field(
        None, description="How convolutions are carried out. Default: as the planner chooses on this machine."
    )
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5
    most_gb: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="The most that ours may take above the weights on a GPU, in units of 1e9 bytes."
    )
    most_seconds: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="The most that our median may be on a GPU."
    )

    known_peers: ClassVar[tuple[str, ...]] = (WHOLE, CHANNELS_LAST, FRAMEWISE, TILED)
    examples: ClassVar[dict[str, str]] = EXAMPLES

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return MODELS[self.model]

    @property
    def shape(self) -> ClipShape:
        """`size`, parsed."""
        return parse_shape(self.size)


@dataclass(frozen=True)
class EncodeResult(Result):
    """What encoding one clip took, by contender: ours and each peer.

    Attributes:
        times: seconds of one clip, from frames on the host to latents on the host.
        peak_bytes: what the device held at most beside the weights; empty where it does not count.
        gates: what was checked first; if one is red, nothing was timed.
        unavailable: peer → why it was not measured.
        deviations: peer that computes another function → how far its latents are from the clip's.
    """

    times: dict[str, Timing] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    unavailable: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    weights_bytes: int | None = None

    def seconds(self) -> dict[str, float]:
        """Our median; a peer that got slower is no fault of ours."""
        return {OURS: self.times[OURS].median} if OURS in self.times else {}

    def missed_floors(self) -> list[str]:
        """Also: more memory or time than the case allows."""
        found, most, longest = super().missed_floors(), self.case.get("most_gb"), self.case.get("most_seconds")
        taken, median = self.peak_bytes.get(OURS, 0) / 1e9, self.seconds().get(OURS, 0.0)
        if most and taken > most:
            found.append(f"takes {taken:.2f} GB above the weights, more than {most:g}")
        if longest and median > longest:
            found.append(f"takes {median:.3f} s, more than {longest:g}")
        return found

    def entry(self) -> dict[str, Any]:
        """With frames per second."""
        frames = parse_shape(self.case["size"]).frames
        return {
            **super().entry(),
            "frames_per_second": {name: frames / each.median for name, each in self.times.items()},
        }
