"""Every model version by name, of both families, and the built-in small models by the name a recipe uses.

Data only. What a version is: `model_spec.py`; LTX-Video 0.9.x: `specs_ltx_video.py`; LTX-2: `specs_ltx2.py`.
"""

from __future__ import annotations

from ltxforge.model_spec import Licence, ModelSpec, SamplingDefaults
from ltxforge.specs_ltx2 import LTX2_SPECS, LTX2_TINY
from ltxforge.specs_ltx_video import LTX_VIDEO_SPECS, LTX_VIDEO_TINY

__all__ = ["SPECS", "TINY", "TINY_VERSION", "Licence", "ModelSpec", "SamplingDefaults", "specs_of"]

SPECS: dict[str, ModelSpec] = {**LTX_VIDEO_SPECS, **LTX2_SPECS}
"""Every published version by name."""

TINY: dict[str, ModelSpec] = {**LTX_VIDEO_TINY, **LTX2_TINY}
"""Built-in small models with the real classes and ratios and random, seeded weights; by the name a recipe uses."""

TINY_VERSION = 1
"""Raised by hand when the weights of the built-in models change: part of their digests, and so of every cache key."""


def specs_of(family: str) -> dict[str, ModelSpec]:
    """The published versions of one family, "ltx-video" or "ltx-2"."""
    return {name: spec for name, spec in SPECS.items() if spec.family == family}
