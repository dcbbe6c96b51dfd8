"""The family's own forward against diffusers' stock forward, which is the oracle."""

import dataclasses

import pytest
import torch
from diffusers import LTXConditionPipeline

from ltxforge.memory.strategy import run_block_of
from ltxforge.modalities import Streams
from ltxforge.models import ltx_video
from ltxforge.models.base_model import ROPES_KEPT
from ltxforge.models.interface import Noisy, NoisyTokens, PromptBatch
from ltxforge.models.ltx_video import LTXVideo, cast
from ltxforge.models.tiny import tiny_parts, tiny_transformer
from ltxforge.plan import MemoryPlan, every_nth
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY

WIRINGS = [
    "tiny/ltx-video-0.9.0",
    "tiny/ltx-video-0.9.1",
    "tiny/ltx-video-0.9.5",
    "tiny/ltx-video-0.9.8",
    "tiny/ltx-video-13b",
]
pytestmark = pytest.mark.usefixtures("stock_in_float64")

CPU = torch.device("cpu")
SHAPE = LatentShape(frames=3, height=2, width=5)
FPS = 24.0
BOUND = {torch.float32: 1e-6, torch.float64: 1e-10}


def make_model(name: str, dtype: torch.dtype, rope: str | None = None) -> LTXVideo:
    spec = TINY[name]
    model = LTXVideo(spec, rope or spec.rope, tiny_parts(spec), CPU, dtype)
    model.load_transformer()
    return model


def make_inputs(model: LTXVideo, per_token: bool = False, batch: int = 2) -> tuple[Noisy, PromptBatch]:
    """Batch of two with different prompts' lengths; timesteps that bf16 or an integer would round."""
    draw = torch.Generator().manual_seed(5)
    spec = model.spec
    tokens = torch.randn(batch, SHAPE.tokens, spec.latent_channels, generator=draw, dtype=torch.float64)
    embeds = torch.randn(batch, 8, spec.caption_channels, generator=draw, dtype=torch.float64)
    mask = (torch.arange(8)[None] < torch.tensor([5, 8])[:batch, None]).float()
    levels = torch.tensor([437.25, 912.6])[:batch]
    timesteps = levels[:, None]
    if per_token:  # first-frame conditioning: the first latent frame is clean
        timesteps = timesteps.repeat(1, SHAPE.tokens)
        timesteps[:, : SHAPE.height * SHAPE.width] = 0
    tokens = tokens.to(model.dtype).requires_grad_()
    prompts = PromptBatch(Streams(embeds.to(model.dtype).requires_grad_()), mask)
    return Noisy(Streams(NoisyTokens(tokens, timesteps, levels)), SHAPE, FPS), prompts


def predicted(model: LTXVideo, noisy: Noisy, prompts: PromptBatch) -> torch.Tensor:
    velocities = model.predict(noisy, prompts)
    assert velocities.audio is None
    return velocities.video


def in_float64(tensors: Streams) -> Streams:
    return tensors.map(lambda tensor: tensor.detach().double())


def as_float64(noisy: Noisy) -> Noisy:
    video = noisy.streams.video
    return dataclasses.replace(noisy, streams=Streams(dataclasses.replace(video, tokens=video.tokens.double())))


def with_timesteps(noisy: Noisy, timesteps: torch.Tensor) -> Noisy:
    return dataclasses.replace(noisy, streams=Streams(dataclasses.replace(noisy.streams.video, timesteps=timesteps)))


def stock_forward(model: LTXVideo, noisy: Noisy, prompts: PromptBatch) -> torch.Tensor:
    """diffusers' own forward with the position arguments of the two pipelines."""
    shape, video = noisy.shape, noisy.streams.video
    if model.rope == "plain":
        position = {
            "num_frames": shape.frames, "height": shape.height, "width": shape.width,
            "rope_interpolation_scale": (8 / noisy.fps, 32, 32),
        }  # fmt: skip
    else:
        ids = LTXConditionPipeline._prepare_video_ids(len(video.tokens), shape.frames, shape.height, shape.width)
        coordinates = LTXConditionPipeline._scale_video_ids(ids, 32, 8, 0).float()
        coordinates[:, 0] = coordinates[:, 0] * (1.0 / noisy.fps)
        position = {"video_coords": coordinates}
    return model.transformer(
        hidden_states=video.tokens, encoder_hidden_states=prompts.embeds.video, timestep=video.timesteps,
        encoder_attention_mask=prompts.mask, return_dict=False, **position,
    )[0]  # fmt: skip


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().double().norm() / theirs.detach().double().norm())


