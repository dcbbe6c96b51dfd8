"""What the samplers of both families share: a prompt's numbers as a call's, pictures, and what counts as a fault.

Decides that a sample with a number that is not finite is no sample. Knows no pipeline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltxforge.plan import PromptPlan


def plain_arguments(prompt: PromptPlan) -> dict[str, Any]:
    """A planned prompt's size, rate, steps and guidance, as every pipeline's call names them."""
    return {
        "width": prompt.shape.width,
        "height": prompt.shape.height,
        "num_frames": prompt.shape.frames,
        "frame_rate": prompt.fps,
        "num_inference_steps": prompt.steps,
        "guidance_scale": prompt.guidance,
    }


def pictures(video: np.ndarray) -> np.ndarray:
    """A pipeline's frames, 0 to 1, as uint8. Raises FloatingPointError as `require_finite` does."""
    require_finite("pictures", torch.from_numpy(video))
    return np.rint(video * 255.0).astype(np.uint8)


def require_finite(name: str, values: Tensor) -> None:
    """Raise FloatingPointError where one of the sample's `values` is NaN or infinite: it could not be drawn."""
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(f"the sample's {name} are not finite numbers")
