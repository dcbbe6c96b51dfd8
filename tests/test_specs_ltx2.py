"""LTX-2's specs against diffusers' classes built without memory: sizes, widths that must meet, the distilled steps."""

import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

from ltxforge.specs import SPECS, TINY
from ltxforge.specs_ltx2 import LTX2_SPECS, LTX2_TINY
from ltxforge.specs_ltx_video import LTX_VIDEO_SPECS, LTX_VIDEO_TINY

EVERY = {**LTX2_SPECS, **LTX2_TINY}


def count(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e9


@pytest.mark.parametrize("version", LTX2_SPECS)
def test_published_sizes(version):
    """19B is 2.0's transformer; 22B are 2.3's and 2.5's transformer and connectors."""
    spec = LTX2_SPECS[version]
    with torch.device("meta"):
        transformer = LTX2VideoTransformer3DModel(**spec.transformer_config)
        connectors = LTX2TextConnectors(**spec.connectors_config)
    total = count(transformer) + (0 if spec.parameters == "19B" else count(connectors))
    assert f"{total:.0f}B" == spec.parameters


@pytest.mark.parametrize("name", EVERY)
def test_the_parts_fit_each_other(name):
    spec = EVERY[name]
    kind = LTX2VocoderWithBWE if "bwe_in_channels" in spec.vocoder_config else LTX2Vocoder
    with torch.device("meta"):
        transformer = LTX2VideoTransformer3DModel(**spec.transformer_config)
        connectors = LTX2TextConnectors(**spec.connectors_config)
        vae = AutoencoderKLLTX2Video(**spec.vae_config)
        audio_vae = AutoencoderKLLTX2Audio(**spec.audio_vae_config)
        vocoder = kind(**spec.vocoder_config)
    block = transformer.transformer_blocks[0]
    for modality, prefix in (("video", ""), ("audio", "audio_")):
        connected = getattr(connectors, f"{modality}_connector").inner_dim
        projection = getattr(transformer, f"{prefix}caption_projection", None)
        prompt = projection.linear_1.in_features if projection else getattr(block, f"{prefix}attn2").to_k.in_features
        assert connected == prompt
    assert vae.latents_mean.shape == (spec.latent_channels,)
    mel_bins = audio_vae.config.mel_bins // audio_vae.mel_compression_ratio
    assert audio_vae.latents_mean.shape == (spec.transformer_config["audio_in_channels"],)
    assert audio_vae.config.latent_channels * mel_bins == spec.transformer_config["audio_in_channels"]
    assert vocoder.config.in_channels == audio_vae.config.output_channels * audio_vae.config.mel_bins
    assert spec.default_prompt_tokens % spec.connectors_config["video_connector_num_learnable_registers"] == 0
    assert (spec.spatial_factor, spec.temporal_factor) == (
        vae.spatial_compression_ratio,
        vae.temporal_compression_ratio,
    )
    assert max(spec.sampling.stg_blocks, default=0) < spec.blocks
    assert spec.has_audio and spec.family == "ltx-2"


@pytest.mark.parametrize(("version", "megabytes"), [("2.0-dev", 15.7), ("2.3-dev", 12.6), ("2.5-dev", 12.6)])
def test_what_a_cached_caption_weighs(version, megabytes):
    config, tokens = LTX2_SPECS[version].connectors_config, LTX2_SPECS[version].default_prompt_tokens
    widths = [
        config[f"{part}_connector_num_attention_heads"] * config[f"{part}_connector_attention_head_dim"]
        for part in ("video", "audio")
    ]
    assert tokens * sum(widths) * 2 / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_distilled_versions_take_diffusers_eight_steps_without_guidance():
    for version, spec in LTX2_SPECS.items():
        assert spec.distilled == version.endswith("-distilled") == bool(spec.sampling.timesteps)
        if spec.distilled:
            assert spec.sampling.timesteps == tuple(1000 * sigma for sigma in DISTILLED_SIGMA_VALUES)
            assert (spec.sampling.steps, spec.sampling.guidance, spec.sampling.audio_guidance) == (8, 1.0, 1.0)
            assert spec.sampling.stg == 0 and spec.sampling.modality_guidance == 1


def test_ltx_video_s_specs_say_that_there_is_no_sound():
    for spec in (*LTX_VIDEO_SPECS.values(), *LTX_VIDEO_TINY.values()):
        assert not spec.has_audio and spec.text_encoder == "t5" and spec.connectors_config is None
    assert len(SPECS) == len(LTX_VIDEO_SPECS) + len(LTX2_SPECS) and len(TINY) == len(LTX_VIDEO_TINY) + len(LTX2_TINY)
