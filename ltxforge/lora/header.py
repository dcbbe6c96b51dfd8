"""What a LoRA file's header says of itself: which layers it changes, and which versions those layers fit. Torch-free.

Read wherever such a file is met: to say what it is where a model was wanted, and to refuse it on another version. Names
and sizes decide; many LoRAs fit several versions by them, and then what ltxforge wrote into the metadata decides, if
it is there. Takes names, shapes and metadata; opens no file (`models/weights.py: read_header` does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ltxforge.errors import WeightsError
from ltxforge.lora.layers import Sizes, diffusers_name, linear_layers
from ltxforge.specs import SPECS, TINY, ModelSpec

# Lightricks' and ComfyUI's files, diffusers', PEFT's.
PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.")
DOWN, UP, ALPHA = (".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight"), (".alpha",)
# What two versions must share for a LoRA of one to mean the same in the other, in words.
SHARED = {"transformer_config": "wiring", "vae_family": "latents", "text_encoder": "text encoder"}


@dataclass(frozen=True)
class LoraHeader:
    """`layers` by diffusers' names; `ranks` from smallest to largest; `version` as ltxforge wrote it, or ""."""

    layers: Sizes
    ranks: tuple[int, ...]
    version: str

    @property
    def fits(self) -> tuple[str, ...]:
        """The versions and built-in models that have all these layers in these sizes."""
        return tuple(name for name, spec in {**SPECS, **TINY}.items() if not mismatch_of_layers(self, spec))

    def __str__(self) -> str:
        count, ranks = len(self.layers), " to ".join(map(str, dict.fromkeys((self.ranks[0], self.ranks[-1]))))
        origin = f"trained on {self.version}" if self.version else _fitting(self)
        return f"a LoRA of {count} layers and rank {ranks}, {origin}"


def describe(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], where: str) -> LoraHeader:
    """Read a LoRA's header.

    Args:
        shapes: every tensor's name and shape: A is [R, in], B is [out, R].
        metadata: the file's.
        where: the file, for messages.

    Raises:
        WeightsError: there is no LoRA in it, halves of one that do not belong together, or more than a LoRA.
    """
    down, up = _halves(shapes, DOWN), _halves(shapes, UP)
    if not down and not up:
        raise WeightsError("holds no LoRA: no lora_A or lora_down among its tensors", where=where)
    for name in sorted(down.keys() | up.keys()):
        a, b = down.get(name, ()), up.get(name, ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise WeightsError(
                f"is no whole LoRA of linear layers: {name} has A of shape {list(a)} and B of shape {list(b)}",
                where=where,
                remedy="Download or copy the file again; if that does not help, it is an adapter of another kind.",
            )
    _require_no_more(shapes, where)
    return LoraHeader(
        layers={name: (down[name][1], up[name][0]) for name in down},
        ranks=tuple(sorted({shape[0] for shape in down.values()})),
        version=_version(metadata),
    )


def require_fitting(header: LoraHeader, spec: ModelSpec, where: str) -> None:
    """Raise WeightsError, with the reason, for a LoRA that is not for this version."""
    if reason := mismatch_of_version(header, spec) or mismatch_of_layers(header, spec):
        raise WeightsError(f"this LoRA {reason}", where=where, remedy=f"It is {header}.")


def mismatch_of_version(header: LoraHeader, spec: ModelSpec) -> str:
    """Why a LoRA of the version that the metadata names means something else in `spec`; "" if it does not."""
    if not header.version:
        return ""
    if header.version not in SPECS:
        return f"was trained on {header.version}, which this release does not know"
    own, other = SPECS[header.version], SPECS[spec.version]
    differing = [word for field, word in SHARED.items() if getattr(own, field) != getattr(other, field)]
    return (
        f"was trained on {own.version}, and {other.version} differs in {' and '.join(differing)}" if differing else ""
    )


def mismatch_of_layers(header: LoraHeader, spec: ModelSpec) -> str:
    """Why these layers are not all in `spec`, or not in these sizes; "" if they are."""
    own = linear_layers(spec)
    if missing := [name for name in header.layers if name not in own]:
        return f"has {len(missing)} layers that {spec.version} does not have, such as {missing[0]}"
    if wrong := [name for name, size in header.layers.items() if size != own[name]]:
        theirs, ours = (f"{layers[wrong[0]][0]} to {layers[wrong[0]][1]}" for layers in (header.layers, own))
        return f"is for layers of other sizes: {wrong[0]} goes from {theirs}, and from {ours} in {spec.version}"
    return ""


def by_layer(names: Iterable[str], endings: tuple[str, ...]) -> dict[str, str]:
    """Each layer, by diffusers' name → the file's name of its tensor with one of the endings."""
    return {
        diffusers_name(_without_prefix(name.removesuffix(ending))): name
        for name in names
        for ending in endings
        if name.endswith(ending)
    }


def _halves(shapes: Mapping[str, Sequence[int]], endings: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {layer: tuple(shapes[name]) for layer, name in by_layer(shapes, endings).items()}


def _require_no_more(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse tensors beside A, B and alpha, such as DoRA's magnitudes: without them the rest means something else."""
    down, alphas = by_layer(shapes, DOWN), by_layer(shapes, ALPHA)
    numbers = {name for layer, name in alphas.items() if layer in down and math.prod(shapes[name]) == 1}
    known = {*down.values(), *by_layer(shapes, UP).values(), *numbers}
    if rest := sorted(shapes.keys() - known):
        raise WeightsError(
            f"is no plain LoRA: it has {len(rest)} tensors beside A, B and alpha of each layer, such as {rest[0]}",
            where=where,
        )


def _without_prefix(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _version(metadata: Mapping[str, str]) -> str:
    try:
        version = json.loads(metadata.get("ltxforge", "{}"))["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return version if isinstance(version, str) else ""


def _fitting(header: LoraHeader) -> str:
    return f"whose layers fit {', '.join(header.fits)}" if header.fits else "whose layers fit no version that is known"
