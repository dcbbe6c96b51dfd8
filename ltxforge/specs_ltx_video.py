"""What is fixed about each LTX-Video version, 0.9.0 to 0.9.8, and about its built-in small twins.

Data only; reads no file and decides nothing about a run. `models/detect.py` finds out which version a file is,
`models/tiny.py` makes the small random twins that stand in for weights.

Sources: diffusers `scripts/convert_ltx_to_diffusers.py` (wiring, schedulers); Lightricks' LTX-Video repository,
`configs/*.yaml` (steps, guidance, decoding) and the model card of Lightricks/LTX-Video (licences); diffusers' LTX page
(13B guidance without the spatio-temporal one); Lightricks' LTX-Video-Trainer (0.9.6 and 0.9.7 use 0.9.5's VAE).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ltxforge.model_spec import Licence, ModelSpec, SamplingDefaults

_HUB = "https://huggingface.co/Lightricks/LTX-Video/blob/main"
LICENCE_090 = Licence("LTX-Video 2B v0.9 RAIL-M", f"{_HUB}/ltx-video-2b-v0.9.license.txt")
LICENCE_091 = Licence("LTX-Video 2B v0.9.1 RAIL-M", f"{_HUB}/ltx-video-2b-v0.9.1.license.txt")
LICENCE_095 = Licence("LTX-Video 2B v0.9.5 OpenRAIL-M", f"{_HUB}/ltx-video-2b-v0.9.5.license.txt")
LICENCE_OPEN_WEIGHTS = Licence("LTX-Video Open Weights License 0.X", f"{_HUB}/LTX-Video-Open-Weights-License-0.X.txt")

TRANSFORMER_2B: dict[str, Any] = {
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1,
    "num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28,
    "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "caption_channels": 4096, "attention_bias": True, "attention_out_bias": True,
}  # fmt: skip
TRANSFORMER_13B = {
    **TRANSFORMER_2B, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48,
}  # fmt: skip

_VAE_SHARED: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4, "patch_size_t": 1,
    "resnet_norm_eps": 1e-6, "scaling_factor": 1.0, "encoder_causal": True, "decoder_causal": False,
}  # fmt: skip
VAE_090: dict[str, Any] = {
    **_VAE_SHARED,
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4), "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5, "downsample_type": ("conv",) * 4,
    "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "timestep_conditioning": False,
}  # fmt: skip
VAE_091: dict[str, Any] = {
    **VAE_090,
    "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_spatio_temporal_scaling": (True, True, True), "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
}  # fmt: skip
VAE_095: dict[str, Any] = {
    **_VAE_SHARED,
    "block_out_channels": (128, 256, 512, 1024, 2048), "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2), "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True,) * 4, "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip

# 0.9.0 and 0.9.1: the shift grows with the token count and the last sigma is stretched to 0.1.
SCHEDULER_DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05,
    "base_image_seq_len": 1024, "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
# 0.9.5 and later: the pipeline brings its own linear-quadratic schedule.
SCHEDULER_PLAIN: dict[str, Any] = {"use_dynamic_shifting": False}

# The steps that distilled weights were distilled for; their files list them as `allowed_inference_steps`. They are
# the linear-quadratic schedule of eight steps.
DISTILLED_TIMESTEPS = (1000.0, 993.75, 987.5, 981.25, 975.0, 909.375, 725.0, 421.875)
_DISTILLED = SamplingDefaults(8, 1.0, DISTILLED_TIMESTEPS, 0.05, 0.025)
_DEV_2B = SamplingDefaults(40, 3.0, (), 0.05, 0.025)
_DEV_13B = SamplingDefaults(30, 5.0, (), 0.05, 0.025)


def _from(base: ModelSpec, version: str, hub: str, **changes: Any) -> ModelSpec:
    return dataclasses.replace(base, version=version, hub=hub, **changes)


def _file(name: str) -> str:
    return f"Lightricks/LTX-Video:{name}.safetensors"


_V090 = ModelSpec(
    version="0.9.0", hub="Lightricks/LTX-Video", family="ltx-video", parameters="2B", rope="plain", distilled=False,
    vae_family="0.9.0", sampling=SamplingDefaults(40, 3.0), licence=LICENCE_090,
    transformer_config=TRANSFORMER_2B, vae_config=VAE_090, scheduler_config=SCHEDULER_DYNAMIC,
)  # fmt: skip
_V091 = _from(
    _V090, "0.9.1", _file("ltx-video-2b-v0.9.1"), vae_family="0.9.1", vae_config=VAE_091, licence=LICENCE_091,
    sampling=_DEV_2B,
)  # fmt: skip
_V095 = _from(
    _V091, "0.9.5", "Lightricks/LTX-Video-0.9.5", rope="causal", vae_family="0.9.5", vae_config=VAE_095,
    scheduler_config=SCHEDULER_PLAIN, licence=LICENCE_095, default_prompt_tokens=256,
)  # fmt: skip
_V096 = _from(_V095, "0.9.6-dev", _file("ltxv-2b-0.9.6-dev-04-25"), licence=LICENCE_OPEN_WEIGHTS)
_V097 = _from(
    _V096, "0.9.7-dev", "Lightricks/LTX-Video-0.9.7-dev", parameters="13B", transformer_config=TRANSFORMER_13B,
    sampling=_DEV_13B,
)  # fmt: skip
_MADE_DISTILLED: dict[str, Any] = {"distilled": True, "sampling": _DISTILLED}

LTX_VIDEO_SPECS: dict[str, ModelSpec] = {
    spec.version: spec
    for spec in (
        _V090,
        _V091,
        _V095,
        _V096,
        _from(_V096, "0.9.6-distilled", _file("ltxv-2b-0.9.6-distilled-04-25"), **_MADE_DISTILLED),
        _V097,
        _from(_V097, "0.9.7-distilled", "Lightricks/LTX-Video-0.9.7-distilled", **_MADE_DISTILLED),
        _from(_V097, "0.9.8-dev", _file("ltxv-13b-0.9.8-dev")),
        _from(_V097, "0.9.8-distilled", "Lightricks/LTX-Video-0.9.8-13B-distilled", **_MADE_DISTILLED),
        _from(_V096, "0.9.8-2b-distilled", _file("ltxv-2b-0.9.8-distilled"), **_MADE_DISTILLED),
    )
}
"""Every published LTX-Video version by name."""


def _tiny_transformer(**changes: Any) -> dict[str, Any]:
    return {
        **TRANSFORMER_2B, "in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 32,
        "cross_attention_dim": 128, "num_layers": 4, "caption_channels": 64, **changes,
    }  # fmt: skip


_TINY_VAE_090 = {
    **VAE_090, "latent_channels": 16, "block_out_channels": (16, 16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16, 16), "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
}  # fmt: skip
_TINY_VAE_091 = {
    **VAE_091, "latent_channels": 16, "block_out_channels": (16, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 32), "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4,
}  # fmt: skip
_TINY_VAE_095 = {
    **VAE_095, "latent_channels": 16, "block_out_channels": (8, 16, 32, 64, 64),
    "decoder_block_out_channels": (8, 16, 32), "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4,
}  # fmt: skip


def _tiny(name: str, version: str, vae: dict[str, Any], **transformer: Any) -> ModelSpec:
    return dataclasses.replace(
        LTX_VIDEO_SPECS[version], hub=name, parameters="tiny", tiny=True, vae_config=vae,
        transformer_config=_tiny_transformer(**transformer),
        licence=Licence("none (random weights made by ltxforge)", ""),
    )  # fmt: skip


LTX_VIDEO_TINY: dict[str, ModelSpec] = {
    "tiny/ltx-video": _tiny("tiny/ltx-video", "0.9.5", _TINY_VAE_095),
    "tiny/ltx-video-0.9.0": _tiny("tiny/ltx-video-0.9.0", "0.9.0", _TINY_VAE_090),
    "tiny/ltx-video-0.9.1": _tiny("tiny/ltx-video-0.9.1", "0.9.1", _TINY_VAE_091),
    "tiny/ltx-video-0.9.5": _tiny("tiny/ltx-video-0.9.5", "0.9.5", _TINY_VAE_095),
    "tiny/ltx-video-0.9.8": _tiny("tiny/ltx-video-0.9.8", "0.9.8-2b-distilled", _TINY_VAE_095),
    "tiny/ltx-video-13b": _tiny(
        "tiny/ltx-video-13b", "0.9.7-dev", _TINY_VAE_095,
        attention_head_dim=64, num_attention_heads=2, num_layers=6,
    ),
}  # fmt: skip
"""Built-in small models with the real classes and ratios and random, seeded weights; by the name a recipe uses."""
