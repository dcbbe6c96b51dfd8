"""How LTX-2's parts are made, one by one, on demand. Makes none itself: `load.py` and `ltx2_tiny.py` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn
from transformers import PreTrainedTokenizerBase

from ltxforge.models.audio_features import MelSettings
from ltxforge.quant.keep import Keep

Part = TypeVar("Part")
Make = Callable[[torch.device, torch.dtype], Part]


@dataclass(frozen=True)
class LTX2Parts:
    """How each part is made, on demand, on the device and in the dtype it is given; the transformer as it is kept.

    The text encoder comes with its tokenizer, which pads on the left.
    """

    transformer: Callable[[Keep], LTX2VideoTransformer3DModel]
    vae: Make[AutoencoderKLLTX2Video]
    audio_vae: Make[AutoencoderKLLTX2Audio]
    vocoder: Make[LTX2Vocoder | LTX2VocoderWithBWE]
    connectors: Make[LTX2TextConnectors]
    text_encoder: Make[tuple[nn.Module, PreTrainedTokenizerBase]]
    scheduler: Callable[[], FlowMatchEulerDiscreteScheduler]
    mel: Callable[[], MelSettings]
