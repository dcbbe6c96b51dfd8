"""Compact rotary tables: what they leave out of diffusers' tables comes back bit for bit, for every model there is."""

from __future__ import annotations

import pytest
import torch
from ltxforge_kernels.qk_norm_rope.rope import Rope, compact, expand

from ltxforge.models import ltx2, ltx_video
from ltxforge.models.random_weights import TRANSFORMERS
from ltxforge.shapes import LatentShape
from ltxforge.specs import SPECS, TINY

CPU = torch.device("cpu")
# One of each width and layout; versions that share both have the same tables.
REAL = ("0.9.0", "0.9.7-dev", "2.0-dev", "2.3-dev", "2.5-dev")
SHAPE = LatentShape(3, 2, 5)
AUDIO_LENGTH = 7
GRID = (SHAPE.frames, SHAPE.height, SHAPE.width)
GRIDS = {
    "plain": (GRID, None), "causal": (GRID, None), "video": (GRID, None), "video, cross": (GRID, (0,)),
    "audio": ((AUDIO_LENGTH,), None), "audio, cross": ((AUDIO_LENGTH,), None),
}  # fmt: skip


def tables_of(name: str, shape: LatentShape = SHAPE, length: int = AUDIO_LENGTH) -> dict[str, tuple]:
    """Every table that the model's transformer makes, as the models' functions hand them to `compact`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ltx_video, ltx2):
            patch.setattr(module, "compact", lambda cos, sin, sizes, along=None: (cos, sin))
        return full_tables(name, shape, length)


def full_tables(name: str, shape: LatentShape, length: int) -> dict[str, tuple]:
    spec = {**SPECS, **TINY}[name]
    with torch.device("meta"):
        transformer = TRANSFORMERS[spec.family](**{**spec.transformer_config, "num_layers": 1})
    if spec.family == "ltx-video":
        return {
            convention: ltx_video.rope_tables(transformer, convention, shape, 23.976, CPU)
            for convention in ("plain", "causal")
        }
    video, audio = ltx2.video_ropes(transformer, shape, 23.976, CPU), ltx2.audio_ropes(transformer, length, CPU)
    return {"video": video[0], "video, cross": video[1], "audio": audio[0], "audio, cross": audio[1]}


@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_nothing_is_lost(name):
    for kind, (cos, sin) in tables_of(name).items():
        rope = compact(cos, sin, *GRIDS[kind])
        for one, other in zip(rope.full, (cos, sin), strict=True):
            assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other), kind
        pairs = cos.numel() // (1 if cos.ndim == 4 else 2)
        assert (rope.tokens, rope.width) == (cos.shape[-2], 2 * pairs // cos.shape[-2])
        assert rope.layout == ("interleaved" if cos.ndim == 3 else "split")
        assert rope.cos.shape[0] == sum(GRIDS[kind][0][axis] for axis in GRIDS[kind][1] or range(len(GRIDS[kind][0])))


def test_padding_of_every_kind_is_met():
    """Some of these models have pairs that no axis turns, and some have none."""
    paddings = {
        compact(cos, sin, *GRIDS[kind]).padding
        for name in ("0.9.0", "0.9.7-dev", "2.0-dev")
        for kind, (cos, sin) in tables_of(name).items()
    }
    assert paddings == {0, 1, 2}


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["0.9.0", "0.9.7-dev", "2.0-dev"])
def test_nothing_is_lost_of_a_whole_clip(name):
    """768x512, 121 frames; what is kept is at most a hundredth."""
    shape = LatentShape(16, 16, 24)
    grid = (shape.frames, shape.height, shape.width)
    for kind, (cos, sin) in tables_of(name, shape, 126).items():
        if "audio" in kind:
            continue
        rope = compact(cos, sin, grid, GRIDS[kind][1])
        assert all(torch.equal(one, other) for one, other in zip(expand(rope), (cos, sin), strict=True))
        assert 100 * sum(each.nbytes for each in (rope.cos, rope.sin, rope.rows)) < cos.nbytes + sin.nbytes


def test_full_tables_are_made_once_and_late():
    rope = Rope(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(4, 2, dtype=torch.int32))
    assert not rope._full
    assert rope.full is rope.full is rope._full[0]
    assert rope.full[0].shape == (1, 4, 12)


def test_what_is_no_grid_is_refused():
    cos, sin = tables_of("tiny/ltx-video")["plain"]
    assert compact(cos, sin, (30,)).cos.shape[0] == 30  # a row per token is always one
    for sizes in ((2, 2, 5), (3, 10), (5, 2, 3)):
        with pytest.raises(ValueError, match=r"tables of \[1, 30, "):
            compact(cos, sin, sizes)
    with pytest.raises(ValueError, match="not of a grid"):
        compact(cos, sin[:, :1], GRID)
    with pytest.raises(ValueError, match="not of a grid"):
        compact(cos.repeat(2, 1, 1), sin.repeat(2, 1, 1), GRID)
    spoilt = cos.clone()
    spoilt[0, 17, -1] += 1
    with pytest.raises(ValueError, match="more than the rows"):
        compact(spoilt, sin, GRID)
