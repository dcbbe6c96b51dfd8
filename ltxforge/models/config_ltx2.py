"""diffusers' configurations of LTX-2's parts: the version's table, what the file says of itself, and its shapes.

A folder says it in its `config.json`, a single file in the `config` of its metadata, in Lightricks' words; both may be
silent. Shapes decide over both wherever they show a number, so that small and fine-tuned files work without either.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltxforge.errors import WeightsError
from ltxforge.models.layout import blocks_of, require_timesteps
from ltxforge.models.layout_ltx2 import Part, is_extended, vae_family, wiring_of
from ltxforge.models.stated import Stated
from ltxforge.specs import SPECS, ModelSpec

Config = Mapping[str, Any]
# Settings that diffusers' class knows and no table needs to repeat, with the class's own defaults.
_USUAL = {
    "ff_bias": True, "audio_ff_bias": True, "use_prompt_adaln_single": True, "use_keyframes_abs_pos_embedding": False,
}  # fmt: skip
# Lightricks' word → diffusers', where the value is the same.
_TRANSFORMER_WORDS = {
    "num_attention_heads": "num_attention_heads", "audio_num_attention_heads": "audio_num_attention_heads",
    "norm_eps": "norm_eps", "positional_embedding_theta": "rope_theta",
    "timestep_scale_multiplier": "timestep_scale_multiplier",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier", "rope_type": "rope_type",
}  # fmt: skip
_AUDIO_WORDS = {
    "in_channels": "in_channels", "resolution": "resolution", "norm_type": "norm_type",
    "causality_axis": "causality_axis", "dropout": "dropout", "mid_block_add_attention": "mid_block_add_attention",
    "mel_bins": "mel_bins",
}  # fmt: skip
_RATE_WORDS = {"upsample_rates": "upsample_factors", "resblock_dilation_sizes": "resnet_dilations"}
_VOCODER_WORDS = {**_RATE_WORDS, "output_sampling_rate": "output_sampling_rate"}
_EXTENSION_WORDS = {
    "n_fft": "filter_length", "hop_length": "hop_length", "num_mels": "num_mel_channels",
    "input_sampling_rate": "input_sampling_rate", "output_sampling_rate": "output_sampling_rate",
}  # fmt: skip


def transformer_config(part: Part, folder: Stated, metadata: Stated, spec: ModelSpec, where: str) -> dict[str, Any]:
    """Of LTX2VideoTransformer3DModel.

    Args:
        part: the transformer's tensors.
        folder: its `config.json`, or empty.
        metadata: a single file's `config`, or empty.
        spec: the version.
        where: the file, for messages.
    """
    table = spec.transformer_config
    stated = folder or metadata.table("transformer")
    require_timesteps(stated)
    told = _told(table, folder) if folder else _of_lightricks(stated, table)
    wiring = wiring_of(part)
    audio_gated = part.has("transformer_blocks.0.audio_attn1.to_gate_logits.")
    shapes = {
        "num_layers": blocks_of(stated, part.depth("transformer_blocks."), _published_depth(part, table)),
        "in_channels": part.size("proj_in.weight", 1),
        "out_channels": part.size("proj_out.weight", 0),
        "audio_in_channels": part.size("audio_proj_in.weight", 1),
        "audio_out_channels": part.size("audio_proj_out.weight", 0),
        "cross_attention_dim": part.size("transformer_blocks.0.attn2.to_k.weight", 1),
        "audio_cross_attention_dim": part.size("transformer_blocks.0.audio_attn2.to_k.weight", 1),
        "gated_attn": wiring.gated,
        "audio_gated_attn": audio_gated,
        "cross_attn_mod": _modulations(part, "") == 9,
        "audio_cross_attn_mod": _modulations(part, "audio_") == 9,
        "use_prompt_embeddings": wiring.captions,
        **_heads(part, "", "transformer_blocks.0.attn1", told, table, where),
        **_heads(part, "audio_", "transformer_blocks.0.audio_attn1", told, table, where),
    }
    if wiring.captions:
        shapes["caption_channels"] = part.size("caption_projection.linear_1.weight", 1)
    switches = {
        "ff_bias": wiring.ff_bias,
        "audio_ff_bias": "transformer_blocks.0.audio_ff.net.2.bias" in part.entries,
        "use_prompt_adaln_single": part.has("prompt_adaln.") or not shapes["cross_attn_mod"],
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in part.entries,
    }
    unusual = {name: value for name, value in switches.items() if name in table or value != _USUAL[name]}
    return {**table, **told, **shapes, **unusual}


def _published_depth(part: Part, table: Config) -> int:
    """How many blocks a transformer of this width is published with; 0 for a width of its own."""
    is_published = part.size("proj_in.weight", 0) == table["num_attention_heads"] * table["attention_head_dim"]
    return table["num_layers"] if is_published else 0


def _modulations(part: Part, side: str) -> int:
    """How many numbers per channel a timestep sets: 9 where the prompt's attention is modulated too, else 6."""
    name = f"{side}time_embed.linear.weight"
    return part.size(name, 0) // part.size(name, 1)


