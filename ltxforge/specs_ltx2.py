"""What is fixed about each LTX-2 version: 2.0, 2.3 and 2.5, dev and distilled; and its built-in small twins.

Data only. Sources: diffusers `scripts/convert_ltx2_to_diffusers.py` (wiring, schedulers), its LTX-2 page (guidance,
names of converted models) and `pipelines/ltx2/utils.py` (the distilled steps); Lightricks' LTX-2 repository (2.0's 40
steps and block 29, published files, licences).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ltxforge.model_spec import Licence, ModelSpec, SamplingDefaults
from ltxforge.specs_ltx_video import DISTILLED_TIMESTEPS, SCHEDULER_DYNAMIC

_REPOSITORY = "https://github.com/Lightricks/LTX-2/blob/main"
LICENCE_20 = Licence("LTX-2 Community License Agreement", f"{_REPOSITORY}/LICENSE-2")
LICENCE_25 = Licence("LTX-2.x Community License Agreement", f"{_REPOSITORY}/LICENSE-2_x")
GEMMA_3 = "google/gemma-3-12b-it-qat-q4_0-unquantized"
"""Where the text encoder of 2.0 and 2.3 is published. 2.5's is tuned for it and comes with it."""

TRANSFORMER_20: dict[str, Any] = {
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1,
    "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096,
    "vae_scale_factors": (8, 32, 32), "pos_embed_max_pos": 20, "base_height": 2048, "base_width": 2048,
    "gated_attn": False, "cross_attn_mod": False,
    "audio_in_channels": 128, "audio_out_channels": 128, "audio_patch_size": 1, "audio_patch_size_t": 1,
    "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048,
    "audio_scale_factor": 4, "audio_pos_embed_max_pos": 20, "audio_sampling_rate": 16000, "audio_hop_length": 160,
    "audio_gated_attn": False, "audio_cross_attn_mod": False,
    "num_layers": 48, "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 3840, "attention_bias": True,
    "attention_out_bias": True, "rope_theta": 10000.0, "rope_double_precision": True, "causal_offset": 1,
    "timestep_scale_multiplier": 1000, "cross_attn_timestep_scale_multiplier": 1000, "rope_type": "split",
    "use_prompt_embeddings": True, "perturbed_attn": False,
}  # fmt: skip
# 2.3 gates attention, modulates prompt attention on both sides and projects prompts in the connectors.
TRANSFORMER_23 = {
    **TRANSFORMER_20, "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
    "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip
# 2.5 drops the biases of video's feed-forward and can mark tokens of single frames.
TRANSFORMER_25 = {**TRANSFORMER_23, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}

CONNECTORS_20: dict[str, Any] = {
    "caption_channels": 3840, "text_proj_in_factor": 49,
    "video_connector_num_attention_heads": 30, "video_connector_attention_head_dim": 128,
    "video_connector_num_layers": 2, "video_connector_num_learnable_registers": 128, "video_gated_attn": False,
    "audio_connector_num_attention_heads": 30, "audio_connector_attention_head_dim": 128,
    "audio_connector_num_layers": 2, "audio_connector_num_learnable_registers": 128, "audio_gated_attn": False,
    "connector_rope_base_seq_len": 4096, "rope_theta": 10000.0, "rope_double_precision": True,
    "causal_temporal_positioning": False, "rope_type": "split", "per_modality_projections": False, "proj_bias": False,
}  # fmt: skip
# Also 2.5's, whose Gemma 4 12B is as wide and deep as Gemma 3 12B; the encoder's own configuration decides.
CONNECTORS_23 = {
    **CONNECTORS_20,
    "video_connector_num_attention_heads": 32, "video_connector_num_layers": 8, "video_gated_attn": True,
    "audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64,
    "audio_connector_num_layers": 8, "audio_gated_attn": True,
    "per_modality_projections": True, "video_hidden_dim": 4096, "audio_hidden_dim": 2048, "proj_bias": True,
}  # fmt: skip

VAE_20: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 128, "block_out_channels": (256, 512, 1024, 2048),
    "down_block_types": ("LTX2VideoDownBlock3D",) * 4, "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2), "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True,) * 4, "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_type": ("spatiotemporal",) * 3, "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3,
    "timestep_conditioning": False, "patch_size": 4, "patch_size_t": 1, "resnet_norm_eps": 1e-6,
    "encoder_causal": True, "decoder_causal": False,
    "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect",
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
# Also 2.5's convolutional VAE: the encoders' weights are the same, so are the latents.
VAE_23 = {
    **VAE_20,
    "block_out_channels": (256, 512, 1024, 1024), "decoder_block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": (4, 6, 4, 2, 2), "decoder_layers_per_block": (4, 6, 4, 2, 2),
    "decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5,
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    "upsample_residual": (False,) * 4, "upsample_factor": (2, 2, 1, 2), "decoder_spatial_padding_mode": "zeros",
}  # fmt: skip

