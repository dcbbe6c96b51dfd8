"""LTX-2's samples equal those of a stock diffusers pipeline made from the same parts, to the last bit."""

import dataclasses
import itertools
import weakref

import numpy as np
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from ltxforge.errors import DeviceFullError
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.ltx2_sampling import LTX2Sampler, weight_bytes
from ltxforge.models.ltx2_tiny import tiny_parts
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.vae_tiles import FRUGAL, WHOLE, DecodeTiling
from ltxforge.plan import PromptPlan
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.shapes import ClipShape, tiles_along
from ltxforge.specs_ltx2 import LTX2_SPECS, LTX2_TINY

CPU = torch.device("cpu")
NAMES = list(LTX2_TINY)
CAPTION, NEGATIVE = "a red ball rolls", "blurry"
SHAPE, FPS = ClipShape(96, 64, 9), 24.0  # 2.0's decoder reflects at its edges and takes no side of 32


def distilled(name):
    """The tiny model as its version's distilled twin: other scheduler and sampling, the same weights."""
    spec = LTX2_TINY[name]
    real = LTX2_SPECS[spec.version.replace("dev", "distilled")]
    changed = {"sampling": real.sampling, "scheduler_config": real.scheduler_config, "distilled": True}
    return dataclasses.replace(spec, **changed)


def model_of(spec, dtype=torch.float32, with_lora=True, **changed):
    """The model with an adapter that matters, drawn by PEFT itself."""
    parts = dataclasses.replace(tiny_parts(spec), **changed)
    model = LTX2Video(spec, spec.rope, parts, CPU, dtype, vae_dtype=dtype, text_dtype=dtype)
    model.load_transformer()
    if with_lora:
        torch.manual_seed(3)
        targets = ["to_q", "to_v"]
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model.transformer)
    return model


