"""Built-in small LTX-2 models: every part with the real class, wiring and ratios, and seeded random weights.

As `tiny.py`, whose seeding, tokenizer and calibration it uses; decides how the weights of `specs_ltx2.LTX2_TINY` are
drawn. The global random state is borrowed and put back.
"""

from __future__ import annotations

import math

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.audio_utils import mel_filter_bank

from ltxforge.models.audio_features import MelSettings
from ltxforge.models.ltx2_parts import LTX2Parts
from ltxforge.models.parts import cast, cast_weights
from ltxforge.models.tiny import calibrate, make_byte_tokenizer, placed_again, rounded, seeded
from ltxforge.specs import ModelSpec

# When anything here changes the weights, raise `specs.TINY_VERSION`.
Gemma = Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<boi>", "<eoi>"]
TOKENIZER_LENGTH = 1024
HEADS = 4
# A trained decoder's log-mel values lie between log(1e-5) = −11.5 and about 2.
MEL_MEAN, MEL_STD = -5.0, 2.0
LOUDNESS = 0.1


def tiny_parts(spec: ModelSpec) -> LTX2Parts:
    """The parts of one of `specs_ltx2.LTX2_TINY`."""
    assert spec.audio_vae_config is not None
    return LTX2Parts(
        transformer=lambda keep: placed_again(tiny_transformer(spec), keep),
        vae=lambda device, dtype: cast(tiny_vae(spec), device, dtype),
        audio_vae=lambda device, dtype: cast(tiny_audio_vae(spec), device, dtype),
        vocoder=lambda device, dtype: cast(tiny_vocoder(spec), device, dtype),
        connectors=lambda device, dtype: cast(tiny_connectors(spec), device, dtype),
        text_encoder=lambda device, dtype: (cast_weights(tiny_text_encoder(spec), device, dtype), gemma_tokenizer()),
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(**spec.scheduler_config),
        mel=lambda: MelSettings.from_vae_config(spec.audio_vae_config),
    )


def tiny_transformer(spec: ModelSpec) -> LTX2VideoTransformer3DModel:
    """A transformer of the spec's wiring, float32 on the CPU. 2.5's keyframe mark is drawn too, not left zero."""
    with seeded(11):
        transformer = LTX2VideoTransformer3DModel(**spec.transformer_config).eval()
        if transformer.config.use_keyframes_abs_pos_embedding:
            torch.nn.init.normal_(transformer.keyframes_abs_pos_embedding, std=0.1)
    return transformer


def tiny_connectors(spec: ModelSpec) -> LTX2TextConnectors:
    """Connectors of the spec's wiring, with their learnable registers."""
    assert spec.connectors_config is not None
    with seeded(12):
        return LTX2TextConnectors(**spec.connectors_config).eval()


def tiny_text_encoder(spec: ModelSpec) -> Gemma:
    """A Gemma 3 or 4 as wide and deep as the connectors expect, for `gemma_tokenizer`'s vocabulary."""
    assert spec.connectors_config is not None
    width, layers = spec.caption_channels, spec.connectors_config["text_proj_in_factor"] - 1
    shared = {
        "vocab_size": len(gemma_tokenizer()), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": 1,
        "head_dim": width // HEADS, "max_position_embeddings": TOKENIZER_LENGTH, "sliding_window": 512,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    with seeded(13):
        if spec.text_encoder == "gemma-4":
            return Gemma4UnifiedForConditionalGeneration(
                Gemma4UnifiedConfig(text_config=Gemma4UnifiedTextConfig(**shared))
            ).eval()
        vision = SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14,
        )  # fmt: skip
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=Gemma3TextConfig(**shared), vision_config=vision, mm_tokens_per_image=4,
                image_token_index=4, boi_token_index=5, eoi_token_index=6,
            )
        ).eval()  # fmt: skip


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, every text begins with <bos> and is padded on the left, as Gemma's are."""
    return make_byte_tokenizer(
        SPECIALS, "<bos> $A", ("<bos>", 2), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        padding_side="left", model_max_length=TOKENIZER_LENGTH,
    )  # fmt: skip


