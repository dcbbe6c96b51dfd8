"""Samples equal those of a stock diffusers pipeline made from the same parts, bit for bit; training notices nothing."""

import dataclasses
import random

import av
import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from ltxforge.events import Note, PhaseAdvanced, PhaseEnded, PhaseStarted, SampleReady
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import ConditioningPlan, PromptPlan, ValidationPlan
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY
from ltxforge.validation.sample import sample, validate

CPU = torch.device("cpu")
TOKENS = 32
CAPTION, NEGATIVE = "a red ball rolls", "blurry"


def tiny(name, rope=None, dtype=torch.float32):
    model = LTXVideo(TINY[name], rope or TINY[name].rope, tiny_parts(TINY[name]), CPU, dtype)
    model.load_transformer()
    return model


def prompt_for(model, image="", **changes):
    """Three steps and guidance 2, except for distilled weights: their own schedule and no guidance."""
    own = model.spec.sampling if model.spec.distilled else None
    steps, guidance = (own.steps, own.guidance) if own else (3, 2.0)
    shape = ClipShape(64, 32, 9)
    usual = PromptPlan("ball", CAPTION, NEGATIVE, str(image), shape, 25.0, steps, guidance, seed=5)
    return dataclasses.replace(usual, **changes)


def embeddings(model):
    wanted = [WantedPrompt(text) for text in (CAPTION, NEGATIVE)]
    return dict(zip((CAPTION, NEGATIVE), model.encode_prompts(wanted, TOKENS), strict=True))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 64, 3), np.uint8)).save(path)
    return path


def with_lora(model):
    """PEFT's own injection with weights that matter, in training mode and with dropout."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, model.transformer)
    model.transformer.train()
    return model


def stock(model, prompt, **call):
    """The prompt through a pipeline as a user would call it: text in, the encoder's own padding, nothing of ours."""
    parts = tiny_parts(model.spec)
    encoder, tokenizer = parts.text_encoder(CPU, model.dtype)
    kind = LTXConditionPipeline if model.rope == "causal" else LTXImageToVideoPipeline if prompt.image else LTXPipeline
    if prompt.image:
        call["image"] = Image.open(prompt.image)
    model.transformer.eval()
    pipeline = kind(
        scheduler=parts.scheduler(), vae=parts.vae(CPU, model.dtype), text_encoder=encoder, tokenizer=tokenizer,
        transformer=model.transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    sampling = model.spec.sampling
    torch.manual_seed(prompt.seed)
    return pipeline(
        prompt=prompt.prompt, negative_prompt=prompt.negative_prompt, max_sequence_length=TOKENS,
        width=prompt.shape.width, height=prompt.shape.height, num_frames=prompt.shape.frames, frame_rate=prompt.fps,
        guidance_scale=prompt.guidance, num_inference_steps=prompt.steps, output_type="np",
        decode_timestep=sampling.decode_timestep, decode_noise_scale=sampling.decode_noise_scale,
        generator=torch.Generator().manual_seed(prompt.seed), **call,
    ).frames[0]  # fmt: skip


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny/ltx-video-0.9.0", LTXPipeline),
        ("tiny/ltx-video-0.9.1", LTXPipeline),
        ("tiny/ltx-video-0.9.5", LTXConditionPipeline),
        ("tiny/ltx-video-0.9.8", LTXConditionPipeline),
    ],
)
def test_a_sample_equals_the_stock_pipelines(name, kind, with_image, image):
    model = with_lora(tiny(name))
    prompt = prompt_for(model, image if with_image else "")
    made = sample(model, prompt, embeddings(model), TOKENS)
    own = {"timesteps": list(model.spec.sampling.timesteps)} if model.spec.distilled else {}
    assert (model.rope == "causal") == (kind is LTXConditionPipeline)
    expected = stock(model, prompt, **own)
    assert made.frames.dtype == np.uint8 and made.frames.shape == (9, 32, 64, 3)
    assert np.array_equal(made.frames, (expected * 255).round().astype(np.uint8))
    assert made.frames.std() > 1, "a flat picture would be equal for the wrong reason"


