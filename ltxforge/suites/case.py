"""What every suite's cases and results share: a name, peers with their floors, an outcome. Torch-free.

Says what a result answers to the verb `bench`, whatever was measured: its seconds for `--against`, its ratios, and what
is wrong with it; and what one check (`Gate`) and one contender's seconds (`Timing`) are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ltxforge.recipe.schema import Name

Outcome = Literal[
    "measured", "out of memory", "not finite", "skipped", "gate failed", "over the cap", "failed", "not finished"
]  # fmt: skip
Floor = Annotated[float, Field(gt=0, le=1000)]


class Section(BaseModel):
    """A table of a suite's file: what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Case(Section):
    """One thing to measure.

    Attributes:
        peers: what it is measured against, in the same process.
        floors: peer → the least that (seconds of the peer) / (our seconds) may be, on a GPU.
    """

    name: Name
    peers: list[str] = []
    floors: dict[str, Floor] = {}

    known_peers: ClassVar[tuple[str, ...]] = ()
    """Every peer of this kind of case."""
    examples: ClassVar[dict[str, str]] = {}
    """Key → what is said to whoever left it out."""

    def settings(self) -> dict[str, Any]:
        """The case with its defaults filled in, without its name: what a results file says of it."""
        return self.model_dump(exclude={"name"})

    def contradictions(self) -> Iterator[tuple[str, str, str]]:
        """(key, what is wrong, hint) of what no single key can know."""
        for peer in self.peers:
            if peer not in self.known_peers:
                yield "peers", f'there is no peer "{peer}"', f"legal here: {', '.join(self.known_peers) or 'none'}"
        for peer in self.floors:
            if peer not in self.peers:
                yield "floors", f'"{peer}" has a floor and is not measured', "add it to `peers`"


@dataclass(frozen=True)
class Result:
    """What measuring one case gave. A kind of suite adds its own fields, which are None or empty if not measured.

    Attributes:
        case: `Case.settings`.
        reason: why the outcome is not "measured".
        ratios: peer → how many times our time it took.
    """

    name: str
    outcome: Outcome
    case: dict[str, Any]
    reason: str = ""
    ratios: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """What `--against` compares: what was timed → its median; less is better."""
        return {}

    def faults(self) -> list[str]:
        """What makes this result wrong enough for an exit status: one line each. Floors hold on a GPU only."""
        return [self.reason or self.outcome] if self.outcome in FAULTY else []

    def missed_floors(self) -> list[str]:
        """One line for each floor that its ratio does not reach. A peer that could not be measured misses nothing."""
        floors = self.case.get("floors", {})
        return [
            f"{self.ratios[peer]:.2f} times as fast as {peer}, less than {floor:g}"
            for peer, floor in floors.items()
            if peer in self.ratios and self.ratios[peer] < floor
        ]

    def entry(self) -> dict[str, Any]:
        """As a results file holds it: the fields, and what follows from them."""
        return {**dataclasses.asdict(self), "seconds": self.seconds()}


@dataclass(frozen=True)
class Gate:
    """One check before any timing: an error and the bounds that it must meet, or equality of bits."""

    implementation: str
    what: str
    passed: bool
    error: float | None = None
    bound: float | None = None
    eager_error: float | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and what a fifth of the calls stayed below and above."""

    median: float
    p20: float
    p80: float
    host: float | None = None
    """The median of the host's own time to enqueue the call on a GPU, which is no part of the others."""
    is_late: bool = False
    """Whether the GPU waited for the host in some round all the same, so that the median may hold the host's time."""
    graph: float | None = None
    """The median of a replay of the call as a CUDA graph: without the launches' own time on the host."""
    launches: int | None = None
    """Kernels that one call launches."""
    peak_bytes: int | None = None
    """What a call allocates at its peak, beside its inputs."""


FAULTY = ("not finite", "gate failed", "over the cap", "failed")
"""Outcomes that end `bench` with an error, after everything is measured and written."""
