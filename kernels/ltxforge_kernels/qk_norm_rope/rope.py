"""Rotary tables without their repetition: each frequency depends on one coordinate, so rows along the axes are enough.

What the tables of diffusers' transformers hold (RoFormer, arXiv 2104.09864, over A axes): D/2 pairs of numbers are
turned, the first `padding` of them by nothing, and pair `padding` + A·q + a by the angle of axis a's q-th frequency.
Full tables are [T, D/2] at least; these are [P, Q] with P the axes' positions together and Q = D/2 / A, 0.3 MB for
0.1 GB at 6144 tokens of 4096 numbers. Computes no angle: tables come from the model, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """Tables of one sequence of T tokens.

    Attributes:
        cos: [P, Q] float32, a row per position of every axis.
        sin: [P, Q] float32.
        rows: [T, A] int32, each token's row in them on each axis.
        padding: how many pairs stand before the first that is turned.
        heads: None where pairs are neighbours, numbers 2j and 2j + 1 of all D ("interleaved", LTX-Video); else number k
            of a head's first half and number k of its second are a pair ("split", LTX-2), the pairs head by head.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor
    padding: int = 0
    heads: int | None = None
    _full: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    @property
    def layout(self) -> str:
        return "interleaved" if self.heads is None else "split"

    @property
    def tokens(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return 2 * (self.padding + self.rows.shape[1] * self.cos.shape[1])

    def prepare(self) -> None:
        """Make `full` now, for who needs it in a function that is traced or computed twice."""
        _ = self.full

    @property
    def full(self) -> tuple[Tensor, Tensor]:
        """cos and sin as diffusers makes them, made when they are first asked for and kept; see `expand`."""
        # No functools.cached_property: torch.compile cannot trace its lock.
        if not self._full:
            self._full.append(expand(self))
        return self._full[0]


def compact(cos: Tensor, sin: Tensor, sizes: Sequence[int], along: Sequence[int] | None = None) -> Rope:
    """The rows along each axis of diffusers' tables for a grid of tokens.

    Args:
        cos: [1, T, D] with every number twice (interleaved) or [1, H, T, K/2] (split).
        sin: as `cos`.
        sizes: of the grid's axes, the last of which changes fastest; (T,) for a sequence.
        along: the axes that have frequencies, None for all; (0,) where a video's tokens know their time alone.

    Raises:
        ValueError: the tables are not those of such a grid.
    """
    tokens, heads = cos.shape[-2], cos.shape[1] if cos.ndim == 4 else None
    if cos.shape != sin.shape or cos.shape[0] != 1 or math.prod(sizes) != tokens or cos.numel() == 0:
        raise ValueError(f"tables of {list(cos.shape)} and {list(sin.shape)} are not of a grid of {tuple(sizes)}")
    along = range(len(sizes)) if along is None else along
    lengths, strides = [sizes[axis] for axis in along], [math.prod(sizes[axis + 1 :]) for axis in along]
    halves = [as_pairs(table) for table in (cos, sin)]
    padding = halves[0].shape[1] % len(along)
    places = list(enumerate(zip(lengths, strides, strict=True)))
    short = [
        torch.cat(
            [half[: length * stride : stride, padding + number :: len(along)] for number, (length, stride) in places]
        )
        for half in halves
    ]
    token, begins = torch.arange(tokens, device=cos.device, dtype=torch.int32), accumulate(lengths[:-1], initial=0)
    rows = [begin + token // stride % length for begin, length, stride in zip(begins, lengths, strides, strict=True)]
    rope = Rope(*short, torch.stack(rows, dim=1), padding, heads)
    # On "meta", where operations are counted, there are no numbers to compare.
    whole = cos.is_meta or all(torch.equal(one, other) for one, other in zip(expand(rope), (cos, sin), strict=True))
    if not whole:
        raise ValueError(f"tables of {list(cos.shape)} hold more than the rows along a grid of {tuple(sizes)}")
    return rope


def as_pairs(table: Tensor) -> Tensor:
    """[T, D/2] of either of diffusers' shapes."""
    return table[0, :, ::2] if table.ndim == 3 else table[0].transpose(0, 1).flatten(1)


def expand(rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin of every token: [1, T, D] for interleaved pairs, [1, H, T, K/2] for split ones."""
    return spread(rope, rope.cos, 1.0), spread(rope, rope.sin, 0.0)


def spread(rope: Rope, table: Tensor, padding: float) -> Tensor:
    """One of the two, in diffusers' shape."""
    axes = rope.rows.shape[1]
    pairs = table.new_full((rope.tokens, rope.width // 2), padding)
    for axis in range(axes):
        pairs[:, rope.padding + axis :: axes] = table[rope.rows[:, axis]]
    if rope.heads is None:
        return pairs.repeat_interleave(2, dim=1)[None]
    return pairs.unflatten(1, (rope.heads, -1)).transpose(0, 1)[None]
