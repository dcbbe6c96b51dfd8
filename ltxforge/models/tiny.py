"""Built-in small models: the real classes, wiring and ratios with random weights that are the same everywhere.

Decides how the weights of `specs.TINY` are drawn. The global random state is borrowed and put back (`fork_rng` around
a seeded CPU generator), so making a tiny model disturbs no run. A random VAE maps a clip to latents of arbitrary
scale; its statistics and its last convolution are therefore measured once on a synthetic clip, so that latents of
ordinary clips are near zero mean and unit variance and decoded pictures use the range of colours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ltxforge.models.base_weights import placed
from ltxforge.models.ltx_video import Parts
from ltxforge.models.parts import cast
from ltxforge.quant.keep import Keep
from ltxforge.specs import ModelSpec

Transformer = TypeVar("Transformer", bound=nn.Module)
# When anything here changes the weights, raise `specs.TINY_VERSION`.
SEED = 2024
TOKENIZER_LENGTH = 128


def tiny_parts(spec: ModelSpec) -> Parts:
    """The parts of one of `specs.TINY`."""
    return Parts(
        transformer=lambda keep: placed_again(tiny_transformer(spec), keep),
        vae=lambda device, dtype: cast(tiny_vae(spec), device, dtype),
        text_encoder=lambda device, dtype: (cast(tiny_text_encoder(spec), device, dtype), byte_tokenizer()),
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(**spec.scheduler_config),
    )


def tiny_transformer(spec: ModelSpec) -> LTXVideoTransformer3DModel:
    """A transformer of the spec's wiring with seeded random weights, float32 on the CPU."""
    with seeded(1):
        return LTXVideoTransformer3DModel(**spec.transformer_config).eval()


def placed_again(transformer: Transformer, keep: Keep) -> Transformer:
    """A built-in transformer, whose weights had to be drawn whole, as it is kept."""
    names = [name for name, _ in transformer.named_parameters()]
    return placed(transformer, ((name, transformer.get_parameter(name).detach()) for name in names), keep)


def tiny_text_encoder(spec: ModelSpec) -> T5EncoderModel:
    """A two-layer T5 encoder whose width is the spec's `caption_channels`."""
    width = spec.caption_channels
    config = T5Config(
        vocab_size=len(byte_tokenizer()), d_model=width, d_ff=2 * width, d_kv=16, num_layers=2, num_heads=width // 16,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with seeded(2):
        return T5EncoderModel(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token and every text ends in </s>, as T5's does; nothing is trained or downloaded."""
    return make_byte_tokenizer(
        ["<pad>", "</s>", "<unk>"], "$A </s>", ("</s>", 1), eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", model_max_length=TOKENIZER_LENGTH,
    )  # fmt: skip


def make_byte_tokenizer(
    specials: list[str], template: str, added: tuple[str, int], **settings: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes without merges.

    Args:
        specials: the first tokens; the 256 bytes follow.
        template: what a text becomes, "$A" being its bytes.
        added: the special token in `template` and its number.
        settings: names of the special tokens, the padding's side and the longest text.
    """
    vocabulary = {token: number for number, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def tiny_vae(spec: ModelSpec) -> AutoencoderKLLTXVideo:
    """A VAE of the spec's layout with seeded random weights, calibrated on `synthetic_clip`."""
    with seeded(3):
        vae = AutoencoderKLLTXVideo(**spec.vae_config).requires_grad_(False).eval()
    calibrate(vae, spec.sampling.decode_timestep)
    return vae


@torch.no_grad()
def calibrate(vae: AutoencoderKLLTXVideo | AutoencoderKLLTX2Video, decode_timestep: float) -> None:
    """Set the latents' statistics, the posterior's width and the decoder's output range from one synthetic clip.

    The posterior's standard deviation becomes about a tenth of the latents', as in a trained VAE. The measured numbers
    are rounded to three digits, so that machines whose last bits differ agree on the weights.
    """
    clip = synthetic_clip()
    posterior = vae.encode(clip).latent_dist
    mean = posterior.mean
    vae.latents_mean.copy_(rounded(mean.mean(dim=(0, 2, 3, 4))))
    vae.latents_std.copy_(rounded(mean.std(dim=(0, 2, 3, 4))))
    # The encoder's last output channel is the logarithm of the variance, shared by all latent channels.
    narrower = 0.1 * vae.latents_std.mean() / posterior.std.mean()
    vae.encoder.conv_out.conv.bias[-1] += float(rounded(2 * narrower.log()))
    timestep = torch.tensor([decode_timestep]) if vae.config.timestep_conditioning else None
    with seeded(4):  # 0.9.1's decoder draws noise
        pixels = vae.decode(mean, timestep, return_dict=False)[0]
    last = vae.decoder.conv_out.conv
    gain = float(rounded(0.5 / pixels.std()))
    last.weight.mul_(gain)
    last.bias.mul_(gain).sub_(float(rounded(gain * pixels.mean())))


def synthetic_clip(frames: int = 9, side: int = 96) -> Tensor:
    """Moving waves of several sizes and a disc, [1, 3, frames, side, side] in [-1, 1]; arithmetic alone."""
    time = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y = torch.linspace(0, 1, side).view(1, -1, 1)
    x = torch.linspace(0, 1, side).view(1, 1, -1)
    disc = ((x - 0.3 - 0.4 * time) ** 2 + (y - 0.5) ** 2 < 0.04).float()
    waves = [torch.sin(2 * math.pi * (k * x + (4 - k) * y + k * time)) for k in (1, 2, 3)]
    return torch.stack([0.6 * wave * (1 - disc) + (0.9 - 0.7 * k) * disc for k, wave in enumerate(waves)])[None]


def rounded(values: Tensor) -> Tensor:
    """Each value to three significant digits."""
    digits = 10.0 ** (2 - torch.floor(torch.log10(values.abs().clamp(min=1e-12))))
    return torch.round(values * digits) / digits


@contextlib.contextmanager
def seeded(part: int) -> Iterator[None]:
    """The default CPU generator at a fixed seed, and put back afterwards. Device generators are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED + part)
        yield