def _heads(part: Part, side: str, module: str, told: Config, table: Config, where: str) -> dict[str, int]:
    """Heads and their width: gates have one row per head; else the file says it, else a published width does."""
    width = part.size(f"{side}proj_in.weight", 0)
    count, size = f"{side}num_attention_heads", f"{side}attention_head_dim"
    gates = part.shape(f"{module}.to_gate_logits.weight")
    published = table[count] if width == table[count] * table[size] else None
    heads = gates[0] if gates else told.get(count) or published
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise WeightsError(
            f"has an unpublished width of {width} and does not say how many attention heads it has",
            where=where,
            remedy="Give the folder with its config.json, or the single file with its metadata.",
        )
    return {count: heads, size: width // heads}


def _of_lightricks(stated: Stated, table: Config) -> dict[str, Any]:
    said = stated.settings(_TRANSFORMER_WORDS, table)
    if precision := _precision(stated):
        said |= precision
    if "positional_embedding_max_pos" in stated.values:
        positions = stated.numbers("positional_embedding_max_pos", 3)
        said |= dict(zip(("pos_embed_max_pos", "base_height", "base_width"), positions, strict=True))
    if "audio_positional_embedding_max_pos" in stated.values:
        said["audio_pos_embed_max_pos"] = stated.numbers("audio_positional_embedding_max_pos", 1)[0]
    return said


def _precision(stated: Stated) -> dict[str, bool]:
    if "frequencies_precision" not in stated.values:
        return {}
    return {"rope_double_precision": stated.value("frequencies_precision", "") == "float64"}


def connectors_config(
    part: Part, folder: Stated, metadata: Stated, spec: ModelSpec, text_encoder: tuple[int, int] | None, where: str
) -> dict[str, Any]:
    """Of LTX2TextConnectors.

    Args:
        part: the connectors' tensors, with the projections.
        folder, metadata, spec, where: as for `transformer_config`.
        text_encoder: (width, layers) of the text encoder, whose states after each layer and before the first one the
            projections take; None where it is not known, then the shapes and the table decide.
    """
    table = spec.connectors_config
    assert table is not None
    stated = metadata.table("transformer")
    if folder:
        told = _told(table, folder)
    else:
        told = stated.settings({"positional_embedding_theta": "rope_theta", "rope_type": "rope_type"}, table)
        told |= _precision(stated)
        if "connector_positional_embedding_max_pos" in stated.values:
            told["connector_rope_base_seq_len"] = stated.numbers("connector_positional_embedding_max_pos", 1)[0]
    sizes: dict[str, Any] = {}
    for side in ("video", "audio"):
        sizes |= _connector_sizes(part, side, told, table, stated, where)
    return {**table, **told, **sizes, **_projection_sizes(part, {**table, **told}, text_encoder)}


def _connector_sizes(part: Part, side: str, told: Config, table: Config, stated: Stated, where: str) -> dict[str, Any]:
    module = f"{side}_connector.transformer_blocks."
    width = part.size(f"{module}0.attn1.to_q.weight", 1)
    gates = part.shape(f"{module}0.attn1.to_gate_logits.weight")
    count, size = f"{side}_connector_num_attention_heads", f"{side}_connector_attention_head_dim"
    words = ["connector_num_attention_heads", *(["audio_connector_num_attention_heads"] if side == "audio" else [])]
    own = next((stated.value(word, 1) for word in reversed(words) if word in stated.values), None)
    published = table[count] if width == table[count] * table[size] else None
    heads = gates[0] if gates else told.get(count) or own or published
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise WeightsError(
            f"has {side} connectors of an unpublished width of {width} and does not say how many heads they have",
            where=where,
            remedy="Give the folder with its config.json, or the single file with its metadata.",
        )
    registers, length = part.shape(f"{side}_connector.learnable_registers"), f"{side}_connector_num_learnable_registers"
    return {
        count: heads,
        size: width // heads,
        f"{side}_connector_num_layers": max(
            part.depth(module), table[f"{side}_connector_num_layers"] if published else 0
        ),
        length: registers[0] if registers else table[length],
        f"{side}_gated_attn": bool(gates),
    }


def _projection_sizes(part: Part, known: Config, text_encoder: tuple[int, int] | None) -> dict[str, Any]:
    shared = part.shape("text_proj_in.weight")
    video = part.shape("video_text_proj_in.weight")
    flat = part.size("text_proj_in.weight" if shared else "video_text_proj_in.weight", 1)
    width = shared[0] if shared else text_encoder[0] if text_encoder else known["caption_channels"]
    sizes = {
        "caption_channels": width,
        "text_proj_in_factor": flat // width,
        "per_modality_projections": not shared,
        "proj_bias": any(f"{name}.bias" in part.entries for name in ("text_proj_in", "video_text_proj_in")),
    }
    if shared:
        return sizes
    return {**sizes, "video_hidden_dim": video[0], "audio_hidden_dim": part.size("audio_text_proj_in.weight", 0)}


def vae_config(part: Part, folder: Stated) -> dict[str, Any]:
    """Of AutoencoderKLLTX2Video: the folder's own, else the family's table with the file's own sizes.

    A block of the encoder is as wide as its input, and hands on the next one's width; the decoder's lists run from the
    picture inwards, and an upsampler's factor divides the width that it leaves behind.
    """
    table = family_table(vae_family(part))
    if "block_out_channels" in folder.values:
        return {name: value for name, value in folder.values.items() if not name.startswith("_")}
    downs = [f"encoder.down_blocks.{n}." for n in range(part.count("encoder.down_blocks."))]
    ups = [f"decoder.up_blocks.{n}." for n in range(part.count("decoder.up_blocks."))]
    factors = reversed(table["upsample_factor"])
    widths = [_width(part, up) * factor for up, factor in zip(ups, factors, strict=True)]
    sizes = {
        "latent_channels": part.size("decoder.conv_in.conv.weight", 1),
        "block_out_channels": tuple(_width(part, block) for block in [*downs[1:], "encoder.mid_block."]),
        "layers_per_block": tuple(_layers(part, block) for block in [*downs, "encoder.mid_block."]),
        "decoder_block_out_channels": tuple(reversed(widths)),
        "decoder_layers_per_block": tuple(_layers(part, block) for block in [*reversed(ups), "decoder.mid_block."]),
    }
    return {**table, **sizes, **published_layers(sizes, table)}


def published_layers(sizes: Config, table: Config) -> dict[str, Any]:
    """The layers of the sides of a VAE that are as wide as published: what is fewer in a file is missing from it."""
    sides = ("", "decoder_")
    is_published = (sizes[f"{side}block_out_channels"] == table[f"{side}block_out_channels"] for side in sides)
    layers = [f"{side}layers_per_block" for side, holds in zip(sides, is_published, strict=True) if holds]
    return {name: table[name] for name in layers if len(table[name]) == len(sizes[name])}


def family_table(family: str) -> dict[str, Any]:
    """The VAE's table of a `vae_family`."""
    return next(spec for spec in SPECS.values() if spec.vae_family == family).vae_config


def _width(part: Part, block: str) -> int:
    return part.size(f"{block}resnets.0.conv1.conv.weight", 0)


def _layers(part: Part, block: str) -> int:
    return part.depth(f"{block}resnets.")


def audio_vae_config(part: Part, folder: Stated, metadata: Stated, spec: ModelSpec) -> dict[str, Any]:
    """Of AutoencoderKLLTX2Audio."""
    table = spec.audio_vae_config
    assert table is not None
    told = _told(table, folder) if folder else _audio_of_lightricks(metadata.table("audio_vae"), table)
    base = part.size("encoder.conv_in.conv.weight", 0)
    levels = range(part.depth("encoder.down."))
    widths = [part.size(f"encoder.down.{level}.block.0.conv1.conv.weight", 0) for level in levels]
    latents = part.size("decoder.conv_in.conv.weight", 1)
    published = table["num_res_blocks"] if base == table["base_channels"] else 0
    return {
        **table,
        **told,
        "base_channels": base,
        "ch_mult": tuple(width // base for width in widths),
        "num_res_blocks": max(published, *(part.depth(f"encoder.down.{level}.block.") for level in levels)),
        "in_channels": part.size("encoder.conv_in.conv.weight", 1),
        "output_channels": part.size("decoder.conv_out.conv.weight", 0),
        "latent_channels": latents,
        "double_z": part.size("encoder.conv_out.conv.weight", 0) == 2 * latents,
    }


def _audio_of_lightricks(stated: Stated, table: Config) -> dict[str, Any]:
    parameters = stated.table("model").table("params")
    stft = stated.table("preprocessing").table("stft")
    said = parameters.table("ddconfig").settings(_AUDIO_WORDS, table)
    said |= parameters.settings({"sampling_rate": "sample_rate"}, table)
    return said | stft.settings({"hop_length": "mel_hop_length", "causal": "is_causal"}, table)


def vocoder_config(part: Part, folder: Stated, metadata: Stated, spec: ModelSpec) -> dict[str, Any]:
    """Of LTX2Vocoder, or of LTX2VocoderWithBWE. Strides and dilations show in no shape."""
    table = spec.vocoder_config
    assert table is not None
    stated = metadata.table("vocoder")
    if not is_extended(part):
        told = _told(table, folder) if folder else stated.settings(_VOCODER_WORDS, table)
        return _fitted({**table, **told, **_vocoder_sizes(part, "")}, "")
    if folder:
        told = _told(table, folder)
    else:
        extension = stated.table("bwe")
        told = stated.table("vocoder").settings(_RATE_WORDS, table)
        told |= extension.settings({theirs: f"bwe_{ours}" for theirs, ours in _RATE_WORDS.items()}, table)
        told |= extension.settings(_EXTENSION_WORDS, table)
    sizes = _vocoder_sizes(part, "vocoder.")
    extended = {f"bwe_{name}": value for name, value in _vocoder_sizes(part, "bwe_generator.").items()}
    return _fitted(_fitted({**table, **told, **sizes, **extended}, ""), "bwe_")


def _fitted(config: dict[str, Any], side: str) -> dict[str, Any]:
    """One list of dilations per kernel size; all published ones are alike."""
    kernels, dilations = config[f"{side}resnet_kernel_sizes"], config[f"{side}resnet_dilations"]
    return {**config, f"{side}resnet_dilations": [*dilations, *dilations[-1:] * len(kernels)][: len(kernels)]}


def _vocoder_sizes(part: Part, module: str) -> dict[str, Any]:
    upsamplers = part.depth(f"{module}upsamplers.")
    kinds = -(-part.depth(f"{module}resnets.") // max(1, upsamplers))
    return {
        "in_channels": part.size(f"{module}conv_in.weight", 1),
        "hidden_channels": part.size(f"{module}conv_in.weight", 0),
        "out_channels": part.size(f"{module}conv_out.weight", 0),
        "upsample_kernel_sizes": [part.size(f"{module}upsamplers.{n}.weight", 2) for n in range(upsamplers)],
        "resnet_kernel_sizes": [part.size(f"{module}resnets.{n}.convs1.0.weight", 2) for n in range(kinds)],
    }


def _told(table: Config, folder: Stated) -> dict[str, Any]:
    """What a folder's `config.json` says of the table's settings."""
    return folder.settings({name: name for name in table}, table)