def tiny_vae(spec: ModelSpec) -> AutoencoderKLLTX2Video:
    """A video VAE of the spec's layout, calibrated on `tiny.synthetic_clip`."""
    with seeded(14):
        vae = AutoencoderKLLTX2Video(**spec.vae_config).requires_grad_(False).eval()
    calibrate(vae, spec.sampling.decode_timestep)
    return vae


def tiny_audio_vae(spec: ModelSpec) -> AutoencoderKLLTX2Audio:
    """An audio VAE of the spec's layout, calibrated on `synthetic_mel`."""
    assert spec.audio_vae_config is not None
    with seeded(15):
        vae = AutoencoderKLLTX2Audio(**spec.audio_vae_config).requires_grad_(False).eval()
    calibrate_audio(vae)
    return vae


@torch.no_grad()
def calibrate_audio(vae: AutoencoderKLLTX2Audio) -> None:
    """Set the latents' statistics, one per channel and latent mel bin, the posterior's width and the decoder's range.

    From one spectrogram, as `tiny.calibrate` does from one clip; the posterior becomes a tenth of the latents' width.
    """
    posterior = vae.encode(synthetic_mel(vae.config.mel_bins)).latent_dist
    mean = posterior.mode()
    tokens = mean.transpose(1, 2).flatten(2)  # [1, L, channels · latent mel bins]
    vae.latents_mean.copy_(rounded(tokens.mean(dim=(0, 1))))
    vae.latents_std.copy_(rounded(tokens.std(dim=(0, 1))))
    # The second half of the encoder's output channels are logarithms of variances.
    narrower = 0.1 * vae.latents_std.mean() / posterior.std.mean()
    vae.encoder.conv_out.conv.bias[mean.shape[1] :] += float(rounded(2 * narrower.log()))
    mel = vae.decode(mean, return_dict=False)[0]
    last = vae.decoder.conv_out.conv
    gain = float(rounded(MEL_STD / mel.std()))
    last.weight.mul_(gain)
    last.bias.mul_(gain).sub_(float(rounded(gain * mel.mean() - MEL_MEAN)))


def synthetic_mel(bins: int, frames: int = 101) -> Tensor:
    """A log-mel spectrogram with two moving tones and a beat, [1, 2, frames, bins]; arithmetic alone."""
    time = torch.linspace(0, 1, frames).view(-1, 1)
    pitch = torch.linspace(0, 1, bins).view(1, -1)
    channels = []
    for phase in (0.0, 0.5):
        tone = torch.exp(-(((pitch - 0.3 - 0.2 * torch.sin(2 * math.pi * (time + phase))) / 0.05) ** 2))
        beat = 0.5 * (1 + torch.sin(2 * math.pi * (8 * time + phase))) * (1 - pitch)
        channels.append(-10 + 7 * tone + 4 * beat)
    return torch.stack(channels)[None]


def tiny_vocoder(spec: ModelSpec) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """A vocoder of the spec's layout. With bandwidth extension its mel basis is the real kind of filter bank."""
    config = spec.vocoder_config
    assert config is not None
    mel = synthetic_mel(64)
    with seeded(16):
        if "bwe_in_channels" not in config:
            vocoder = LTX2Vocoder(**config).requires_grad_(False).eval()
            quieten(vocoder, mel)
            return vocoder
        extended = LTX2VocoderWithBWE(**config).requires_grad_(False).eval()
    filters = mel_filter_bank(
        config["filter_length"] // 2 + 1, config["num_mel_channels"], 0.0, config["input_sampling_rate"] / 2,
        config["input_sampling_rate"], norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    extended.mel_stft.mel_basis.copy_(torch.from_numpy(filters.T))
    for part in (extended.vocoder, extended.bwe_generator):
        quieten(part, mel)
    return extended


@torch.no_grad()
def quieten(vocoder: LTX2Vocoder, mel: Tensor) -> None:
    """Scale the last convolution so that the sound has an ordinary loudness and is not cut off at ±1."""
    gain = float(rounded(LOUDNESS / vocoder(mel).std()))
    for tensor in vocoder.conv_out.parameters():
        tensor.mul_(gain)
