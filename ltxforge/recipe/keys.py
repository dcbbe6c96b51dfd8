"""The schema as a map of keys: which table stands where, and which key was meant by a wrong one.

Reads `schema.py` and nothing else; judges no recipe.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ltxforge.recipe.faults import Key
from ltxforge.recipe.schema import NOT_YET, Recipe
from ltxforge.recipe.suggest import nearest

# What other trainers and other habits call our keys.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "optimizer_type": "optimizer.name",
    "lr_scheduler": "optimizer.schedule",
    "lr_schedule": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "warmup": "optimizer.warmup_steps",
    "eps": "optimizer.epsilon",
    "adam_epsilon": "optimizer.epsilon",
    "wd": "optimizer.weight_decay",
    "lora_rank": "lora.rank",
    "network_dim": "lora.rank",
    "dim": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "network_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "max_train_steps": "run.steps",
    "max_steps": "run.steps",
    "num_train_epochs": "run.epochs",
    "max_train_epochs": "run.epochs",
    "output_dir": "run.directory",
    "output_directory": "run.directory",
    "resume_from_checkpoint": "run.resume",
    "train_batch_size": "training.batch_size",
    "batch": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "accumulation": "training.accumulate",
    "gradient_accumulation": "training.accumulate",
    "max_grad_norm": "training.clip_norm",
    "grad_clip": "training.clip_norm",
    "mixed_precision": "training.precision",
    "dtype": "training.precision",
    "gradient_checkpointing": "memory.checkpointing",
    "gradient_checkpointing_interval": "memory.checkpointing",
    "activation_checkpointing": "memory.checkpointing",
    "base_model_precision": "memory.base_precision",
    "base_model_default_dtype": "training.precision",
    "quantization": "memory.base_precision",
    "quantize": "memory.base_precision",
    "quantize_via": "memory.quantise_on",
    "quantize_on": "memory.quantise_on",
    "load_in_4bit": "memory.base_precision",
    "load_in_8bit": "memory.base_precision",
    "bnb_4bit_use_double_quant": "memory.double_quant",
    "fp8_base": "memory.base_precision",
    "fp8_scaled": "memory.base_precision",
    "text_encoder_1_precision": "memory.text_encoder_precision",
    "load_text_encoder_in_8bit": "memory.text_encoder_precision",
    "fp8_t5": "memory.text_encoder_precision",
    "enable_group_offload": "memory.group_offload",
    "group_offload_type": "memory.group_offload",
    "offload_type": "memory.group_offload",
    "group_offload_blocks_per_group": "memory.blocks_per_group",
    "num_blocks_per_group": "memory.blocks_per_group",
    "group_offload_use_stream": "memory.use_stream",
    "group_offload_to_disk_path": "memory.offload_to_disk",
    "offload_to_disk_path": "memory.offload_to_disk",
    "musubi_blocks_to_swap": "memory.block_swap",
    "blocks_to_swap": "memory.block_swap",
    "blocks_swap": "memory.block_swap",
    "layer_offload_fraction": "memory.block_swap",
    "enable_model_cpu_offload": "memory.fit",
    "low_vram": "memory.fit",
    "lowvram": "memory.fit",
    "vram": "memory.fit",
    "cpu_offload_activations": "memory.offload_activations",
    "activation_offloading": "memory.offload_activations",
    "enable_activation_offloading": "memory.offload_activations",
    "vae_tiling": "memory.decode",
    "vae_enable_tiling": "memory.decode",
    "enable_vae_tiling": "memory.decode",
    "vae_enable_slicing": "memory.decode",
    "torch_compile": "training.compile",
    "compile_blocks": "training.compile",
    "use_triton": "kernels.all",
    "pretrained_model_name_or_path": "model.base",
    "save_every": "checkpoint.every",
    "checkpointing_steps": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "caption_dropout_probability": "conditioning.caption_dropout",
    "first_frame_conditioning_p": "conditioning.first_frame",
    "num_repeats": "dataset.repeats",
    "num_frames": "dataset.frames",
    "frame_rate": "dataset.fps",
    "guidance_scale": "validation.guidance",
    "audio_guidance_scale": "validation.audio_guidance",
    "stg_scale": "validation.stg",
    "modality_scale": "validation.modality_guidance",
    "rescale_scale": "validation.rescale",
    "guidance_rescale": "validation.rescale",
    "audio_loss_weight": "audio.loss_weight",
    "with_audio": "training.modalities",
    "generate_audio": "training.modalities",
    "max_sequence_length": "conditioning.prompt_tokens",
    "num_inference_steps": "validation.steps",
}
_SECTION_ALIASES = {
    "adapter": "lora", "network": "lora", "data": "dataset", "datasets": "dataset", "train": "training",
    "optim": "optimizer", "validate": "validation", "prompts": "validation.prompt", "checkpoints": "checkpoint",
    "sampling": "validation", "save": "checkpoint", "flow_matching": "flow", "sound": "audio",
    "ops": "kernels",
}  # fmt: skip


def bare(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation without its `Annotated` layers, and what they said."""
    metadata: list[Any] = []
    while typing.get_origin(annotation) is typing.Annotated:
        annotation, *more = typing.get_args(annotation)
        for item in more:
            metadata += item.metadata if isinstance(item, FieldInfo) else [item]
    return annotation, metadata


