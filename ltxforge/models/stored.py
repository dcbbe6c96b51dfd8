"""LTX-2's parts where a plan's components lie: tensors, configurations, and the spec with their real sizes.

What planner and loader both read, so that what is planned is what is loaded. Reads headers and small JSON files of
local components; what is still on the Hub has the version's published sizes. Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxforge.digests import FileDigests
from ltxforge.models import config_ltx2 as config
from ltxforge.models.layout_ltx2 import Part, has_projections, joined, packed_config, part_of
from ltxforge.models.stated import Stated
from ltxforge.models.trees import LocalTree, whole_header
from ltxforge.models.weights import Header
from ltxforge.plan import ComponentPlan
from ltxforge.specs import TINY, ModelSpec

Components = Mapping[str, ComponentPlan]
PARTS = ("transformer", "vae", "audio_vae", "vocoder", "connectors")


@dataclass(frozen=True)
class Stored:
    """One part as it lies: its files, its tensors, a folder's `config.json` or a single file's whole metadata."""

    files: tuple[Path, ...]
    part: Part
    folder: Stated
    header: Header

    @property
    def where(self) -> str:
        return str(self.files[0])

    @property
    def metadata(self) -> Stated:
        """The `config` of a single file's metadata; empty for a folder."""
        return Stated() if self.folder else Stated.in_metadata(self.header, self.where)


def stored(path: Path, name: str) -> Stored:
    """A part at a place."""
    header, folder = whole_header(LocalTree(path.parent, path.name, FileDigests()), path.name)
    return Stored((path,), part_of(header, name, str(path)), Stated(folder, str(path)), header)


def stored_connectors(components: Components, path: Path) -> Stored:
    """The connectors at a place; the projections before them perhaps in the text encoder's file (2.5's split files)."""
    own = stored(path, "connectors")
    encoder = components["text_encoder"].location
    if has_projections(own.part) or not encoder:
        return own
    beside = stored(Path(encoder), "connectors")
    return dataclasses.replace(own, files=(*own.files, *beside.files), part=joined(own.part, beside.part))


def text_encoder_sizes(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, layers) of a Gemma by its configuration, or None."""
    text = settings.get("text_config", settings)
    if not isinstance(text, dict):
        return None
    width, layers = text.get("hidden_size"), text.get("num_hidden_layers")
    return (width, layers) if isinstance(width, int) and isinstance(layers, int) else None


def measured_spec(components: Components, spec: ModelSpec) -> ModelSpec:
    """The version's spec with the real sizes of the parts that lie here; built-in ones have their own spec's."""
    sizes: dict[str, Any] = {}
    for name in PARTS:
        part = components[name]
        if part.kind == "builtin":
            sizes[f"{name}_config"] = getattr(TINY[part.source], f"{name}_config")
        elif part.location and (name != "connectors" or has_both(components)):
            sizes[f"{name}_config"] = _measured(components, name, spec)
    return _with_caption_channels(dataclasses.replace(spec, **sizes))


def _measured(components: Components, name: str, spec: ModelSpec) -> dict[str, Any]:
    path = Path(components[name].location)
    if name == "connectors":
        found = stored_connectors(components, path)
        return config.connectors_config(
            found.part, found.folder, found.metadata, spec, _text_encoder_sizes(components), found.where
        )
    found = stored(path, name)
    if name == "transformer":
        return config.transformer_config(found.part, found.folder, found.metadata, spec, found.where)
    if name == "vae":
        return config.vae_config(found.part, found.folder)
    measure = config.audio_vae_config if name == "audio_vae" else config.vocoder_config
    return measure(found.part, found.folder, found.metadata, spec)


def _text_encoder_sizes(components: Components) -> tuple[int, int] | None:
    encoder = components["text_encoder"]
    if encoder.kind == "builtin":
        return builtin_text_sizes(TINY[encoder.source])
    return text_encoder_sizes(_text_encoder_settings(Path(encoder.location)))


def _text_encoder_settings(path: Path) -> Mapping[str, Any]:
    """The configuration of a text encoder: its folder's, or what its packed file says."""
    if path.is_dir():
        return json.loads((path / "config.json").read_bytes())
    return packed_config(whole_header(LocalTree(path.parent, path.name, FileDigests()), path.name)[0].metadata)


def has_both(components: Components) -> bool:
    """Whether connectors and text encoder can be read together."""
    encoder = components["text_encoder"]
    return bool(encoder.location) or encoder.kind == "builtin"


def _with_caption_channels(spec: ModelSpec) -> ModelSpec:
    """From 2.3 on, only the connectors know how wide the text encoder is; the transformer does not use it."""
    assert spec.connectors_config is not None
    width = spec.connectors_config["caption_channels"]
    return dataclasses.replace(spec, transformer_config={**spec.transformer_config, "caption_channels": width})


def builtin_text_sizes(spec: ModelSpec) -> tuple[int, int]:
    """(width, layers) of a built-in model's text encoder."""
    assert spec.connectors_config is not None
    return spec.caption_channels, spec.connectors_config["text_proj_in_factor"] - 1
