"""Suites of VAE encoding: what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/encode.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ltxforge.model_spec import ModelSpec
from ltxforge.shapes import ClipShape
from ltxforge.suites.case import Case, Result
from ltxforge.suites.sizes import EXAMPLES, MODELS, Models, Size, parse_shape


class EncodeCase(Case):
    """One clip through a version's VAE encoder, of random weights."""

    model: Models  # type: ignore[valid-type]
    size: Size
    precision: Literal["bf16", "fp32"] = "bf16"
    chunk: Annotated[int, Field(ge=8, le=10_000, multiple_of=8)] | None = Field(
        None, description="Frames at a time. Default: what the encoder itself takes."
    )
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5

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
    """What encoding one clip took: medians and peaks above the weights by implementation or peer."""

    medians: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Every median."""
        return self.medians
