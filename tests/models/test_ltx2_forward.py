"""LTX-2's own forward against diffusers' stock forward, which is the oracle: joint, video alone, audio alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ltxforge.memory.strategy import run_block_of
from ltxforge.modalities import Streams
from ltxforge.models import ltx2
from ltxforge.models.ltx2 import AUDIO, BY_NAME, VIDEO, Stream, transformer_forward
from ltxforge.models.ltx2_tiny import tiny_transformer
from ltxforge.models.tiny import cast
from ltxforge.plan import MemoryPlan, every_nth
from ltxforge.shapes import LatentShape
from ltxforge.specs_ltx2 import LTX2_TINY

WIRINGS = list(LTX2_TINY)
pytestmark = pytest.mark.usefixtures("stock_in_float64")

CPU = torch.device("cpu")
SHAPE = LatentShape(frames=3, height=2, width=3)
AUDIO_LENGTH = 7
FPS = 24.0
PROMPT = 6
BOUND = {torch.float32: 1e-6, torch.float64: 1e-10}
VIDEO_LEVELS, AUDIO_LEVELS = (437.25, 912.6), (731.3, 120.75)  # numbers that bf16 or an integer would round
SETTINGS = ["joint", "joint-per-token", "video", "video-per-token", "audio"]


def make_transformer(name: str, dtype: torch.dtype, **changes):
    """A tiny model of three blocks, perhaps with other switches."""
    spec = LTX2_TINY[name]
    spec = dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": 3, **changes})
    return cast(tiny_transformer(spec), CPU, dtype)


def make_streams(transformer, *, per_token=False, mask=False, audio_levels=AUDIO_LEVELS) -> Streams[Stream]:
    """Batch of two. `per_token`: video's first latent frame is clean, and so are sound's first two tokens."""
    draw = torch.Generator().manual_seed(5)
    config, dtype = transformer.config, transformer.dtype
    made = {}
    for name, tokens, levels in (("video", SHAPE.tokens, VIDEO_LEVELS), ("audio", AUDIO_LENGTH, audio_levels)):
        prefix = "audio_" if name == "audio" else ""
        width = config[f"{prefix}cross_attention_dim"]
        prompt_width = config.caption_channels if config.use_prompt_embeddings else width
        timesteps = torch.tensor(levels)[:, None]
        if per_token:
            timesteps = timesteps.repeat(1, tokens)
            timesteps[:, : SHAPE.height * SHAPE.width if name == "video" else 2] = 0
        ropes = (
            ltx2.video_ropes(transformer, SHAPE, FPS, CPU)
            if name == "video"
            else ltx2.audio_ropes(transformer, AUDIO_LENGTH, CPU)
        )
        made[name] = Stream(
            tokens=torch.randn(2, tokens, config[f"{prefix}in_channels"], generator=draw, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(),
            timesteps=timesteps,
            sample_timesteps=torch.tensor(levels),
            prompts=torch.randn(2, PROMPT, prompt_width, generator=draw, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(),
            rope=ropes[0],
            cross_rope=ropes[1],
            prompt_mask=(torch.arange(PROMPT)[None] < torch.tensor([[4], [PROMPT]])).float() if mask else None,
        )
    return Streams(**made)


def stock_forward(transformer, streams: Streams[Stream], **switches) -> Streams[Tensor]:
    """diffusers' own forward over both modalities."""
    video, audio = streams.video, streams.audio
    output = transformer(
        hidden_states=video.tokens, audio_hidden_states=audio.tokens,
        encoder_hidden_states=video.prompts, audio_encoder_hidden_states=audio.prompts,
        timestep=video.timesteps, audio_timestep=audio.timesteps,
        sigma=video.sample_timesteps, audio_sigma=audio.sample_timesteps,
        encoder_attention_mask=video.prompt_mask, audio_encoder_attention_mask=audio.prompt_mask,
        num_frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width, fps=FPS, audio_num_frames=AUDIO_LENGTH,
        return_dict=False, **switches,
    )  # fmt: skip
    return Streams(*output)


def official_forward(transformer, streams: Streams[Stream]) -> Streams[Tensor]:
    """The official rule from stock parts: the other's sigma everywhere, and own timesteps put back for scale and shift.

    `use_cross_timestep=True` hands the other modality's sigma to both embedders; two hooks replace it before the one
    for scale and shift.
    """

    def give(timesteps: Tensor):
        return lambda _module, _arguments, keywords: ((timesteps.flatten(),), keywords)

    hooks = [
        transformer.av_cross_attn_video_scale_shift.register_forward_pre_hook(
            give(streams.video.timesteps), with_kwargs=True
        ),
        transformer.av_cross_attn_audio_scale_shift.register_forward_pre_hook(
            give(streams.audio.timesteps), with_kwargs=True
        ),
    ]
    try:
        return stock_forward(transformer, streams, use_cross_timestep=True)
    finally:
        for hook in hooks:
            hook.remove()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().double().norm() / theirs.detach().double().norm())