def prompt_for(model, **changes):
    """The version's own guidance; two steps, or a distilled model's own."""
    own = model.spec.sampling
    stg = own.stg if own.timesteps else 1.0  # also for 2.0, whose plans leave it out
    usual = PromptPlan(
        "ball", CAPTION, NEGATIVE, "", SHAPE, FPS, own.steps if own.timesteps else 2, own.guidance, seed=5,
        audio_guidance=own.audio_guidance, stg=stg, stg_blocks=own.stg_blocks,
        modality_guidance=own.modality_guidance, rescale=own.rescale,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def embeddings(model):
    wanted = [WantedPrompt(text, "both") for text in (CAPTION, NEGATIVE)]
    prompts = model.encode_prompts(wanted, model.spec.default_prompt_tokens)
    return dict(zip((CAPTION, NEGATIVE), prompts, strict=True))


def make(model, prompt, prompts, image=None, on_step=lambda _done: None):
    return model.sample(prompt, prompts, model.spec.default_prompt_tokens, image, on_step)


def latents(model, prompt, prompts):
    """What is denoised, without the decoding: video [1, C, F, Y, X] and sound [1, L, C]."""
    tokens = model.spec.default_prompt_tokens
    embeds, negative = (model.batch_prompts([prompts[text]], tokens) for text in (prompt.prompt, NEGATIVE))
    sampler = LTX2Sampler(model.spec, model.transformer, tiny_parts(model.spec), CPU, torch.float32)
    with torch.no_grad():
        return sampler.denoise(prompt, embeds, negative if prompt.guided else None, None, lambda _done: None)


def stock_pipeline(model, kind, audio_dtype=torch.float32):
    """A pipeline as a user has it, with text encoder and connectors; of ours is only the transformer."""
    parts = tiny_parts(model.spec)
    encoder, tokenizer = parts.text_encoder(CPU, model.dtype)
    pipeline = kind(
        scheduler=parts.scheduler(), vae=parts.vae(CPU, model.dtype), audio_vae=parts.audio_vae(CPU, audio_dtype),
        text_encoder=encoder, tokenizer=tokenizer, connectors=parts.connectors(CPU, model.dtype),
        transformer=model.transformer, vocoder=parts.vocoder(CPU, audio_dtype),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(model, prompt, image=None, **call):
    """Frames [N, h, w, 3] and sound [channels, samples] of the stock pipeline, texts in."""
    if image is not None:
        call["image"] = image
    frames, sound = stock_pipeline(model, LTX2Pipeline if image is None else LTX2ImageToVideoPipeline)(
        prompt=prompt.prompt, negative_prompt=prompt.negative_prompt,
        max_sequence_length=model.spec.default_prompt_tokens,
        width=prompt.shape.width, height=prompt.shape.height, num_frames=prompt.shape.frames, frame_rate=prompt.fps,
        num_inference_steps=prompt.steps, guidance_scale=prompt.guidance, audio_guidance_scale=prompt.audio_guidance,
        stg_scale=prompt.stg, spatio_temporal_guidance_blocks=list(prompt.stg_blocks), audio_stg_scale=prompt.stg,
        modality_scale=prompt.modality_guidance, audio_modality_scale=prompt.modality_guidance,
        guidance_rescale=prompt.rescale, audio_guidance_rescale=prompt.rescale,
        generator=torch.Generator().manual_seed(prompt.seed), return_dict=False, **{"output_type": "np", **call},
    )  # fmt: skip
    return frames[0], sound[0]


def assert_equal(made, expected, prompt):
    frames, sound = expected
    assert made.frames.dtype == np.uint8 and made.frames.shape == (prompt.shape.frames, 64, 96, 3)
    assert np.array_equal(made.frames, np.rint(frames * 255).astype(np.uint8))
    assert made.frames.std() > 1, "a flat picture would be equal for the wrong reason"
    count = min(sound.shape[1], made.sound.shape[1])
    assert made.sound.dtype == np.float32 and made.sound.shape[1] - count < 0.05 * made.sound_rate
    assert np.array_equal(made.sound[:, :count], sound[:, :count].numpy())
    assert not made.sound[:, count:].any() and made.sound.std() > 0.01


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8))


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_equals_the_stock_pipelines(name, with_image, image):
    model = model_of(LTX2_TINY[name])
    prompt, first = prompt_for(model), image if with_image else None
    assert prompt.guidance > 1 and prompt.audio_guidance > 1 and prompt.stg and prompt.modality_guidance > 1
    made = make(model, prompt, embeddings(model), first)
    assert_equal(made, stock(model, prompt, first), prompt)
    assert made.sound_rate == model.spec.vocoder_config["output_sampling_rate"]
    assert made.sound.shape == (2, round(9 / 24 * made.sound_rate))


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.5"])
def test_distilled_weights_sample_as_diffusers_own_page_has_it(name, with_image, image):
    model = model_of(distilled(name))
    prompt, first = prompt_for(model), image if with_image else None
    assert prompt.steps == 8 and not prompt.guided and prompt.guidance == prompt.modality_guidance == 1
    made = make(model, prompt, embeddings(model), first)
    assert_equal(made, stock(model, prompt, first, sigmas=DISTILLED_SIGMA_VALUES), prompt)


def test_distilled_steps_need_no_scheduler_made_for_them():
    """A distilled transformer beside the dev folder's scheduler, which shifts; another number of steps is its own."""
    fixed, seen = model_of(distilled("tiny/ltx2")), []
    dev = dataclasses.replace(distilled("tiny/ltx2"), scheduler_config=LTX2_TINY["tiny/ltx2"].scheduler_config)
    shifting = model_of(dev)
    prompts = embeddings(fixed)
    shifting.transformer.register_forward_pre_hook(
        lambda _module, _args, call: seen.append(float(call["timestep"].flatten()[0])), with_kwargs=True
    )
    prompt = prompt_for(shifting)
    assert torch.equal(latents(shifting, prompt, prompts)[0], latents(fixed, prompt, prompts)[0])
    assert seen == pytest.approx(list(fixed.spec.sampling.timesteps), abs=1e-3)
    seen.clear()
    latents(shifting, dataclasses.replace(prompt, steps=4), prompts)
    assert len(seen) == 4 and seen[1] != pytest.approx(fixed.spec.sampling.timesteps[2])