AUDIO_VAE: dict[str, Any] = {
    "base_channels": 128, "output_channels": 2, "ch_mult": (1, 2, 4), "num_res_blocks": 2, "attn_resolutions": None,
    "in_channels": 2, "resolution": 256, "latent_channels": 8, "norm_type": "pixel", "causality_axis": "height",
    "dropout": 0.0, "mid_block_add_attention": False, "sample_rate": 16000, "mel_hop_length": 160, "is_causal": True,
    "mel_bins": 64, "double_z": True,
}  # fmt: skip

VOCODER_20: dict[str, Any] = {
    "in_channels": 128, "hidden_channels": 1024, "out_channels": 2,
    "upsample_kernel_sizes": [16, 15, 8, 4, 4], "upsample_factors": [6, 5, 2, 2, 2],
    "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": [[1, 3, 5]] * 3,
    "act_fn": "leaky_relu", "leaky_relu_negative_slope": 0.1, "antialias": False, "final_act_fn": "tanh",
    "final_bias": True, "output_sampling_rate": 24000,
}  # fmt: skip
# 2.3 and 2.5 make 16 kHz first and extend the bandwidth to 48 kHz from its mel spectrogram.
VOCODER_23: dict[str, Any] = {
    "in_channels": 128, "hidden_channels": 1536, "out_channels": 2,
    "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4], "upsample_factors": [5, 2, 2, 2, 2, 2],
    "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": [[1, 3, 5]] * 3,
    "act_fn": "snakebeta", "leaky_relu_negative_slope": 0.1, "antialias": True, "antialias_ratio": 2,
    "antialias_kernel_size": 12, "final_act_fn": None, "final_bias": False,
    "bwe_in_channels": 128, "bwe_hidden_channels": 512, "bwe_out_channels": 2,
    "bwe_upsample_kernel_sizes": [12, 11, 4, 4, 4], "bwe_upsample_factors": [6, 5, 2, 2, 2],
    "bwe_resnet_kernel_sizes": [3, 7, 11], "bwe_resnet_dilations": [[1, 3, 5]] * 3,
    "bwe_act_fn": "snakebeta", "bwe_leaky_relu_negative_slope": 0.1, "bwe_antialias": True, "bwe_antialias_ratio": 2,
    "bwe_antialias_kernel_size": 12, "bwe_final_act_fn": None, "bwe_final_bias": False,
    "filter_length": 512, "hop_length": 80, "window_length": 512, "num_mel_channels": 64,
    "input_sampling_rate": 16000, "output_sampling_rate": 48000,
}  # fmt: skip

SCHEDULER_DISTILLED: dict[str, Any] = {**SCHEDULER_DYNAMIC, "use_dynamic_shifting": False, "shift_terminal": None}

_FAULTS = (
    f"{SamplingDefaults.negative_prompt}, flicker, warped faces and hands, unreadable text, muffled or distorted sound,"
    " hiss, clipping, robotic voice, lips out of step with speech"
)
_GUIDED = SamplingDefaults(
    30, 3.0, audio_guidance=7.0, stg=1.0, stg_blocks=(28,), modality_guidance=3.0, rescale=0.7,
    negative_prompt=_FAULTS,
)  # fmt: skip
# STG would cost 2.0 a pass and change nothing: its transformer in diffusers 0.42 has no attention that can be skipped.
_GUIDED_20 = dataclasses.replace(_GUIDED, steps=40, stg=0.0, stg_blocks=(29,))
_DISTILLED = SamplingDefaults(8, 1.0, DISTILLED_TIMESTEPS, audio_guidance=1.0, negative_prompt=_FAULTS)

_V20 = ModelSpec(
    version="2.0-dev", hub="Lightricks/LTX-2", family="ltx-2", parameters="19B", rope="causal", distilled=False,
    vae_family="2.0", sampling=_GUIDED_20, licence=LICENCE_20, transformer_config=TRANSFORMER_20, vae_config=VAE_20,
    scheduler_config=SCHEDULER_DYNAMIC, default_fps=24.0, default_prompt_tokens=1024, text_encoder="gemma-3",
    connectors_config=CONNECTORS_20, audio_vae_config=AUDIO_VAE, vocoder_config=VOCODER_20,
)  # fmt: skip
_V23 = dataclasses.replace(
    _V20, version="2.3-dev", hub="Lightricks/LTX-2.3:ltx-2.3-22b-dev.safetensors", parameters="22B", vae_family="2.3",
    sampling=_GUIDED, transformer_config=TRANSFORMER_23, vae_config=VAE_23, connectors_config=CONNECTORS_23,
    vocoder_config=VOCODER_23,
)  # fmt: skip
_V25 = dataclasses.replace(
    _V23, version="2.5-dev", hub="Lightricks/LTX-2.5-Diffusers:transformer_full", transformer_config=TRANSFORMER_25,
    text_encoder="gemma-4", licence=LICENCE_25,
)  # fmt: skip


