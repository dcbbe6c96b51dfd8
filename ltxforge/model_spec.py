"""What is fixed about a model version, as types: factors, frame rule, wiring, sampling defaults, licence.

Data only. The versions themselves stand in `specs_ltx_video.py` and `specs_ltx2.py`, all together in `specs.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# What the names of a transformer's blocks begin with, in diffusers and in Lightricks' checkpoints.
BLOCKS = "transformer_blocks."


@dataclass(frozen=True)
class Licence:
    """Under which terms the base weights come; printed in the plan and written on cards."""

    name: str
    url: str


@dataclass(frozen=True)
class SamplingDefaults:
    """How the version's own pipeline samples. `timesteps` (of 1000) are set for distilled weights only.

    From `audio_guidance` on for LTX-2: guidance by the prompt is set for video and audio separately, the rest for both
    alike. `stg` skips self attention in `stg_blocks` (0 is off), `modality_guidance` skips cross attention between
    video and audio (1 is off), `rescale` is the share of the guided result's standard deviation that is taken back.
    """

    steps: int
    guidance: float
    timesteps: tuple[float, ...] = ()
    decode_timestep: float = 0.0
    decode_noise_scale: float | None = None
    audio_guidance: float | None = None
    stg: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    modality_guidance: float = 1.0
    rescale: float = 0.0
    negative_prompt: str = "worst quality, inconsistent motion, blurry, jittery, distorted"


@dataclass(frozen=True)
class ModelSpec:
    """One model version.

    `rope` is the version's convention for the time coordinate of latent frame j, used where the weights themselves do
    not say: "plain" 8·j/fps (diffusers' LTXPipeline) or "causal" max(0, 8·j − 7)/fps (LTXConditionPipeline).
    `vae_family` names encoders whose latents are interchangeable: 0.9.0 and 0.9.1 share an encoder's layout but not
    its weights, and 0.9.5 and later share theirs. `hub` is where the version is published, as a recipe's source.
    `default_prompt_tokens` is the default of the diffusers pipeline that samples. `text_encoder` is "t5", "gemma-3" or
    "gemma-4"; the configurations after it are of parts that only LTX-2 has.
    """

    version: str
    family: str
    parameters: str
    hub: str
    rope: str
    distilled: bool
    vae_family: str
    sampling: SamplingDefaults
    licence: Licence
    transformer_config: dict[str, Any] = field(repr=False)
    vae_config: dict[str, Any] = field(repr=False)
    scheduler_config: dict[str, Any] = field(repr=False)
    spatial_factor: int = 32
    temporal_factor: int = 8
    default_fps: float = 25.0
    default_prompt_tokens: int = 128
    tiny: bool = False
    text_encoder: str = "t5"
    connectors_config: dict[str, Any] | None = field(default=None, repr=False)
    audio_vae_config: dict[str, Any] | None = field(default=None, repr=False)
    vocoder_config: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return self.transformer_config["num_layers"]

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.transformer_config["in_channels"]

    @property
    def width(self) -> int:
        """D = heads · head width."""
        return self.transformer_config["num_attention_heads"] * self.transformer_config["attention_head_dim"]

    @property
    def caption_channels(self) -> int:
        """Width of the text encoder's output."""
        return self.transformer_config["caption_channels"]

    @property
    def has_audio(self) -> bool:
        """Whether the model makes sound beside pictures."""
        return self.audio_vae_config is not None

    @property
    def skips_attention(self) -> bool:
        """Whether self attention can be skipped in chosen blocks, which is what STG is."""
        return self.transformer_config.get("perturbed_attn", False)

    @property
    def smallest_sampled_side(self) -> int:
        """The least height or width, in pixels, that can be decoded: reflected borders need two latents."""
        is_reflected = self.vae_config.get("decoder_spatial_padding_mode") == "reflect"
        return self.spatial_factor * (2 if is_reflected else 1)

    @property
    def least_sampling_steps(self) -> int:
        """A schedule that is stretched to an end of its own needs two steps."""
        return 2 if self.scheduler_config.get("shift_terminal") else 1

    @property
    def prompt_multiple(self) -> int:
        """What a prompt's length in tokens must be a multiple of: the connectors' registers; 1 without connectors."""
        config = self.connectors_config or {}
        counts = (config.get(f"{name}_connector_num_learnable_registers") or 1 for name in ("video", "audio"))
        return math.lcm(*counts)

    @property
    def audio_latents_per_second(self) -> float:
        """25 for all published versions. Only where `has_audio`."""
        config = self.transformer_config
        return config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
