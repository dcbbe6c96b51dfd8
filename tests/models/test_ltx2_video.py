"""LTX-2's prompts, sound and clips against diffusers' own pipelines, VAEs and transformers' audio utilities; and the
rule that no two encoders are ever held together.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from ltxforge.estimates import caption_bytes
from ltxforge.models import ltx2_text, ltx2_video
from ltxforge.models.interface import PromptEmbeddings, WantedPrompt
from ltxforge.models.ltx2_parts import LTX2Parts
from ltxforge.models.ltx2_tiny import (
    gemma_tokenizer,
    tiny_audio_vae,
    tiny_connectors,
    tiny_parts,
    tiny_text_encoder,
    tiny_vae,
    tiny_vocoder,
)
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.tiny import synthetic_clip
from ltxforge.specs import SPECS, TINY

CPU = torch.device("cpu")
NAMES = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]
TOKENS, REGISTERS = 128, 32
CAPTIONS = ["A red fox.", "", "  rain on a tin roof, far away \n", "waves and wind over green hills " * 8]
WANTED = [WantedPrompt(caption, "both") for caption in CAPTIONS]
ENCODERS = ("vae", "audio_vae", "connectors", "text_encoder", "vocoder")


def make(name: str, parts: LTX2Parts | None = None, **settings: Any) -> LTX2Video:
    return LTX2Video(TINY[name], TINY[name].rope, parts or tiny_parts(TINY[name]), CPU, torch.float32, **settings)


def same(ours: PromptEmbeddings, theirs: PromptEmbeddings) -> bool:
    assert ours.tensors.keys() == theirs.tensors.keys() and ours.tokens == theirs.tokens
    return all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())


def pipeline(name: str, **parts: Any) -> LTX2Pipeline:
    """diffusers' pipeline of these parts alone."""
    names = ("scheduler", "vae", "audio_vae", "text_encoder", "tokenizer", "connectors", "transformer", "vocoder")
    return LTX2Pipeline(**{part: parts.get(part) for part in names})


