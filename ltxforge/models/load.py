"""Weights to models: each part is built without memory, then filled by one tensor after the other (`tensors.py`).

Decides which class of model a family is, and which loader each of its parts has. Asks no network: `sources.fetch` has
brought the files. What is planned is loaded, nothing is guessed (`detect.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.audio_features import MelSettings
from ltxforge.models.convert import transformer_names, vae_config, vae_names
from ltxforge.models.interface import VideoModel
from ltxforge.models.layout import transformer_config, transformer_layout
from ltxforge.models.ltx2_video import LTX2Parts, LTX2Video
from ltxforge.models.ltx_video import LTXVideo, Parts
from ltxforge.models.sources import spec_of
from ltxforge.models.stored import Stored, stored, stored_connectors
from ltxforge.models.tensors import fill
from ltxforge.models.text_encoders import load_gemma, load_t5
from ltxforge.models.trees import LocalTree, whole_header
from ltxforge.models.weights import Header
from ltxforge.plan import ComponentPlan, ModelPlan
from ltxforge.specs import TINY, ModelSpec

Module = TypeVar("Module", bound=nn.Module)


def load_model(
    plan: ModelPlan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae_dtype: torch.dtype | None = None,
    text_dtype: torch.dtype | None = None,
    modalities: str = "video",
    text_cache: str = "connectors",
) -> VideoModel:
    """The plan's model. Nothing is read before a part is asked for.

    Args:
        plan: with every component's location filled in (`sources.fetch`).
        device, dtype: where the transformer goes, and in which dtype.
        vae_dtype, text_dtype: the encoders' dtypes; by default float32 on a CPU, bfloat16 elsewhere.
        modalities: "video", "audio" or "both": what the model computes. LTX-Video has video alone.
        text_cache: "connectors" or "features": what LTX-2 caches of a caption.
    """
    spec = spec_of(plan)
    dtypes = {"vae_dtype": vae_dtype, "text_dtype": text_dtype}
    if spec.family == "ltx-video":
        assert modalities == "video", "LTX-Video has no sound"
        return LTXVideo(spec, plan.rope, _ltx_video_parts(plan, spec), device, dtype, **dtypes)
    return LTX2Video(
        spec, plan.rope, _ltx2_parts(plan, spec), device, dtype, modalities=modalities, text_cache=text_cache, **dtypes
    )


def _ltx_video_parts(plan: ModelPlan, spec: ModelSpec) -> Parts:
    made = partial(_made, plan, tiny.tiny_parts)
    return Parts(
        transformer=made("transformer", lambda path, device, dtype: load_transformer(path, spec, device, dtype)),
        vae=made("vae", load_vae),
        text_encoder=made("text_encoder", partial(_with_tokenizer, plan, load_t5)),
        scheduler=partial(load_scheduler, plan.components["scheduler"], spec),
    )


def _ltx2_parts(plan: ModelPlan, spec: ModelSpec) -> LTX2Parts:
    components = plan.components
    made = partial(_made, plan, ltx2_tiny.tiny_parts)

    def part(name: str, kind: Callable[..., nn.Module]) -> Callable:
        settings = getattr(spec, f"{name}_config")
        find = partial(stored_connectors, components) if name == "connectors" else partial(stored, name=name)
        return made(name, lambda path, device, dtype: _fill_ltx2(kind, settings, find(path), device, dtype))

    return LTX2Parts(
        transformer=part("transformer", LTX2VideoTransformer3DModel),
        vae=part("vae", AutoencoderKLLTX2Video),
        audio_vae=part("audio_vae", AutoencoderKLLTX2Audio),
        vocoder=part("vocoder", _vocoder_class(spec)),
        connectors=part("connectors", LTX2TextConnectors),
        text_encoder=made("text_encoder", partial(_with_tokenizer, plan, load_gemma)),
        scheduler=partial(load_scheduler, components["scheduler"], spec),
        mel=partial(_mel_settings, components["audio_vae"], spec),
    )


def _made(plan: ModelPlan, tiny_parts: Callable[[ModelSpec], Any], name: str, from_files: Callable) -> Callable:
    """How a part is made: built in, or by `from_files(path, device, dtype)`."""
    component = plan.components[name]
    if component.kind == "builtin":
        return getattr(tiny_parts(TINY[component.source]), name)
    return partial(from_files, _located(component, name))


def _with_tokenizer(plan: ModelPlan, load: Callable, path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    return load(path, _located(plan.components["tokenizer"], "tokenizer"), device, dtype)


def _located(component: ComponentPlan, name: str) -> Path:
    if component.kind != "builtin" and not component.location:
        raise WeightsError(f"the {name} has not been fetched", where=component.source)
    return Path(component.location)


def load_transformer(
    path: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> LTXVideoTransformer3DModel:
    """LTX-Video's transformer from a folder or single file, on the device and in the dtype."""
    header, config = _header_at(path, "transformer")
    layout = transformer_layout(header)
    if layout is None:
        raise WeightsError("holds no LTX-Video transformer", where=str(path))
    settings = transformer_config(layout, config, spec, str(path))
    module = _unfilled(lambda: LTXVideoTransformer3DModel(**settings))
    return fill(module, path, transformer_names(header), device, dtype)


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLLTXVideo:
    """LTX-Video's VAE from a folder or single file, on the device and in the dtype."""
    header, config = _header_at(path, "vae")
    settings = vae_config(header, config)
    module = _unfilled(lambda: AutoencoderKLLTXVideo(**settings))
    return fill(module, path, vae_names(header), device, dtype)


def load_scheduler(component: ComponentPlan, spec: ModelSpec) -> FlowMatchEulerDiscreteScheduler:
    """The base's own sampling schedule, else the version's."""
    if component.kind == "builtin":
        return FlowMatchEulerDiscreteScheduler(**spec.scheduler_config)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(component.location, local_files_only=True)


def _header_at(path: Path, part: str) -> tuple[Header, dict[str, Any]]:
    header, folder = whole_header(LocalTree(path.parent, path.name, FileDigests()), path.name)
    return header, folder or header.config.get(part, {})


def _fill_ltx2(
    kind: Callable[..., Module], settings: Any, found: Stored, device: torch.device, dtype: torch.dtype
) -> Module:
    return fill(_unfilled(lambda: kind(**settings)), found.files, found.part.names, device, dtype)


def _vocoder_class(spec: ModelSpec) -> Callable[..., LTX2Vocoder | LTX2VocoderWithBWE]:
    """With or without bandwidth extension. Its filter for resampling is in no file, so it is made, not left empty."""
    assert spec.vocoder_config is not None
    if "bwe_in_channels" not in spec.vocoder_config:
        return LTX2Vocoder

    def extended(**settings: Any) -> LTX2VocoderWithBWE:
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            return LTX2VocoderWithBWE(**settings)

    return extended


def _mel_settings(component: ComponentPlan, spec: ModelSpec) -> MelSettings:
    """How sound becomes the audio VAE's input: by a single file's metadata, else by the VAE's configuration."""
    assert spec.audio_vae_config is not None
    if component.kind != "builtin":
        metadata = stored(_located(component, "audio VAE"), "audio_vae").metadata
        if "audio_vae" in metadata:
            return MelSettings.from_metadata(metadata)
    return MelSettings.from_vae_config(spec.audio_vae_config)


def _unfilled(make: Callable[[], Module]) -> Module:
    """The module with shapes and no memory."""
    with torch.device("meta"):
        return make().eval()