def test_in_bfloat16_picture_and_sound_are_the_stock_pipelines_with_its_sound_in_float32(image):
    model = model_of(LTX2_TINY["tiny/ltx2.3"], torch.bfloat16)
    prompt = prompt_for(model)
    assert_equal(make(model, prompt, embeddings(model), image), stock(model, prompt, image), prompt)


def test_latents_are_the_last_step_s_normalised_and_packed():
    model = model_of(LTX2_TINY["tiny/ltx2.3"])
    prompt, prompts, packed = prompt_for(model), embeddings(model), []
    made = make(model, prompt, prompts)
    _, sound = stock(
        model, prompt, output_type="latent",
        callback_on_step_end=lambda _p, _i, _t, tensors: packed.append(tensors["latents"]) or {},
    )  # fmt: skip
    assert torch.equal(made.latents.video, packed[-1][0])
    vae = tiny_parts(model.spec).audio_vae(CPU, torch.float32)
    tokens = sound.transpose(0, 1).flatten(1)
    assert made.latents.audio.shape == tokens.shape == (round(25 * 9 / 24), 32)
    assert torch.equal(made.latents.audio * vae.latents_std + vae.latents_mean, tokens)


def test_every_number_of_the_plan_matters():
    model = model_of(LTX2_TINY["tiny/ltx2.3"])
    prompts, base = embeddings(model), prompt_for(model)
    video, sound = latents(model, base, prompts)
    changes = [
        {"seed": 6}, {"fps": 12.0}, {"prompt": NEGATIVE}, {"guidance": 2.0}, {"audio_guidance": 2.0}, {"stg": 0.5},
        {"stg_blocks": (1,)}, {"modality_guidance": 2.0}, {"rescale": 0.2}, {"guidance": 1.0, "audio_guidance": 1.0},
    ]  # fmt: skip
    for change in changes:
        other = latents(model, dataclasses.replace(base, **change), prompts)
        assert not torch.equal(other[0], video) and not torch.equal(other[1], sound), change


def test_stg_does_nothing_to_2_0_in_this_diffusers():
    """Its transformer is published without `perturbed_attn`, without which the blocks' numbers are read by nobody."""
    model = model_of(LTX2_TINY["tiny/ltx2"], with_lora=False)
    prompts, base = embeddings(model), prompt_for(model)
    first, other = (
        latents(model, dataclasses.replace(base, stg_blocks=blocks), prompts) for blocks in ((1,), (0, 2, 3))
    )
    assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def test_the_strength_of_the_first_frame_s_compression_is_the_version_s(image):
    """Gemma 4 marks 2.5, whose pipeline compresses less; a sampler without text encoder must know it all the same."""
    frames = {}
    model = model_of(LTX2_TINY["tiny/ltx2.5"], with_lora=False)
    for encoder in ("gemma-3", "gemma-4"):
        spec = dataclasses.replace(model.spec, text_encoder=encoder)
        sampler = LTX2Sampler(spec, model.transformer, tiny_parts(spec), CPU, torch.float32)
        frames[encoder] = sampler.first_frame(image, SHAPE)
    assert not torch.equal(frames["gemma-3"], frames["gemma-4"])


class Witness(torch.nn.Module):
    """Sits in the transformer and writes down when it is moved; may refuse the n-th move."""

    def __init__(self, log, refused=0):
        super().__init__()
        self.log, self.refused = log, refused

    def _apply(self, function, recurse=True):
        self.log.append("transformer moved")
        if self.log.count("transformer moved") == self.refused:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._apply(function, recurse)


