"""Which linear layers a recipe's targets mean. Pure names and sizes, no torch, so the plan can refuse early.

A target is a preset, the end of a module's name (`to_q`, `ff.net.2`), or `re:` and a regular expression searched in
the whole name. Presets stay inside the blocks; layers outside are reached only by name, because not every program
that reads LoRA files knows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ltxforge.errors import PlanError
from ltxforge.specs import ModelSpec

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "all": (),  # every linear inside the blocks
}
BLOCKS = "transformer_blocks."
# diffusers' names → the original checkpoint's, for layers outside the blocks. Inside they are the same.
ORIGINAL_NAMES = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}


@dataclass(frozen=True)
class Match:
    """What the targets matched. `layers` maps a module's name to (in_features, out_features)."""

    layers: dict[str, tuple[int, int]]
    by_target: dict[str, int]

    def parameters(self, rank: int) -> int:
        """Trainable numbers of a LoRA of this rank: R · (in + out) per layer."""
        return sum(rank * (inner + outer) for inner, outer in self.layers.values())


def linear_layers(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Every linear layer of the transformer as name → (in_features, out_features), in module order."""
    config = spec.transformer_config
    width, cross, prompt = spec.width, config["cross_attention_dim"], config["caption_channels"]
    block = {
        **{f"attn1.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "attn2.to_q": (width, width), "attn2.to_k": (cross, width), "attn2.to_v": (cross, width),
        "attn2.to_out.0": (width, width), "ff.net.0.proj": (width, 4 * width), "ff.net.2": (4 * width, width),
    }  # fmt: skip
    outside = {
        "proj_in": (config["in_channels"], width),
        "time_embed.emb.timestep_embedder.linear_1": (256, width),
        "time_embed.emb.timestep_embedder.linear_2": (width, width),
        "time_embed.linear": (width, 6 * width),
        "caption_projection.linear_1": (prompt, width),
        "caption_projection.linear_2": (width, width),
        "proj_out": (width, config["out_channels"]),
    }
    blocks = {f"{BLOCKS}{n}.{name}": size for n in range(spec.blocks) for name, size in block.items()}
    return {**outside, **blocks}


def match(targets: Sequence[str], spec: ModelSpec) -> Match:
    """The layers that the targets name. Raises PlanError for targets that match nothing."""
    layers = linear_layers(spec)
    by_target = {target: [name for name in layers if _meant(target, name)] for target in targets}
    if empty := [target for target, names in by_target.items() if not names]:
        endings = sorted({name.split(".", 2)[2] for name in layers if name.startswith(BLOCKS)})
        raise PlanError(
            f"lora.targets {', '.join(map(repr, empty))} match no linear layer of this model",
            remedy=f"Presets: {', '.join(PRESETS)}. Layers of a block: {', '.join(endings)}.",
        )
    chosen = {name for names in by_target.values() for name in names}
    return Match(
        layers={name: size for name, size in layers.items() if name in chosen},
        by_target={target: len(names) for target, names in by_target.items()},
    )


def original_name(module: str) -> str:
    """A module's name in Lightricks' checkpoints, from its name in diffusers."""
    head, dot, rest = module.partition(".")
    return ORIGINAL_NAMES.get(head, head) + dot + rest


def unread(modules: Iterable[str]) -> dict[str, str]:
    """Layers that some program cannot read from the LoRA file → which one, and why.

    The file has the original names. diffusers' LTX loader strips the prefix and renames nothing (0.42.1).
    """
    return {
        module: f"diffusers: the file calls it {original_name(module)}, and diffusers' loader renames nothing"
        for module in modules
        if original_name(module) != module
    }


def _meant(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.search(target[3:], name) is not None
    if target in PRESETS:
        inside = name.startswith(BLOCKS)
        return inside and (target == "all" or any(name.endswith(f".{end}") for end in PRESETS[target]))
    return name == target or name.endswith(f".{target}")
