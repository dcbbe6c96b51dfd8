"""Aspect buckets: the legal sizes around a recipe's resolution, and which of them a clip goes to. Pure, torch-free.

Decides sizes in pixels only; frames and windows are `dataset.windows`' matter, the resize rule `media.geometry`'s.
"""

from __future__ import annotations

import math

from ltxforge.media.geometry import enlargement

# A bucket's area is at most the resolution's (memory was planned for it) and at least this share of it.
SMALLEST_AREA_SHARE = 0.75
# No bucket is longer than 4:1, lying or standing.
LONGEST_ASPECT = 4.0


def bucket_sizes(resolution: tuple[int, int], mode: str = "aspect", factor: int = 32) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) that clips may be trained at, sorted by aspect, tall first.

    For every number of rows the widest size that fits the resolution's area, for every number of columns the tallest,
    the largest square, and the resolution itself. `mode` is "aspect", or "fixed" for the resolution alone; `factor`
    is the VAE's spatial factor.
    """
    if mode == "fixed":
        return (resolution,)
    if mode != "aspect":
        raise ValueError(f"buckets are 'aspect' or 'fixed', not {mode!r}")
    cells = (resolution[0] // factor) * (resolution[1] // factor)
    sides = range(1, cells + 1)
    square = math.isqrt(cells)
    grid = {(cells // side, side) for side in sides} | {(side, cells // side) for side in sides} | {(square, square)}
    sizes = {(x * factor, y * factor) for x, y in grid if _is_legal(x, y, cells)} | {resolution}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def nearest_bucket(size: tuple[int, int], buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket nearest in log aspect to a picture of `size`; a tie goes to the larger area, then to the wider."""
    aspect = math.log(size[0] / size[1])

    def distance(bucket: tuple[int, int]) -> tuple[float, int, int]:
        # Rounded, so that mirror-image distances (4:3 and 3:4 from a square) are the tie that they are.
        return round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1], -bucket[0]

    return min(buckets, key=distance)


def too_small(size: tuple[int, int], bucket: tuple[int, int], max_upscale: float) -> str:
    """Why a picture of `size` must not be enlarged to cover `bucket`, or ""."""
    scale = enlargement(size, bucket)
    if scale <= max_upscale * (1 + 1e-9):
        return ""
    return (
        f"too small: {size[0]}x{size[1]} must be enlarged {scale:.2f} times to cover {bucket[0]}x{bucket[1]}, "
        f"and max_upscale is {max_upscale:g}"
    )


def _is_legal(x: int, y: int, cells: int) -> bool:
    fits = SMALLEST_AREA_SHARE * cells <= x * y <= cells
    return fits and 1 / LONGEST_ASPECT <= x / y <= LONGEST_ASPECT
