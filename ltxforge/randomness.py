"""Random draws by address (seed, purpose, step, index): nothing random is consumed.

A draw is a pure function of its address, so an interrupted run, another worker count or a validation in between
changes nothing, and there is no random state to save. This module makes the addresses; whoever draws builds a
generator from one (`torch.Generator().manual_seed(address(...))`) and uses it for that draw alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def address(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit generator seed for one draw.

    Args:
        seed: the run's seed.
        purpose: what is drawn: "sigma", "noise", "order", …
        numbers: usually step and the sample's index within the whole step's batch.
    """
    text = "/".join((str(seed), purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """One number in [0, 1) with 53 random bits, for choices made on the host."""
    return (address(seed, purpose, *numbers) >> 10) / 2**53


def permutation(items: Iterable[Item], seed: int, purpose: str, *numbers: int) -> Sequence[Item]:
    """The items in an order that depends on the address alone, not on any library's shuffle.

    Each position is ranked by its own address, so the order is defined by arithmetic and can be recomputed anywhere.
    """
    ranked = [(address(seed, purpose, *numbers, position), position, item) for position, item in enumerate(items)]
    ranked.sort(key=lambda entry: entry[:2])
    return [item for _, _, item in ranked]
