"""Tiles against the decoder's own whole output: where they lie, how they are blended, what they cost in truth."""

import itertools

import numpy as np
import pytest
import torch

from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.vae import decode_frames, fixed_randomness, statistics
from ltxforge.models.vae_tiles import WHOLE, DecodeTiling, blend_weights, decode_parts, decoding_in_tiles
from ltxforge.plan import PromptPlan
from ltxforge.shapes import ClipShape, tiles_along
from ltxforge.specs import TINY

CPU = torch.device("cpu")
NAMES = ["tiny/ltx-video-0.9.0", "tiny/ltx-video-0.9.1", "tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3"]


def vae_of(name: str):
    return (ltx2_tiny if TINY[name].has_audio else tiny).tiny_vae(TINY[name])


def timestep_of(vae) -> torch.Tensor | None:
    return torch.tensor([0.05]) if vae.config.timestep_conditioning else None


def latents_of(vae, frames: int, rows: int, columns: int) -> torch.Tensor:
    noise = torch.randn(
        1, vae.config.latent_channels, frames, rows, columns, generator=torch.Generator().manual_seed(0)
    )
    mean, std, scale = statistics(vae)
    return noise * std / scale + mean


def decoded(vae, latents: torch.Tensor, tiling: DecodeTiling) -> torch.Tensor:
    with fixed_randomness(CPU):
        return torch.cat(list(decode_parts(vae, latents, timestep_of(vae), tiling)), dim=2)


def whole(vae, latents: torch.Tensor) -> torch.Tensor:
    with fixed_randomness(CPU), torch.no_grad():
        return vae.decode(latents, timestep_of(vae), return_dict=False)[0]


