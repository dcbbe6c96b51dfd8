"""Models of any version at full size with random weights, for measuring: speed and memory do not depend on values.

A transformer is built without memory and drawn on the device, one tensor after the other, each put where it is kept
before the next one, so that it is never held twice. Decides the values' scale, so that activations stay finite. Makes
no encoders: what they would have made is synthetic too (`random_prompt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
)
from torch import Tensor, nn

from ltxforge.modalities import MODALITIES, has
from ltxforge.models.audio_features import MelSettings
from ltxforge.models.base_weights import placed
from ltxforge.models.interface import PromptEmbeddings, VideoModel
from ltxforge.models.ltx2_parts import LTX2Parts
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo, Parts
from ltxforge.models.parts import cast
from ltxforge.quant.keep import Keep
from ltxforge.randomness import address
from ltxforge.specs import ModelSpec

SEED = 0
WEIGHT_STD = 0.02  # the usual starting width of transformers' weights


def random_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, modalities: str) -> VideoModel:
    """A model whose transformer has random weights; it has no other part."""
    if spec.family == "ltx-2":
        return _ltx2(spec, device, dtype, modalities)
    assert modalities == "video", f"{spec.version} makes no sound"
    parts = Parts(transformer=_transformer(spec), vae=_none, text_encoder=_none,
                  scheduler=_none)  # fmt: skip
    return LTXVideo(spec, spec.rope, parts, device, dtype)


def _ltx2(spec: ModelSpec, device: torch.device, dtype: torch.dtype, modalities: str) -> LTX2Video:
    parts = LTX2Parts(
        transformer=_transformer(spec), vae=_none, audio_vae=_none, vocoder=_none,
        connectors=_none, text_encoder=_none, scheduler=_none,
        mel=lambda: MelSettings.from_vae_config(spec.audio_vae_config or {}),
    )  # fmt: skip
    return LTX2Video(spec, spec.rope, parts, device, dtype, modalities=modalities)


TRANSFORMERS: dict[str, type[nn.Module]] = {
    "ltx-video": LTXVideoTransformer3DModel,
    "ltx-2": LTX2VideoTransformer3DModel,
}
VAES: dict[str, type[nn.Module]] = {"ltx-video": AutoencoderKLLTXVideo, "ltx-2": AutoencoderKLLTX2Video}


def empty_transformer(spec: ModelSpec) -> nn.Module:
    """diffusers' transformer of the version on the meta device: shapes without memory, waiting for weights."""
    with torch.device("meta"):
        return TRANSFORMERS[spec.family](**spec.transformer_config).eval()


def _none(*_arguments: Any) -> Any:
    raise AssertionError("a model with random weights has no part but its transformer")


def _transformer(spec: ModelSpec) -> Callable[[Keep], Any]:
    return lambda keep: _placed(empty_transformer(spec), keep)


def _placed(module: nn.Module, keep: Keep) -> nn.Module:
    """A transformer of the meta device with random values, as it is kept; shapes alone on the meta device."""
    assert not list(module.buffers()), "buffers have values of their own, which nobody would fill in"
    return placed(module, drawn(module, keep.device, keep.dtype), keep)


@torch.no_grad()
def drawn(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, drawn on a device one after the other."""
    generator = None if device.type == "meta" else _generator(device)
    for name, parameter in list(module.named_parameters()):
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if generator is not None:
            _draw(name, value, generator)
        yield name, value


def random_vae(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """The version's video VAE, frozen; its latents' statistics are those of latents that are normalised already."""
    with torch.device("meta"):
        vae = VAES[spec.family](**spec.vae_config).eval()
    statistics = {name: vae._buffers.pop(name) for name in ("latents_mean", "latents_std")}
    vae = randomly_filled(vae, device, dtype).requires_grad_(False)
    for name, buffer in statistics.items():
        vae.register_buffer(name, torch.full(buffer.shape, float(name == "latents_std"), device=device, dtype=dtype))
    return vae


def randomly_filled(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A module of the meta device on the device, in the dtype, with random values; shapes alone on the meta device."""
    assert not list(module.buffers()), "buffers have values of their own, which nobody would fill in"
    module = cast(module, torch.device("meta"), dtype).to_empty(device=device)
    if device.type != "meta":
        fill_randomly(module, device)
    return module


@torch.no_grad()
def fill_randomly(module: nn.Module, device: torch.device) -> None:
    """Every parameter of a module, drawn in place on the device."""
    generator = _generator(device)
    for name, parameter in module.named_parameters():
        _draw(name, parameter, generator)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(address(SEED, "random-weights"))


def _draw(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Norms are 1, biases 0, all else normal with `WEIGHT_STD`."""
    if value.ndim == 1 and name.endswith("bias"):
        value.zero_()
    elif value.ndim == 1 and name.endswith("weight"):
        value.fill_(1)
    else:
        value.normal_(0, WEIGHT_STD, generator=generator)


def random_prompt(spec: ModelSpec, tokens: int, modalities: str, dtype: torch.dtype) -> PromptEmbeddings:
    """A caption of full length as the text side would leave it: T5's output, or that of LTX-2's connectors."""
    generator = torch.Generator().manual_seed(address(SEED, "random-prompt"))

    def drawn(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator).to(dtype)

    return PromptEmbeddings({name: drawn(width) for name, width in prompt_widths(spec, modalities).items()}, tokens)


def prompt_widths(spec: ModelSpec, modalities: str) -> dict[str, int]:
    """What a cached caption holds, and how wide each of its tensors is."""
    config = spec.connectors_config
    if config is None:
        return {"embeds": spec.caption_channels}
    return {
        name: config[f"{name}_connector_num_attention_heads"] * config[f"{name}_connector_attention_head_dim"]
        for name in MODALITIES
        if has(modalities, name)
    }
