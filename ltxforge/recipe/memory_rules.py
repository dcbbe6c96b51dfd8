"""Rules of [memory]: which ways of making a model fit exclude each other, need each other, or mean nothing alone.

Judges the text alone. Where `fit` stands, what the recipe leaves open may still be chosen, so a key that would only
then mean something is no mistake. What a device or the weights rule out is the planner's to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator

from ltxforge.recipe.faults import Fault
from ltxforge.recipe.model_rules import FAMILY_NAMES, family_named, spec_named
from ltxforge.recipe.rulebook import key_of, rule, warning
from ltxforge.recipe.schema import Memory, Model, Recipe
from ltxforge.recipe.wording import toml
from ltxforge.specs import specs_of


def _is_said(recipe: Recipe, name: str) -> bool:
    return name in recipe.memory.model_fields_set


def _streams(memory: Memory) -> bool:
    """Whether weights leave the device, or may."""
    return bool(memory.block_swap) or memory.group_offload is not None or memory.fit is not None


# --- weights that wait off the device --------------------------------------------------------------------------------


@rule("memory.block_swap", "memory.group_offload")
def _one_way_of_streaming(recipe: Recipe) -> Iterator[Fault]:
    memory = recipe.memory
    if memory.block_swap and memory.group_offload is not None:
        what = "block_swap and group_offload exclude each other: with group_offload all blocks wait off the device"
        yield Fault(key_of("memory.block_swap"), what, "keep one of them", other=key_of("memory.group_offload"))


@rule("memory.group_offload", "memory.blocks_per_group")
def _groups_of_blocks(recipe: Recipe) -> Iterator[Fault]:
    if not _is_said(recipe, "blocks_per_group") or recipe.memory.group_offload == "block_level":
        return
    key, said = key_of("memory.blocks_per_group"), f"blocks_per_group = {recipe.memory.blocks_per_group}"
    if recipe.memory.group_offload == "leaf_level":
        what = f'{said} with group_offload = "leaf_level", where each layer comes alone'
        hint = 'leave it out, or say group_offload = "block_level"'
        yield Fault(key, what, hint, other=key_of("memory.group_offload"))
    else:
        yield warning(key, f"{said} means nothing here", 'only group_offload = "block_level" reads it')


@rule("memory.fit", "memory.block_swap", "memory.group_offload", "memory.use_stream", "memory.offload_to_disk")
def _something_is_streamed(recipe: Recipe) -> Iterator[Fault]:
    for name in ("use_stream", "offload_to_disk"):
        if _is_said(recipe, name) and not _streams(recipe.memory):
            what = f"{name} = {toml(getattr(recipe.memory, name))} means nothing here: all weights stay on the device"
            yield warning(key_of(f"memory.{name}"), what, "block_swap and group_offload read it")


@rule("memory.group_offload", "training.compile")
def _blocks_are_compiled_whole(recipe: Recipe) -> Iterator[Fault]:
    if recipe.memory.group_offload == "leaf_level" and recipe.training.compile:
        what = "leaf_level brings weights between the layers of a block, and training.compile compiles it whole"
        hint = 'group_offload = "block_level", or compile = false'
        yield Fault(key_of("memory.group_offload"), what, hint, other=key_of("training.compile"))


@rule("model.base", "model.version", "model.transformer", "memory.block_swap", "memory.blocks_per_group")
def _there_are_so_many_blocks(recipe: Recipe) -> Iterator[Fault]:
    most, whose = _most_blocks(recipe.model)
    for name in ("block_swap", "blocks_per_group"):
        count = getattr(recipe.memory, name)
        if most and _is_said(recipe, name) and count > most:
            what = f"{name} = {count}: {whose} {most} blocks"
            yield Fault(key_of(f"memory.{name}"), what, f"at most {most}", other=key_of("model.base"))


def _most_blocks(model: Model) -> tuple[int, str]:
    """The number of blocks, and who has them, as far as the text says; 0 where it does not."""
    spec, family = spec_named(model), family_named(model)
    if spec:
        return spec.blocks, f"{model.base if spec.tiny else f'{FAMILY_NAMES[spec.family]} {spec.version}'} has"
    if family:
        return max(each.blocks for each in specs_of(family).values()), f"{FAMILY_NAMES[family]} has at most"
    return 0, ""


# --- precision -------------------------------------------------------------------------------------------------------


@rule("memory.fit", "memory.base_precision", "memory.double_quant")
def _nf4_has_scales_to_quantise(recipe: Recipe) -> Iterator[Fault]:
    memory = recipe.memory
    if memory.double_quant is None or memory.base_precision == "nf4":
        return
    said = f"double_quant = {toml(memory.double_quant)}"
    if memory.base_precision is not None or memory.fit is None:
        yield warning(
            key_of("memory.double_quant"), f"{said} means nothing here", 'only base_precision = "nf4" reads it'
        )


@rule("memory.fit", "memory.base_precision", "memory.quantise_on")
def _something_is_quantised(recipe: Recipe) -> Iterator[Fault]:
    memory = recipe.memory
    plain = memory.base_precision == "bf16" or (memory.base_precision is None and memory.fit is None)
    if _is_said(recipe, "quantise_on") and plain:
        what = f'quantise_on = "{memory.quantise_on}" means nothing here: the base is not quantised'
        yield warning(key_of("memory.quantise_on"), what, "base_precision says how it is")


# --- activations -----------------------------------------------------------------------------------------------------


@rule("memory.checkpointing", "memory.activation_budget")
def _one_choice_of_blocks(recipe: Recipe) -> Iterator[Fault]:
    if recipe.memory.activation_budget is not None and recipe.memory.checkpointing is not None:
        what = "activation_budget and checkpointing both say which blocks are computed again"
        hint = "keep one of them"
        yield Fault(key_of("memory.activation_budget"), what, hint, other=key_of("memory.checkpointing"))


# --- decoding --------------------------------------------------------------------------------------------------------


@rule("memory.fit", "memory.decode", "memory.decode_tile", "memory.decode_frames")
def _tiles_are_asked_for(recipe: Recipe) -> Iterator[Fault]:
    decode = recipe.memory.decode
    if decode == "tiles" or (decode is None and recipe.memory.fit is not None):
        return
    for name in ("decode_tile", "decode_frames"):
        if _is_said(recipe, name):
            what = f"{name} = {getattr(recipe.memory, name)} means nothing here: samples are decoded at once"
            yield warning(key_of(f"memory.{name}"), what, 'only decode = "tiles" reads it')


@rule("memory.decode", "validation.frugal")
def _frugal_samples_come_in_tiles(recipe: Recipe) -> Iterator[Fault]:
    if recipe.memory.decode == "whole" and recipe.validation.frugal:
        what = 'decode = "whole" with validation.frugal = true, which decodes in tiles'
        yield Fault(key_of("memory.decode"), what, "leave one of them out", other=key_of("validation.frugal"))
