"""Each part from files: its module without memory, and the tensors that fill it.

Decides which module a part is and what it is built by, and so, from headers alone, whether all parts are whole before
anything is encoded. Reads no tensor (`tensors.py`) and puts nothing on a device (`load.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.audio_features import MelSettings
from ltxforge.models.base_weights import placed_from_files
from ltxforge.models.components import Told
from ltxforge.models.convert import transformer_names, vae_config, vae_names
from ltxforge.models.layout import transformer_config, transformer_layout
from ltxforge.models.sources import spec_of
from ltxforge.models.stated import Stated
from ltxforge.models.stored import has_both, stored, stored_connectors
from ltxforge.models.tensors import fill, require_same_tensors
from ltxforge.models.text_encoders import require_whole_gemma, require_whole_t5
from ltxforge.models.trees import LocalTree, whole_header
from ltxforge.models.weights import Header
from ltxforge.plan import ModelPlan
from ltxforge.quant.keep import Keep
from ltxforge.specs import ModelSpec


@dataclass(frozen=True)
class Blueprint:
    """A part as files have it: its module on the meta device, its files, and the module's name → theirs."""

    module: nn.Module
    files: Path | Sequence[Path]
    names: Mapping[str, str]

    def require_whole(self, noun: str) -> None:
        """Compare names and shapes; no tensor is read."""
        require_same_tensors(self.module, self.files, self.names, noun)

    def filled(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module with the files' tensors."""
        return fill(self.module, self.files, self.names, device, dtype)

    def placed(self, keep: Keep, digest: str) -> nn.Module:
        """A transformer with the files' tensors, each where and how it is kept; `digest` names their content."""
        self.require_whole("transformer")
        return placed_from_files(self.module, self.files, self.names, keep, digest)


Draw = Callable[[Path], Blueprint]


def require_whole(plan: ModelPlan) -> None:
    """Refuse parts that lie here and are not whole: tensors that miss, that no module has, or of another shape.

    Costs headers and modules without memory, some seconds for the largest; tells all mistakes of all parts at once.
    """
    told, spec = Told(), spec_of(plan)
    checks: dict[str, list[Callable[[Path], object]]] = {
        name: [partial(_require_whole, draw, name)] for name, draw in blueprints(plan, spec).items()
    }
    checks["text_encoder"] = [require_whole_gemma if spec.has_audio else require_whole_t5]
    if spec.has_audio:
        checks["audio_vae"].append(lambda _: mel_settings(plan, spec))
    for name, path in _lying_here(plan).items():
        for check in checks.get(name, ()):
            try:
                check(path)
            except WeightsError as error:
                told.add(error)
    told.raise_all()


def _lying_here(plan: ModelPlan) -> dict[str, Path]:
    """Where the parts are that can be looked at: connectors may have tensors in the text encoder's file."""
    return {
        name: Path(component.location)
        for name, component in plan.components.items()
        if component.kind != "builtin" and component.location and (name != "connectors" or has_both(plan.components))
    }


def _require_whole(draw: Draw, name: str, path: Path) -> None:
    draw(path).require_whole(name.replace("_", " "))


def blueprints(plan: ModelPlan, spec: ModelSpec) -> dict[str, Draw]:
    """How each part with tensors is drawn from where it lies, text encoders apart; `spec` has the files' sizes."""
    if spec.family == "ltx-video":
        return {"transformer": partial(_ltx_video_transformer, spec), "vae": _ltx_video_vae}
    kinds: dict[str, Callable[..., nn.Module]] = {
        "transformer": LTX2VideoTransformer3DModel,
        "vae": AutoencoderKLLTX2Video,
        "audio_vae": AutoencoderKLLTX2Audio,
        "vocoder": _vocoder_class(spec),
        "connectors": LTX2TextConnectors,
    }
    return {name: partial(_ltx2_part, plan, spec, name, kind) for name, kind in kinds.items()}


def _ltx_video_transformer(spec: ModelSpec, path: Path) -> Blueprint:
    header, stated = _header_at(path, "transformer")
    layout = transformer_layout(header)
    if layout is None:
        raise WeightsError("holds no LTX-Video transformer", where=str(path))
    settings = transformer_config(layout, stated, spec, str(path))
    return Blueprint(_unfilled(LTXVideoTransformer3DModel, settings, str(path)), path, transformer_names(header))


def _ltx_video_vae(path: Path) -> Blueprint:
    header, stated = _header_at(path, "vae")
    settings = vae_config(header, stated.values, str(path))
    return Blueprint(_unfilled(AutoencoderKLLTXVideo, settings, str(path)), path, vae_names(header))


def _header_at(path: Path, part: str) -> tuple[Header, Stated]:
    header, folder = whole_header(LocalTree(path.parent, path.name, FileDigests()), path.name)
    return header, Stated.of(header, folder, part, str(path))


def _ltx2_part(plan: ModelPlan, spec: ModelSpec, name: str, kind: Callable[..., nn.Module], path: Path) -> Blueprint:
    found = stored_connectors(plan.components, path) if name == "connectors" else stored(path, name)
    settings = getattr(spec, f"{name}_config")
    return Blueprint(_unfilled(kind, settings, str(path)), found.files, found.part.names)


def mel_settings(plan: ModelPlan, spec: ModelSpec) -> MelSettings:
    """How sound becomes the audio VAE's input: by a single file's metadata, else by the VAE's configuration."""
    assert spec.audio_vae_config is not None
    if location := plan.components["audio_vae"].location:
        stated = stored(Path(location), "audio_vae").metadata
        if "audio_vae" in stated.values:
            return MelSettings.from_metadata(stated.values, stated.where)
    return MelSettings.from_vae_config(spec.audio_vae_config)


def _vocoder_class(spec: ModelSpec) -> Callable[..., LTX2Vocoder | LTX2VocoderWithBWE]:
    """With or without bandwidth extension. Its filter for resampling is in no file, so it is made, not left empty."""
    assert spec.vocoder_config is not None
    if "bwe_in_channels" not in spec.vocoder_config:
        return LTX2Vocoder

    def extended(**settings: Any) -> LTX2VocoderWithBWE:
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            return LTX2VocoderWithBWE(**settings)

    return extended


def _unfilled(kind: Callable[..., nn.Module], settings: Mapping[str, Any], where: str) -> nn.Module:
    """The module with shapes and no memory. What its own class refuses, the files' description is wrong about."""
    try:
        with torch.device("meta"):
            return kind(**settings).eval()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"no module can be built as its description and shapes say: {error}",
            where=where,
            remedy="The file is incomplete or its description is damaged; download it again or name another.",
        ) from error
