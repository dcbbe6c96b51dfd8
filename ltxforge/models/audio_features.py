"""The mel front end of LTX-2's audio VAE: waveforms to log-mel spectrograms, and lengths of latents.

Takes the place of torchaudio. Decides nothing: every number comes from the weights' own
description. Knows no file and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ltxforge.errors import WeightsError
from ltxforge.models.stated import Stated

# Slaney's scale (Auditory Toolbox, 1998): linear with 15 mels up to 1000 Hz, then 27 steps for each factor of 6.4.
_BREAK_HZ, _BREAK_MEL, _MELS_PER_FACTOR, _FACTOR = 1000.0, 15.0, 27.0, 6.4

# Lightricks' word → ours, and values of the types that they must have.
_MEL_WORDS = {"n_mel_channels": "mel_bins", "mel_fmin": "lowest_hz", "mel_fmax": "highest_hz"}
_STFT_WORDS = {"filter_length": "n_fft", "win_length": "win_length", "hop_length": "hop_length"}
_LIKE = {
    "sample_rate": 1, "n_fft": 1, "win_length": 1, "hop_length": 1, "mel_bins": 1, "lowest_hz": 1.0, "highest_hz": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class MelSettings:
    """How a waveform becomes what the audio VAE takes.

    Lengths in samples at `sample_rate` Hz; `highest_hz` None is half the rate; `floor` is the least magnitude before
    the logarithm; `temporal_factor` is how many mel frames make one latent.
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    win_length: int = 1024
    hop_length: int = 160
    mel_bins: int = 64
    lowest_hz: float = 0.0
    highest_hz: float | None = None
    floor: float = 1e-5
    temporal_factor: int = 4

    @property
    def latents_per_second(self) -> float:
        """25 for all published weights."""
        return self.sample_rate / self.hop_length / self.temporal_factor

    @staticmethod
    def from_metadata(config: Mapping[str, Any], where: str = "") -> MelSettings:
        """Read from `config` of a single file's safetensors metadata; what is not there has its default.

        Raises WeightsError for what cannot be meant; `where` is the file, for that message.
        """
        vae = Stated(config, where, "metadata config").table("audio_vae")
        parameters, stated = vae.table("model").table("params"), vae.table("preprocessing")
        said: dict[str, Any] = {}
        for table, names in (
            (stated.table("audio"), {"sampling_rate": "sample_rate"}),
            (stated.table("mel"), _MEL_WORDS),
            (stated.table("stft"), _STFT_WORDS),
            (parameters, {"sampling_rate": "sample_rate"}),
            (parameters.table("ddconfig"), {"mel_bins": "mel_bins"}),
        ):
            found = table.settings(names, _LIKE)
            said |= {name: value for name, value in found.items() if value is not None}
        settings = MelSettings(**{"win_length": said.get("n_fft", MelSettings.n_fft), **said})
        settings._require_sense(where)
        return settings

    def _require_sense(self, where: str) -> None:
        """Refuse numbers that make no spectrogram."""
        highest = self.sample_rate / 2 if self.highest_hz is None else self.highest_hz
        if self.win_length > self.n_fft:
            what = f"a window of {self.win_length} samples is longer than the transform's {self.n_fft}"
        elif not self.lowest_hz < highest <= self.sample_rate / 2:
            what = f"mel bins from {self.lowest_hz:g} to {highest:g} Hz do not fit {self.sample_rate} samples a second"
        else:
            return
        raise WeightsError(
            f"{what}, in metadata config.audio_vae",
            where=where,
            remedy="Its description is damaged or of another model; download it again or name another.",
        )

    @staticmethod
    def from_vae_config(config: Mapping[str, Any]) -> MelSettings:
        """Read from diffusers' config of AutoencoderKLLTX2Audio; what it does not state has its default."""
        default = MelSettings()
        return MelSettings(
            sample_rate=int(config.get("sample_rate") or default.sample_rate),
            hop_length=int(config.get("mel_hop_length") or default.hop_length),
            mel_bins=int(config.get("mel_bins") or default.mel_bins),
        )


def log_mel(waveforms: torch.Tensor, settings: MelSettings) -> torch.Tensor:
    """Waveforms [B, channels, samples] → [B, channels, mel frames, mel bins], in the waveforms' dtype.

    Magnitudes (power 1) of a centred STFT with reflected ends and a periodic Hann window, Slaney's triangles with
    equal areas, then log(max(x, floor)). Mel frames are samples // hop_length + 1, frame n centred on sample
    n · hop_length.
    """
    samples = waveforms.shape[-1]
    if samples <= settings.n_fft // 2:
        raise ValueError(f"{samples} samples are too few: reflected ends need more than {settings.n_fft // 2}")
    window = torch.hann_window(settings.win_length, periodic=True, dtype=torch.float64).to(waveforms)
    spectrum = torch.stft(
        waveforms.flatten(0, 1),
        settings.n_fft,
        settings.hop_length,
        settings.win_length,
        window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    mel = spectrum.abs().transpose(1, 2) @ mel_filters(settings).to(waveforms)
    return mel.clamp_min(settings.floor).log().unflatten(0, waveforms.shape[:2])


@lru_cache
def mel_filters(settings: MelSettings) -> torch.Tensor:
    """Triangles on Slaney's scale, each of area 1 in Hz / 2: float64 [n_fft / 2 + 1, mel bins]."""
    nyquist = settings.sample_rate / 2
    highest = nyquist if settings.highest_hz is None else settings.highest_hz
    mels = torch.linspace(_mel(settings.lowest_hz), _mel(highest), settings.mel_bins + 2, dtype=torch.float64)
    corners = _hz(mels)
    frequencies = torch.linspace(0, nyquist, settings.n_fft // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((frequencies - left) / (centre - left), (right - frequencies) / (right - centre))
    return triangles.clamp_min(0) * 2 / (right - left)


def latent_length(seconds: float, settings: MelSettings) -> int:
    """How many audio latents belong to a video of this duration, as LTX2Pipeline counts them; at least 1."""
    return max(1, round(seconds * settings.latents_per_second))


def mel_frames(latents: int, settings: MelSettings) -> int:
    """The fewest mel frames that the causal audio VAE turns into so many latents, and decodes them to."""
    return (latents - 1) * settings.temporal_factor + 1


def _mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return _BREAK_MEL * hz / _BREAK_HZ
    return _BREAK_MEL + _MELS_PER_FACTOR * math.log(hz / _BREAK_HZ, _FACTOR)


def _hz(mels: torch.Tensor) -> torch.Tensor:
    linear = mels * (_BREAK_HZ / _BREAK_MEL)
    return torch.where(mels < _BREAK_MEL, linear, _BREAK_HZ * _FACTOR ** ((mels - _BREAK_MEL) / _MELS_PER_FACTOR))
