"""Video and audio: what a model may see and make, and a pair of something for each. Torch-free.

"video" is the picture alone, "audio" the sound alone, "both" is joint. Decides nothing about a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Each = TypeVar("Each")
Other = TypeVar("Other")
MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class Streams(Generic[Each]):
    """Something of each modality; None where it takes no part."""

    video: Each | None = None
    audio: Each | None = None

    def __getitem__(self, name: str) -> Each | None:
        """That of "video" or "audio"."""
        return {"video": self.video, "audio": self.audio}[name]

    def items(self) -> list[tuple[str, Each]]:
        """("video", …) and ("audio", …), as far as they take part, in this order."""
        both = (("video", self.video), ("audio", self.audio))
        return [(name, each) for name, each in both if each is not None]

    def map(self, change: Callable[[Each], Other]) -> Streams[Other]:
        """The same modalities with something else made of each."""
        return Streams(**{name: change(each) for name, each in self.items()})


def has(modalities: str, one: str) -> bool:
    """Whether "video", "audio" or "both" holds `one` of them."""
    assert modalities in (*MODALITIES, "both") and one in MODALITIES, (modalities, one)
    return modalities in (one, "both")