@torch.no_grad()
def stock_encodings(name: str, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Video's and audio's embeddings [P, D] of each caption, as the pipeline makes them."""
    spec = TINY[name]
    parts = {
        "text_encoder": tiny_text_encoder(spec),
        "tokenizer": gemma_tokenizer(),
        "connectors": tiny_connectors(spec),
    }
    pipe, found = pipeline(name, **parts), []
    for caption in CAPTIONS:
        given, mask, _, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=tokens, device=CPU
        )
        video, audio, real = pipe.connectors(given, mask, padding_side=pipe.tokenizer.padding_side)
        assert bool((real == 1).all()), "with registers every position is real"
        found.append((video[0], audio[0]))
    return found


def length_of(caption: str, tokens: int) -> int:
    """A token for <bos> and one for each byte, cut."""
    return min(1 + len(caption.strip().encode()), tokens)


@pytest.mark.parametrize("tokens", [REGISTERS, TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_equal_the_pipeline_s_own_encoding(name, tokens):
    ours = list(make(name).encode_prompts(WANTED, tokens))
    for caption, prompt, theirs in zip(CAPTIONS, ours, stock_encodings(name, tokens), strict=True):
        assert list(prompt.tensors) == ["video", "audio"]
        assert torch.equal(prompt.tensors["video"], theirs[0]) and torch.equal(prompt.tensors["audio"], theirs[1])
        assert prompt.tokens == length_of(caption, tokens)
    assert ours[-1].tokens == tokens, "the last caption is over-long"
    assert not torch.allclose(ours[0].tensors["video"], ours[1].tensors["video"], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_s_bits_depend_on_no_neighbour(name):
    model = make(name)
    together = list(model.encode_prompts(WANTED, TOKENS))
    for wanted, expected in zip(reversed(WANTED), reversed(together), strict=True):
        (alone,) = model.encode_prompts([wanted], TOKENS)
        assert same(alone, expected)


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_a_caption_for_one_modality_holds_its_half_alone(name, modality):
    model = make(name)
    whole = list(model.encode_prompts(WANTED, TOKENS))
    halves = list(model.encode_prompts([WantedPrompt(caption, modality) for caption in CAPTIONS], TOKENS))
    for half, both in zip(halves, whole, strict=True):
        assert half.tensors.keys() == {modality}
        assert torch.equal(half.tensors[modality], both.tensors[modality])
    batch = model.batch_prompts([whole[0], *halves[1:]], TOKENS)
    assert [key for key, _ in batch.embeds.items()] == [modality] and batch.mask is None
    assert torch.equal(getattr(batch.embeds, modality), torch.stack([each.tensors[modality] for each in whole]))


@pytest.mark.parametrize("modalities", ["both", "video", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_features_give_the_batches_of_connector_outputs(name, modalities):
    """What the connectors are fed is kept trimmed; a caption's embeddings made of it later are bit-equal."""
    wanted = [WantedPrompt(caption, modalities) for caption in CAPTIONS]
    kept, features = make(name), make(name, text_cache="features")
    outputs, inputs = (list(model.encode_prompts(wanted, TOKENS)) for model in (kept, features))
    shared = not TINY[name].connectors_config["per_modality_projections"]
    trained = ["video", "audio"] if modalities == "both" else [modalities]
    for caption, prompt in zip(CAPTIONS, inputs, strict=True):
        assert list(prompt.tensors) == (["features"] if shared else [f"{each}_features" for each in trained])
        assert {len(value) for value in prompt.tensors.values()} == {prompt.tokens} == {length_of(caption, TOKENS)}
    for each in trained:
        for output, given in zip(outputs, inputs, strict=True):
            batch = features.batch_prompts([given], TOKENS)
            assert batch.mask is None
            assert torch.equal(getattr(batch.embeds, each), getattr(kept.batch_prompts([output], TOKENS).embeds, each))
        expected, found = kept.batch_prompts(outputs, TOKENS), features.batch_prompts(inputs, TOKENS)
        assert torch.equal(getattr(found.embeds, each), getattr(expected.embeds, each))


class Watched:
    """Tiny parts that tell which of them were made, and refuse to be made while another one is alive."""

    def __init__(self, name: str) -> None:
        real = tiny_parts(TINY[name])
        self.made: list[str] = []
        self._alive: list[tuple[str, weakref.ref[nn.Module]]] = []
        self.parts = dataclasses.replace(real, **{part: self._watch(part, getattr(real, part)) for part in ENCODERS})

    def alive(self) -> list[str]:
        return [part for part, held in self._alive if held() is not None]

    def _watch(self, part: str, make: Any) -> Any:
        def made(device: torch.device, dtype: torch.dtype) -> Any:
            assert not self.alive(), f"{part} is made while {self.alive()} is held"
            found = make(device, dtype)
            self.made.append(part)
            self._alive.append((part, weakref.ref(found[0] if isinstance(found, tuple) else found)))
            return found

        return made


@pytest.mark.parametrize("name", NAMES)
def test_gemma_and_the_connectors_take_turns_and_are_freed(name):
    watched = Watched(name)
    model = make(name, watched.parts)
    prompts = model.encode_prompts(WANTED, TOKENS)
    assert watched.made == []
    for _ in prompts:
        assert watched.alive() == ["connectors"]
    assert watched.made == ["text_encoder", "connectors"] and watched.alive() == []
    with model.vae():
        assert watched.alive() == ["vae"]
    with model.audio_vae():
        assert watched.alive() == ["audio_vae"]
    assert watched.alive() == []


def test_nothing_is_held_when_memory_is_given_back_to_the_device(monkeypatch):
    watched, held = Watched("tiny/ltx2"), []

    def give_back(_device: torch.device) -> None:
        gc.collect()
        held.append(watched.alive())

    monkeypatch.setattr(ltx2_video, "release_memory", give_back)
    model = make("tiny/ltx2", watched.parts)
    list(model.encode_prompts(WANTED, TOKENS))
    with model.vae():
        pass
    with model.audio_vae():
        pass
    assert held == [[]] * 4


def test_an_iterator_that_is_closed_early_frees_what_it_holds():
    watched = Watched("tiny/ltx2.3")
    model = make("tiny/ltx2.3", watched.parts)
    prompts = model.encode_prompts(WANTED, TOKENS)
    next(prompts)
    assert watched.alive() == ["connectors"]
    prompts.close()
    gc.collect()
    assert watched.alive() == []
    with model.vae():
        assert watched.alive() == ["vae"]


def test_no_encoder_is_loaded_beside_another():
    model = make("tiny/ltx2")
    with model.vae(), pytest.raises(AssertionError, match="must be freed"), model.audio_vae():
        pass
    with model.audio_vae(), pytest.raises(AssertionError, match="must be freed"):
        next(model.encode_prompts(WANTED, TOKENS))
    prompts = model.encode_prompts(WANTED, TOKENS)
    next(prompts)
    with pytest.raises(AssertionError, match="must be freed"), model.vae():
        pass
    prompts.close()
    with pytest.raises(ZeroDivisionError), model.vae():
        raise ZeroDivisionError
    with model.audio_vae(), pytest.raises(AssertionError, match=r"inside vae\(\)"):
        model.encode_clip(torch.zeros(9, 32, 32, 3, dtype=torch.uint8))
    with model.vae(), pytest.raises(AssertionError, match=r"inside audio_vae\(\)"):
        model.encode_sound(torch.zeros(2, 16000), 25)


@pytest.mark.parametrize(("held", "turns"), [(1, 4), (2**31, 1)])
def test_hidden_states_beyond_what_the_host_may_hold_take_several_turns(held, turns, monkeypatch):
    name = "tiny/ltx2"
    expected = list(make(name).encode_prompts(WANTED, TOKENS))
    monkeypatch.setattr(ltx2_video, "LEAST_HELD_BYTES", held)
    monkeypatch.setattr(ltx2_video, "HOST_SHARE_HELD", 0)
    watched = Watched(name)
    found = list(make(name, watched.parts).encode_prompts(WANTED, TOKENS))
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert watched.made == ["text_encoder", "connectors"] * turns


REAL = {"2.0-dev": 15.7e6, "2.3-dev": 12.6e6, "2.5-dev": 12.6e6}


@pytest.mark.parametrize(("version", "stated"), REAL.items())
def test_a_caption_of_the_real_size_weighs_what_is_stated(version, stated):
    spec = SPECS[version]
    each = caption_bytes(spec, spec.default_prompt_tokens, 2, "both", ["a caption"])
    assert spec.default_prompt_tokens == 1024 and abs(each["connectors"] - stated) < 0.05e6
    halves = [caption_bytes(spec, 1024, 2, half, ["a caption"])["connectors"] for half in ("video", "audio")]
    assert sum(halves) == each["connectors"] and halves[0] == (7864320 if version == "2.0-dev" else 8388608)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modalities", ["both", "video", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_of_a_caption_s_bytes_is_what_is_measured(name, modalities, dtype):
    tensors = next(make(name, text_dtype=dtype).encode_prompts([WantedPrompt("a caption", modalities)], TOKENS)).tensors
    assert {value.dtype for value in tensors.values()} == {dtype}
    measured = sum(value.untyped_storage().nbytes() for value in tensors.values())
    assert measured == caption_bytes(TINY[name], TOKENS, dtype.itemsize, modalities, ["a caption"])["connectors"]
    features = make(name, text_dtype=dtype, text_cache="features")
    (prompt,) = features.encode_prompts([WantedPrompt("a caption", modalities)], TOKENS)
    measured = sum(value.untyped_storage().nbytes() for value in prompt.tensors.values())
    guess = caption_bytes(TINY[name], TOKENS, dtype.itemsize, modalities, ["x" * 4 * (prompt.tokens - 2)])
    assert measured == guess["features"]


# Sound.

CLIPS = [(9, 24), (17, 25), (25, 30), (33, 24), (49, 24), (57, 50), (65, 30000 / 1001), (97, 24000 / 1001), (121, 25),
         (121, 60), (1, 24), (9, 60), (257, 24)]  # fmt: skip


def noise(seconds: float, seed: int = 0) -> Tensor:
    """Two channels at an ordinary loudness, float32 [2, samples] at 16 kHz: no mel bin is near the floor."""
    return torch.randn(2, round(seconds * 16000), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def sounding():
    """A model, and diffusers' pipeline over the same audio VAE."""
    spec = TINY["tiny/ltx2"]
    return make("tiny/ltx2"), pipeline("tiny/ltx2", audio_vae=tiny_audio_vae(spec), vocoder=tiny_vocoder(spec))


@pytest.mark.parametrize(("frames", "fps"), CLIPS)
def test_a_video_has_as_many_audio_latents_as_in_the_pipeline(frames, fps, sounding):
    model, pipe = sounding
    seconds = frames / fps
    per_second = pipe.audio_sampling_rate / pipe.audio_hop_length / float(pipe.audio_vae_temporal_compression_ratio)
    length = model.sound_length(seconds)
    assert length == max(1, round(seconds * per_second)) and abs(length - 25 * seconds) < 1
    assert model.sound_rate == pipe.audio_sampling_rate == 16000
    with model.audio_vae():
        latents = model.encode_sound(noise(seconds), length)
    assert latents.mean.shape == latents.std.shape == (length, model.spec.transformer_config["audio_in_channels"])
    assert latents.mean.dtype == latents.std.dtype == torch.float32


def oracle_mel(waveform: np.ndarray) -> np.ndarray:
    """log-mel of one channel by transformers' audio utilities, in float64."""
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return spectrogram(
        waveform.astype(np.float64), window_function(1024, "hann", periodic=True), 1024, 160, power=1.0, center=True,
        pad_mode="reflect", mel_filters=filters, mel_floor=1e-5, log_mel="log", dtype=np.float64,
    ).T  # fmt: skip


@torch.no_grad()
def oracle_latents(name: str, waveform: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[L, C] mean and deviation, float64: all of the sound through the stock VAE, packed and normalised as diffusers
    does it, and cut, the VAE being causal.
    """
    vae = nn.Module.to(tiny_audio_vae(TINY[name]), torch.float64)
    mel = torch.from_numpy(np.stack([oracle_mel(channel) for channel in waveform.numpy()]))[None]
    posterior = vae.encode(mel).latent_dist
    mean, std = (LTX2Pipeline._pack_audio_latents(value) for value in (posterior.mean, posterior.std))
    mean = LTX2Pipeline._normalize_audio_latents(mean, vae.latents_mean, vae.latents_std)
    std = LTX2Pipeline._normalize_audio_latents(std, torch.zeros_like(vae.latents_mean), vae.latents_std)
    return mean[0, :length], std[0, :length]


@pytest.mark.parametrize("seconds", [9 / 25, 49 / 24, 97 / 30])
@pytest.mark.parametrize("name", NAMES)
def test_sound_equals_the_independent_encoding(name, seconds):
    model = make(name)
    waveform = noise(seconds)
    length = model.sound_length(seconds)
    with model.audio_vae():
        ours = model.encode_sound(waveform, length)
    mean, std = oracle_latents(name, waveform, length)
    assert ours.mean.shape == mean.shape == (length, TINY[name].transformer_config["audio_in_channels"])
    assert (ours.mean.double() - mean).abs().max() < 2e-5
    assert (ours.std.double() / std - 1).abs().max() < 2e-5


def test_sound_that_ends_early_goes_on_in_silence(sounding):
    model, _ = sounding
    waveform = noise(1.0)
    ended = waveform.clone()
    ended[:, 9000:] = 0
    with model.audio_vae():
        assert torch.equal(model.encode_sound(waveform[:, :9000], 25).mean, model.encode_sound(ended, 25).mean)
        empty, silence = (model.encode_sound(torch.zeros(2, samples), 25).mean for samples in (0, 16000))
    assert torch.equal(empty, silence)


def test_sound_beyond_the_video_changes_nothing_but_the_last_windows(sounding):
    """Latents follow from what is heard until their own end; the last one's mel windows reach 512 samples further."""
    model, _ = sounding
    with model.audio_vae():
        short, long = (model.encode_sound(noise(2.0)[:, :samples], 25).mean for samples in (16000, 32000))
    assert torch.allclose(short[:24], long[:24], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seconds", [9 / 24, 49 / 24, 121 / 25])
def test_sound_comes_back_as_long_as_the_video(seconds, sounding):
    """Latents → unpacked by diffusers → stock VAE → stock vocoder: within a latent of the video's duration."""
    model, pipe = sounding
    length = model.sound_length(seconds)
    with model.audio_vae():
        tokens = model.encode_sound(noise(seconds), length).mean[None]
    vae = pipe.audio_vae
    tokens = pipe._denormalize_audio_latents(tokens, vae.latents_mean, vae.latents_std)
    mel = vae.decode(pipe._unpack_audio_latents(tokens, length, 16), return_dict=False)[0]
    assert mel.shape == (1, 2, 4 * (length - 1) + 1, 64)
    waveform = pipe.vocoder(mel)
    rate = model.spec.vocoder_config["output_sampling_rate"]
    assert waveform.shape[:2] == (1, 2) and abs(waveform.shape[-1] / rate - seconds) <= 0.04 + 0.02


@pytest.mark.parametrize(
    "waveform", [torch.zeros(2, 16000, dtype=torch.float64), torch.zeros(16000)], ids=["float64", "no-channels"]
)
def test_another_kind_of_waveform_is_refused(waveform, sounding):
    model, _ = sounding
    with model.audio_vae(), pytest.raises(AssertionError, match=r"float32 \[channels, samples\]"):
        model.encode_sound(waveform, 25)


# Picture.


def clip(frames: int = 9, width: int = 96, height: int = 64) -> Tensor:
    pixels = synthetic_clip(frames, 96)[0, :, :, :height, :width]
    return (pixels.permute(1, 2, 3, 0) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_latents_equal_diffusers_encoding(name):
    model, vae, frames = make(name), tiny_vae(TINY[name]), clip()
    with model.vae():
        latents = model.encode_clip(frames)
    pixels = VideoProcessor(vae_scale_factor=32).preprocess_video([Image.fromarray(each) for each in frames.numpy()])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean = LTX2Pipeline._normalize_latents(posterior.mean, vae.latents_mean, vae.latents_std)
    assert latents.mean.shape == latents.std.shape == (16, 2, 2, 3)
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    assert torch.allclose(latents.mean, mean[0], rtol=0, atol=1e-5)
    assert torch.allclose(latents.std, (posterior.std / vae.latents_std.view(1, -1, 1, 1, 1))[0], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_diffusers_decoding(name):
    model, vae, frames = make(name), tiny_vae(TINY[name]), clip(17)
    with model.vae():
        mean = model.encode_clip(frames).mean
        ours = model.decode(mean)
    with torch.no_grad():
        raw = LTX2Pipeline._denormalize_latents(mean[None], vae.latents_mean, vae.latents_std)
        stock = vae.decode(raw, None, return_dict=False)[0]
    theirs = VideoProcessor(vae_scale_factor=32).postprocess_video(stock, output_type="np")[0]
    assert ours.shape == frames.shape and ours.float().std() > 20
    assert (ours.double() - torch.from_numpy(theirs * 255.0).double()).abs().max() <= 0.51


@pytest.mark.parametrize("cache", ["connectors", "features"])
def test_a_batch_for_one_modality_asks_only_its_connector(cache, monkeypatch):
    """2.0's features serve both: a video-only run must not pay for the audio connector in every step."""
    model = make("tiny/ltx2", text_cache=cache)
    prompts = list(model.encode_prompts([WantedPrompt("a caption", "video")], TOKENS))
    asked: list[str] = []
    stock = ltx2_text.embeddings
    monkeypatch.setattr(ltx2_text, "embeddings", lambda *given: asked.append(given[-1]) or stock(*given))
    batch = model.batch_prompts(prompts, TOKENS, "video")
    assert batch.embeds.audio is None and batch.embeds.video is not None
    assert asked == (["video"] if cache == "features" else [])