def gradients(model: LTXVideo, output: torch.Tensor, noisy: Noisy, prompts: PromptBatch) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    some = [model.transformer.proj_in.weight, model.transformer.time_embed.linear.weight]
    some += [block.attn1.to_q.weight for block in model.blocks()] + [block.ff.net[2].weight for block in model.blocks()]
    return list(torch.autograd.grad((output * weight).sum(), [noisy.streams.video.tokens, prompts.embeds.video, *some]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rope", ["plain", "causal"])
@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
def test_output_and_gradients_equal_diffusers(name, rope, dtype, per_token):
    model = make_model(name, dtype, rope)
    model.transformer.requires_grad_(True)
    noisy, prompts = make_inputs(model, per_token)
    ours, theirs = predicted(model, noisy, prompts), stock_forward(model, noisy, prompts)
    assert relative(ours, theirs) <= BOUND[dtype]
    for own, stock in zip(
        gradients(model, ours, noisy, prompts), gradients(model, theirs, noisy, prompts), strict=True
    ):
        assert relative(own, stock) <= 5 * BOUND[dtype]
    if not per_token and dtype == torch.float32:
        assert torch.equal(ours, theirs)


def test_the_two_ropes_differ():
    noisy, prompts = make_inputs(make_model(WIRINGS[0], torch.float32))
    plain, causal = (
        predicted(make_model(WIRINGS[0], torch.float32, rope), noisy, prompts) for rope in ("plain", "causal")
    )
    assert relative(plain, causal) > 1e-3


def test_masked_prompt_positions_change_no_bit():
    model = make_model(WIRINGS[2], torch.float32)
    noisy, prompts = make_inputs(model)
    embeds, mask = prompts.embeds.video, prompts.mask
    noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))
    zeroed = PromptBatch(Streams(embeds * mask[..., None]), mask)
    filled = PromptBatch(Streams(torch.where(mask[..., None] > 0, embeds, noise)), mask)
    assert torch.equal(predicted(model, noisy, zeroed), predicted(model, noisy, filled))
    assert not torch.equal(
        predicted(model, noisy, zeroed), predicted(model, noisy, PromptBatch(filled.embeds, torch.ones(2, 8)))
    )


def test_timesteps_are_not_rounded_in_a_bf16_model():
    model = make_model(WIRINGS[2], torch.bfloat16)
    noisy, prompts = make_inputs(model)
    rounded = with_timesteps(noisy, noisy.streams.video.timesteps.bfloat16().float())
    output = predicted(model, noisy, prompts)
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, predicted(model, rounded, prompts))


@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
def test_in_bf16_it_is_no_further_from_the_truth_than_diffusers(per_token):
    """Norm, modulation and gate are rounded once where the stock block rounds after each."""
    model, exact = (make_model(WIRINGS[2], dtype) for dtype in (torch.bfloat16, torch.float64))
    exact.transformer.load_state_dict(model.transformer.state_dict())
    noisy, prompts = make_inputs(model, per_token)
    truth = stock_forward(exact, as_float64(noisy), dataclasses.replace(prompts, embeds=in_float64(prompts.embeds)))
    ours, theirs = predicted(model, noisy, prompts), stock_forward(model, noisy, prompts)
    assert relative(ours, truth) <= 1.1 * relative(theirs, truth)


def test_integer_timesteps_are_refused():
    model = make_model(WIRINGS[2], torch.float32)
    noisy, prompts = make_inputs(model)
    with pytest.raises(AssertionError, match="float32"):
        predicted(model, with_timesteps(noisy, noisy.streams.video.timesteps.long()), prompts)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_checkpointing_changes_no_gradient(every, per_token):
    model = make_model(WIRINGS[2], torch.float32)
    model.transformer.requires_grad_(True)
    noisy, prompts = make_inputs(model, per_token)
    kept = gradients(model, predicted(model, noisy, prompts), noisy, prompts)
    calls = count_block_calls(model)
    model.run_block = run_block_of(MemoryPlan(every_nth(every, model.spec.blocks)), model.device)
    recomputed = gradients(model, predicted(model, noisy, prompts), noisy, prompts)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert calls == [2 if number % every == 0 else 1 for number in range(len(calls))]


def test_checkpointing_repeats_dropout():
    model = make_model(WIRINGS[2], torch.float32)
    model.transformer.requires_grad_(True)
    for block in model.blocks():
        block.attn1.to_out[1] = torch.nn.Dropout(0.3).train()
    noisy, prompts = make_inputs(model)
    found = []
    for every in (0, 1):
        model.run_block = run_block_of(MemoryPlan(every_nth(every, model.spec.blocks)), model.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            found.append(gradients(model, predicted(model, noisy, prompts), noisy, prompts))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def count_block_calls(model: LTXVideo) -> list[int]:
    counts = [0] * len(model.blocks())

    def count(number):
        def hook(*_):
            counts[number] += 1

        return hook

    for number, block in enumerate(model.blocks()):
        block.attn1.to_q.register_forward_hook(count(number))
    return counts


def test_time_embedding_runs_once_per_distinct_timestep():
    model = make_model(WIRINGS[2], torch.float32)
    noisy, prompts = make_inputs(model, per_token=True)
    rows = []
    model.transformer.time_embed.linear.register_forward_hook(lambda *call: rows.append(len(call[2])))
    predicted(model, noisy, prompts)
    assert rows == [3]  # 0, 437.25 and 912.6 instead of 2 · 30 tokens


def test_rope_tables_are_computed_once_per_size(monkeypatch):
    model = make_model(WIRINGS[2], torch.float32)
    noisy, prompts = make_inputs(model)
    made = []
    original = ltx_video.rope_tables
    monkeypatch.setattr(ltx_video, "rope_tables", lambda *args: made.append(args) or original(*args))
    for fps in (24.0, 24.0, 25.0, 24.0):
        predicted(model, dataclasses.replace(noisy, fps=fps), prompts)
    assert len(made) == 2


def test_rope_cache_stays_small():
    model = make_model(WIRINGS[2], torch.float32)
    noisy, prompts = make_inputs(model)
    for fps in range(20, 30):
        predicted(model, dataclasses.replace(noisy, fps=float(fps)), prompts)
    assert len(model._ropes) == ROPES_KEPT


def test_cast_converts_parameters_and_buffers():
    module = cast(tiny_transformer(TINY[WIRINGS[0]]), CPU, torch.float64)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
