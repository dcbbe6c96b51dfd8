"""Suites of training under a memory cap: what a case may say, and what measuring it gave. Torch-free.

A case becomes numbers in `benchmarks/memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from ltxforge.suites.case import Result
from ltxforge.suites.step import NF4_PEER, PEERS, TrainingCase

OURS = "ltxforge"
RESIDENT = "ltxforge, everything resident"
"""Ours without anything streamed or offloaded, and without the cap: what streaming costs is seen beside it."""
RESERVED_GIB = 0.7
"""What context and desktop take of a card."""


class MemoryCase(TrainingCase):
    """A training step on a card of `cap_gb`: it must fit, or the case is red, and take no more than `most_gb`."""

    cap_gb: Annotated[float, Field(ge=1, le=1000)] = Field(description="GiB that a card of this kind is sold with.")
    most_gb: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="10^9 bytes that tensors may take at the peak, on a GPU: what we promise of this case."
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = 3
    warmup_steps: Annotated[int, Field(ge=1, le=1000)] = 2

    known_peers: ClassVar[tuple[str, ...]] = (*PEERS, NF4_PEER, RESIDENT)

    @property
    def cap_bytes(self) -> int:
        """What is left of the card for PyTorch."""
        return round((self.cap_gb - RESERVED_GIB) * 2**30)


@dataclass(frozen=True)
class MemoryResult(Result):
    """What the steps took under the cap, by contender, each in a process of its own: ours and each peer.

    Attributes:
        cap_bytes: None where nothing can be capped, on a CPU.
        estimated_bytes: what the planner says that a step of ours takes on the device.
        peak_bytes: contender → "allocated" and "reserved" by PyTorch on the device, "resident" of the process.
        medians: contender → seconds of a step.
        unavailable: peer → why it was not measured; under a cap that is mostly too little memory.
    """

    cap_bytes: int | None = None
    estimated_bytes: int | None = None
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Our median; a peer that got slower is no fault of ours."""
        return {OURS: self.medians[OURS]} if OURS in self.medians else {}
