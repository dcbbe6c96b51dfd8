"""Weights to models: each part is built without memory (`blueprints.py`), then filled by one tensor after the other.

Decides which class of model a family is, and how each of its parts is made. Asks no network: `sources.fetch` has
brought the files. What is planned is loaded, nothing is guessed (`detect.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ltxforge.errors import WeightsError
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.blueprints import Draw, blueprints, mel_settings
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2_parts import LTX2Parts
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo, Parts
from ltxforge.models.quantised_encoders import HOST, NOT_QUANTISED, quantised_module
from ltxforge.models.sources import spec_of
from ltxforge.models.text_encoders import load_gemma, load_t5
from ltxforge.plan import ComponentPlan, ModelPlan
from ltxforge.quant.keep import Keep
from ltxforge.specs import TINY, ModelSpec


def load_model(
    plan: ModelPlan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae_dtype: torch.dtype | None = None,
    text_dtype: torch.dtype | None = None,
    modalities: str = "video",
    text_cache: str = "connectors",
    text_encoder_precision: str = NOT_QUANTISED,
) -> VideoModel:
    """The plan's model. Nothing is read before a part is asked for; how the transformer is kept is `model.keep`'s.

    Args:
        plan: with every component's location filled in (`sources.fetch`).
        device, dtype: where the transformer goes, and in which dtype.
        vae_dtype, text_dtype: the encoders' dtypes; by default float32 on a CPU, bfloat16 elsewhere.
        modalities: "video", "audio" or "both": what the model computes. LTX-Video has video alone.
        text_cache: "connectors" or "features": what LTX-2 caches of a caption.
        text_encoder_precision: "bf16", which is `text_dtype`, "int8" or "nf4".
    """
    spec = spec_of(plan)
    dtypes = {"vae_dtype": vae_dtype, "text_dtype": text_dtype}
    if spec.family == "ltx-video":
        assert modalities == "video", "LTX-Video has no sound"
        return LTXVideo(spec, plan.rope, _ltx_video_parts(plan, spec, text_encoder_precision), device, dtype, **dtypes)
    parts = _ltx2_parts(plan, spec, text_encoder_precision)
    return LTX2Video(spec, plan.rope, parts, device, dtype, modalities=modalities, text_cache=text_cache, **dtypes)


def _ltx_video_parts(plan: ModelPlan, spec: ModelSpec, text_precision: str) -> Parts:
    made = partial(_made, plan, tiny.tiny_parts)
    drawn = blueprints(plan, spec)
    return Parts(
        transformer=made("transformer", partial(_placed, plan, drawn["transformer"])),
        vae=made("vae", partial(_filled, drawn["vae"])),
        text_encoder=_text_encoder(plan, made, load_t5, text_precision),
        scheduler=partial(load_scheduler, plan.components["scheduler"], spec),
    )


def _ltx2_parts(plan: ModelPlan, spec: ModelSpec, text_precision: str) -> LTX2Parts:
    components = plan.components
    made = partial(_made, plan, ltx2_tiny.tiny_parts)
    drawn = blueprints(plan, spec)
    filled = {name: made(name, partial(_filled, draw)) for name, draw in drawn.items() if name != "transformer"}
    return LTX2Parts(
        transformer=made("transformer", partial(_placed, plan, drawn["transformer"])),
        **filled,
        text_encoder=_text_encoder(plan, made, load_gemma, text_precision),
        scheduler=partial(load_scheduler, components["scheduler"], spec),
        mel=partial(mel_settings, plan, spec),
    )


def _made(plan: ModelPlan, tiny_parts: Callable[[ModelSpec], Any], name: str, from_files: Callable) -> Callable:
    """How a part is made: built in, or by `from_files(path, …)`, with what else the caller gives."""
    component = plan.components[name]
    if component.kind == "builtin":
        return getattr(tiny_parts(TINY[component.source]), name)
    return partial(from_files, _located(component, name))


def _text_encoder(plan: ModelPlan, made: Callable, load: Callable, precision: str) -> Callable:
    """How the text encoder is made, with its tokenizer; a built-in one is whole before it is quantised."""
    make = made("text_encoder", partial(_with_tokenizer, plan, load, precision))
    if plan.components["text_encoder"].kind != "builtin" or precision == NOT_QUANTISED:
        return make

    def quantised(device: torch.device, dtype: torch.dtype) -> Any:
        encoder, tokenizer = make(HOST, dtype)
        return quantised_module(encoder, device, dtype, precision), tokenizer

    return quantised


def _with_tokenizer(
    plan: ModelPlan, load: Callable, precision: str, path: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    return load(path, _located(plan.components["tokenizer"], "tokenizer"), device, dtype, precision)


def _located(component: ComponentPlan, name: str) -> Path:
    if component.kind != "builtin" and not component.location:
        raise WeightsError(f"the {name} has not been fetched", where=component.source)
    return Path(component.location)


def _filled(draw: Draw, path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return draw(path).filled(device, dtype)


def _placed(plan: ModelPlan, draw: Draw, path: Path, keep: Keep) -> nn.Module:
    return draw(path).placed(keep, plan.components["transformer"].digest)


def load_scheduler(component: ComponentPlan, spec: ModelSpec) -> FlowMatchEulerDiscreteScheduler:
    """The base's own sampling schedule, else the version's."""
    if component.kind == "builtin":
        return FlowMatchEulerDiscreteScheduler(**spec.scheduler_config)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(component.location, local_files_only=True)
