"""The linear layers of a transformer that could take an adapter: names, sizes, whose they are. Torch-free.

Read off a version's configuration, so that a plan can be refused before any weights are loaded; the tests hold them
against diffusers' modules. Decides nothing about which layers are trained (`targets.py`).
"""

from __future__ import annotations

import re
from typing import Any

from ltxforge.model_spec import BLOCKS
from ltxforge.specs import ModelSpec

Sizes = dict[str, tuple[int, int]]
"""A layer's name → (in_features, out_features)."""

SINUSOIDS = 256  # how many numbers a timestep is embedded into
# diffusers' names → Lightricks', for layers outside the blocks, of all families. Inside the blocks they are the same.
ORIGINAL_NAMES = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
DIFFUSERS_NAMES = {original: name for name, original in ORIGINAL_NAMES.items()}
CROSS_MODAL = re.compile(r"audio_to_video|video_to_audio|av_cross")


def original_name(layer: str) -> str:
    """A layer's or a tensor's name in Lightricks' checkpoints, from its name in diffusers."""
    return _renamed(layer, ORIGINAL_NAMES)


def diffusers_name(layer: str) -> str:
    """The inverse of `original_name`; a name that is diffusers' already stays as it is."""
    return _renamed(layer, DIFFUSERS_NAMES)


def _renamed(layer: str, names: dict[str, str]) -> str:
    head, dot, rest = layer.partition(".")
    return names.get(head, head) + dot + rest


def modality_of(layer: str) -> str:
    """Whose a layer is: "video", "audio", or "both" where it serves what they see of each other."""
    if CROSS_MODAL.search(layer):
        return "both"
    return "audio" if "audio" in layer else "video"


def linear_layers(spec: ModelSpec) -> Sizes:
    """Every linear layer of the transformer in module order."""
    return _ltx2(spec.transformer_config) if spec.has_audio else _ltx_video(spec.transformer_config)


def _ltx_video(config: dict[str, Any]) -> Sizes:
    width, cross = config["num_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
    block = {
        **_attention("attn1", width, width, width),
        **_attention("attn2", width, cross, width),
        **_feed_forward("ff", width),
    }
    return {
        "proj_in": (config["in_channels"], width),
        **_modulation("time_embed", width, 6),
        **_projection("caption_projection", config["caption_channels"], width),
        **_in_every_block(block, config),
        "proj_out": (width, config["out_channels"]),
    }


def _ltx2(config: dict[str, Any]) -> Sizes:
    """2.3 and 2.5 gate each attention head, modulate prompt attention, and project prompts outside the transformer."""
    heads, audio_heads = config["num_attention_heads"], config["audio_num_attention_heads"]
    width, audio = heads * config["attention_head_dim"], audio_heads * config["audio_attention_head_dim"]
    modulated, audio_modulated = config["cross_attn_mod"], config["audio_cross_attn_mod"]
    captions, prompts = config["caption_channels"], modulated or audio_modulated
    projected = config["use_prompt_embeddings"]
    return {
        "proj_in": (config["in_channels"], width),
        "audio_proj_in": (config["audio_in_channels"], audio),
        **(_projection("caption_projection", captions, width) if projected else {}),
        **(_projection("audio_caption_projection", captions, audio) if projected else {}),
        **_modulation("time_embed", width, 9 if modulated else 6),
        **_modulation("audio_time_embed", audio, 9 if audio_modulated else 6),
        **_modulation("av_cross_attn_video_scale_shift", width, 4),
        **_modulation("av_cross_attn_audio_scale_shift", audio, 4),
        **_modulation("av_cross_attn_video_a2v_gate", width, 1),
        **_modulation("av_cross_attn_audio_v2a_gate", audio, 1),
        **(_prompt_modulation(width, audio) if prompts and config.get("use_prompt_adaln_single", True) else {}),
        **_in_every_block(_ltx2_block(config, width, audio), config),
        "proj_out": (width, config["out_channels"]),
        "audio_proj_out": (audio, config["audio_out_channels"]),
    }


def _ltx2_block(config: dict[str, Any], width: int, audio: int) -> Sizes:
    """Attention between the modalities has audio's heads on both sides."""
    heads, audio_heads = config["num_attention_heads"], config["audio_num_attention_heads"]
    gates, audio_gates = config["gated_attn"], config["audio_gated_attn"]
    return {
        **_attention("attn1", width, width, width, gates and heads),
        **_attention("audio_attn1", audio, audio, audio, audio_gates and audio_heads),
        **_attention("attn2", width, config["cross_attention_dim"], width, gates and heads),
        **_attention("audio_attn2", audio, config["audio_cross_attention_dim"], audio, audio_gates and audio_heads),
        **_attention("audio_to_video_attn", width, audio, audio, gates and audio_heads),
        **_attention("video_to_audio_attn", audio, width, audio, audio_gates and audio_heads),
        **_feed_forward("ff", width),
        **_feed_forward("audio_ff", audio),
    }


def _in_every_block(block: Sizes, config: dict[str, Any]) -> Sizes:
    return {f"{BLOCKS}{n}.{name}": size for n in range(config["num_layers"]) for name, size in block.items()}


def _attention(name: str, query: int, context: int, inner: int, gates: int = 0) -> Sizes:
    """`inner` is heads · head width; `gates` the heads that have a gate of their own."""
    return {
        f"{name}.to_q": (query, inner),
        f"{name}.to_k": (context, inner),
        f"{name}.to_v": (context, inner),
        f"{name}.to_out.0": (inner, query),
        **({f"{name}.to_gate_logits": (query, gates)} if gates else {}),
    }


def _feed_forward(name: str, width: int) -> Sizes:
    return {f"{name}.net.0.proj": (width, 4 * width), f"{name}.net.2": (4 * width, width)}


def _modulation(name: str, width: int, rows: int) -> Sizes:
    """Adaptive layer norm's embedding of the timestep, to `rows` scales, shifts and gates."""
    return {
        f"{name}.emb.timestep_embedder.linear_1": (SINUSOIDS, width),
        f"{name}.emb.timestep_embedder.linear_2": (width, width),
        f"{name}.linear": (width, rows * width),
    }


def _prompt_modulation(width: int, audio: int) -> Sizes:
    return {**_modulation("prompt_adaln", width, 2), **_modulation("audio_prompt_adaln", audio, 2)}


def _projection(name: str, captions: int, width: int) -> Sizes:
    return {f"{name}.linear_1": (captions, width), f"{name}.linear_2": (width, width)}
