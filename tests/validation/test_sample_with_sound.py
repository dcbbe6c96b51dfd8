"""LTX-2's samples as files: the sound is muxed, ends with the picture and is drawn; a faulty one is passed over."""

import dataclasses

import av
import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from PIL import Image

from ltxforge.events import Note, PhaseAdvanced, SampleReady
from ltxforge.lora.files import export
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject
from ltxforge.lora.targets import match
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.ltx2_tiny import tiny_parts
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.plan import ConditioningPlan, LoraPlan, PromptPlan, ValidationPlan
from ltxforge.quant.keep import Keep
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs_ltx2 import LTX2_TINY
from ltxforge.validation.contact_sheet import WAVES
from ltxforge.validation.sample import sample, validate

CPU = torch.device("cpu")
CAPTION, NEGATIVE = "a red ball rolls", "blurry"


def tiny(name="tiny/ltx2.3", **changed):
    spec = LTX2_TINY[name]
    parts = dataclasses.replace(tiny_parts(spec), **changed)
    model = LTX2Video(spec, spec.rope, parts, CPU, torch.float32)
    model.load_transformer()
    return model


def embeddings(model):
    wanted = [WantedPrompt(text, "both") for text in (CAPTION, NEGATIVE)]
    prompts = model.encode_prompts(wanted, model.spec.default_prompt_tokens)
    return dict(zip((CAPTION, NEGATIVE), prompts, strict=True))


def prompt_for(**changes):
    """Unguided, for one pass per step; `test_ltx2_sampling.py` has the guidance."""
    usual = PromptPlan("ball", CAPTION, "", "", ClipShape(64, 64, 9), 24.0, 2, 1.0, seed=5, audio_guidance=1.0)
    return dataclasses.replace(usual, **changes)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts(model):
    return embeddings(model)


def planned(plan_maker, model, *prompt_plans):
    conditioning = ConditioningPlan(0, 0, model.spec.default_prompt_tokens)
    return plan_maker(conditioning=conditioning, validation=ValidationPlan(1, True, prompt_plans))


def read(path):
    """Sound [channels, samples] and its rate; from when to when pictures and sound decode; both tracks' own lengths."""
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        pictures = list(container.decode(video))
        container.seek(0)
        pieces = list(container.decode(sound))
        frame = 1 / float(video.average_rate)
        picture = float(pictures[0].time), float(pictures[-1].time) + frame
        heard = float(pieces[0].time), float(pieces[-1].time) + pieces[-1].samples / sound.rate
        stated = [float(stream.duration * stream.time_base) for stream in (video, sound)]
        return np.concatenate([piece.to_ndarray() for piece in pieces], axis=1), sound.rate, picture, heard, stated


@pytest.mark.parametrize(("fps", "frames"), [(24.0, 9), (29.97, 17), (12.5, 1), (60.0, 9)])
def test_both_tracks_end_within_a_frame_of_each_other(fps, frames, model, prompts, plan_maker, tmp_path):
    prompt = prompt_for(fps=fps, shape=ClipShape(64, 64, frames))
    plan, events = planned(plan_maker, model, prompt), []
    (ready,) = validate(plan, model, prompts, 100, tmp_path, events.append, StopRequest())
    _, rate, picture, heard, stated = read(ready.video)
    assert picture[0] == 0 and abs(picture[1] - frames / fps) < 1e-3 / fps
    assert abs(stated[0] - frames / fps) < 1e-3 / fps and abs(stated[1] - stated[0]) < 1e-3
    # Beyond its stated end a decoder still has the silent rest of the last piece of AAC, 1024 samples long.
    assert heard[0] == 0 and 0 <= heard[1] - picture[1] < 1024 / rate


