"""LTX-2's own block and transformer forward, over video and audio or one of them alone; 2.0, 2.3 and 2.5.

The forward runs over the diffusers modules' own parameters, names unchanged; diffusers' forward is the oracle. Both
modalities are computed by the same functions, told apart by `Modality`; versions by the modules that are there. What
differs from diffusers: a modality that takes no part costs nothing and none of its modules is touched, timesteps are
embedded once per distinct value, rope tables come from outside, how a block is called may be said, and
audio-video cross attention follows the official rule for per-token timesteps (`prepare_cross`). Loads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from ltxforge_kernels.choice import EAGER, Kernels
from ltxforge_kernels.qk_norm_rope.rope import Rope, compact
from torch import Tensor, nn

from ltxforge.modalities import Streams
from ltxforge.models import blocks
from ltxforge.models.blocks import (
    Gate,
    Modulation,
    RunBlock,
    Shift,
    add,
    add_and_norm,
    add_and_norm_twice,
    attention_forward,
    distinct_timesteps,
    norm,
    prompt_bias,
    run_plainly,
)
from ltxforge.shapes import LatentShape


@dataclass(frozen=True, eq=False)
class Modality:
    """What diffusers calls a modality's modules and parameters.

    The modules of one modality have the same names but for `prefix`. Cross attention, in which this modality asks and
    the other one answers, has names of its own; `cross_row` is where its scale stands in both modalities' tables, its
    shift below it.
    """

    prefix: str
    cross_norm: str
    cross_attn: str
    cross_table: str
    cross_row: int
    cross_embed: str
    gate_embed: str

    def of(self, module: nn.Module, name: str) -> Any:
        """This modality's part of a module, or None if the version has none."""
        return getattr(module, self.prefix + name, None)


VIDEO = Modality(
    prefix="",
    cross_norm="audio_to_video_norm",
    cross_attn="audio_to_video_attn",
    cross_table="video_a2v_cross_attn_scale_shift_table",
    cross_row=0,
    cross_embed="av_cross_attn_video_scale_shift",
    gate_embed="av_cross_attn_video_a2v_gate",
)
AUDIO = Modality(
    prefix="audio_",
    cross_norm="video_to_audio_norm",
    cross_attn="video_to_audio_attn",
    cross_table="audio_a2v_cross_attn_scale_shift_table",
    cross_row=2,
    cross_embed="av_cross_attn_audio_scale_shift",
    gate_embed="av_cross_attn_audio_v2a_gate",
)
BY_NAME = {"video": VIDEO, "audio": AUDIO}
CROSS_GATE_ROW = 4  # of the five rows of a cross table; the first four are scales and shifts


@dataclass(frozen=True)
class Stream:
    """One modality's input.

    `tokens` [B, T, C] in the transformer's dtype. `timesteps` [B, 1] (one per sample) or [B, T] (one per token) and
    `sample_timesteps` [B], both float32, sigma · 1000 and never rounded, best on the host: the latter is the sample's
    noise level whatever its clean tokens' timesteps are. `prompts` [B, P, E], this modality's half of the connectors'
    output; `prompt_mask` [B, P], 1 real and 0 padding, or None where every position is real, as after registers. `rope`
    and `cross_rope` from `video_ropes` or `audio_ropes`. `present` [B], 1 where the sample has this modality and 0
    where its tokens only fill the batch, or None where all have it: the other modality of a sample without it comes out
    as if it were alone.
    """

    tokens: Tensor
    timesteps: Tensor
    sample_timesteps: Tensor
    prompts: Tensor
    rope: Rope
    cross_rope: Rope
    prompt_mask: Tensor | None = None
    present: Tensor | None = None


@dataclass(frozen=True)
class Cross:
    """What every block gets of a modality for cross attention.

    `own` has four rows, `gate` one. `other_present` [B, 1, 1] is 0 where a sample lacks the other modality, None where
    none does.
    """

    own: Modulation
    gate: Modulation
    other_present: Tensor | None
    rope: Rope


