"""Weights to modules. First form: the built-in tiny models."""

from __future__ import annotations

import torch

from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import ModelPlan
from ltxforge.specs import TINY


def load_model(plan: ModelPlan, device: torch.device, dtype: torch.dtype) -> LTXVideo:
    """The model of the plan; nothing is loaded before it is asked for."""
    spec = TINY[plan.base]
    return LTXVideo(spec, plan.rope, tiny_parts(spec), device, dtype)
