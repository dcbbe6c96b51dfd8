"""Suites of training under a memory cap: what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ltxforge.suites.case import Result
from ltxforge.suites.step import StepCase


class MemoryCase(StepCase):
    """A training step on a card of `cap_gb`: it must fit, or the case is red."""

    cap_gb: Annotated[float, Field(gt=0, le=1000)] = Field(description="GiB that a card of this kind is sold with.")
    steps: Annotated[int, Field(ge=1, le=1000)] = 3


@dataclass(frozen=True)
class MemoryResult(Result):
    """What the steps took under the cap: peaks and medians by implementation or peer."""

    cap_bytes: int | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Every median."""
        return self.medians
