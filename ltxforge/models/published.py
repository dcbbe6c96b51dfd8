"""A published model that is not on this machine: its version by name, its parts as large as the version says.

For plans that no run follows. Sizes are counted from the version's configuration over modules without memory, at the
16 bits in which weights are published. Opens no file and asks no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn

from ltxforge.errors import WeightsError
from ltxforge.models.random_weights import TRANSFORMERS, VAES
from ltxforge.plan import ComponentPlan, ModelPlan
from ltxforge.recipe.schema import Model
from ltxforge.specs import SPECS, TINY, ModelSpec

KIND = "assumed"
PUBLISHED_BYTES = 2
# Numbers of the text encoders: T5 v1.1 XXL's encoder; Gemma 3 12B with its tower for pictures; 2.5's Gemma 4 12B is as
# wide and deep and taken to be as large.
TEXT_ENCODERS = {"t5": 4_762_310_656, "gemma-3": 12_187_325_040, "gemma-4": 12_187_325_040}


def published_model(model: Model, absent: Sequence[str]) -> ModelPlan:
    """The plan's model by the recipe's words alone.

    Args:
        absent: which of its sources are not here.

    Raises:
        WeightsError: the base is no published name, and the recipe does not say which version it is.
    """
    spec = _version(model, absent)
    sizes = parts(spec)
    sizes |= {"text_encoder": TEXT_ENCODERS[spec.text_encoder], "tokenizer": 0, "scheduler": 0}
    components = {
        name: ComponentPlan(
            source=getattr(model, name, None) or model.base, kind=KIND, inside=name, bytes=PUBLISHED_BYTES * count
        )
        for name, count in sizes.items()
    }
    rope = spec.rope if model.rope == "auto" else model.rope
    return ModelPlan(
        model.base, spec.version, rope, components, licence=spec.licence.name, licence_url=spec.licence.url,
        evidence=(_evidence(model, spec),),
    )  # fmt: skip


def _version(model: Model, absent: Sequence[str]) -> ModelSpec:
    published = {spec.hub: spec for spec in SPECS.values()}
    if model.version:
        return SPECS[model.version]
    if found := published.get(model.base.partition("@")[0]):
        return found
    raise WeightsError(
        f"not on this machine, and {model.base} is no published name that could stand for the whole",
        where=", ".join(absent),
        remedy="Say which version it is with model.version, name a file or folder that is here, or one of: "
        f"{', '.join(published)}; or {', '.join(TINY)}.",
    )  # fmt: skip


def _evidence(model: Model, spec: ModelSpec) -> str:
    said = f"the recipe says {spec.version}" if model.version else f"{spec.version} is published as {spec.hub}"
    return f"its name, since it is not on this machine: {said}, whose published sizes stand for the files"


def parts(spec: ModelSpec) -> dict[str, int]:
    """How many numbers each part with a configuration of its own has, text encoders apart."""
    kinds: dict[str, Callable[..., nn.Module]] = {"transformer": TRANSFORMERS[spec.family], "vae": VAES[spec.family]}
    if spec.vocoder_config is not None:
        is_extended = "bwe_in_channels" in spec.vocoder_config
        kinds |= {
            "audio_vae": AutoencoderKLLTX2Audio,
            "vocoder": LTX2VocoderWithBWE if is_extended else LTX2Vocoder,
            "connectors": LTX2TextConnectors,
        }
    with torch.device("meta"):
        return {name: _count(kind(**getattr(spec, f"{name}_config"))) for name, kind in kinds.items()}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