def branches(annotation: Any, metadata: list[Any] | None = None) -> list[tuple[Any, list[Any]]]:
    """The alternatives of an annotation with their limits; None is left out, TOML has no such value."""
    annotation, more = bare(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [branch for item in typing.get_args(annotation) for branch in branches(item)]
    else:
        found = [] if annotation is type(None) else [(annotation, more)]
    return [(kind, limits + (metadata or [])) for kind, limits in found]


def table_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class behind a field, and whether the field is a list of such tables."""
    for kind, _ in branches(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind, False
        if typing.get_origin(kind) is list:
            table, _ = table_in(typing.get_args(kind)[0])
            if table:
                return table, True
    return None, False


def field_at(key: Key) -> FieldInfo | None:
    """The field that a key names, list numbers skipped; None if the schema has no such key."""
    table: type[BaseModel] | None = Recipe
    found: FieldInfo | None = None
    for part in key:
        if isinstance(part, int):
            continue
        found = table.model_fields.get(part) if table else None
        if found is None:
            return None
        table = table_in(found.annotation)[0]
    return found


def table_at(key: Key) -> type[BaseModel] | None:
    """The section class of the table that stands at `key`; () is the recipe itself."""
    if not key:
        return Recipe
    found = field_at(key)
    return table_in(found.annotation)[0] if found else None


def header(key: Key) -> str:
    """A table's header as one writes it: `[optimizer]`, `[[dataset]]`."""
    names = tuple(part for part in key if isinstance(part, str))
    found = field_at(names)
    many = found is not None and table_in(found.annotation)[1]
    return f"[[{'.'.join(names)}]]" if many else f"[{'.'.join(names)}]"


def _header(section: str) -> str:
    return header(tuple(section.split(".")))


@cache
def legal_keys() -> dict[str, tuple[str, ...]]:
    """Section name → its keys; "" holds the sections themselves, "validation.prompt" the prompt tables."""
    return dict(_legal_keys(Recipe, ""))


def _legal_keys(table: type[BaseModel], name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield name, tuple(table.model_fields)
    for key, item in table.model_fields.items():
        inner, _ = table_in(item.annotation)
        if inner:
            yield from _legal_keys(inner, f"{name}.{key}" if name else key)


def suggestion(key: Key) -> tuple[str, Key | None]:
    """For an unknown key: what was probably meant, in words, and the legal key in the same table if it is one."""
    section = ".".join(part for part in key[:-1] if isinstance(part, str))
    word = str(key[-1])
    here = legal_keys()[section]
    homes = [name for name, keys in legal_keys().items() if name and word in keys]
    if homes and section != "dataset":
        return f"`{word}` belongs in {' or '.join(_header(home) for home in homes[:3])}", None
    alias = (_SECTION_ALIASES if not section else ALIASES).get(word.lower().replace("-", "_"))
    alias = {"dataset.name": "dataset.id", "dataset.folder": "dataset.path"}.get(f"{section}.{word}", alias)
    if alias:
        home, _, name = alias.rpartition(".")
        told = f"`{name}`{'' if home == section else f' in {_header(home)}'}" if home else header((name,))
        return f"did you mean {told}?", (*key[:-1], name) if home == section else None
    if near := nearest(word, here):
        told = f"`{near}`" if section else header((near,))
        return f"did you mean {told}?", (*key[:-1], near)
    for home, keys in legal_keys().items():
        if home and (near := nearest(word, keys)):
            return f"did you mean `{near}` in {_header(home)}?", None
    if homes:
        return f"`{word}` belongs in {' or '.join(_header(home) for home in homes[:3])}", None
    return f"legal here: {', '.join(here)}", None


def not_yet(data: dict[str, Any]) -> list[tuple[Key, str]]:
    """Keys in `data` that the design has a place for and this release has not, with the reason."""
    found: list[tuple[Key, str]] = []
    for name, reason in NOT_YET.items():
        at: Any = data
        parts = name.split(".")
        for part in parts:
            at = at.get(part, _ABSENT) if isinstance(at, dict) else _ABSENT
        if at is not _ABSENT:
            found.append((tuple(parts), reason))
    return found


_ABSENT = object()