def test_the_file_sounds_as_the_sample_does_and_the_sheet_draws_it(model, prompts, plan_maker, tmp_path):
    prompt = prompt_for(shape=ClipShape(64, 64, 17))
    plan, events = planned(plan_maker, model, prompt), []
    (ready,) = validate(plan, model, prompts, 100, tmp_path, events.append, StopRequest())
    assert ready in events and isinstance(ready, SampleReady)
    made = sample(model, prompt, prompts, model.spec.default_prompt_tokens)
    assert made.sound.shape == (2, round(17 / 24 * 48000)) and made.sound_rate == 48000
    heard = read(ready.video)[0]
    length = min(heard.shape[1], made.sound.shape[1])
    for one, other in zip(made.sound, heard, strict=True):
        assert np.corrcoef(one[:length], other[:length])[0, 1] > 0.8, "AAC loses some of what is near noise, not all"
    with Image.open(ready.contact_sheet) as sheet:
        lower = np.asarray(sheet)[sheet.height // 2 :].astype(int)
    for colour in WAVES:  # two channels that differ are drawn one above the other
        assert (np.abs(lower - colour).max(-1) < 12).sum() > 100


def test_training_notices_nothing_of_a_frugal_sample(model, prompts, plan_maker, tmp_path):
    model.transformer.train()
    model.transformer.transformer_blocks[0].eval()
    before = {name: module.training for name, module in model.transformer.named_modules()}, torch.get_rng_state()
    plan = planned(plan_maker, model, prompt_for(frugal=True))
    assert validate(plan, model, prompts, 1, tmp_path, lambda _event: None, StopRequest())
    assert {name: module.training for name, module in model.transformer.named_modules()} == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_sound_that_is_no_number_is_a_warning_and_leaves_no_file(plan_maker, tmp_path):
    def spoiled(device, dtype):
        vocoder = tiny_parts(LTX2_TINY["tiny/ltx2"]).vocoder(device, dtype)
        vocoder.conv_out.bias.fill_(float("nan"))
        return vocoder

    model = tiny("tiny/ltx2", vocoder=spoiled)
    plan, events = planned(plan_maker, model, prompt_for()), []
    assert validate(plan, model, embeddings(model), 3, tmp_path, events.append, StopRequest()) == []
    (warning,) = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert "ball" in warning and "sound" in warning and "not finite" in warning
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_stop_between_denoising_steps_is_heard(model, prompts, plan_maker, tmp_path):
    plan, stop, events = planned(plan_maker, model, prompt_for(steps=3), prompt_for(name="second")), StopRequest(), []

    def emit(event):
        events.append(event)
        if isinstance(event, PhaseAdvanced):
            stop.request()

    assert validate(plan, model, prompts, 7, tmp_path, emit, stop) == []
    assert [event.done for event in events if isinstance(event, PhaseAdvanced)] == [1]


def test_the_exported_file_in_a_fresh_stock_pipeline_samples_the_same(tmp_path):
    model = tiny("tiny/ltx2.5")
    lora = LoraPlan(4, 4.0, 0.0, False, ("attention",), "fp32", "both")
    inject(model.transformer, lora, match(lora.targets, model.spec, "both", "both"), seed=1)
    adapter, draw = adapter_parameters(model.transformer), torch.Generator().manual_seed(2)
    for value in adapter.values():
        value.data = 0.2 * torch.randn(value.shape, generator=draw)
    prompt, tokens = prompt_for(guidance=2.0, negative_prompt=NEGATIVE), model.spec.default_prompt_tokens
    made = sample(model, prompt, embeddings(model), tokens)
    facts = {"name": "test"}
    export(tmp_path / "lora.safetensors", adapter, adapter_scaling(model.transformer), "fp32", facts)

    parts = tiny_parts(model.spec)
    encoder, tokenizer = parts.text_encoder(CPU, torch.float32)
    made_of = ("vae", "audio_vae", "connectors", "vocoder")
    loaded = {name: getattr(parts, name)(CPU, torch.float32) for name in made_of}
    loaded["transformer"] = parts.transformer(Keep(CPU, torch.float32))
    pipeline = LTX2Pipeline(scheduler=parts.scheduler(), text_encoder=encoder, tokenizer=tokenizer, **loaded)
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "prompt": CAPTION, "negative_prompt": NEGATIVE, "width": 64, "height": 64, "num_frames": 9, "frame_rate": 24,
        "num_inference_steps": 2, "guidance_scale": 2.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0,
        "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0, "max_sequence_length": tokens, "output_type": "np", "return_dict": False,
    }  # fmt: skip
    base, _ = pipeline(**call, generator=torch.Generator().manual_seed(5))
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    for parameter in pipeline.transformer.parameters():  # mapped at odd addresses, for which the CPU has other kernels
        parameter.data = parameter.data.clone()
    frames, sound = pipeline(**call, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(made.frames, np.rint(frames[0] * 255).astype(np.uint8))
    assert np.array_equal(made.sound[:, : sound.shape[2]], sound[0].numpy())
    assert np.abs(frames - base).mean() > 1e-3, "the adapter must matter"
