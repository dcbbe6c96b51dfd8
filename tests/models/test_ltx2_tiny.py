"""The built-in small LTX-2 models: the same everywhere, wired as the real ones, and able to run diffusers' pipeline."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline

from ltxforge.models import ltx2_tiny as tiny
from ltxforge.models.tiny import synthetic_clip
from ltxforge.specs_ltx2 import LTX2_SPECS, LTX2_TINY

NAMES = list(LTX2_TINY)
PARTS = [
    tiny.tiny_transformer,
    tiny.tiny_connectors,
    tiny.tiny_text_encoder,
    tiny.tiny_vae,
    tiny.tiny_audio_vae,
    tiny.tiny_vocoder,
]
REAL = {"tiny/ltx2": "2.0-dev", "tiny/ltx2.3": "2.3-dev", "tiny/ltx2.5": "2.5-dev"}
SWITCHES = [
    "gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "rope_type", "rope_double_precision",
    "use_prompt_embeddings", "perturbed_attn", "ff_bias", "use_keyframes_abs_pos_embedding", "audio_scale_factor",
    "vae_scale_factors",
]  # fmt: skip


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_same_every_time_and_disturb_no_run(name, make):
    before = torch.random.get_rng_state()
    first = make(LTX2_TINY[name]).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    second = make(LTX2_TINY[name]).state_dict()
    assert first and all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.isfinite(value).all() for value in first.values())


@pytest.mark.parametrize("name", NAMES)
def test_switches_are_the_real_version_s(name):
    ours, real = LTX2_TINY[name], LTX2_SPECS[REAL[name]]
    for switch in SWITCHES:
        assert ours.transformer_config.get(switch) == real.transformer_config.get(switch), switch
    assert ours.vocoder_config["upsample_factors"] == real.vocoder_config["upsample_factors"]
    assert ours.text_encoder == real.text_encoder and ours.sampling.guidance == real.sampling.guidance


def encode(name: str, captions: list[str]):
    """Connectors' outputs and mask of captions, as the pipeline makes them."""
    spec = LTX2_TINY[name]
    words = tiny.gemma_tokenizer()(
        captions, padding="max_length", max_length=spec.default_prompt_tokens, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = tiny.tiny_text_encoder(spec)(**words, output_hidden_states=True).hidden_states
        layers = torch.stack(hidden, dim=-1).flatten(2, 3)
        return words.attention_mask, *tiny.tiny_connectors(spec)(layers, words.attention_mask, padding_side="left")


@pytest.mark.parametrize("name", NAMES)
def test_registers_fill_the_padding_so_that_every_position_is_real(name):
    spec = LTX2_TINY[name]
    words, video, audio, mask = encode(name, ["a red fox", "rain on a tin roof, far away"])
    assert int(words[0].sum()) == 10 and int(words[0, 0]) == 0 and int(words[0, -1]) == 1  # <bos> and nine bytes, right
    assert mask.shape == (2, spec.default_prompt_tokens) and bool((mask == 1).all())
    wide = spec.transformer_config["use_prompt_embeddings"]
    assert video.shape[-1] == (spec.caption_channels if wide else spec.width)
    assert audio.shape[-1] == (spec.caption_channels if wide else 64)
    assert video.std() > 0.1 and not torch.allclose(video[0], video[1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_video_latents_have_the_real_ratios_and_an_ordinary_scale(name):
    vae = tiny.tiny_vae(LTX2_TINY[name])
    with torch.no_grad():
        posterior = vae.encode(synthetic_clip(17, 96)).latent_dist
        mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
        latents = (posterior.mean - mean) / std
        pixels = vae.decode(posterior.mean, return_dict=False)[0]
    assert latents.shape == (1, 16, 3, 3, 3) and pixels.shape == (1, 3, 17, 96, 96)
    assert abs(latents.mean()) < 0.3 and 0.6 < latents.std() < 1.4 and 0.3 < pixels.std() < 0.7
    assert 0.05 < (posterior.std / std).mean() < 0.2


def test_audio_latents_have_the_real_ratios_and_an_ordinary_scale():
    spec = LTX2_TINY["tiny/ltx2"]
    vae = tiny.tiny_audio_vae(spec)
    mel = tiny.synthetic_mel(64, frames=201)  # two seconds, another length than the one calibrated on
    with torch.no_grad():
        posterior = vae.encode(mel).latent_dist
        mean = posterior.mode()
        back = vae.decode(mean, return_dict=False)[0]
    tokens = mean.transpose(1, 2).flatten(2)
    assert tokens.shape == (1, 51, spec.transformer_config["audio_in_channels"])
    latents = (tokens - vae.latents_mean) / vae.latents_std
    assert abs(latents.mean()) < 0.3 and 0.6 < latents.std() < 1.4
    assert 0.02 < (posterior.std.mean() / vae.latents_std.mean()) < 0.5
    assert -7 < back.mean() < -3 and 1 < back.std() < 3


@pytest.mark.parametrize("name", NAMES)
def test_sound_has_the_real_rates_and_an_ordinary_loudness(name):
    spec = LTX2_TINY[name]
    with torch.no_grad():
        sound = tiny.tiny_vocoder(spec)(tiny.synthetic_mel(64, frames=100))
    rate = spec.vocoder_config["output_sampling_rate"]
    assert rate == (24000 if name == "tiny/ltx2" else 48000)
    assert sound.shape == (1, 2, rate)  # 100 mel frames are a second
    assert 0.02 < sound.std() < 0.4 and float((sound.abs() == 1).float().mean()) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_pipeline_samples_picture_and_sound_with_the_version_s_guidance(name):
    spec, sampling = LTX2_TINY[name], LTX2_TINY[name].sampling
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**spec.scheduler_config), vae=tiny.tiny_vae(spec),
        audio_vae=tiny.tiny_audio_vae(spec), text_encoder=tiny.tiny_text_encoder(spec),
        tokenizer=tiny.gemma_tokenizer(), connectors=tiny.tiny_connectors(spec),
        transformer=tiny.tiny_transformer(spec), vocoder=tiny.tiny_vocoder(spec),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    frames, sound = pipeline(
        "a red fox", negative_prompt="noise", width=64, height=64, num_frames=9, frame_rate=spec.default_fps,
        num_inference_steps=2, max_sequence_length=spec.default_prompt_tokens, output_type="np", return_dict=False,
        guidance_scale=sampling.guidance, audio_guidance_scale=sampling.audio_guidance,
        stg_scale=sampling.stg, audio_stg_scale=sampling.stg,
        spatio_temporal_guidance_blocks=list(sampling.stg_blocks),
        modality_scale=sampling.modality_guidance, audio_modality_scale=sampling.modality_guidance,
        guidance_rescale=sampling.rescale, audio_guidance_rescale=sampling.rescale,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert frames.shape == (1, 9, 64, 64, 3) and frames.std() > 0.05
    seconds = sound.shape[-1] / spec.vocoder_config["output_sampling_rate"]
    assert sound.shape[:2] == (1, 2) and abs(seconds - 9 / 24) < 0.05 and bool(torch.isfinite(sound).all())