def witnessed(spec, refused=0, **changed):
    """A model that logs what is loaded and freed and when the transformer moves."""
    log = []

    def told(name, make):
        def load(device, dtype):
            part = make(device, dtype)
            log.append(f"{name} loaded")
            weakref.finalize(part, log.append, f"{name} freed")
            return part

        return load

    parts = dataclasses.replace(tiny_parts(spec), **changed)
    made = {name: told(name, getattr(parts, name)) for name in ("vae", "audio_vae", "vocoder")}
    model = model_of(spec, **made)
    model.transformer.add_module("witness", Witness(log, refused))
    return model, log


def stages(*names):
    return [f"{name} {what}" for name in names for what in ("loaded", "freed")]


@pytest.mark.parametrize("frugal", [False, True], ids=["ordinary", "frugal"])
def test_each_part_is_on_the_device_for_its_stage_alone(frugal, image):
    model, log = witnessed(distilled("tiny/ltx2.3"))
    prompt = prompt_for(model, frugal=frugal, steps=2)
    make(model, prompt, embeddings(model), image, lambda done: log.append(f"step {done}"))
    moved = ["transformer moved"] if frugal else []
    sound = stages("vae", "audio_vae", "vocoder")
    assert log == [*moved, *stages("vae"), *moved, "step 1", "step 2", *moved, *sound, *moved]


def test_a_frugal_sample_below_a_tile_is_the_ordinary_one_and_training_keeps_its_parameters(image):
    model = model_of(LTX2_TINY["tiny/ltx2"])
    prompt, prompts = prompt_for(model), embeddings(model)
    before = {name: (id(value), value.clone()) for name, value in model.transformer.named_parameters()}
    ordinary = make(model, prompt, prompts, image)
    frugal = make(model, dataclasses.replace(prompt, frugal=True), prompts, image)
    for one, other in zip(ordinary.latents.items(), frugal.latents.items(), strict=True):
        assert torch.equal(one[1], other[1])
    assert np.array_equal(ordinary.frames, frugal.frames) and np.array_equal(ordinary.sound, frugal.sound)
    after = dict(model.transformer.named_parameters())
    assert all(id(after[name]) == known and torch.equal(after[name], value) for name, (known, value) in before.items())


