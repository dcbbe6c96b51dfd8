"""Sizes of clips and models as suites write them, shared by all that measure whole models. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from ltxforge.shapes import ClipShape, is_legal_frames, is_legal_side, nearest_frames, nearest_sizes
from ltxforge.specs import SPECS, TINY, ModelSpec

MODELS: dict[str, ModelSpec] = {**SPECS, **TINY}
"""What a case may name: every published version at full size, and the built-in small models."""
Models = Literal[tuple(MODELS)]  # type: ignore[valid-type]


def parse_shape(text: str) -> ClipShape:
    """`"768x512x49"`, width × height × frames. Raises ValueError, worded like a recipe's, for what no VAE encodes."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*", text)
    if not match:
        raise ValueError('is no size; write "WIDTHxHEIGHTxFRAMES", for example "768x512x49"')
    width, height, frames = map(int, match.groups())
    if not (is_legal_side(width) and is_legal_side(height)):
        sizes = " or ".join(f"{side}x{other}x{frames}" for side, other in nearest_sizes(width, height))
        raise ValueError(f"cannot be encoded: both sides must be multiples of 32; nearest: {sizes}")
    if not is_legal_frames(frames):
        sizes = " or ".join(f"{width}x{height}x{count}" for count in nearest_frames(frames))
        raise ValueError(f"cannot be encoded: the VAE needs 8k + 1 frames; nearest: {sizes}")
    return ClipShape(width, height, frames)


def _check_shape(text: str) -> str:
    parse_shape(text)
    return text


Size = Annotated[str, AfterValidator(_check_shape)]
EXAMPLES = {
    "name": 'for example name = "ltx2-49-frames"',
    "model": 'for example model = "2.0-dev"',
    "size": 'for example size = "768x512x49"',
}
