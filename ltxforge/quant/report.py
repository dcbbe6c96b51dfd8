"""What became of each linear layer of a base: its format and what that leaves of it, or why it stays whole.

Data, made while loading, printed as one line and kept beside quantised weights, so that the next start says the same.
Torch-free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: its module's.
        format: what it is kept in; "" where it stays whole.
        reason: why it stays whole, or "".
        sqnr: signal to quantisation noise of the weight in dB; None where it was not measured: the layer stays whole
            anyway, or came quantised.
        floor: what the format must leave, in dB.
        bytes_before: in 16 bits.
        bytes_after: as it is kept, scales included.
    """

    name: str
    format: str
    reason: str
    sqnr: float | None
    floor: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class BaseReport:
    """All linear layers of a base, in the order of its modules; none for a base that is not quantised.

    Attributes:
        format: as asked for.
        whole: the dtype of layers that stay whole ("bf16").
        layers: each layer.
        source: "" where they were quantised at this start, "cache", or "file" where they came quantised.
        notes: what else should be known.
    """

    format: str = "bf16"
    whole: str = "bf16"
    layers: tuple[LayerReport, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def quantised(self) -> tuple[LayerReport, ...]:
        """The layers in few bits."""
        return tuple(layer for layer in self.layers if layer.format)

    @property
    def stayed(self) -> Mapping[str, int]:
        """How many layers stay whole, by reason; the most frequent first."""
        return dict(Counter(layer.reason for layer in self.layers if not layer.format).most_common())

    @property
    def worst(self) -> LayerReport | None:
        """The quantised layer with the most noise among those that were measured."""
        measured = [layer for layer in self.quantised if layer.sqnr is not None]
        return min(measured, key=lambda layer: layer.sqnr or 0.0, default=None)

    @property
    def bytes_before(self) -> int:
        """What the quantised layers would weigh in 16 bits."""
        return sum(layer.bytes_before for layer in self.quantised)

    @property
    def bytes_after(self) -> int:
        """What they weigh."""
        return sum(layer.bytes_after for layer in self.quantised)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, the summary first. Numbers that are not finite become texts."""
        worst = self.worst
        return {
            "format": self.format, "whole": self.whole, "source": self.source, "notes": list(self.notes),
            "count": len(self.layers), "quantised": len(self.quantised), "stayed": dict(self.stayed),
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "worst": None if worst is None else {"name": worst.name, "sqnr": _plain(worst.sqnr)},
            "layers": [{**vars(layer), "sqnr": _plain(layer.sqnr)} for layer in self.layers],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseReport:
        """The report again. Raises KeyError, TypeError or ValueError for what is none."""
        layers = tuple(
            LayerReport(**{**layer, "sqnr": None if layer["sqnr"] is None else float(layer["sqnr"])})
            for layer in value["layers"]
        )
        return cls(value["format"], value["whole"], layers, value["source"], tuple(value["notes"]))


def _plain(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else repr(number)
