"""Which ops a run uses, how each is carried out, and how a run that goes on keeps that. Pure; torch-free.

`ltxforge_kernels.choice` decides about one op on one machine; here stands what a recipe and an earlier attempt say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ltxforge_kernels.choice import OPS, QUANTISED_OPS, Choice, Kernels, Machine, choose, why_not

from ltxforge.errors import PlanError
from ltxforge.modalities import has
from ltxforge.model_spec import ModelSpec
from ltxforge.quant.formats import FORMATS
from ltxforge.recipe.schema import Kernels as Section


def used_ops(modalities: str, base_precision: str = "bf16") -> tuple[str, ...]:
    """The ops that training these modalities over such a base calls, from the clip to the LoRA's gradient."""
    of_base = (FORMATS[base_precision].op,) if base_precision in FORMATS else ()
    return (*(op for op in OPS if op != "causal_conv3d" or has(modalities, "video")), *of_base)


def asked_for(section: Section) -> dict[str, str]:
    """Op → what the recipe asks for, where it does: the op's own key, else `all`."""
    asked = {op: getattr(section, op) or section.all for op in (*OPS, *QUANTISED_OPS)}
    return {op: implementation for op, implementation in asked.items() if implementation}


def choose_kernels(
    ops: Collection[str],
    machine: Machine,
    precision: str,
    encoder_precision: str,
    *,
    asked: Mapping[str, str] | None = None,
    spec: ModelSpec | None = None,
    previous: Kernels | None = None,
    rank: int = 0,
) -> Kernels:
    """The choices of a run: what the recipe asks for, else what the run began with, else what is best here.

    Args:
        precision: the activations' dtype; `encoder_precision` the VAE's.
        asked: as `asked_for` gives it.
        spec: the model, whose widths alone matter; by default every width that was measured.
        previous: the choices of the run that goes on.
        rank: the LoRA's.

    Raises:
        PlanError: the recipe asks for what cannot run here; all of it is told at once.
    """
    asked, found, refused = asked or {}, [], {}
    for op in ops:
        dtype = encoder_precision if op == "causal_conv3d" else precision
        of_rank = rank if op == "lora_linear" else 0
        if op in asked and (obstacle := why_not(asked[op], machine, dtype, of_rank)):
            refused.setdefault((asked[op], obstacle), []).append(op)
            continue
        choice = choose(op, machine, dtype, asked.get(op), widths_of(op, spec) if spec else None, rank=of_rank)
        found.append(choice if previous is None or op in asked else _kept(choice, previous, machine, dtype, of_rank))
    if refused:
        raise _refusal(refused)
    return Kernels(tuple(found))


def _refusal(refused: Mapping[tuple[str, str], Collection[str]]) -> PlanError:
    told = "; ".join(f"{asked} for {', '.join(ops)}: {obstacle}" for (asked, obstacle), ops in refused.items())
    return PlanError(
        f"what [kernels] asks for cannot run here: {told}",
        remedy='Leave it out, then the plan chooses; "eager" runs everywhere.',
    )


def _kept(fresh: Choice, previous: Kernels, machine: Machine, dtype: str, rank: int) -> Choice:
    """What the run began with, if it can run here. Ops that are not in an earlier plan were eager then."""
    before = previous.choice(fresh.op)
    if any(why_not(each, machine, dtype, rank) for each in before.implementations):
        return fresh
    if (before.implementation, before.exceptions) == (fresh.implementation, fresh.exceptions):
        return fresh
    return dataclasses.replace(before, reason="this run began with it")


def compiles(kernels: Kernels) -> bool:
    """Whether anything is compiled while it runs; on a GPU Triton does that."""
    return any(choice.implementations != {"eager"} for choice in kernels.choices)


def changed(before: Kernels, now: Kernels) -> list[str]:
    """What two attempts of a run compute differently, in words: bits may differ from there on."""
    moves: dict[tuple[str, str], list[str]] = {}
    for choice in now.choices:
        was = before.choice(choice.op)
        if (was.implementation, was.exceptions) != (choice.implementation, choice.exceptions):
            moves.setdefault((was.implementation, choice.implementation), []).append(choice.op)
    return [f"{', '.join(ops)}: {_moved(*move)}" for move, ops in moves.items()]


def _moved(was: str, now: str) -> str:
    return f"{now} instead of {was}" if was != now else f"{now} at other sizes"


def widths_of(op: str, spec: ModelSpec) -> frozenset[int]:
    """How wide an op's rows are in this model: of a convolution, the channels that it reads."""
    config = spec.transformer_config
    widths, channels = {spec.width}, {spec.latent_channels}
    if spec.has_audio:
        widths.add(config["audio_num_attention_heads"] * config["audio_attention_head_dim"])
        channels.add(config["audio_in_channels"])
    inner = {4 * width for width in widths}  # the feed-forwards
    if op == "flow_matching":
        return frozenset(channels)
    if op == "causal_conv3d":
        return _widths_of_encoder(spec.vae_config)
    if op in ("lora_linear", *QUANTISED_OPS):
        return frozenset(widths | inner)
    return frozenset(inner if op == "gelu" else widths)


def _widths_of_encoder(config: Mapping[str, Any]) -> frozenset[int]:
    """Patches of pixels, the blocks' channels, and as many as latents have: there LTX-2's first convolution ends."""
    patch = config["in_channels"] * config["patch_size"] ** 2
    return frozenset((patch, config["latent_channels"], *config["block_out_channels"]))
