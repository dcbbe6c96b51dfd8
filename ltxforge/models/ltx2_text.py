"""From a caption to what LTX-2's transformer attends to: Gemma's hidden states, features, connectors.

Gemma gives one hidden state per layer and token; a projection makes features of them; the connectors, small
transformers, fill the padding with learned registers and give the embeddings of video and of audio. The order of
operations is that of diffusers' LTX2Pipeline and LTX2TextConnectors, so that the bits agree; what differs is that each
stage can be kept, and that a modality which is not wanted is not computed. Loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm, per_token_rms_norm
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ltxforge.modalities import MODALITIES, has
from ltxforge.models.quantised_encoders import device_of

SHARED = "features"
"""What 2.0's one feature tensor is called, which serves both modalities; the later ones' are `video_features`, …"""


@torch.no_grad()
def hidden_states(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, caption: str, tokens: int) -> Tensor:
    """All hidden states of a caption's real tokens, [n, E, layers + 1], n ≤ tokens, on the encoder's device.

    Args:
        encoder: Gemma 3 or 4 for conditional generation; its head is not asked.
        tokenizer: pads on the left.
        tokens: padded or cut to so many.
    """
    assert tokenizer.padding_side == "left", "Gemma's captions are padded on the left"
    words = tokenizer(
        [caption.strip()], padding="max_length", max_length=tokens, truncation=True, add_special_tokens=True,
        return_tensors="pt",
    )  # fmt: skip
    device = device_of(encoder)
    mask = words.attention_mask.to(device)
    output = encoder.model(input_ids=words.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
    kept = tokens - int(words.attention_mask.sum())
    return torch.stack([layer[0, kept:] for layer in output.hidden_states], dim=-1)


@torch.no_grad()
def features(connectors: LTX2TextConnectors, states: Tensor, tokens: int, modalities: str) -> dict[str, Tensor]:
    """What the connectors are fed, for a caption's real tokens: `features`, or `video_features` and `audio_features`.

    Each [n, D]. 2.0 projects once, after a normalisation over the whole caption; 2.3 and 2.5 project for each modality,
    after one over each token.

    Args:
        states: from `hidden_states`, on the connectors' device and in their dtype.
        tokens: the length that sums run over, as in the pipeline: another one would give other last bits.
        modalities: "video", "audio" or "both".
    """
    config = connectors.config
    padded, mask = pad_left(states[None], tokens)
    if not config.per_modality_projections:
        lengths = mask.sum(dim=-1)
        normed = per_layer_masked_mean_norm(padded, lengths, padded.device, padding_side="left")
        return {SHARED: trim(connectors.text_proj_in(normed), mask)}
    normed = per_token_rms_norm(padded).flatten(2, 3)
    normed = torch.where(mask.bool().unsqueeze(-1), normed, torch.zeros_like(normed))
    found = {}
    for name in MODALITIES:
        if has(modalities, name):
            width = config.video_hidden_dim if name == "video" else config.audio_hidden_dim
            scaled = normed * math.sqrt(width / config.caption_channels)
            found[f"{name}_features"] = trim(getattr(connectors, f"{name}_text_proj_in")(scaled), mask)
    return found


@torch.no_grad()
def embeddings(connectors: LTX2TextConnectors, given: Tensor, mask: Tensor, modality: str) -> Tensor:
    """One modality's connector: features [B, P, D], padded on the left, and their mask [B, P] → [B, P, D].

    Registers take the place of padding, so that all P positions are real.
    """
    connector = getattr(connectors, f"{modality}_connector")
    assert connector.learnable_registers is not None, "connectors without registers are not published"
    bias = (mask.to(torch.int64) - 1).to(given.dtype)[:, None, None] * torch.finfo(given.dtype).max
    return connector(given, bias)[0]


def features_of(tensors: Mapping[str, Tensor], modality: str) -> Tensor:
    """A modality's features among those of a caption, [n, D]."""
    return tensors[SHARED] if SHARED in tensors else tensors[f"{modality}_features"]


def pad_left(values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[1, n, …] → [1, tokens, …] with zeros before, and the mask [1, tokens], 1 where values are."""
    length = values.shape[1]
    assert length <= tokens, f"{length} tokens do not fit in {tokens}"
    zeros = values.new_zeros(1, tokens - length, *values.shape[2:])
    mask = torch.zeros(1, tokens, dtype=torch.int64, device=values.device)
    mask[:, tokens - length :] = 1
    return torch.cat([zeros, values], dim=1), mask


def trim(values: Tensor, mask: Tensor) -> Tensor:
    """[1, P, D] → [n, D]: the real tokens."""
    return values[0, mask[0].bool()]