def gradients(transformer, outputs: list[Tensor], streams: Streams[Stream]) -> list[Tensor]:
    """Of a weighted sum of the outputs, by inputs, prompts and some weights and tables of every part that took part."""
    present = {BY_NAME[name]: stream for name, stream in streams.items()}
    weighed = [o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    wanted = [tensor for stream in present.values() for tensor in (stream.tokens, stream.prompts)]
    for modality in present:
        wanted += [modality.of(transformer, "proj_in").weight, modality.of(transformer, "time_embed").linear.weight]
        wanted += [modality.of(transformer, "scale_shift_table")]
        for block in transformer.transformer_blocks:
            wanted += [modality.of(block, "attn1").to_q.weight, modality.of(block, "attn2").to_k.weight]
            wanted += [modality.of(block, "ff").net[2].weight, modality.of(block, "scale_shift_table")]
            if len(present) == 2:
                wanted += [getattr(block, modality.cross_attn).to_v.weight, getattr(block, modality.cross_table)]
        if len(present) == 2:
            wanted += [getattr(transformer, modality.gate_embed).linear.weight]
            wanted += [getattr(transformer, modality.cross_embed).linear.weight]
    return list(torch.autograd.grad(sum(each.sum() for each in weighed), wanted))


def oracle(transformer, streams: Streams[Stream], setting: str) -> list[Tensor]:
    if setting.startswith("joint"):
        both = official_forward(transformer, streams)
        return [both.video, both.audio]
    alone = stock_forward(transformer, streams, isolate_modalities=True)
    return [alone.video if setting.startswith("video") else alone.audio]


def taking_part(streams: Streams[Stream], setting: str) -> Streams[Stream]:
    kept = {"joint": ("video", "audio"), "video": ("video",), "audio": ("audio",)}[setting.split("-")[0]]
    return Streams(**{name: getattr(streams, name) for name in kept})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", WIRINGS)
def test_output_and_gradients_equal_diffusers(name, setting, dtype):
    transformer = make_transformer(name, dtype)
    streams = make_streams(transformer, per_token=setting.endswith("per-token"))
    ours_in = taking_part(streams, setting)
    ours = [each for _, each in transformer_forward(transformer, ours_in).items()]
    theirs = oracle(transformer, streams, setting)
    worst = max(relative(own, stock) for own, stock in zip(ours, theirs, strict=True))
    found = gradients(transformer, ours, ours_in), gradients(transformer, theirs, ours_in)
    worst_gradient = max(relative(own, stock) for own, stock in zip(*found, strict=True))
    assert worst <= BOUND[dtype]
    assert worst_gradient <= 5 * BOUND[dtype]
    if not setting.endswith("per-token") and dtype == torch.float32:
        assert all(torch.equal(own, stock) for own, stock in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("use_cross_timestep", [False, True])
@pytest.mark.parametrize("name", WIRINGS)
def test_joint_without_conditioning_and_with_one_sigma_is_the_plain_stock_model(name, use_cross_timestep):
    transformer = make_transformer(name, torch.float32)
    streams = make_streams(transformer, audio_levels=VIDEO_LEVELS)
    ours = transformer_forward(transformer, streams)
    stock = stock_forward(transformer, streams, use_cross_timestep=use_cross_timestep)
    assert relative(ours.video, stock.video) <= 1e-6 and relative(ours.audio, stock.audio) <= 1e-6


def test_neither_of_diffusers_two_rules_is_the_official_one():
    transformer = make_transformer("tiny/ltx2.3", torch.float32)
    streams = make_streams(transformer, per_token=True, audio_levels=VIDEO_LEVELS)
    ours = transformer_forward(transformer, streams)
    for use_cross_timestep in (False, True):
        stock = stock_forward(transformer, streams, use_cross_timestep=use_cross_timestep)
        assert relative(ours.video, stock.video) > 1e-4 and relative(ours.audio, stock.audio) > 1e-4


@pytest.mark.parametrize("name", WIRINGS)
def test_one_modality_alone_is_not_the_joint_model(name):
    transformer = make_transformer(name, torch.float32)
    streams = make_streams(transformer)
    joint = transformer_forward(transformer, streams)
    assert relative(transformer_forward(transformer, Streams(video=streams.video)).video, joint.video) > 1e-3
    assert relative(transformer_forward(transformer, Streams(audio=streams.audio)).audio, joint.audio) > 1e-3


def test_a_sample_without_sound_among_others_is_as_if_video_were_alone():
    """And the other samples of the batch are joint; what fills the absent sound's place reaches nobody."""
    transformer = make_transformer("tiny/ltx2.3", torch.float32)
    streams = make_streams(transformer, per_token=True)
    audio = dataclasses.replace(streams.audio, present=torch.tensor([0.0, 1.0]))
    mixed = transformer_forward(transformer, Streams(streams.video, audio))
    joint = transformer_forward(transformer, streams)
    alone = transformer_forward(transformer, Streams(video=streams.video))
    assert torch.equal(mixed.video[0], alone.video[0]) and torch.equal(mixed.video[1], joint.video[1])
    assert torch.equal(mixed.audio[1], joint.audio[1])
    (of_audio,) = torch.autograd.grad(mixed.video.square().sum(), streams.audio.tokens)
    assert not of_audio[0].any() and of_audio[1].any()


def belongs_to(name: str) -> str:
    """Whether a parameter is video's, audio's or of both together, by its name."""
    if "a2v" in name or "v2a" in name or "video_to_audio" in name or "audio_to_video" in name or "av_cross" in name:
        return "both"
    return "audio" if "audio" in name else "video"


@pytest.mark.parametrize("alone", ["video", "audio"])
@pytest.mark.parametrize("name", WIRINGS)
def test_the_absent_modality_is_never_touched(name, alone):
    """With NaN in every parameter that is not its own, one modality alone gives the same bits."""
    transformer = make_transformer(name, torch.float32)
    streams = taking_part(make_streams(transformer), alone)
    clean = getattr(transformer_forward(transformer, streams), alone)
    with torch.no_grad():
        poisoned = [p.fill_(torch.nan) for n, p in transformer.named_parameters() if belongs_to(n) != alone]
    assert len(poisoned) > 100
    output = transformer_forward(transformer, streams)
    assert torch.equal(getattr(output, alone), clean)
    assert (output.audio if alone == "video" else output.video) is None


@pytest.mark.parametrize("alone", ["video", "audio"])
def test_no_module_of_the_absent_modality_runs(alone):
    transformer = make_transformer("tiny/ltx2.5", torch.float32)
    ran = []
    for name, module in transformer.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    transformer_forward(transformer, taking_part(make_streams(transformer), alone))
    assert ran and {belongs_to(name) for name in ran if "rope" not in name} == {alone}


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("setting", ["joint-per-token", "video", "audio"])
def test_checkpointing_changes_no_gradient(setting, every):
    transformer = make_transformer("tiny/ltx2.3", torch.float32)
    streams = taking_part(make_streams(transformer, per_token=setting.endswith("per-token")), setting)
    calls = [0] * len(transformer.transformer_blocks)
    watched = "audio_attn1" if setting == "audio" else "attn1"

    def count(number):
        def hook(*_):
            calls[number] += 1

        return hook

    def found(checkpoint_every):
        again = every_nth(checkpoint_every, len(transformer.transformer_blocks))
        run_block = run_block_of(MemoryPlan(again), torch.device("cpu"))
        output = transformer_forward(transformer, streams, run_block=run_block)
        return gradients(transformer, [each for _, each in output.items()], streams)

    kept = found(0)
    for number, block in enumerate(transformer.transformer_blocks):
        getattr(block, watched).to_q.register_forward_hook(count(number))
    assert all(torch.equal(a, b) for a, b in zip(kept, found(every), strict=True))
    assert calls == [2 if number % every == 0 else 1 for number in range(len(calls))]


@pytest.mark.parametrize("name", WIRINGS)
def test_prompt_masks_are_the_stock_model_s(name):
    transformer = make_transformer(name, torch.float32)
    streams = make_streams(transformer, mask=True)
    ours, stock = transformer_forward(transformer, streams), official_forward(transformer, streams)
    assert relative(ours.video, stock.video) <= 1e-6 and relative(ours.audio, stock.audio) <= 1e-6
    unmasked = transformer_forward(transformer, make_streams(transformer))
    assert relative(ours.video, unmasked.video) > 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "interleaved"},
        {"use_prompt_adaln_single": False},
        {"audio_cross_attn_mod": False},
        {"cross_attn_timestep_scale_multiplier": 500},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_that_no_published_version_uses_yet_still_equal_diffusers(changes):
    transformer = make_transformer("tiny/ltx2.5", torch.float32, **changes)
    streams = make_streams(transformer, per_token=True)
    ours, stock = transformer_forward(transformer, streams), official_forward(transformer, streams)
    assert relative(ours.video, stock.video) <= 1e-6 and relative(ours.audio, stock.audio) <= 1e-6


def test_timesteps_are_not_rounded_in_a_bf16_model():
    transformer = make_transformer("tiny/ltx2.3", torch.bfloat16)
    streams = make_streams(transformer)
    ours = transformer_forward(transformer, streams)
    assert ours.video.dtype == torch.bfloat16
    rounded = dataclasses.replace(streams.video, timesteps=streams.video.timesteps.bfloat16().float())
    assert not torch.equal(ours.video, transformer_forward(transformer, Streams(rounded, streams.audio)).video)


def test_in_bf16_it_is_no_further_from_the_truth_than_diffusers():
    """Norm, modulation and gate are rounded once where the stock block rounds after each."""
    transformer, exact = (make_transformer("tiny/ltx2.3", dtype) for dtype in (torch.bfloat16, torch.float64))
    exact.load_state_dict(transformer.state_dict())
    streams = make_streams(transformer)
    precise = streams.map(lambda s: dataclasses.replace(s, tokens=s.tokens.double(), prompts=s.prompts.double()))
    truth = official_forward(exact, precise)
    ours, stock = transformer_forward(transformer, streams), official_forward(transformer, streams)
    for name, expected in truth.items():
        assert relative(ours[name], expected) <= 1.1 * relative(stock[name], expected)


@pytest.mark.parametrize("field", ["timesteps", "sample_timesteps"])
def test_integer_timesteps_are_refused(field):
    transformer = make_transformer("tiny/ltx2.3", torch.float32)
    streams = make_streams(transformer)
    whole = dataclasses.replace(streams.video, **{field: getattr(streams.video, field).long()})
    with pytest.raises(AssertionError, match="float32"):
        transformer_forward(transformer, Streams(whole, streams.audio))


def test_each_embedding_runs_once_per_distinct_timestep():
    transformer = make_transformer("tiny/ltx2.3", torch.float32)
    streams = make_streams(transformer, per_token=True)
    rows = {}
    embedders = ["time_embed", "prompt_adaln", VIDEO.cross_embed, VIDEO.gate_embed, AUDIO.cross_embed, AUDIO.gate_embed]
    for name in embedders:
        linear = getattr(transformer, name).linear
        linear.register_forward_hook(lambda *call, name=name: rows.setdefault(name, []).append(len(call[2])))
    transformer_forward(transformer, streams)
    # 0 and two noise levels per token; two samples where there is one per sample.
    assert [rows[name] for name in embedders] == [[3], [2], [3], [2], [3], [2]]


def test_ropes_are_the_stock_model_s_for_the_clip_s_own_rate():
    transformer = make_transformer("tiny/ltx2", torch.float32)
    own, cross = ltx2.video_ropes(transformer, SHAPE, 29.97, CPU)
    other, _ = ltx2.video_ropes(transformer, SHAPE, 24.0, CPU)
    assert own.cos.dtype == torch.float32 and own.full[0].shape == (1, 4, SHAPE.tokens, 16)
    assert not torch.equal(own.cos, other.cos)
    # Seconds: the first latent frame is one frame long, the second eight; cross attention knows time alone.
    middle = torch.tensor([0.5, 5.0, 13.0]) / 29.97
    coordinates = transformer.rope.prepare_video_coords(1, 3, 2, 3, CPU, fps=29.97)[0, 0].mean(-1)
    assert torch.allclose(coordinates.view(3, 6)[:, 0], middle)
    assert cross.cos.shape[0] == SHAPE.frames and cross.full[0].shape == (1, 4, SHAPE.tokens, 8)
    assert torch.equal(cross.rows.view(3, 6)[:, 0], cross.rows.view(3, 6)[:, 5])


@pytest.mark.parametrize("alone", ["video", "audio"])
@pytest.mark.parametrize("name", WIRINGS)
def test_what_is_named_unused_can_be_gone_and_is_nearly_all_of_the_other_modality(name, alone):
    transformer = make_transformer(name, torch.float32)
    streams = taking_part(make_streams(transformer), alone)
    clean = getattr(transformer_forward(transformer, streams), alone)
    foreign = sum(p.numel() for n, p in transformer.named_parameters() if belongs_to(n) != alone)
    unused = ltx2.unused_modules(transformer, alone)
    assert sum(p.numel() for module in unused for p in module.parameters()) > 0.97 * foreign
    for module in unused:
        module.to("meta")
    assert torch.equal(getattr(transformer_forward(transformer, streams), alone), clean)
    assert ltx2.unused_modules(transformer, "both") == []
