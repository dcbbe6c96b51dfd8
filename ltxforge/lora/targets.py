"""Which linear layers a recipe's targets mean. Pure names and sizes, no torch, so the plan can refuse early.

A target is a preset, the end of a module's name (`to_q`, `ff.net.2`), or `re:` and a regular expression searched in
the whole name. Presets stay inside the blocks; layers outside are reached only by name. Targets mean layers of the
adapter's own modalities, unless they name sound or what connects it to the video themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ltxforge.errors import PlanError
from ltxforge.lora.layers import BLOCKS, CROSS_MODAL, Sizes, linear_layers, modality_of, original_name
from ltxforge.specs import ModelSpec

# What a preset means: the ends of names inside the blocks. Gates, which 2.3 and 2.5 have per head, are in "all" alone.
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "feed_forward": (".net.0.proj", ".net.2"),
    "cross_modal": tuple(f".{side}_attn{end}" for side in ("audio_to_video", "video_to_audio") for end in ATTENTION),
    "all": ("",),
}
NAMES_SOUND = re.compile(rf"audio|a2v|v2a|cross_modal|{CROSS_MODAL.pattern}")
WHOSE = {"video": "the picture's", "audio": "the sound's", "both": "between picture and sound"}
# Families whose loader in diffusers (0.42.1) turns Lightricks' names into its own; LTX-Video's renames nothing.
RENAMED_BY_DIFFUSERS = ("ltx-2",)


@dataclass(frozen=True)
class Match:
    """What the targets matched. `layers` maps a module's name to (in_features, out_features).

    `unread` maps layers that not every program reads from the LoRA file to the program that does not, and why.
    """

    layers: Sizes
    by_target: dict[str, int]
    unread: dict[str, str]

    def parameters(self, rank: int) -> int:
        """Trainable numbers of a LoRA of this rank: R · (in + out) per layer."""
        return sum(self.tensor_sizes(rank))

    def tensor_sizes(self, rank: int) -> tuple[int, ...]:
        """How many numbers A [R, in] and B [out, R] of each layer have."""
        return tuple(rank * width for layer in self.layers.values() for width in layer)


def match(targets: Sequence[str], spec: ModelSpec, modalities: str = "video", computed: str = "video") -> Match:
    """The layers that the targets name.

    Args:
        modalities: "video", "audio" or "both": whose layers the targets mean.
        computed: what the run computes at all; `modalities` lies within it.

    Raises:
        PlanError: a target matches nothing, or a layer that the run never computes.
    """
    _require_modalities(spec, modalities, computed)
    layers = linear_layers(spec)
    meant = {target: [name for name in layers if _means(target, name)] for target in targets}
    own = {
        target: [name for name in names if _names_sound(target) or _lies_within(name, modalities)]
        for target, names in meant.items()
    }
    _require_some(meant, own, layers, modalities)
    _require_computed(own, computed)
    named = set().union(*own.values())
    chosen = {name: size for name, size in layers.items() if name in named}
    return Match(
        layers=chosen,
        by_target={target: len(names) for target, names in own.items()},
        unread=unread(chosen, spec),
    )


def unread(layers: Iterable[str], spec: ModelSpec) -> dict[str, str]:
    """Layers that some program cannot read from the LoRA file → which one, and why.

    The file has the original names. ComfyUI and Lightricks' loader have the same ones; diffusers' LTX-2 loader renames
    every one of them to its own, its LTX-Video loader none.
    """
    if spec.family in RENAMED_BY_DIFFUSERS:
        return {}
    return {
        layer: f"diffusers: the file calls it {original_name(layer)}, and diffusers' loader renames nothing"
        for layer in layers
        if original_name(layer) != layer
    }


def _means(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.search(target[3:], name) is not None
    if target in PRESETS:
        return name.startswith(BLOCKS) and name.endswith(PRESETS[target])
    return name == target or name.endswith(f".{target}")


def _names_sound(target: str) -> bool:
    return NAMES_SOUND.search(target) is not None


def _lies_within(layer: str, modalities: str) -> bool:
    return modalities in ("both", modality_of(layer))


def _require_modalities(spec: ModelSpec, modalities: str, computed: str) -> None:
    if not spec.has_audio and (modalities, computed) != ("video", "video"):
        raise PlanError(
            f"{spec.version} makes no sound, so there is nothing but video to train",
            where="lora.modalities" if modalities != "video" else "training.modalities",
            remedy='Write "video", or leave it out.',
        )
    if computed not in ("both", modalities):
        raise PlanError(
            f'"{modalities}" means layers that are never computed while training.modalities is "{computed}"',
            where="lora.modalities",
            remedy=f'Write "{computed}" or leave it out, or set training.modalities = "both".',
        )


def _require_some(meant: dict[str, list[str]], own: dict[str, list[str]], layers: Sizes, modalities: str) -> None:
    """Refuse targets that match nothing at all, then those that match only what the adapter leaves out."""
    if absent := [target for target, names in meant.items() if not names]:
        endings = sorted({name.split(".", 2)[2] for name in layers if name.startswith(BLOCKS)})
        outside = [name for name in layers if not name.startswith(BLOCKS)]
        presets = [preset for preset in PRESETS if any(_means(preset, name) for name in layers)]
        raise PlanError(
            f"lora.targets {_quoted(absent)} match no linear layer of this model",
            remedy=f"Presets: {', '.join(presets)}. Layers of a block: {', '.join(endings)}. Outside the blocks:"
            f" {', '.join(outside)}.",
        )
    if foreign := [target for target, names in own.items() if not names]:
        raise PlanError(
            f'lora.targets {_quoted(foreign)} match no layer of lora.modalities = "{modalities}", only'
            f" {_described([name for target in foreign for name in meant[target]])}",
            remedy='Leave them out, or set lora.modalities = "both".',
        )


def _require_computed(own: dict[str, list[str]], computed: str) -> None:
    dead = {target: [name for name in names if not _lies_within(name, computed)] for target, names in own.items()}
    if refused := [target for target, names in dead.items() if names]:
        raise PlanError(
            f"lora.targets {_quoted(refused)} name layers that are never computed while training.modalities is"
            f' "{computed}": {_described([name for target in refused for name in dead[target]])}',
            remedy='Leave them out, or set training.modalities = "both".',
        )


def _quoted(targets: list[str]) -> str:
    return ", ".join(map(repr, targets))


def _described(layers: list[str]) -> str:
    """The first one, how many more, and whose they are."""
    kinds = set(map(modality_of, layers))
    whose = " and ".join(text for kind, text in WHOSE.items() if kind in kinds)
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"{layers[0]}{more} ({whose})"