def _distilled(dev: ModelSpec, hub: str) -> ModelSpec:
    return dataclasses.replace(
        dev, version=dev.version.replace("dev", "distilled"), hub=hub, distilled=True,
        sampling=dataclasses.replace(_DISTILLED, stg_blocks=dev.sampling.stg_blocks),
        scheduler_config=SCHEDULER_DISTILLED,
    )  # fmt: skip


LTX2_SPECS: dict[str, ModelSpec] = {
    spec.version: spec
    for spec in (
        _V20,
        _distilled(_V20, "Lightricks/LTX-2:ltx-2-19b-distilled.safetensors"),
        _V23,
        _distilled(_V23, "Lightricks/LTX-2.3:ltx-2.3-22b-distilled-1.1.safetensors"),
        _V25,
        _distilled(_V25, "Lightricks/LTX-2.5-Diffusers"),
    )
}
"""Every published LTX-2 version by name."""

_TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 32,
    "cross_attention_dim": 128, "audio_in_channels": 32, "audio_out_channels": 32, "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16, "audio_cross_attention_dim": 64, "num_layers": 4, "caption_channels": 64,
}  # fmt: skip
# A tiny Gemma is 64 wide and has three layers; registers stay on: they are a quarter of the 128 positions.
_TINY_CONNECTORS: dict[str, Any] = {
    "caption_channels": 64, "text_proj_in_factor": 4,
    "video_connector_num_attention_heads": 4, "video_connector_attention_head_dim": 16,
    "video_connector_num_layers": 1, "video_connector_num_learnable_registers": 32,
    "audio_connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 16,
    "audio_connector_num_layers": 1, "audio_connector_num_learnable_registers": 32,
}  # fmt: skip
_TINY_CONNECTORS_23 = {
    **_TINY_CONNECTORS, "video_connector_attention_head_dim": 32, "video_hidden_dim": 128, "audio_hidden_dim": 64,
}  # fmt: skip
_TINY_VAE_20: dict[str, Any] = {
    "latent_channels": 16, "block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4,
}  # fmt: skip
_TINY_VAE_23 = {
    **_TINY_VAE_20, "block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 16, 32),
    "decoder_layers_per_block": (1,) * 5,
}  # fmt: skip
# All 64 mel bins, a quarter of the channels: a latent frame is 2 · 16 numbers, as many as there are statistics.
_TINY_AUDIO_VAE: dict[str, Any] = {"base_channels": 32, "num_res_blocks": 1, "latent_channels": 2}
_TINY_VOCODER_20: dict[str, Any] = {
    "hidden_channels": 32, "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]],
}  # fmt: skip
_TINY_VOCODER_23: dict[str, Any] = {
    **_TINY_VOCODER_20, "hidden_channels": 64, "bwe_hidden_channels": 32,
    "bwe_resnet_kernel_sizes": [3], "bwe_resnet_dilations": [[1, 3, 5]],
}  # fmt: skip


def _tiny(
    name: str, version: str, connectors: dict[str, Any], vae: dict[str, Any], vocoder: dict[str, Any]
) -> ModelSpec:
    real = LTX2_SPECS[version]
    assert real.connectors_config and real.audio_vae_config and real.vocoder_config
    return dataclasses.replace(
        real, hub=name, parameters="tiny", tiny=True, default_prompt_tokens=128,
        licence=Licence("none (random weights made by ltxforge)", ""),
        sampling=dataclasses.replace(real.sampling, stg_blocks=(2,)),
        transformer_config={**real.transformer_config, **_TINY_TRANSFORMER},
        connectors_config={**real.connectors_config, **connectors},
        vae_config={**real.vae_config, **vae},
        audio_vae_config={**real.audio_vae_config, **_TINY_AUDIO_VAE},
        vocoder_config={**real.vocoder_config, **vocoder},
    )  # fmt: skip


LTX2_TINY: dict[str, ModelSpec] = {
    "tiny/ltx2": _tiny("tiny/ltx2", "2.0-dev", _TINY_CONNECTORS, _TINY_VAE_20, _TINY_VOCODER_20),
    "tiny/ltx2.3": _tiny("tiny/ltx2.3", "2.3-dev", _TINY_CONNECTORS_23, _TINY_VAE_23, _TINY_VOCODER_23),
    "tiny/ltx2.5": _tiny("tiny/ltx2.5", "2.5-dev", _TINY_CONNECTORS_23, _TINY_VAE_23, _TINY_VOCODER_23),
}
"""Built-in small LTX-2 models, as `specs.TINY`; made by `models/ltx2_tiny.py`."""
