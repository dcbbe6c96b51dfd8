"""What tensor names and shapes say about an LTX-Video file: its sizes, which VAE, in whose spelling; and which family.

Two spellings exist: Lightricks' single files (`patchify_proj`, `vae.…`, perhaps under `model.diffusion_model.`) and
diffusers' folders (`proj_in`, …). LTX-2's names are
`layout_ltx2.py`'s. Decides nothing about versions (`detect.py`) and reads no file. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltxforge.errors import WeightsError
from ltxforge.lora.header import describe
from ltxforge.models.formats import is_companion, scale_of
from ltxforge.models.layout_ltx2 import is_transformer, part_of
from ltxforge.models.stated import Stated
from ltxforge.models.weights import Header, TensorEntry
from ltxforge.specs import ModelSpec

SINGLE_FILE_PREFIX = "model.diffusion_model."
TIMESTEPS = 1000
QUANTISED = ("F8_", "I8", "U8", "F4", "F6")
_MADE_FOR_OWN_KERNELS = re.compile(r"ltxv-(2b|13b)-0\.9\.\d+-(dev|distilled)-fp8(\.safetensors)?$")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class TransformerLayout:
    """Sizes read from shapes. `spelling` is "lightricks" or "diffusers"."""

    spelling: str
    blocks: int
    width: int
    in_channels: int
    out_channels: int
    caption_channels: int
    cross_attention_dim: int


@dataclass(frozen=True)
class VaeLayout:
    """`family` is 0.9.0, 0.9.1 or 0.9.5 by wiring."""

    spelling: str
    family: str
    latent_channels: int


def transformer_tensors(header: Header) -> dict[str, TensorEntry]:
    """The transformer's tensors, without the single files' prefix and without the VAE."""
    return {name.removeprefix(SINGLE_FILE_PREFIX): header.tensors[name] for name in transformer_originals(header)}


def transformer_originals(header: Header) -> list[str]:
    """The transformer's tensors as the file names them, scales and the like left out."""
    return [name for name in header.tensors if not _is_vae(name) and not is_companion(name)]


def vae_tensors(header: Header) -> dict[str, TensorEntry]:
    """The VAE's tensors, without the single files' `vae.` prefix."""
    return {name.removeprefix("vae."): entry for name, entry in header.tensors.items() if _is_vae(name)}


def _is_vae(name: str) -> bool:
    return name.startswith(("vae.", "encoder.", "decoder.", "per_channel_statistics.", "latents_mean", "latents_std"))


def transformer_layout(header: Header) -> TransformerLayout | None:
    """The LTX-Video transformer in a file, or None if there is none."""
    tensors = transformer_tensors(header)
    entrance = {"lightricks": "patchify_proj.weight", "diffusers": "proj_in.weight"}
    spelling = next((kind for kind, name in entrance.items() if name in tensors), None)
    needed = ("caption_projection.linear_1.weight", "proj_out.weight", "transformer_blocks.0.attn2.to_k.weight")
    if spelling is None or any(len(shape_of(tensors, name)) != 2 for name in (entrance[spelling], *needed)):
        return None
    width, in_channels = shape_of(tensors, entrance[spelling])
    caption, out, cross = (shape_of(tensors, name) for name in needed)
    blocks = 1 + max(int(found[1]) for name in tensors if (found := _BLOCK.match(name)))
    return TransformerLayout(spelling, blocks, width, in_channels, out[0], caption[1], cross[1])


def vae_layout(header: Header) -> VaeLayout | None:
    """The LTX-Video VAE in a file, or None if there is none.

    0.9.5 splits space and time in its encoder's downsamplers, which shows in their names; 0.9.1 added a time embedding
    to 0.9.0's decoder.
    """
    tensors = vae_tensors(header)
    if len(shape_of(tensors, "decoder.conv_in.conv.weight")) != 5 or "encoder.conv_in.conv.weight" not in tensors:
        return None
    spelling = "diffusers" if any(name.startswith("encoder.mid_block.") for name in tensors) else "lightricks"
    if spelling == "diffusers":
        split = "encoder.down_blocks.0.downsamplers.0.conv.conv.weight" in tensors
        timed = any(name.startswith("decoder.time_embedder.") for name in tensors)
    else:
        split = not any(name.startswith("encoder.down_blocks.9.") for name in tensors)
        timed = any(name.startswith("decoder.last_time_embedder.") for name in tensors)
    family = {(False, False): "0.9.0", (False, True): "0.9.1", (True, True): "0.9.5"}.get((split, timed))
    if family is None:
        return None
    return VaeLayout(spelling, family, shape_of(tensors, "decoder.conv_in.conv.weight")[1])


def shape_of(tensors: Mapping[str, TensorEntry], name: str) -> tuple[int, ...]:
    """A tensor's shape, () if it is absent."""
    return tensors[name].shape if name in tensors else ()


