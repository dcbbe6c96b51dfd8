"""Aspect buckets: legal, within the area, and the nearest one chosen."""

from __future__ import annotations

import math

import pytest

from ltxforge.media.buckets import bucket_sizes, nearest_bucket, too_small
from ltxforge.media.geometry import cover_size, enlargement, kept_share


@pytest.mark.parametrize("resolution", [(128, 96), (768, 512), (512, 512), (1216, 704), (32, 32), (64, 256), (352, 32)])
@pytest.mark.parametrize("factor", [16, 32])
def test_every_size_is_legal_and_within_the_area(resolution: tuple[int, int], factor: int) -> None:
    sizes = bucket_sizes(resolution, "aspect", factor)
    area = resolution[0] * resolution[1]
    assert resolution in sizes and len(set(sizes)) == len(sizes)
    assert [w / h for w, h in sizes] == sorted(w / h for w, h in sizes)
    for width, height in set(sizes) - {resolution}:
        assert width % factor == height % factor == 0
        assert 0.75 * area <= width * height <= area
        assert 0.25 <= width / height <= 4
        assert (height, width) in sizes  # lying and standing clips are served alike


def test_small_areas_by_hand() -> None:
    # 4 × 3 cells: 12 or fewer, at least 9, up to 4:1.
    cells = [(2, 6), (2, 5), (3, 4), (3, 3), (4, 3), (5, 2), (6, 2)]
    assert bucket_sizes((128, 96)) == tuple((32 * x, 32 * y) for x, y in cells)


def test_fixed_is_the_resolution_alone() -> None:
    assert bucket_sizes((768, 512), "fixed") == ((768, 512),)
    with pytest.raises(ValueError, match="aspect"):
        bucket_sizes((768, 512), "square")


def test_the_nearest_in_log_aspect() -> None:
    sizes = bucket_sizes((768, 512))
    for clip in ((1920, 1080), (1080, 1920), (640, 480), (720, 720), (4000, 100), (321, 243)):
        chosen = nearest_bucket(clip, sizes)
        distances = [abs(math.log(w / h) - math.log(clip[0] / clip[1])) for w, h in sizes]
        assert abs(math.log(chosen[0] / chosen[1]) - math.log(clip[0] / clip[1])) == pytest.approx(min(distances))
    assert nearest_bucket((720, 720), sizes) == (608, 608)
    assert nearest_bucket((1080, 1920), sizes) == nearest_bucket((1920, 1080), sizes)[::-1]


def test_ties_go_to_the_larger_then_the_wider() -> None:
    assert nearest_bucket((100, 100), ((96, 128), (128, 96))) == (128, 96)
    assert nearest_bucket((100, 100), ((64, 64), (128, 128), (96, 96))) == (128, 128)


def test_too_small_gives_the_numbers() -> None:
    assert too_small((640, 480), (768, 512), 2.0) == ""
    assert too_small((96, 32), (192, 64), 2.0) == ""  # exactly twice is allowed
    reason = too_small((320, 240), (704, 544), 2.0)
    assert "320x240" in reason and "2.27" in reason and "704x544" in reason and "max_upscale is 2" in reason


def test_cover_fits_one_side_exactly() -> None:
    for size in ((1920, 1080), (321, 243), (1280, 32), (7, 5000)):
        for target in ((768, 512), (96, 128), (32, 32)):
            width, height = cover_size(size, target)
            assert width >= target[0] and height >= target[1]
            assert width == target[0] or height == target[1]
            assert abs(width - size[0] * enlargement(size, target)) <= 0.5
    assert kept_share((200, 100), (100, 100)) == pytest.approx(0.5)
