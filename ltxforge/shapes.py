"""Pixels ↔ latents arithmetic. The 8·k + 1 frame rule and the 32-pixel rule live here and nowhere else.

Decides which sizes are legal and which legal sizes are nearest. Knows no model: the factors come from `specs`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LatentShape:
    """Size of a clip's latents: F frames × Y rows × X columns. One position is one token (patch size 1)."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """T = F · Y · X."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, order=True)
class ClipShape:
    """Size of a clip in pixels and frames, written `768x512x121` (width × height × frames)."""

    width: int
    height: int
    frames: int

    def latent(self, spatial: int = 32, temporal: int = 8) -> LatentShape:
        """The latents' size under a causal VAE: the first frame alone, then groups of `temporal` frames."""
        if not is_legal_side(self.width, spatial) or not is_legal_side(self.height, spatial):
            raise ValueError(f"{self} has a side that is no multiple of {spatial}")
        if not is_legal_frames(self.frames, temporal):
            raise ValueError(f"{self} has a frame count that is not {temporal}k + 1")
        return LatentShape((self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def is_legal_frames(frames: int, temporal: int = 8) -> bool:
    """Whether a causal VAE with this temporal factor can encode `frames` frames: temporal·k + 1, k ≥ 0."""
    return frames >= 1 and frames % temporal == 1 % temporal


def is_legal_side(pixels: int, spatial: int = 32) -> bool:
    """Whether a side can be encoded: a positive multiple of the spatial factor."""
    return pixels >= spatial and pixels % spatial == 0


def nearest_frames(frames: int, temporal: int = 8) -> tuple[int, ...]:
    """The legal counts around an illegal one, lower first: 61 → (57, 65). A legal count gives itself."""
    return _around(frames - 1, temporal, 0, 1)


def nearest_sizes(width: int, height: int, spatial: int = 32) -> tuple[tuple[int, int], ...]:
    """The legal sizes nearest to width × height, two where a side lies in the middle between two legal ones.

    480x854 → (480x864); 720x1280 → (704x1280, 736x1280). Sides that tie together go down or up together.
    """
    found = {(_nearest(width, spatial, up), _nearest(height, spatial, up)) for up in (False, True)}
    return tuple(sorted(found))


def _nearest(pixels: int, step: int, up: bool) -> int:
    """The multiple of `step` nearest to `pixels`, at least `step`; a tie goes up or down."""
    lower, rest = divmod(pixels, step)
    return max(1, lower + (2 * rest > step or (up and 2 * rest == step))) * step


def _around(value: int, step: int, smallest: int, offset: int) -> tuple[int, ...]:
    lower = max(smallest, value // step * step)
    upper = max(smallest, -(-value // step) * step)
    return (lower + offset,) if lower == upper else (lower + offset, upper + offset)


def tiles_along(size: int, most: int) -> tuple[tuple[int, int], ...]:
    """Overlapping spans [begin, end) over `size` latents, each of at most `most`; one where all fit or `most` is 0.

    As few and as equal as can be; neighbours share at least a quarter of `most`, and two where that leaves one.
    """
    if not most or size <= most:
        return ((0, size),)
    overlap = min(max(2, most // 4), most - 1)
    count = -(-(size - overlap) // (most - overlap))
    length = -(-(size + (count - 1) * overlap) // count)
    begins = [(size - length) * number // (count - 1) for number in range(count)]
    return tuple((begin, begin + length) for begin in begins)
