"""Encoding and decoding against diffusers' own pipelines, and the rule that encoders never share the device."""

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ltxforge.models import tiny
from ltxforge.models.interface import PromptEmbeddings, WantedPrompt, from_tokens, to_tokens
from ltxforge.models.ltx_video import LTXVideo, pad_prompts
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY
from ltxforge.specs_ltx_video import LTX_VIDEO_TINY

CPU = torch.device("cpu")
NAMES = ["tiny/ltx-video-0.9.0", "tiny/ltx-video-0.9.1", "tiny/ltx-video"]
CAPTIONS = ["a red ball", "", "rain over green hills " * 12]
WANTED = [WantedPrompt(caption) for caption in CAPTIONS]


def make(name: str, dtype: torch.dtype = torch.float32) -> LTXVideo:
    return LTXVideo(TINY[name], TINY[name].rope, tiny.tiny_parts(TINY[name]), CPU, dtype)


def clip(frames: int = 9, width: int = 96, height: int = 64) -> torch.Tensor:
    pixels = tiny.synthetic_clip(frames, 96)[0, :, :, :height, :width]
    return (pixels.permute(1, 2, 3, 0) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def pipeline_class(model: LTXVideo):
    return LTXConditionPipeline if model.rope == "causal" else LTXPipeline


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [32, 128])
def test_prompts_equal_the_sampling_pipelines_own_encoding(name, tokens):
    model = make(name)
    for caption, ours in zip(CAPTIONS, model.encode_prompts(WANTED, tokens), strict=True):
        theirs, mask = stock_encoding(model, caption, tokens)
        assert ours.tensors.keys() == {"embeds"}
        assert torch.equal(ours.tensors["embeds"], theirs[0, : int(mask.sum())])
        assert len(ours.tensors["embeds"]) == ours.tokens == min(len(caption) + 1, tokens)