def test_the_latents_are_the_stock_pipelines_too():
    model = tiny("tiny/ltx-video")
    prompt = prompt_for(model)
    made = sample(model, prompt, embeddings(model), TOKENS)
    parts = tiny_parts(model.spec)
    encoder, tokenizer = parts.text_encoder(CPU, torch.float32)
    pipeline = LTXConditionPipeline(
        parts.scheduler(), parts.vae(CPU, torch.float32), encoder, tokenizer, model.transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    packed = []
    pipeline(
        prompt=CAPTION, negative_prompt=NEGATIVE, width=64, height=32, num_frames=9, frame_rate=25, guidance_scale=2.0,
        num_inference_steps=3, max_sequence_length=TOKENS, generator=torch.Generator().manual_seed(5),
        callback_on_step_end=lambda _p, _i, _t, tensors: packed.append(tensors["latents"]) or {},
    )  # fmt: skip
    assert torch.equal(made.latents.video, packed[-1][0])


def test_distilled_timesteps_reach_a_plain_pipeline_which_refuses_them_as_an_argument():
    model = tiny("tiny/ltx-video-0.9.8", rope="plain")
    prompt, seen = prompt_for(model), []
    model.transformer.register_forward_pre_hook(
        lambda _module, _args, call: seen.append(float(call["timestep"].flatten()[0])), with_kwargs=True
    )
    sample(model, prompt, embeddings(model), TOKENS)
    assert seen == pytest.approx(list(model.spec.sampling.timesteps), abs=1e-3)
    with pytest.raises(ValueError, match="timesteps"):
        stock(model, prompt, timesteps=list(model.spec.sampling.timesteps))
    seen.clear()
    sample(model, dataclasses.replace(prompt, steps=4), embeddings(model), TOKENS)
    assert len(seen) == 4


def test_bf16_weights_with_a_float32_adapter_sample(image):
    model = with_lora(tiny("tiny/ltx-video-0.9.1", dtype=torch.bfloat16))
    for name, parameter in model.transformer.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    made = sample(model, prompt_for(model, image), embeddings(model), TOKENS)
    assert made.frames.std() > 1


def test_the_rate_the_seed_and_the_prompt_matter():
    model = tiny("tiny/ltx-video")
    prompts = embeddings(model)
    base = prompt_for(model)
    variants = [
        base,
        dataclasses.replace(base, fps=12.5),
        dataclasses.replace(base, seed=6),
        dataclasses.replace(base, prompt=NEGATIVE),
        dataclasses.replace(base, guidance=1.0),
    ]
    latents = [sample(model, variant, prompts, TOKENS).latents.video for variant in variants]
    assert all(not torch.equal(latents[0], other) for other in latents[1:])
    assert torch.equal(latents[0], sample(model, base, prompts, TOKENS).latents.video)


@pytest.fixture
def run(plan_maker):
    model = with_lora(tiny("tiny/ltx-video"))
    first = prompt_for(model)
    planned = (first, dataclasses.replace(first, name="second", seed=6))
    plan = plan_maker(conditioning=ConditioningPlan(0, 0, TOKENS), validation=ValidationPlan(1, True, planned))
    return plan, model, embeddings(model)


def training_state(model):
    modes = {name: module.training for name, module in model.transformer.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.transformer.named_parameters()}
    return modes, flags, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_files_events_and_an_undisturbed_training(run, tmp_path):
    plan, model, prompts = run
    model.transformer.transformer_blocks[0].eval()  # a mixture of modes must come back as a mixture
    weights = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    before, events = training_state(model), []
    ready = validate(plan, model, prompts, 100, tmp_path / "samples", events.append, StopRequest())
    assert training_state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.transformer.state_dict().items())

    assert [one.name for one in ready] == ["ball", "second"] == [e.name for e in events if isinstance(e, SampleReady)]
    folder = tmp_path / "samples" / "step-000100"
    assert sorted(path.name for path in folder.iterdir()) == ["ball.mp4", "ball.png", "second.mp4", "second.png"]
    made = sample(model, plan.validation.prompts[0], prompts, TOKENS)
    with av.open(ready[0].video) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 25
    assert len(frames) == 9
    luma = np.array([0.2126, 0.7152, 0.0722])
    likeness = np.corrcoef((made.frames @ luma).ravel(), (np.stack(frames) @ luma).ravel())[0, 1]
    assert likeness > 0.95, "H.264 with thinned-out colour loses some, not all"
    with Image.open(ready[0].contact_sheet) as sheet:
        assert sheet.width >= 520

    assert isinstance(events[0], PhaseStarted) and events[0].total == 6 and isinstance(events[-1], PhaseEnded)
    advanced = [(event.done, event.detail) for event in events if isinstance(event, PhaseAdvanced)]
    of_each = [(1, "ball"), (2, "ball"), (3, "ball, decoding"), (4, "second"), (5, "second"), (6, "second, decoding")]
    assert advanced == of_each


def test_a_stop_between_denoising_steps_keeps_what_was_finished(run, tmp_path):
    plan, model, prompts = run
    before, stop, events = training_state(model), StopRequest(), []

    def emit(event):
        events.append(event)
        if isinstance(event, PhaseAdvanced) and event.done == 4:
            stop.request()

    ready = validate(plan, model, prompts, 7, tmp_path, emit, stop)
    assert [one.name for one in ready] == ["ball"]
    assert max(event.done for event in events if isinstance(event, PhaseAdvanced)) == 4
    assert isinstance(events[-1], PhaseEnded) and events[-1].detail == "stopped"
    assert sorted(path.name for path in (tmp_path / "step-000007").iterdir()) == ["ball.mp4", "ball.png"]
    assert training_state(model) == before
    assert validate(plan, model, prompts, 8, tmp_path, events.append, stop) == []


def test_a_sample_that_cannot_be_made_is_a_warning_and_the_others_are_made(run, tmp_path, monkeypatch):
    plan, model, prompts = run
    gone = dataclasses.replace(plan.validation.prompts[0], name="gone", image=str(tmp_path / "gone.png"))
    large = dataclasses.replace(plan.validation.prompts[0], name="large", seed=99)
    planned = (gone, large, plan.validation.prompts[1])
    plan = dataclasses.replace(plan, validation=dataclasses.replace(plan.validation, prompts=planned))
    forward = type(model.transformer).forward

    def out_of_memory(module, *args, **call):
        if torch.initial_seed() == 99:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(module, *args, **call)

    monkeypatch.setattr(type(model.transformer), "forward", out_of_memory)
    before, events = training_state(model), []
    ready = validate(plan, model, prompts, 3, tmp_path / "samples", events.append, StopRequest())
    assert [one.name for one in ready] == ["second"]
    warnings = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert len(warnings) == 2 and "gone" in warnings[0] and "out of memory" in warnings[1]
    assert [event.done for event in events if isinstance(event, PhaseAdvanced)][-1] == 9
    assert training_state(model) == before