@dataclass(frozen=True)
class Given:
    """What every block gets of a modality beside its tokens.

    `own` has six rows, or nine where prompt attention is modulated; `prompt_rows` two, or one row of zeros where
    prompts are modulated by the block's table alone. `cross` is None without the other modality.
    """

    own: Modulation
    rope: Rope
    prompt: Tensor
    prompt_rows: Modulation
    bias: Tensor | None
    cross: Cross | None
    kernels: Kernels


def transformer_forward(
    transformer: LTX2VideoTransformer3DModel,
    streams: Streams[Stream],
    kernels: Kernels = EAGER,
    run_block: RunBlock = run_plainly,
) -> Streams[Tensor]:
    """The velocities [B, T, C] of the modalities that take part.

    With one modality alone the result is the stock model's under `isolate_modalities=True`, not the joint model's.

    Args:
        transformer: diffusers' module; only its parameters and leaf modules are used.
        streams: video, audio or both; with both, of equal B.
        kernels: which implementation each op has.
        run_block: how each block is called.
    """
    present = {BY_NAME[name]: stream for name, stream in streams.items()}
    assert present, "at least one modality must take part"
    hidden = {modality: modality.of(transformer, "proj_in")(stream.tokens) for modality, stream in present.items()}
    given, output_rows = {}, {}
    for modality in present:
        given[modality], output_rows[modality] = prepare(transformer, modality, present, kernels)
    for number, block in enumerate(transformer.transformer_blocks):
        hidden = run_block(number, block_forward, block, hidden, given)
    velocities = {m: output_forward(transformer, m, hidden[m], output_rows[m]) for m in present}
    return Streams(video=velocities.get(VIDEO), audio=velocities.get(AUDIO))


def prepare(
    transformer: LTX2VideoTransformer3DModel,
    modality: Modality,
    present: Mapping[Modality, Stream],
    kernels: Kernels,
) -> tuple[Given, Modulation]:
    """What all blocks share of one modality, and the output's modulation, one row."""
    stream = present[modality]
    dtype, count = stream.tokens.dtype, len(stream.tokens)
    distinct, index = distinct_timesteps(stream.timesteps, stream.tokens.device)
    block, output = embed(modality.of(transformer, "time_embed"), distinct, dtype)
    prompt, prompt_rows = stream.prompts, stream.prompts.new_zeros(1, 1, 1)
    if (projection := modality.of(transformer, "caption_projection")) is not None:
        prompt = projection(prompt)
    if (prompt_embed := modality.of(transformer, "prompt_adaln")) is not None:
        prompt_rows = embed(prompt_embed, stream.sample_timesteps.to(stream.tokens.device, non_blocking=True), dtype)[0]
    assert prompt.shape[0] == count and stream.sample_timesteps.shape == (count,)
    given = Given(
        own=Modulation(block, index),
        rope=stream.rope,
        prompt=prompt,
        prompt_rows=Modulation(prompt_rows, None),
        bias=None if stream.prompt_mask is None else prompt_bias(stream.prompt_mask, dtype),
        cross=prepare_cross(transformer, modality, present, distinct, index),
        kernels=kernels,
    )
    return given, Modulation(output[:, None], index)


def prepare_cross(
    transformer: LTX2VideoTransformer3DModel,
    modality: Modality,
    present: Mapping[Modality, Stream],
    distinct: Tensor,
    index: Tensor | None,
) -> Cross | None:
    """The modality's side of cross attention, or None where it is alone; timesteps as from `distinct_timesteps`.

    Scale and shift follow the modality's own timesteps, per token where they are, and the gate follows the other
    modality's noise level: the official trainer's rule. diffusers offers own and own (`use_cross_timestep=False`) or
    other and other (True); all agree where no token is conditioned and both sigmas are equal.
    """
    stream = present[modality]
    other = next((each for each in present.values() if each is not stream), None)
    if other is None:
        return None
    dtype, config = stream.tokens.dtype, transformer.config
    own, _ = embed(getattr(transformer, modality.cross_embed), distinct, dtype)
    ratio = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
    level = other.sample_timesteps.to(stream.tokens.device, non_blocking=True)
    gate, _ = embed(getattr(transformer, modality.gate_embed), level * ratio, dtype)
    return Cross(
        own=Modulation(own, index),
        gate=Modulation(gate, None),
        other_present=None if other.present is None else other.present.to(dtype)[:, None, None],
        rope=stream.cross_rope,
    )


