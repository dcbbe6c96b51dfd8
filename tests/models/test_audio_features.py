"""The mel front end against transformers' audio utilities in float64, and lengths against the audio VAE itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from ltxforge.models.audio_features import MelSettings, latent_length, log_mel, mel_filters, mel_frames

LTX2 = MelSettings()
OTHERS = [
    dataclasses.replace(LTX2, sample_rate=48000, hop_length=480, n_fft=2048, win_length=2048, mel_bins=80),
    dataclasses.replace(LTX2, sample_rate=24000, n_fft=512, win_length=400, mel_bins=16, lowest_hz=80, highest_hz=7600),
]


def oracle_filters(settings: MelSettings) -> np.ndarray:
    return mel_filter_bank(
        settings.n_fft // 2 + 1, settings.mel_bins, settings.lowest_hz,
        settings.highest_hz or settings.sample_rate / 2, settings.sample_rate, norm="slaney", mel_scale="slaney",
    )  # fmt: skip


def oracle(waveform: np.ndarray, settings: MelSettings) -> np.ndarray:
    """log-mel of one channel in float64: [mel frames, mel bins]."""
    return spectrogram(
        waveform.astype(np.float64), window_function(settings.win_length, "hann", periodic=True,
        frame_length=settings.n_fft), settings.n_fft, settings.hop_length, fft_length=settings.n_fft, power=1.0,
        center=True, pad_mode="reflect", mel_filters=oracle_filters(settings), mel_floor=settings.floor, log_mel="log",
        dtype=np.float64,
    ).T  # fmt: skip


def by_definition(waveform: np.ndarray, settings: MelSettings) -> np.ndarray:
    """The same by numpy alone, in float64 throughout but for the oracle's filters: [mel frames, mel bins]."""
    half, hop = settings.n_fft // 2, settings.hop_length
    mirrored = np.concatenate([waveform[half:0:-1], waveform, waveform[-2 : -half - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.win_length) / settings.win_length)
    margin = (settings.n_fft - settings.win_length) // 2
    window = np.pad(window, (margin, settings.n_fft - settings.win_length - margin))
    starts = range(0, len(waveform) // hop * hop + 1, hop)
    magnitudes = np.stack([np.abs(np.fft.rfft(window * mirrored[at : at + settings.n_fft])) for at in starts])
    return np.log(np.maximum(magnitudes @ oracle_filters(settings), settings.floor))


def sounds(samples: int, rate: int) -> np.ndarray:
    """float64 [3, 2, samples]: a chord and noise at speaking level, a sweep with silence in it, digital silence."""
    time, random = np.arange(samples) / rate, np.random.default_rng(0)
    chord = 0.2 * (np.sin(2 * np.pi * 440 * time) + np.sin(2 * np.pi * 1234.5 * time + 1))
    sweep = 0.9 * np.sin(2 * np.pi * (50 + 3000 * time) * time) * (time % 0.5 < 0.25)
    noise = 0.1 * random.standard_normal(samples)
    return np.stack([[chord, noise], [sweep, -sweep], [0 * time, 0 * time]])


@pytest.mark.parametrize("settings", [LTX2, *OTHERS])
def test_filters_equal_the_oracle_s(settings: MelSettings) -> None:
    assert np.abs(mel_filters(settings).numpy() - oracle_filters(settings)).max() < 1e-15
    assert (mel_filters(settings).sum(0) > 0).all()


@pytest.mark.parametrize("settings", [LTX2, *OTHERS])
def test_log_mel_equals_the_oracle_in_float64(settings: MelSettings) -> None:
    waveforms = sounds(settings.sample_rate + 37, settings.sample_rate)
    ours = log_mel(torch.from_numpy(waveforms), settings)
    frames = waveforms.shape[-1] // settings.hop_length + 1
    assert ours.shape == (3, 2, frames, settings.mel_bins) and ours.dtype == torch.float64
    for found, waveform in zip(ours.flatten(0, 1).numpy(), waveforms.reshape(6, -1), strict=True):
        # The oracle rounds its spectrum to complex64 (6e-8 of each value); the second formulation does not.
        assert np.abs(found - oracle(waveform, settings)).max() < 1.5e-7
        assert np.abs(found - by_definition(waveform, settings)).max() < 1e-9
    assert (ours[2] == np.log(settings.floor)).all()


def test_float32_stays_within_rounding_of_float64() -> None:
    """The transform's rounding is some 1e-7 of the loudest bin: magnitudes agree to that, logarithms where it is
    audible."""
    waveforms = sounds(32000, 16000).astype(np.float32)
    ours = log_mel(torch.from_numpy(waveforms), LTX2)
    assert ours.dtype == torch.float32
    for found, waveform in zip(ours.flatten(0, 1).double().numpy(), waveforms.reshape(6, -1), strict=True):
        exact = oracle(waveform, LTX2)
        assert np.abs(np.exp(found) - np.exp(exact)).max() < 1e-6 * max(1.0, np.exp(exact).max())
        loud = exact > np.log(1e-2)
        assert not loud.any() or np.abs(found - exact)[loud].max() < 2e-4


def test_a_tone_lies_in_its_band_and_at_its_time() -> None:
    time = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 2000 * time) * (time >= 0.5)
    mel = log_mel(torch.from_numpy(tone[None, None]), LTX2)[0, 0]
    band = int(mel[80].argmax())
    assert band == np.argmax(oracle_filters(LTX2)[round(2000 / 16000 * 1024)])
    assert (mel[:47] == np.log(1e-5)).all()  # their windows end before sample 8000, where the tone sets in
    loudness = mel[:, band].exp() / mel[80, band].exp()
    assert (loudness[46:52].diff() > 0).all()
    assert (loudness[54:96] - 1).abs().max() < 0.01


def test_too_short_a_sound_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        log_mel(torch.zeros(1, 2, 512), LTX2)
    assert log_mel(torch.zeros(1, 2, 513), LTX2).shape == (1, 2, 4, 64)


@pytest.fixture(scope="module")
def audio_vae() -> AutoencoderKLLTX2Audio:
    torch.manual_seed(0)
    return AutoencoderKLLTX2Audio(base_channels=4, latent_channels=2, num_res_blocks=1).eval()


@pytest.mark.parametrize("seconds", [9 / 25, 1.0, 49 / 24, 121 / 24, 121 / 25, 97 / (30000 / 1001)])
def test_latents_are_25_a_second(seconds: float, audio_vae: AutoencoderKLLTX2Audio) -> None:
    """Encoded whole, the VAE gives at most one latent more; cut to `mel_frames` first, exactly `latent_length`, and
    the same ones, since it is causal."""
    assert LTX2.latents_per_second == 25
    wanted = latent_length(seconds, LTX2)
    assert abs(wanted - 25 * seconds) <= 0.5
    waveforms = torch.randn(1, 2, round(seconds * 16000), generator=torch.Generator().manual_seed(1)) * 0.1
    mel = log_mel(waveforms, LTX2)
    with torch.no_grad():
        whole = audio_vae.encode(mel).latent_dist.mode()
        cut = audio_vae.encode(mel[:, :, : mel_frames(wanted, LTX2)]).latent_dist.mode()
        assert audio_vae.decode(cut).sample.shape == (1, 2, mel_frames(wanted, LTX2), 64)
    assert abs(whole.shape[2] - 25 * seconds) <= 1 + 1e-6
    assert cut.shape[1:] == (2, wanted, 16)
    assert torch.allclose(whole[:, :, :wanted], cut, atol=1e-6)


def test_settings_are_read_from_the_weights() -> None:
    stated = {
        "audio_vae": {
            "model": {"params": {"sampling_rate": 48000, "ddconfig": {"mel_bins": 80}}},
            "preprocessing": {
                "audio": {"sampling_rate": 48000},
                "stft": {"filter_length": 2048, "hop_length": 480, "win_length": 1920, "causal": True},
                "mel": {"n_mel_channels": 80, "mel_fmin": 20, "mel_fmax": 20000},
            },
        }
    }
    assert MelSettings.from_metadata(stated) == MelSettings(48000, 2048, 1920, 480, 80, 20.0, 20000.0)
    assert MelSettings.from_metadata({}) == MelSettings.from_vae_config({}) == LTX2
    config = {"sample_rate": 48000, "mel_hop_length": 480, "mel_bins": None}
    assert MelSettings.from_vae_config(config) == dataclasses.replace(LTX2, sample_rate=48000, hop_length=480)
