"""The 8k + 1 rule and the 32-pixel rule, with the numbers that people meet."""

import pytest

from ltxforge.shapes import ClipShape, LatentShape, is_legal_frames, is_legal_side, nearest_frames, nearest_sizes


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [(61, (57, 65)), (125, (121, 129)), (48, (41, 49)), (121, (121,)), (1, (1,)), (2, (1, 9)), (60, (57, 65))],
)
def test_nearest_frames(frames, nearest):
    assert nearest_frames(frames) == nearest
    assert all(is_legal_frames(n) for n in nearest)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((480, 854), ((480, 864),)),
        ((720, 1280), ((704, 1280), (736, 1280))),
        ((1280, 720), ((1280, 704), (1280, 736))),
        ((720, 720), ((704, 704), (736, 736))),
        ((1920, 1080), ((1920, 1088),)),
        ((10, 16), ((32, 32),)),
        ((768, 512), ((768, 512),)),
    ],
)
def test_nearest_sizes(size, nearest):
    assert nearest_sizes(*size) == nearest
    assert all(is_legal_side(side) for each in nearest for side in each)


@pytest.mark.parametrize(
    ("shape", "latent", "tokens"),
    [
        (ClipShape(768, 512, 121), LatentShape(16, 16, 24), 6144),
        (ClipShape(768, 512, 49), LatentShape(7, 16, 24), 2688),
        (ClipShape(512, 512, 1), LatentShape(1, 16, 16), 256),
    ],
)
def test_tokens(shape, latent, tokens):
    assert shape.latent() == latent and latent.tokens == tokens


@pytest.mark.parametrize("shape", [ClipShape(720, 512, 121), ClipShape(768, 512, 120), ClipShape(0, 32, 9)])
def test_illegal_shapes_are_our_own_mistake(shape):
    with pytest.raises(ValueError, match="multiple of 32|8k"):
        shape.latent()