def stock_encoding(model: LTXVideo, caption: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline class's own `encode_prompt`, over the loaded text encoder."""
    encoder, tokenizer = model._text_encoder
    parts = {"scheduler": tiny.tiny_parts(model.spec).scheduler(), "vae": None, "transformer": None}
    pipeline = pipeline_class(model)(**parts, text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        return pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=tokens)[:2]


def test_padding_restores_a_batch():
    prompts = [PromptEmbeddings({"embeds": torch.full((length, 3), float(length))}, length) for length in (2, 4)]
    batch = pad_prompts(prompts, 5, CPU, torch.bfloat16)
    assert batch.embeds.audio is None and batch.embeds.video.dtype == torch.bfloat16
    assert batch.mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.embeds.video[:, :, 0].tolist() == [[2, 2, 0, 0, 0], [4, 4, 4, 4, 0]]
    with pytest.raises(AssertionError, match="does not fit"):
        pad_prompts(prompts, 3, CPU, torch.float32)


def test_zero_padding_gives_the_bits_of_the_encoders_own_padding():
    """Stored trimmed and re-padded with zeros, against the pipeline's embeddings with their masked tail."""
    model = make("tiny/ltx-video-0.9.1")
    model.load_transformer()
    for encoded in model.encode_prompts(WANTED[:1], 32):
        theirs, mask = stock_encoding(model, CAPTIONS[0], 32)
        ours = model.batch_prompts([encoded], 32)
    assert not torch.equal(ours.embeds.video, theirs)
    shape = LatentShape(2, 2, 3)
    arguments = {
        "hidden_states": torch.randn(1, shape.tokens, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]), "num_frames": 2, "height": 2, "width": 3, "return_dict": False,
    }  # fmt: skip
    outputs = [
        model.transformer(encoder_hidden_states=embeds, encoder_attention_mask=keep, **arguments)[0]
        for embeds, keep in ((theirs, mask), (ours.embeds.video, ours.mask))
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_latents_equal_diffusers_encoding(name):
    model, frames = make(name), clip()
    with model.vae():
        latents = model.encode_clip(frames)
        pixels = VideoProcessor(vae_scale_factor=32).preprocess_video(
            [Image.fromarray(frame) for frame in frames.numpy()]
        )
        posterior = model._vae.encode(pixels).latent_dist
        statistics = model._vae.latents_mean, model._vae.latents_std
        mean = LTXImageToVideoPipeline._normalize_latents(posterior.mean, *statistics)
        width = posterior.std / statistics[1].view(1, -1, 1, 1, 1)
    assert latents.mean.shape == latents.std.shape == (16, 2, 2, 3)
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    assert torch.allclose(latents.mean, mean[0], rtol=0, atol=1e-5)
    assert torch.allclose(latents.std, width[0], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_diffusers_decoding(name):
    model, frames = make(name), clip(17)
    with model.vae():
        mean = model.encode_clip(frames).mean
        ours = model.decode(mean)
        assert torch.equal(ours, model.decode(mean))
        vae = model._vae
        raw = LTXPipeline._denormalize_latents(mean[None], vae.latents_mean, vae.latents_std)
        timestep = torch.tensor([model.spec.sampling.decode_timestep]) if vae.config.timestep_conditioning else None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            stock = vae.decode(raw, timestep, return_dict=False)[0]
    theirs = VideoProcessor(vae_scale_factor=32).postprocess_video(stock, output_type="np")[0]
    assert ours.shape == frames.shape
    assert (ours.double() - torch.from_numpy(theirs * 255.0).double()).abs().max() <= 0.51


def test_decoding_leaves_no_trace_in_the_random_state():
    model = make("tiny/ltx-video-0.9.1")
    before = torch.get_rng_state()
    with model.vae():
        model.decode(torch.zeros(16, 2, 2, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("frames", [8, 10, 16])
def test_illegal_frame_counts_are_refused(frames):
    model = make("tiny/ltx-video")
    with model.vae(), pytest.raises(AssertionError, match=r"8k \+ 1"):
        model.encode_clip(clip(17)[:frames])


def test_encoders_are_never_loaded_together_and_always_freed():
    model = make("tiny/ltx-video")
    with model.vae(), pytest.raises(AssertionError, match="must be freed"), model.text_encoder():
        pass
    with model.text_encoder(), pytest.raises(AssertionError, match="must be freed"), model.vae():
        pass
    with pytest.raises(ZeroDivisionError), model.vae():
        raise ZeroDivisionError
    with model.vae(), pytest.raises(AssertionError, match="must be freed"):
        next(model.encode_prompts(WANTED, 32))
    with pytest.raises(AssertionError, match=r"inside vae\(\)"):
        model.decode(torch.zeros(16, 1, 1, 1))


def test_the_text_encoder_is_there_from_the_first_prompt_to_the_last_or_to_the_end_of_asking():
    model = make("tiny/ltx-video")
    prompts = model.encode_prompts(WANTED, 32)
    assert model._text_encoder is None
    next(prompts)
    assert model._text_encoder is not None
    prompts.close()
    assert model._text_encoder is None
    assert len(list(model.encode_prompts(WANTED, 32))) == len(WANTED) and model._text_encoder is None


def test_tokens_and_latents_are_each_others_inverse():
    shape = LatentShape(3, 2, 5)
    latents = torch.randn(2, 16, 3, 2, 5)
    tokens = to_tokens(latents)
    assert torch.equal(tokens, LTXPipeline._pack_latents(latents))
    assert torch.equal(from_tokens(tokens, shape), latents)


def test_tiny_models_are_the_same_every_time_and_disturb_nothing():
    before = torch.get_rng_state()
    for name, spec in LTX_VIDEO_TINY.items():
        first, second = tiny.tiny_vae(spec), tiny.tiny_vae(spec)
        assert all(
            torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        )
        parts = (first, tiny.tiny_transformer(spec), tiny.tiny_text_encoder(spec))
        assert sum(p.numel() for part in parts for p in part.parameters()) <= 5_000_000, name
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["tiny/ltx-video", "tiny/ltx-video-13b"])
def test_tiny_models_are_small(name):
    spec = TINY[name]
    parts = (tiny.tiny_vae(spec), tiny.tiny_transformer(spec), tiny.tiny_text_encoder(spec))
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) <= 5_000_000


@pytest.mark.parametrize("name", NAMES)
def test_tiny_latents_of_ordinary_clips_are_normalised(name):
    model = make(name)
    with model.vae():
        latents = model.encode_clip(clip(17))
        pixels = model.decode(latents.mean).float()
    assert abs(float(latents.mean.mean())) < 0.5
    assert 0.5 < float(latents.mean.std()) < 2
    assert 0.02 < float(latents.std.mean()) < 0.5
    assert 20 < float(pixels.std()) < 100
