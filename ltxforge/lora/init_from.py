"""The LoRA file that a run starts from: what names its content, what its scale is, what it asks of the run. Torch-free.

What a file means is the product of A, B and its scale. The scale is, in this order, what the layer's `.alpha` says,
alpha / R; what PEFT's configuration says, alpha / R or alpha / √R with rsLoRA, which diffusers writes into the metadata
and PEFT into a file beside; else 1, as in our own files. Decides what is refused; reads no tensor (`files.py` does).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ltxforge.digests import FileDigests
from ltxforge.errors import PlanError, WeightsError
from ltxforge.lora.header import LoraHeader, require_fitting
from ltxforge.lora.layers import BLOCKS
from ltxforge.lora.targets import Match, match
from ltxforge.plan import LoraPlan
from ltxforge.specs import ModelSpec

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_CONFIG, DIFFUSERS_PREFIX = "lora_adapter_metadata", "transformer."
PEFT_ALPHA = 8  # PEFT's default where its configuration leaves alpha out
# What may be added to a recipe's targets so that they cover a file's layers, and where layers may be looked for at all.
MORE_TARGETS = ((), ("attention",), ("feed_forward",), ("attention", "feed_forward"), ("all",))
MODALITIES = ("video", "audio", "both")


@dataclass(frozen=True)
class PeftScale:
    """What PEFT's configuration says of the scale; `of_layers` maps a pattern, as PEFT matches it, to another alpha."""

    alpha: float
    of_layers: Mapping[str, float]
    rslora: bool

    def of(self, layer: str, rank: int) -> float:
        """alpha / R or alpha / √R of a layer, by diffusers' name."""
        own = (alpha for pattern, alpha in self.of_layers.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(own, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class LoraFile:
    """`digest` names all that the adapter follows from, see `digest_of`."""

    path: str
    digest: str
    header: LoraHeader


def digest_of(path: Path, digests: FileDigests) -> str:
    """What names a LoRA file's content: its SHA-256, and that of PEFT's configuration if one lies beside."""
    config = _config_beside(path)
    return "+".join(digests.of(part) for part in (path, config) if part)


def peft_scale(path: Path, metadata: Mapping[str, str]) -> PeftScale | None:
    """What PEFT's configuration says of the transformer's LoRA; None without one.

    Raises:
        WeightsError: it cannot be read.
    """
    text, where = metadata.get(DIFFUSERS_CONFIG, ""), path
    try:
        if not text and (config := _config_beside(path)):
            text, where = config.read_text(encoding="utf-8"), config
        table = json.loads(text or "{}").items()
        own = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in table if _is_transformers(key)}
        of_layers = {key: float(alpha) for key, alpha in (own.get("alpha_pattern") or {}).items() if re.compile(key)}
        scale = PeftScale(float(own.get("lora_alpha", PEFT_ALPHA)), of_layers, bool(own.get("use_rslora")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise WeightsError(
            f"PEFT's configuration, which says the LoRA's scale, cannot be read: {error}", where=str(where)
        ) from error
    return scale if own else None


def _config_beside(path: Path) -> Path | None:
    config = path.with_name(PEFT_CONFIG)
    return config if path.name == PEFT_FILE and config.is_file() else None


def _is_transformers(key: str) -> bool:
    """diffusers packs the configurations of all its adapters into one, each under its own prefix."""
    return key.startswith(DIFFUSERS_PREFIX) or "." not in key


def require_trainable(file: LoraFile, lora: LoraPlan, matched: Match, spec: ModelSpec, computed: str) -> None:
    """Raise WeightsError, with the reason and what to write, for a LoRA that the run cannot go on with.

    Args:
        computed: what the run computes, `training.modalities`.
    """
    header = file.header
    require_fitting(header, spec, file.path)
    if header.ranks != (lora.rank,):
        several = len(header.ranks) > 1
        raise WeightsError(
            f"lora.init_from is {header}, and lora.rank is {lora.rank}",
            where=file.path,
            remedy="A run has one rank: this file cannot be gone on with."
            if several
            else f"Write lora.rank = {header.ranks[0]}.",
        )
    if foreign := [name for name in header.layers if name not in matched.layers]:
        count = f"{len(foreign)} of its" if len(foreign) < len(header.layers) else "none of its"
        verb = "are not trained" if len(foreign) < len(header.layers) else "is trained"
        raise WeightsError(
            f"lora.init_from is {header}; {count} {len(header.layers)} layers {verb} by this run, such as {foreign[0]}",
            where=file.path,
            remedy=f"Write {_covering(header, lora, spec, computed)}.",
        )


def _covering(header: LoraHeader, lora: LoraPlan, spec: ModelSpec, computed: str) -> str:
    """The settings that train all of a file's layers and the least beside them, as the recipe's lines."""
    outside = tuple(name for name in header.layers if not name.startswith(BLOCKS))
    now = (lora.targets, lora.modalities, computed)
    found = []
    for wanted in itertools.product(_wider(lora.targets, outside), MODALITIES, MODALITIES):
        try:
            layers = match(wanted[0], spec, *wanted[1:]).layers
        except PlanError:
            continue
        if header.layers.keys() <= layers.keys():
            changes = sum(new != old for new, old in zip(wanted, now, strict=True))
            found.append((len(layers), changes, len(found), wanted))
    keys = ("lora.targets", "lora.modalities", "training.modalities")
    best = min(found)[-1]
    return " and ".join(
        f"{key} = {json.dumps(new)}" for key, new, old in zip(keys, best, now, strict=True) if new != old
    )


def _wider(targets: tuple[str, ...], outside: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for more in MORE_TARGETS:
        yield tuple(dict.fromkeys((*targets, *more)))
        yield tuple(dict.fromkeys((*targets, *more, *outside)))
