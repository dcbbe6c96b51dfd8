"""How a stored picture becomes a picture of a wanted size: orientation, pixel aspect, cover, centre crop.

Pure arithmetic and numpy views, used alike for video frames and still images. Decides the resize rule; decodes
nothing and knows no file. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# How a stored picture becomes the pixels that are encoded. It enters the cache keys: raise the number whenever the
# same file could give other pixels (filter, crop, rotation, colour conversion).
RESIZE = "bicubic, antialiased, cover and centre crop; 1"

# Pixels wider or taller than this are header errors, not lenses.
_LARGEST_PIXEL_ASPECT = 16


@dataclass(frozen=True)
class Orientation:
    """What a display matrix asks for, as exact array moves: first swap the axes, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def rotation(self) -> int:
        """Clockwise quarter turns in degrees (0, 90, 180, 270); of a mirrored picture the turn before mirroring x."""
        if self.transpose:
            return 270 if self.flip_y else 90
        return 180 if self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        """Whether the picture is also mirrored: an odd number of axis moves."""
        return (self.transpose + self.flip_x + self.flip_y) % 2 == 1

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """The picture [H, W, 3] as it should be seen, as a view."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        if self.flip_x:
            picture = picture[:, ::-1]
        return picture[::-1] if self.flip_y else picture


def orientation_of(matrix: Sequence[int]) -> Orientation:
    """The nearest quarter turn of a 3×3 display matrix (ISO/IEC 14496-12, 8.3.2), row by row, 16.16 fixed point.

    A stored point (x, y) is shown at (a·x + c·y, b·x + d·y) with a, b, c, d = matrix[0], [1], [3], [4], y down.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def is_quarter_turn(matrix: Sequence[int]) -> bool:
    """Whether the matrix only turns and mirrors, so that `orientation_of` says all of it."""
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    return (a == d == 0) != (b == c == 0)


def sane_pixel_aspect(aspect: Fraction | None) -> Fraction:
    """Width of a stored pixel over its height; 1 where the file says nothing or nonsense."""
    if not aspect or not Fraction(1, _LARGEST_PIXEL_ASPECT) <= aspect <= _LARGEST_PIXEL_ASPECT:
        return Fraction(1)
    return Fraction(aspect)


def display_size(width: int, height: int, aspect: Fraction, orientation: Orientation) -> tuple[int, int]:
    """Size (width, height) in square pixels as shown. Pixels are only ever stretched, so no detail is lost."""
    if aspect > 1:
        width = max(1, round(width * aspect))
    else:
        height = max(1, round(height / aspect))
    return (height, width) if orientation.transpose else (width, height)


def enlargement(size: tuple[int, int], target: tuple[int, int]) -> float:
    """The factor by which a picture of `size` is scaled to cover `target`; above 1 it is enlarged."""
    return max(target[0] / size[0], target[1] / size[1])


def kept_share(size: tuple[int, int], target: tuple[int, int]) -> float:
    """The share of the picture's area that is left after covering `target` and cropping."""
    scale = enlargement(size, target)
    return target[0] * target[1] / (scale * size[0] * scale * size[1])


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) to resize to, so that `target` is covered and one side fits exactly."""
    scale = enlargement(size, target)
    return max(target[0], math.floor(size[0] * scale + 0.5)), max(target[1], math.floor(size[1] * scale + 0.5))


def crop_centre(picture: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """The middle `target` (width, height) of a picture [H, W, 3], as a view; an odd rest stays right and below."""
    left, top = (picture.shape[1] - target[0]) // 2, (picture.shape[0] - target[1]) // 2
    return picture[top : top + target[1], left : left + target[0]]
