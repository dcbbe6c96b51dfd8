"""Single files in diffusers' words: which tensor becomes which, and the VAE's configuration from its shapes.

Decides nothing of its own: names go through diffusers' conversion functions. Only names are converted, so that tensors
can be streamed one by one and the file never lies in memory twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
)

from ltxforge.errors import WeightsError
from ltxforge.models.config_ltx2 import published_layers
from ltxforge.models.layout import VaeLayout, transformer_layout, transformer_tensors, vae_layout, vae_tensors
from ltxforge.models.weights import Header
from ltxforge.specs import SPECS

# The width at which diffusers' function tells a 0.9.5 encoder; `layout.py` tells it by wiring, whatever the width.
_WIDTH_OF_095 = 2048
# The tensor whose width that is; that a file lacks it must be said later, with all else that it lacks.
_ASKED_FOR = "vae.encoder.conv_out.conv.weight"


@dataclass(frozen=True)
class _Name:
    """Stands in for a tensor in diffusers' functions, which look at names and at one shape."""

    original: str
    shape: tuple[int, ...]


def transformer_names(header: Header) -> dict[str, str]:
    """diffusers' name → the file's own, for each tensor of the transformer."""
    layout = transformer_layout(header)
    assert layout is not None
    own = _original_names(header, transformer_tensors(header))
    if layout.spelling == "diffusers":
        return own
    markers = {name: _Name(original, ()) for name, original in own.items()}
    return {name: marker.original for name, marker in convert_ltx_transformer_checkpoint_to_diffusers(markers).items()}


def vae_names(header: Header) -> dict[str, str]:
    """diffusers' name → the file's own, for each tensor of the VAE."""
    layout = vae_layout(header)
    assert layout is not None
    own = _original_names(header, vae_tensors(header))
    if layout.spelling == "diffusers":
        return own
    width = _WIDTH_OF_095 if layout.family == "0.9.5" else 0
    markers = {f"vae.{name}": _Name(original, (0, width)) for name, original in own.items()}
    markers.setdefault(_ASKED_FOR, _Name("", (0, width)))
    converted = convert_ltx_vae_checkpoint_to_diffusers(markers)
    return {name: marker.original for name, marker in converted.items() if marker.original}


def _original_names(header: Header, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Names without a prefix → names as the file has them."""
    originals = {name.removeprefix("model.diffusion_model.").removeprefix("vae."): name for name in header.tensors}
    return {name: originals[name] for name in tensors}


def vae_config(header: Header, config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """diffusers' configuration of the VAE: the folder's own, else the family's table with the file's own sizes.

    Raises WeightsError if a tensor that tells a size is missing; `where` is the file, for that message.
    """
    if "block_out_channels" in config:
        return {name: value for name, value in config.items() if not name.startswith("_")}
    layout = vae_layout(header)
    assert layout is not None
    shapes = {name: header.tensors[original].shape for name, original in vae_names(header).items()}
    table = SPECS[layout.family].vae_config
    try:
        sizes = {**_encoder_sizes(shapes, layout), **_decoder_sizes(shapes, layout)}
    except (LookupError, ValueError) as error:
        raise WeightsError(
            f"the VAE lacks what its sizes are read from: {error}",
            where=where,
            remedy="The file is incomplete or of another model; download it again or name another.",
        ) from error
    return {**table, **sizes, **published_layers(sizes, table)}


def _encoder_sizes(shapes: Mapping[str, tuple[int, ...]], layout: VaeLayout) -> dict[str, Any]:
    blocks = _groups(shapes, "encoder.down_blocks.")
    widths = [_width(shapes, block) for block in blocks]
    if layout.family == "0.9.5":  # its middle block has a width of its own
        widths.append(_width(shapes, "encoder.mid_block."))
    layers = [_layers(shapes, block) for block in [*blocks, "encoder.mid_block."]]
    return {
        "latent_channels": layout.latent_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(layers),
    }


def _decoder_sizes(shapes: Mapping[str, tuple[int, ...]], layout: VaeLayout) -> dict[str, Any]:
    """The decoder's lists run from the picture inwards; an upsampler's factor divides the width it leaves behind."""
    blocks = _groups(shapes, "decoder.up_blocks.")
    factors = reversed(SPECS[layout.family].vae_config["upsample_factor"])
    widths = [_width(shapes, block) * factor for block, factor in zip(blocks, factors, strict=True)]
    layers = [_layers(shapes, block) for block in ["decoder.mid_block.", *blocks]]
    return {
        "decoder_block_out_channels": tuple(reversed(widths)),
        "decoder_layers_per_block": tuple(reversed(layers)),
    }


def _groups(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> list[str]:
    """The numbered blocks under a prefix, in order."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return [f"{prefix}{number}." for number in sorted(numbers)]


def _layers(shapes: Mapping[str, tuple[int, ...]], block: str) -> int:
    return len(_groups(shapes, f"{block}resnets."))


def _width(shapes: Mapping[str, tuple[int, ...]], block: str) -> int:
    return shapes[f"{block}resnets.0.conv1.conv.weight"][0]