def embed(module: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Timesteps [N] → modulation rows [N, K, D] and the embedding itself, [N, D]. Float32 up to the sinusoids."""
    assert timesteps.dtype == torch.float32, f"timesteps must be float32, not {timesteps.dtype}"
    rows, embedded = module(timesteps, batch_size=len(timesteps), hidden_dtype=dtype)
    return rows.unflatten(-1, (-1, embedded.shape[-1])), embedded


@dataclass(frozen=True)
class Branch:
    """What a part of a block adds to the residual stream: `value` [B, T, D], gated or not."""

    value: Tensor
    gate: Gate | None


def block_forward(
    block: nn.Module, hidden: Mapping[Modality, Tensor], given: Mapping[Modality, Given]
) -> dict[Modality, Tensor]:
    """One transformer block: self attention, prompt attention, each other, feed-forward. `hidden` is [B, T, D] each.

    A part's branch is added by the part that follows, in one pass with its norm. Each modality's table [U, 6 or 9, D]
    of shifts, scales and gates is made once.
    """
    tables = {m: given[m].own.table(m.of(block, "scale_shift_table")) for m in hidden}
    attended = {m: self_attention(block, m, tokens, tables[m], given[m]) for m, tokens in hidden.items()}
    streams = {m: tokens for m, (tokens, _) in attended.items()}
    branches = {m: prompt_attention(block, m, query, tables[m], given[m]) for m, (_, query) in attended.items()}
    if len(hidden) == 2:
        streams, branches = cross_attention(block, streams, branches, given)
    return {m: feed_forward(block, m, tokens, branches[m], tables[m], given[m]) for m, tokens in streams.items()}


def self_attention(
    block: nn.Module, modality: Modality, hidden: Tensor, table: Tensor, given: Given
) -> tuple[Tensor, Tensor]:
    """The modality attends to itself, between rows 0 to 2 of its modulation.

    Gives the stream, and it normed as the queries of `prompt_attention`, which 2.3 and 2.5 modulate by rows 6 and 7.
    """
    index, kernels = given.own.index, given.kernels
    normed = norm(modality.of(block, "norm1"), hidden, Shift(table, index, 0, 1), kernels)
    attended = attention_forward(modality.of(block, "attn1"), normed, normed, kernels, given.rope)
    queries = Shift(table, index, 6, 7) if table.shape[1] > 6 else None
    return add_and_norm(hidden, attended, Gate(table, index, 2), modality.of(block, "norm2"), queries, kernels)


def prompt_attention(block: nn.Module, modality: Modality, query: Tensor, table: Tensor, given: Given) -> Branch:
    """The modality attends to its prompt; 2.3 and 2.5 modulate the prompt and gate the result by row 8."""
    context = given.prompt
    if (prompt_table := modality.of(block, "prompt_scale_shift_table")) is not None:
        shift, scale = given.prompt_rows.rows(prompt_table)
        context = context * (1 + scale) + shift
    attended = attention_forward(modality.of(block, "attn2"), query, context, given.kernels, bias=given.bias)
    return Branch(attended, Gate(table, given.own.index, 8) if table.shape[1] > 6 else None)


def cross_attention(
    block: nn.Module,
    hidden: Mapping[Modality, Tensor],
    branches: Mapping[Modality, Branch],
    given: Mapping[Modality, Given],
) -> tuple[dict[Modality, Tensor], dict[Modality, Branch]]:
    """Video attends to audio and audio to video, both to what the other was before."""
    cross = {modality: each.cross for modality, each in given.items() if each.cross is not None}
    streams, queries, contexts = {}, {}, {}
    for modality, other in ((VIDEO, AUDIO), (AUDIO, VIDEO)):
        own, kernels = cross[modality].own, given[modality].kernels
        table, module = own.table(getattr(block, modality.cross_table), 0, 4), getattr(block, modality.cross_norm)
        asks, answers = (Shift(table, own.index, row + 1, row) for row in (modality.cross_row, other.cross_row))
        branch = branches[modality]
        streams[modality], queries[modality], contexts[modality] = add_and_norm_twice(
            hidden[modality], branch.value, branch.gate, module, asks, answers, kernels
        )
    added = {}
    for modality, other in ((VIDEO, AUDIO), (AUDIO, VIDEO)):
        attended = attention_forward(
            getattr(block, modality.cross_attn),
            queries[modality],
            contexts[other],
            given[modality].kernels,
            cross[modality].rope,
            context_rope=cross[other].rope,
        )
        gate = cross[modality].gate.table(getattr(block, modality.cross_table), CROSS_GATE_ROW)
        if (present := cross[modality].other_present) is not None:
            gate = gate * present
        added[modality] = Branch(attended, Gate(gate, None, 0))
    return streams, added


def feed_forward(
    block: nn.Module, modality: Modality, hidden: Tensor, branch: Branch, table: Tensor, given: Given
) -> Tensor:
    """The modality's feed-forward, between rows 3 to 5 of its modulation, after what is yet to be added."""
    index, kernels = given.own.index, given.kernels
    moved = Shift(table, index, 3, 4)
    hidden, normed = add_and_norm(hidden, branch.value, branch.gate, modality.of(block, "norm3"), moved, kernels)
    return add(hidden, blocks.feed_forward(modality.of(block, "ff"), normed, kernels), Gate(table, index, 5), kernels)


def output_forward(
    transformer: LTX2VideoTransformer3DModel, modality: Modality, hidden: Tensor, modulation: Modulation
) -> Tensor:
    """The modality's last norm, modulation and projection: [B, T, D] → [B, T, C]."""
    shift, scale = modulation.rows(modality.of(transformer, "scale_shift_table"))
    normed = modality.of(transformer, "norm_out")(hidden) * (1 + scale) + shift
    return modality.of(transformer, "proj_out")(normed)


def video_ropes(
    transformer: LTX2VideoTransformer3DModel, shape: LatentShape, fps: float, device: torch.device
) -> tuple[Rope, Rope]:
    """The rotations of self attention and of cross attention, which knows time alone, from float32 tables.

    A token sits in the middle of what it covers: pixels in space, and in time seconds of the causal VAE's frames (the
    first latent frame holds one frame, every other eight).
    """
    coordinates = transformer.rope.prepare_video_coords(1, shape.frames, shape.height, shape.width, device, fps=fps)
    sizes = (shape.frames, shape.height, shape.width)
    own, cross = transformer.rope(coordinates), transformer.cross_attn_rope(coordinates[:, :1])
    return compact(*own, sizes), compact(*cross, sizes, along=(0,))


def audio_ropes(transformer: LTX2VideoTransformer3DModel, length: int, device: torch.device) -> tuple[Rope, Rope]:
    """As `video_ropes`, for `length` audio tokens of 40 ms each."""
    coordinates = transformer.audio_rope.prepare_audio_coords(1, length, device)
    own, cross = transformer.audio_rope(coordinates), transformer.cross_attn_audio_rope(coordinates)
    return compact(*own, (length,)), compact(*cross, (length,))


def unused_modules(transformer: LTX2VideoTransformer3DModel, modalities: str) -> list[nn.Module]:
    """The modules that `transformer_forward` never touches with these modalities: all of the other one's weights but a
    few tables, which are parameters of blocks.
    """
    if modalities == "both":
        return []
    other = AUDIO if modalities == "video" else VIDEO
    own = ("proj_in", "time_embed", "caption_projection", "prompt_adaln", "norm_out", "proj_out")
    crossed = [name for each in (VIDEO, AUDIO) for name in (each.cross_embed, each.gate_embed)]
    unused = [getattr(transformer, name, None) for name in (*(other.prefix + name for name in own), *crossed)]
    for block in transformer.transformer_blocks:
        unused += [other.of(block, name) for name in ("norm1", "attn1", "norm2", "attn2", "norm3", "ff")]
        unused += [getattr(block, name) for each in (VIDEO, AUDIO) for name in (each.cross_norm, each.cross_attn)]
    return [module for module in unused if module is not None]