def family_of(header: Header) -> str:
    """ "ltx-2" or "ltx-video" by the transformer in a file, or ""."""
    if is_transformer(part_of(header, "transformer")):
        return "ltx-2"
    return "ltx-video" if transformer_layout(header) else ""


def refuse_adapter(header: Header, where: str) -> None:
    """Refuse a LoRA or its like, saying what it is, before anything is asked of it."""
    if not _any(header.tensors, ("lora_A", "lora_B", "lora_up", "lora_down", "lokr_", "hada_")):
        return
    try:
        lora = describe({name: entry.shape for name, entry in header.tensors.items()}, header.metadata, where)
    except WeightsError as error:
        raise WeightsError(
            "is a LoRA or another adapter, not a model", where=where, remedy="Name the base model."
        ) from error
    raise WeightsError(
        f"is {lora}, not a model",
        where=where,
        remedy="Name the base model here; to go on training the LoRA, name it in lora.init_from.",
    )


def refuse_quantised(tensors: Mapping[str, TensorEntry], where: str) -> None:
    """Refuse a VAE in few bits: no latents can be better than what makes them."""
    if any(entry.dtype.startswith(QUANTISED) for name, entry in tensors.items() if name.endswith(".weight")):
        raise WeightsError(
            "has a VAE that is quantised (8 bits or fewer), and latents need a whole one",
            where=where,
            remedy='Name a whole one under [model] in the recipe, for example: vae = "Lightricks/LTX-Video:vae".',
        )


def refuse_rotated(header: Header, where: str) -> None:
    """Refuse the fp8 files of LTX-Video that Lightricks publishes, which are made for kernels of their own.

    Their maker casts without scales and may rotate weights before (Hadamard), which nothing in the file tells: whoever
    read them as plain casts got noise (Lightricks/ComfyUI-LTXVideo#186).
    """
    cast = [
        name
        for name in transformer_originals(header)
        if header.tensors[name].dtype.startswith("F8_") and not scale_of(header.tensors, name)
    ]
    if cast and _MADE_FOR_OWN_KERNELS.search(where):
        raise WeightsError(
            "is made for Lightricks' own Q8 kernels: its weights may be rotated, and nothing in the file tells",
            where=where,
            remedy='Use the bf16 file of the same model, with memory.base_precision = "fp8" for its size in fp8.',
        )


def blocks_of(stated: Stated, found: int, published: int) -> int:
    """How many transformer blocks there must be: as stated, else as published with this width, else as found.

    A model that was made shorter must say so: a file that only lost its last blocks looks just like it.

    Args:
        stated: what the weights say of themselves.
        found: blocks up to the last one in the file.
        published: those of the version, 0 for a width of its own.
    """
    return stated.settings({"num_layers": "num_layers"}, {"num_layers": 1}).get("num_layers", max(found, published))


def require_timesteps(stated: Stated) -> None:
    """Refuse a transformer that takes other timesteps than sigma · 1000, which flow_matching.py makes."""
    name = "timestep_scale_multiplier"
    if name in stated.values and (scale := stated.value(name, 1.0)) != TIMESTEPS:
        raise WeightsError(
            f"says {name} = {scale:g}, so its transformer was trained on sigma · {scale:g}; ltxforge gives every "
            f"transformer sigma · {TIMESTEPS}, as all published ones take it",
            where=stated.where,
            remedy="Name a transformer of a published kind; if this is one, its description is damaged.",
        )


def _any(names: Iterable[str], parts: tuple[str, ...]) -> bool:
    return any(part in name for name in names for part in parts)


def transformer_config(layout: TransformerLayout, stated: Stated, spec: ModelSpec, where: str) -> dict[str, Any]:
    """diffusers' configuration for a transformer: the version's table with the file's own sizes.

    Args:
        layout: sizes from the file's shapes.
        stated: diffusers' `config.json`, or the `transformer` part of a single file's metadata; may be empty.
        spec: the version.
        where: the file, for messages.

    The number of heads shows in no shape: it comes from `stated`, else from the table if the width is the table's.
    """
    table = spec.transformer_config
    require_timesteps(stated)
    is_published = layout.width == spec.width
    heads = table["num_attention_heads"] if is_published else None
    heads = stated.settings({"num_attention_heads": "num_attention_heads"}, table).get("num_attention_heads", heads)
    if not isinstance(heads, int) or heads < 1 or layout.width % heads:
        raise WeightsError(
            f"has an unpublished width of {layout.width} and does not say how many attention heads it has",
            where=where,
            remedy="Give the folder with its config.json, or the single file with its metadata.",
        )
    return {
        **table,
        "num_layers": blocks_of(stated, layout.blocks, spec.blocks if is_published else 0),
        "num_attention_heads": heads,
        "attention_head_dim": layout.width // heads,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "caption_channels": layout.caption_channels,
        "cross_attention_dim": layout.cross_attention_dim,
    }
