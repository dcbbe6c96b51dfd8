"""Finds the parts of an LTX-2 checkpoint by its tensors' names, and says each name in diffusers' words.

Lightricks' files hold several parts, told apart by prefixes; the split files of 2.5 hold one or two, with or without
them; diffusers' folders hold one each. The connectors lie among the transformer's tensors, and what they begin with,
the projection of the text encoder's layers, outside of them or (2.5) in the text encoder's file. Names are all that
changes between the two spellings (facts: diffusers' scripts/convert_ltx2_to_diffusers.py), so that tensors can be
streamed. Reads no file and decides no version (`detect.py`). Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltxforge.errors import WeightsError
from ltxforge.models.formats import is_companion
from ltxforge.models.weights import Header, TensorEntry
from ltxforge.specs import ModelSpec, specs_of

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Where the prefixes are missing, these are no transformer's.
_OTHER_PARTS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "duration_head.")
_VAE_NAMES = ("encoder.", "decoder.", "per_channel_statistics.", "latents_mean", "latents_std")
_CONNECTOR_NAMES = (
    "connectors.", "video_embeddings_connector.", "audio_embeddings_connector.", "text_embedding_projection.",
    "video_connector.", "audio_connector.", "text_proj_in.", "video_text_proj_in.", "audio_text_proj_in.",
)  # fmt: skip
_VOCODER_NAMES = (
    "vocoder.", "bwe_generator.", "mel_stft.", "conv_in.", "conv_pre.", "upsamplers.", "ups.", "resnets.", "resblocks.",
    "act_out.", "act_post.", "conv_out.", "conv_post.",
)  # fmt: skip
# What follows `vocoder.` where that is a prefix: diffusers' 2.3 vocoder has a part of this name itself.
_PREFIXED_VOCODER = ("vocoder.vocoder.", "vocoder.bwe_generator.", "vocoder.conv_pre.", "vocoder.ups.")

# One path segment of a name, as Lightricks' files write it, in diffusers' words.
_SEGMENTS = {
    "patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed", "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln", "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q", "k_norm": "norm_k",
    "video_embeddings_connector": "video_connector", "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks",
    "res_blocks": "resnets", "last_time_embedder": "time_embedder", "last_scale_shift_table": "scale_shift_table",
    "ups": "upsamplers", "resblocks": "resnets", "conv_pre": "conv_in", "conv_post": "conv_out", "act_post": "act_out",
}  # fmt: skip
_STATISTICS = {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}
_PROJECTIONS = {
    "aggregate_embed": "text_proj_in", "video_aggregate_embed": "video_text_proj_in",
    "audio_aggregate_embed": "audio_text_proj_in",
}  # fmt: skip
PACKED_CONFIG, PACKED_TOKENIZER = "gemma_config", "tokenizer_json"
"""A packed text encoder's configuration, in its file's metadata, and its tokenizer, bytes in a tensor."""

_LANGUAGE_LAYER = re.compile(r"(model\.|language_model\.)+layers\.\d+\.mlp\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Part:
    """One part's tensors by diffusers' names: `names` as the file has them, `entries` as its header lists them.

    `where` is the file, for messages.
    """

    names: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    where: str = ""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, () if it is absent."""
        return self.entries[name].shape if name in self.entries else ()

    def size(self, name: str, axis: int) -> int:
        """A tensor's size along an axis. Raises WeightsError where there is none: the file is incomplete."""
        shape = self.shape(name)
        if axis >= len(shape):
            lacks = (
                f"has {name} in the shape {shape}, which has too few axes" if name in self.entries else f"lacks {name}"
            )
            raise WeightsError(
                f"{lacks}, without which the sizes of its part are not known",
                where=self.where,
                remedy="The file is incomplete or damaged; download it again or name another.",
            )
        return shape[axis]

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.entries)

    def count(self, prefix: str) -> int:
        """How many numbered modules there are under a prefix."""
        return len(self._numbers(prefix))

    def depth(self, prefix: str) -> int:
        """How many numbered modules there must be under a prefix for the last one to be there."""
        return 1 + max(self._numbers(prefix), default=-1)

    def _numbers(self, prefix: str) -> set[int]:
        numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
        return {int(found[1]) for name in self.entries if (found := numbered.match(name))}


