"""In which number formats a run computes, and what fp16 needs beside them. Pure; torch-free.

A card without bf16 units (Volta, Turing and older) computes in fp32 unless the recipe says fp16: published weights were
trained in bf16, whose range fp16 has not, and LTX-Video is known to give NaN in it; slow is better than stopped. Its
encoders are in fp32 too: T5's and Gemma's activations leave fp16's range. They fit by being quantised, not by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ltxforge.modalities import has
from ltxforge.plan import BucketPlan, Plan
from ltxforge.recipe.schema import Recipe
from ltxforge.specs import ModelSpec

if TYPE_CHECKING:
    from ltxforge.hardware import Hardware

ROOM_ABOVE = 6
"""log2 of how far below 1 the loss's gradients are put: a layer's gradient sums them over all tokens, and must stay
below 65504 even where they all point one way; fp16 reaches 2^-24, so 18 bits are left below them."""


def precisions(recipe: Recipe, hardware: Hardware, previous: Plan | None) -> tuple[str, str]:
    """The base's and the encoders'. A run that goes on elsewhere keeps its own, unless the recipe says another, and
    with them its cache.
    """
    usual = "bf16" if hardware.has_bf16 else "fp32"
    precision = recipe.training.precision or (previous.device.precision if previous else usual)
    encoders = "fp32" if hardware.kind == "cpu" else usual
    return precision, previous.device.encoder_precision if previous else encoders


def precision_remarks(precision: str, hardware: Hardware) -> tuple[str, ...]:
    """What a plan says of a precision that is asked for and does not suit the card."""
    if hardware.kind in ("cuda", "rocm") and precision == "bf16" and not hardware.has_bf16:
        return (
            'training.precision = "bf16": this card has no units for it and computes it by way of fp32, slowly; "fp16"'
            ' and "fp32" are for such cards',
        )
    if hardware.has_bf16 and precision == "fp16":
        return (
            'training.precision = "fp16" on a card with bf16 units: bf16 has the range that the weights were trained'
            " in, is as fast, and needs no loss scale",
        )
    return ()


def loss_scale(precision: str, buckets: Sequence[BucketPlan], spec: ModelSpec, modalities: str, samples: int) -> float:
    """What the loss is multiplied with before the backward pass, and the adapter's gradient divided by after it.

    1 but in fp16, whose smallest number is 6e-8: a mean over T·C numbers and N samples gives gradients of 2·error /
    (T·C·N), as small at 768x512x121. A power of two, so that multiplying and dividing change no bit; constant, so that
    a run depends on nothing but its plan.

    Args:
        samples: N, of a whole step.
    """
    if precision != "fp16":
        return 1.0
    if has(modalities, "video"):
        numbers = max(bucket.tokens for bucket in buckets) * spec.latent_channels
    else:
        numbers = max(bucket.audio_tokens for bucket in buckets) * spec.transformer_config["audio_in_channels"]
    return 2.0 ** max(0, round(math.log2(numbers * samples)) - ROOM_ABOVE)