def test_spans_cover_all_equally_and_share_a_quarter():
    for most in range(2, 20):
        for size in range(1, 90):
            spans = tiles_along(size, most)
            assert spans[0][0] == 0 and spans[-1][1] == size
            assert len({end - begin for begin, end in spans}) == 1 and spans[0][1] <= most
            shared = [one[1] - other[0] for one, other in itertools.pairwise(spans)]
            assert all(count >= min(max(2, most // 4), most - 1) for count in shared)
            fewer = len(spans) - 1
            overlap = min(max(2, most // 4), most - 1)
            assert fewer == 0 or fewer * (most - overlap) + overlap < size, "fewer would do"
    assert tiles_along(40, 0) == ((0, 40),)


@pytest.mark.parametrize("size", [9, 17, 40, 61])
@pytest.mark.parametrize("most", [2, 4, 8, 16])
def test_shares_make_one_and_rise_evenly(size, most):
    spans = list(tiles_along(size, most))
    total = torch.zeros(size)
    for (begin, end), share in zip(spans, blend_weights(spans), strict=True):
        assert share.min() > 0 and share.shape == (end - begin,)
        total[begin:end] += share
    assert torch.allclose(total, torch.ones(size), atol=1e-6)
    shares = blend_weights([(0, 6), (4, 10)])
    assert torch.equal(shares[0][:4], torch.ones(4)) and torch.equal(shares[1][2:], torch.ones(4))
    assert torch.allclose(shares[0][4:], torch.tensor([2 / 3, 1 / 3])) and torch.allclose(
        shares[1][:2], torch.tensor([1 / 3, 2 / 3])
    )


class Clock:
    """A decoder whose pixels say which latent they come from, with the rule of time of the real ones.

    Latent f of a clip makes frames 8f − 7 to 8f, the first one frame alone, which is the last of its eight. A pixel's
    value is its place along `axis`, told by the latents' own values.
    """

    temporal_compression_ratio, spatial_compression_ratio = 8, 32

    def decode(self, latents, timestep=None, return_dict=False):
        frames = latents.repeat_interleave(8, dim=2)
        inside = torch.arange(8).repeat(latents.shape[2]).view(1, 1, -1, 1, 1)
        pixels = (frames * 8 + inside)[:, :, 7:]
        return (pixels.repeat_interleave(32, dim=3).repeat_interleave(32, dim=4),)


@pytest.mark.parametrize("frames", [16, 24, 32, 64, 120])
def test_every_frame_stands_at_its_time(frames):
    """A tile late by a frame would show in every value; diffusers' tiles in time are."""
    vae, latents = Clock(), torch.arange(31.0).view(1, 1, 31, 1, 1)
    parts = list(decode_parts(vae, latents, None, DecodeTiling(0, frames)))
    assert torch.allclose(torch.cat(parts, dim=2), vae.decode(latents)[0], rtol=1e-6)
    assert len(parts) > 1 and max(part.shape[2] for part in parts) <= frames


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tiling", [WHOLE, DecodeTiling(512, 0), DecodeTiling(0, 32), DecodeTiling(128, 24)])
def test_tiles_that_cover_all_are_the_whole_to_the_last_bit(name, tiling):
    vae = vae_of(name)
    latents = latents_of(vae, 3, 2, 4)
    parts = list(decode_parts(vae, latents, timestep_of(vae), tiling))
    assert len(parts) == 1 and torch.equal(decoded(vae, latents, tiling), whole(vae, latents))


@pytest.mark.parametrize("name", ["tiny/ltx-video", "tiny/ltx2"])
def test_far_from_a_seam_tiles_are_the_whole(name):
    """The real decoders: what no edge of a tile reaches has the whole's value, frame by frame and column by column."""
    vae = vae_of(name)
    for tiling, shape, axis in ((DecodeTiling(0, 192), (40, 2, 2), 2), (DecodeTiling(1024, 0), (1, 2, 52), 4)):
        latents = latents_of(vae, *shape)
        one, other = whole(vae, latents), decoded(vae, latents, tiling)
        apart = (one - other).abs().movedim(axis, 0).flatten(1).amax(dim=1)
        assert (apart < 1e-4).float().mean() > 0.2 and apart.max() > 1e-3
        assert apart[0] < 1e-4 and apart[-1] < 1e-4


def measured(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Of pixels in [-1, 1]: relative error, and PSNR of what is drawn of them, in dB."""
    relative = float((one - other).norm() / one.norm())
    levels = [((each.clamp(-1, 1) + 1) * 127.5).double() for each in (one, other)]
    return relative, float(10 * torch.log10(255**2 / (levels[0] - levels[1]).square().mean()))


@pytest.mark.parametrize(
    ("name", "tiling", "shape", "bound", "least"),
    [
        ("tiny/ltx-video", DecodeTiling(512, 0), (2, 2, 24), 0.10, 32),
        ("tiny/ltx-video", DecodeTiling(0, 64), (16, 2, 2), 0.20, 26),
        ("tiny/ltx2", DecodeTiling(512, 0), (2, 2, 24), 0.20, 26),
        ("tiny/ltx2", DecodeTiling(0, 64), (16, 2, 2), 0.40, 20),
    ],
)
def test_the_stated_seam_error(name, tiling, shape, bound, least, record_property):
    """The worst case: latents of noise, which nothing ties to their neighbours, and random weights."""
    vae = vae_of(name)
    latents = latents_of(vae, *shape)
    relative, ratio = measured(whole(vae, latents), decoded(vae, latents, tiling))
    record_property("count", f"seams of {name} in {tiling}: {relative:.3f} of the whole, {ratio:.1f} dB")
    assert 0 < relative < bound and ratio > least


def test_what_is_decoded_at_a_time_does_not_grow_with_the_clip():
    """Neither what the decoder is given nor what is handed on; frames come in order, none twice."""
    given = []

    class Witness(Clock):
        def decode(self, latents, timestep=None, return_dict=False):
            given.append(latents.numel())
            return super().decode(latents, timestep, return_dict)

    for frames in (9, 18, 36):
        parts = list(decode_parts(Witness(), torch.zeros(1, 1, frames, 2, 6), None, DecodeTiling(128, 32)))
        assert max(given) <= 4 * 2 * 4 and max(part.shape[2] for part in parts) <= 32
        assert sum(part.shape[2] for part in parts) == 8 * (frames - 1) + 1
        assert {part.shape[3:] for part in parts} == {(64, 192)}


@pytest.mark.parametrize(("name", "kind"), [("tiny/ltx-video", LTXVideo), ("tiny/ltx2", LTX2Video)])
def test_a_model_decodes_in_the_tiles_it_is_told(name, kind):
    spec = TINY[name]
    parts = (ltx2_tiny if spec.has_audio else tiny).tiny_parts(spec)
    model = kind(spec, spec.rope, parts, CPU, torch.float32)
    latents = torch.randn(16, 5, 2, 6, generator=torch.Generator().manual_seed(0))
    with model.vae():
        one = model.decode(latents)
        model.decode_tiling = DecodeTiling(128, 24)
        other = model.decode(latents)
    vae = vae_of(name)
    timestep = spec.sampling.decode_timestep
    assert torch.equal(one, decode_frames(vae, latents, CPU, timestep))
    assert torch.equal(other, decode_frames(vae, latents, CPU, timestep, model.decode_tiling))
    assert one.shape == other.shape == (33, 64, 192, 3) and one.dtype == other.dtype == torch.uint8
    assert 0 < (one.int() - other.int()).abs().float().mean() < 40


def test_pipelines_decode_in_tiles_for_a_while():
    """What diffusers' own pipelines call; afterwards, and whole, it is the class's own again."""
    vae = vae_of("tiny/ltx-video")
    latents, tiling = latents_of(vae, 5, 2, 6), DecodeTiling(128, 24)
    joined = decoded(vae, latents, tiling)
    with pytest.raises(ZeroDivisionError), decoding_in_tiles(vae, tiling):
        assert torch.equal(vae.decode(latents, timestep_of(vae), return_dict=False)[0], joined)
        raise ZeroDivisionError
    with decoding_in_tiles(vae, WHOLE):
        assert "decode" not in vars(vae)
    assert torch.equal(whole(vae, latents), decoded(vae, latents, WHOLE)) and "decode" not in vars(vae)


@pytest.mark.parametrize("base", ["tiny/ltx-video-0.9.1", "tiny/ltx-video"])
def test_a_sample_of_ltx_video_in_tiles(base):
    """The same latents as a whole one's, other pixels; and the whole's where a tile holds all."""
    spec = TINY[base]
    model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, torch.float32)
    model.load_transformer()
    prompt = PromptPlan("a", "a ball", "", "", ClipShape(192, 64, 25), 24.0, 2, 1.0, 5)
    prompts = dict(zip(["a ball"], model.encode_prompts([WantedPrompt("a ball")], 32), strict=True))
    made = {}
    for tiling in (WHOLE, DecodeTiling(256, 32), DecodeTiling(128, 24)):
        model.decode_tiling = tiling
        made[tiling] = model.sample(prompt, prompts, 32, None, lambda _done: None)
    one, covering, other = made.values()
    assert torch.equal(one.latents.video, other.latents.video)
    assert np.array_equal(one.frames, covering.frames) and not np.array_equal(one.frames, other.frames)
    assert one.frames.shape == other.frames.shape == (25, 64, 192, 3)
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 40