def part_of(header: Header, name: str, where: str = "") -> Part:
    """A part's tensors in a checkpoint, perhaps none: "transformer", "vae", "audio_vae", "vocoder" or "connectors"."""
    own = {bare: original for bare, original in _bare_names(header, name).items() if not is_companion(original)}
    rename = _vae_name(own) if name in ("vae", "audio_vae") else _plain_name
    renamed = {rename(bare): original for bare, original in own.items()}
    names = {ours: original for ours, original in renamed.items() if ours}
    return Part(names, {ours: header.tensors[original] for ours, original in names.items()}, where)


def packed_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in a packed text encoder's metadata, or {}."""
    try:
        config = json.loads(metadata.get(PACKED_CONFIG, "{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def language_model(header: Header) -> Part:
    """The language model of a packed Gemma 4 by transformers' names; its other modalities' towers are left out.

    The files flatten `model.language_model.` to `model.`, as ComfyUI has it, or keep it.
    """
    names = {}
    for name in header.tensors:
        rest = name.removeprefix("model.").removeprefix("language_model.")
        if (
            name.startswith("model.")
            and rest.startswith(("layers.", "embed_tokens.", "norm."))
            and not is_companion(name)
        ):
            names[f"model.language_model.{rest}"] = name
    return Part(names, {ours: header.tensors[name] for ours, name in names.items()})


def has_language_model(header: Header) -> bool:
    """Whether a file has a language model's layers, whatever its other tensors are, in any of the usual spellings."""
    return any(_LANGUAGE_LAYER.fullmatch(name) for name in header.tensors)


def joined(first: Part, second: Part) -> Part:
    """Two files' tensors of one part; the first one's count where both have one."""
    return Part({**second.names, **first.names}, {**second.entries, **first.entries}, first.where)


def _bare_names(header: Header, part: str) -> dict[str, str]:
    """A part's names without prefix → as the file has them."""
    if part == "transformer":
        return {bare: name for bare, name in _of_transformer(header).items() if not bare.startswith(_CONNECTOR_NAMES)}
    if part == "connectors":
        found = {bare: name for bare, name in _of_transformer(header).items() if bare.startswith(_CONNECTOR_NAMES)}
        outside = {name: name for name in header.tensors if name.startswith("text_embedding_projection.")}
        return {bare.removeprefix("connectors."): name for bare, name in {**outside, **found}.items()}
    if part == "vocoder":
        is_prefixed = any(name.startswith(_PREFIXED_VOCODER) for name in header.tensors)
        return _stripped(header, "vocoder.") if is_prefixed else _starting(header, _VOCODER_NAMES)
    return _stripped(header, f"{part}.") or _starting(header, _VAE_NAMES)


def _of_transformer(header: Header) -> dict[str, str]:
    """Names under the transformer's prefix, or all that are no other part's where there is none."""
    for prefix in TRANSFORMER_PREFIXES:
        if found := _stripped(header, prefix):
            return found
    return {name: name for name in header.tensors if not name.startswith((*_OTHER_PARTS, *_VAE_NAMES))}


def _stripped(header: Header, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in header.tensors if name.startswith(prefix)}


def _starting(header: Header, prefixes: tuple[str, ...]) -> dict[str, str]:
    return {name: name for name in header.tensors if name.startswith(prefixes)}


def _plain_name(name: str) -> str:
    segments = name.split(".")
    if segments[0] == "text_embedding_projection":
        segments = [_PROJECTIONS.get(segments[1], segments[1]), *segments[2:]]
    said = ".".join(_SEGMENTS.get(segment, segment) for segment in segments)
    return said.replace("downsample.lowpass.", "downsample.")


def _vae_name(own: Iterable[str]) -> Callable[[str], str]:
    """How a VAE's names are said, given all of them: "" for what the modules do not have.

    Lightricks' video VAE numbers blocks and samplers in one list: even places are blocks, odd ones the sampler that
    follows (encoder) or comes first (decoder); the encoder's last and the decoder's first are the middle block.
    """
    flat = not any(name.startswith("encoder.mid_block.") for name in own)
    last = max(
        (int(found[1]) for name in own if (found := re.match(r"encoder\.down_blocks\.(\d+)\.", name))), default=0
    )

    def say(name: str) -> str:
        if name.startswith("per_channel_statistics."):
            return _STATISTICS.get(name.partition(".")[2], "")
        found = re.match(r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.(.*)", name) if flat else None
        if not found:
            return _plain_name(name)
        side, place, rest = found[1].split(".")[0], int(found[2]), found[3]
        if (side, place) in (("encoder", last), ("decoder", 0)):
            return _plain_name(f"{side}.mid_block.{rest}")
        block = place // 2 if side == "encoder" else (place - 1) // 2
        sampler = ("downsamplers" if side == "encoder" else "upsamplers") + ".0."
        return _plain_name(f"{found[1]}.{block}.{sampler if place % 2 else ''}{rest}")

    return say


@dataclass(frozen=True)
class Wiring:
    """What the transformer's names say that differs between 2.0, 2.3 and 2.5."""

    gated: bool
    captions: bool
    ff_bias: bool

    @property
    def said(self) -> str:
        """For a sentence."""
        return (
            f"{'gated' if self.gated else 'plain'} attention, prompts projected "
            f"{'in the transformer' if self.captions else 'in the connectors'}, feed-forward "
            f"{'with' if self.ff_bias else 'without'} biases"
        )


def is_transformer(part: Part) -> bool:
    """Whether this is an LTX-2 transformer: it has both modalities' entrances and exits."""
    needed = ("proj_in.weight", "audio_proj_in.weight", "proj_out.weight", "transformer_blocks.0.attn2.to_k.weight")
    return all(len(part.shape(name)) == 2 for name in needed)


def wiring_of(part: Part) -> Wiring:
    """Which kind of LTX-2 a transformer is."""
    return Wiring(
        gated=part.has("transformer_blocks.0.attn1.to_gate_logits."),
        captions=part.has("caption_projection."),
        ff_bias="transformer_blocks.0.ff.net.2.bias" in part.entries,
    )


def wiring_of_config(config: Mapping[str, object]) -> Wiring:
    """The same from diffusers' configuration of a transformer."""
    return Wiring(
        gated=bool(config.get("gated_attn", False)),
        captions=bool(config.get("use_prompt_embeddings", True)),
        ff_bias=bool(config.get("ff_bias", True)),
    )


def generation_of(wiring: Wiring) -> str:
    """ "2.0", "2.3" or "2.5"; "" for a wiring that no published version has."""
    found = (spec for spec in specs_of("ltx-2").values() if wiring_of_config(spec.transformer_config) == wiring)
    return next((generation(spec) for spec in found), "")


def generation(spec: ModelSpec) -> str:
    """A version without "-dev" or "-distilled"."""
    return spec.version.partition("-")[0]


def vae_family(part: Part) -> str:
    """ "2.0" or "2.3" by the decoder's depth; "diffusion" for 2.5's other decoder; "" for no video VAE of LTX-2."""
    if len(part.shape("encoder.conv_in.conv.weight")) != 5:
        return "diffusion" if part.has("decoder.t_embedder.") else ""
    if part.has("decoder.") and not part.has("decoder.conv_in."):
        return "diffusion"
    timed = part.has("decoder.time_embedder.")
    split = part.has("encoder.down_blocks.0.downsamplers.0.conv.conv.")
    return {3: "2.0", 4: "2.3"}.get(part.count("decoder.up_blocks."), "") if split and not timed else ""


def is_audio_vae(part: Part) -> bool:
    """Whether this is the audio VAE: its convolutions have two dimensions, time and mel."""
    return all(len(part.shape(f"{side}.conv_in.conv.weight")) == 4 for side in ("encoder", "decoder"))


def is_vocoder(part: Part) -> bool:
    """Whether this is a vocoder, with or without bandwidth extension."""
    return len(part.shape("conv_in.weight")) == 3 or len(part.shape("vocoder.conv_in.weight")) == 3


def is_extended(vocoder: Part) -> bool:
    """Whether a vocoder extends the bandwidth, as 2.3's and 2.5's do."""
    return vocoder.has("bwe_generator.")


def is_connectors(part: Part) -> bool:
    """Whether both modalities' connectors are here; the projections before them may lie elsewhere."""
    return all(part.has(f"{side}_connector.transformer_blocks.0.") for side in ("video", "audio"))


def has_projections(connectors: Part) -> bool:
    """Whether the connectors have what makes the text encoder's layers their input."""
    both = all(len(connectors.shape(f"{side}_text_proj_in.weight")) == 2 for side in ("video", "audio"))
    return both or len(connectors.shape("text_proj_in.weight")) == 2