def test_another_storage_leaves_parameters_and_their_optimiser_together():
    """What setting aside relies on, where there is no second device: the same call with another dtype."""
    module = torch.nn.Linear(2, 2)
    optimizer, known = torch.optim.AdamW(module.parameters()), [id(value) for value in module.parameters()]
    torch.nn.Module.to(module, torch.float64)
    module(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert [id(value) for value in module.parameters()] == known and not torch.equal(module.weight, before)


def test_a_quantised_transformer_weighs_what_its_buffers_weigh(monkeypatch):
    """Nearly all of it is no parameter: a host without room for it keeps it on the device and decodes in tiles."""
    layer = QuantisedLinear.quantise(torch.randn(128, 128), torch.zeros(128), "int8")
    assert weight_bytes(layer) == 128 * 128 + 128 * 4 + 128 * 4
    spec = LTX2_TINY["tiny/ltx2"]
    sampler = LTX2Sampler(spec, layer, tiny_parts(spec), torch.device("cpu"), torch.float32)
    for free, fits in ((weight_bytes(layer), False), (weight_bytes(layer) + 1, True)):
        monkeypatch.setattr("ltxforge.models.ltx2_sampling.free_host_bytes", lambda free=free: free)
        assert sampler._fits_on_host() == fits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_transformer_goes_and_comes_back():
    spec, cuda = distilled("tiny/ltx2.3"), torch.device("cuda")
    model = LTX2Video(spec, spec.rope, tiny_parts(spec), cuda, torch.bfloat16)
    model.load_transformer()
    before = {name: (id(value), value.clone()) for name, value in model.transformer.named_parameters()}
    prompts = embeddings(model)
    ordinary, frugal = (make(model, prompt_for(model, frugal=frugal), prompts) for frugal in (False, True))
    assert torch.equal(ordinary.latents.video, frugal.latents.video)
    for name, value in model.transformer.named_parameters():
        assert (id(value), value.device.type) == (before[name][0], "cuda") and torch.equal(value, before[name][1])


@pytest.mark.parametrize("tiling", [WHOLE, DecodeTiling(512, 0)], ids=["frugal", "planned"])
@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.3"])
def test_tiles_change_the_picture_near_their_seam_only(name, tiling, record_property):
    """Within 256 pixels of a cut, and by under 8 of 255 levels on average, with decoders of random weights."""
    model = model_of(distilled(name), with_lora=False)
    prompt = prompt_for(model, shape=ClipShape(1152, 64, 9), steps=1)
    place = model.spec, model.transformer, tiny_parts(model.spec), CPU, torch.float32
    drawn = torch.randn(1, 16, 2, 2, 36, generator=torch.Generator().manual_seed(1))
    whole = LTX2Sampler(*place).picture(drawn, prompt)
    frugal = dataclasses.replace(prompt, frugal=tiling == WHOLE)
    tiled = LTX2Sampler(*place, tiling).picture(drawn, frugal)
    difference = np.abs(whole.astype(int) - tiled)
    columns = np.arange(whole.shape[2])
    spans = tiles_along(36, FRUGAL.side // 32)
    cuts = [32 * cut for (_, end), (begin, _) in itertools.pairwise(spans) for cut in (begin, end)]
    near = np.min([np.abs(columns - cut) for cut in cuts], axis=0) < 256
    assert len(spans) == 3 and difference[:, :, ~near].max() <= 1 < difference[:, :, near].max()
    assert difference.mean() < 8
    record_property("count", f"tiles of {name}: {difference.mean():.1f} of 255 levels apart on average")


class Failing(torch.nn.Module):
    """A VAE whose decoder finds no memory."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.config, self.dtype = vae, vae.config, vae.dtype
        self.spatial_compression_ratio = vae.spatial_compression_ratio
        self.temporal_compression_ratio = vae.temporal_compression_ratio
        self.latents_mean, self.latents_std = vae.latents_mean, vae.latents_std

    def decode(self, *_given, **_call):
        raise torch.OutOfMemoryError("CUDA out of memory")


def failing_vae(spec):
    return {"vae": lambda device, dtype: Failing(tiny_parts(spec).vae(device, dtype))}


def test_a_frugal_sample_that_fails_frees_its_part_before_the_transformer_comes_back():
    spec = distilled("tiny/ltx2.3")
    model, log = witnessed(spec, **failing_vae(spec))
    prompts = embeddings(model)
    with pytest.raises(torch.OutOfMemoryError):
        make(model, prompt_for(model, frugal=True, steps=2), prompts)
    assert log == ["transformer moved", *stages("vae"), "transformer moved"]


def test_a_transformer_that_finds_no_room_to_come_back_ends_the_run():
    model, log = witnessed(distilled("tiny/ltx2.3"), refused=2)
    with pytest.raises(DeviceFullError, match="set aside"):
        make(model, prompt_for(model, frugal=True, steps=2), embeddings(model))
    assert log.count("transformer moved") == 2


@pytest.mark.parametrize("part", ["transformer", "vae", "vocoder"])
def test_numbers_that_are_not_finite_are_no_sample(part):
    spec = distilled("tiny/ltx2.3")

    def spoiled(device, dtype):
        made = getattr(tiny_parts(spec), part)(device, dtype)
        with torch.no_grad():
            list(made.parameters())[-1].fill_(float("nan"))
        return made

    model = model_of(spec, with_lora=False, **{part: spoiled})
    with pytest.raises(FloatingPointError, match="not finite"):
        make(model, prompt_for(model, steps=2), embeddings(model))


def test_a_step_may_break_off():
    model, log = witnessed(distilled("tiny/ltx2.3"))
    with pytest.raises(KeyboardInterrupt):
        make(model, prompt_for(model, steps=3), embeddings(model), on_step=lambda done: log.append(done) or _stop(done))
    assert log == [1, 2]


def _stop(done):
    if done == 2:
        raise KeyboardInterrupt
