"""What each optimiser keeps of a trained number, and what that weighs. Facts about torch 2.11+ and bitsandbytes 0.49+.

Torch-free, so that a plan can count it; `optim.py` builds the optimisers, and tests/test_optim.py holds these facts
against the state that they really make. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

BLOCK = 256
"""bitsandbytes quantises moments in blocks of so many numbers, each with a float32 scale."""
LEAST_8BIT = 4096
"""Tensors of fewer numbers keep moments in float32."""
LEAST_PAGED = 100_000
"""Moments of tensors of fewer numbers are never paged."""
MAP_BYTES = 256 * 4
"""A code's 256 values in float32; one table for signed moments, one for the others, shared by all tensors."""


@dataclass(frozen=True)
class Moments:
    """One optimiser, by its name in a recipe.

    Attributes:
        signed: averages of the gradient that it keeps for each trained number.
        unsigned: averages of the gradient's square, likewise.
        in_8_bits: whether tensors from `LEAST_8BIT` numbers on keep them in 8 bits.
        paged: whether their memory moves to the host when the device is full.
        betas: the decays that it has by default, of which a recipe may say two.
        has_epsilon: whether a number is added to its denominator; Lion has none.
    """

    signed: int
    unsigned: int
    in_8_bits: bool = True
    paged: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    has_epsilon: bool = True

    @property
    def count(self) -> int:
        """All moments of one trained number."""
        return self.signed + self.unsigned

    @property
    def maps(self) -> int:
        """Code tables that a tensor in 8 bits refers to."""
        return (self.signed > 0) + (self.unsigned > 0) if self.in_8_bits else 0


_LION = Moments(signed=1, unsigned=0, betas=(0.9, 0.99), has_epsilon=False)
MOMENTS = {
    "adamw": Moments(1, 1, in_8_bits=False),
    "adamw8bit": Moments(1, 1),
    "paged_adamw8bit": Moments(1, 1, paged=True),
    "lion8bit": _LION,
    "paged_lion8bit": Moments(1, 0, paged=True, betas=_LION.betas, has_epsilon=False),
    "ademamix8bit": Moments(2, 1),
}
"""AdamW (arXiv:1711.05101) and Lion (arXiv:2302.06675); AdEMAMix (arXiv:2409.03137) has two averages of the gradient,
the second a slow one.
"""


def optimizer_bytes(name: str, sizes: Sequence[int]) -> int:
    """What an optimiser's state weighs in memory once every tensor has been updated.

    Args:
        name: as in a recipe.
        sizes: how many numbers each trained tensor has.
    """
    return _optimizer_bytes(name, tuple(sizes))


@cache  # a search over memory strategies asks again and again
def _optimizer_bytes(name: str, sizes: tuple[int, ...]) -> int:
    moments = MOMENTS[name]
    in_8_bits = moments.in_8_bits and any(size >= LEAST_8BIT for size in sizes)
    return sum(tensor_bytes(name, size) for size in sizes) + moments.maps * MAP_BYTES * in_8_bits


def tensor_bytes(name: str, size: int) -> int:
    """The state of one tensor of `size` numbers, without the tables that all tensors share."""
    moments = MOMENTS[name]
    if not moments.in_8_bits:
        return size * moments.count * 4 + 4  # torch counts each tensor's steps in a float32
    if size < LEAST_8BIT:
        return size * moments.count * 4
    return moments.count * (size + -(-size // BLOCK) * 4)


def paged_bytes(name: str, sizes: Sequence[int]) -> int:
    """The part of `optimizer_bytes` that a GPU gives way to the host when it is full: moments without their scales."""
    moments = MOMENTS[name]
    return moments.count * sum(size for size in sizes if size >= LEAST_PAGED) if moments.paged else 0


def saved_bytes(name: str, sizes: Sequence[int]) -> int:
    """What a checkpoint's file holds of it, headers apart: the step as a float64, and each tensor its own tables."""
    moments = MOMENTS[name]
    if not moments.in_8_bits:
        return sum(tensor_bytes(name, size) for size in sizes)
    tables = sum(moments.maps * MAP_BYTES for size in sizes if size >= LEAST_8BIT)
    return sum(tensor_bytes(name, size) + 8 for size in sizes) + tables
