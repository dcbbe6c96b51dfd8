"""The contact sheet: which frames, how large, and that the pixels of the frames are really in it."""

import numpy as np
import pytest
from PIL import Image

from ltxforge.validation.contact_sheet import (
    LARGEST_TILE,
    MARGIN,
    SMALLEST_TILE,
    TALLEST_TILE,
    WAVE_HEIGHT,
    WAVES,
    SheetText,
    chosen_frames,
    draw_contact_sheet,
    envelope,
    tile_size,
    write_contact_sheet,
)

TEXT = SheetText("fox", "A fox runs.", "step 1")


def noise(count, height, width):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def find(sheet, picture):
    """Where `picture` stands in `sheet`, compared pixel by pixel; None if it does not."""
    sheet = np.asarray(sheet)
    height, width = picture.shape[:2]
    for top, left in np.argwhere((sheet == picture[0, 0]).all(-1)):
        if np.array_equal(sheet[top : top + height, left : left + width], picture):
            return int(top), int(left)
    return None


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (8, list(range(8))), (9, None), (121, None)])
def test_chosen_frames_are_even_and_hold_both_ends(count, expected):
    chosen = chosen_frames(count)
    assert expected is None or chosen == expected
    assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == min(count, 8)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "size", [(32, 32), (64, 64), (64, 256), (96, 64), (256, 64), (768, 512), (512, 768), (2048, 32), (32, 2048)]
)
def test_tiles_keep_the_aspect_and_are_readable(size):
    width, height = tile_size(*size)
    assert width <= LARGEST_TILE and height <= TALLEST_TILE
    assert width / height == pytest.approx(size[0] / size[1], rel=0.06)
    if max(size) <= 96:
        assert width >= SMALLEST_TILE and width % size[0] == 0 and height % size[1] == 0


def test_tiny_frames_are_enlarged_pixel_by_pixel_in_reading_order():
    frames = noise(9, 64, 64)
    sheet = draw_contact_sheet(frames, 25, TEXT)
    places = [find(sheet, frames[index].repeat(3, 0).repeat(3, 1)) for index in chosen_frames(9)]
    assert None not in places and places == sorted(places)
    assert len({top for top, _ in places}) == 2


def test_a_still_is_a_sheet_too():
    frames = noise(1, 96, 160)
    assert find(draw_contact_sheet(frames, 25, TEXT), frames[0]) is not None


def test_large_frames_are_reduced():
    sheet = draw_contact_sheet(noise(25, 512, 768), 25, TEXT)
    assert sheet.width <= 4 * LARGEST_TILE + 100 and sheet.height <= 700


@pytest.mark.parametrize(
    "prompt",
    ["", "word " * 500, "w" * 5000, "日本語" * 300, "a\x1b[2J\n\0\u202e" * 40, "\ud83e\udd8a fox", "\U0001f98a"],
)
def test_any_prompt_stays_within_a_bounded_head(prompt):
    frames = noise(4, 64, 64)
    plain = draw_contact_sheet(frames, 25, SheetText("fox", "", "step 1"))
    sheet = draw_contact_sheet(frames, 25, SheetText("fox" * 100, prompt, "step 1 " * 100))
    assert sheet.width == plain.width
    assert 0 <= sheet.height - plain.height <= 3 * 22
    pixels = np.asarray(sheet)
    assert (pixels[:, -20:] == pixels[0, 0]).all(), "no text runs into the right margin"


def test_the_text_changes_the_picture_and_the_file_holds_the_picture(tmp_path):
    frames = noise(9, 64, 64)
    path = tmp_path / "step-000100" / "fox.png"
    write_contact_sheet(path, frames, 25, TEXT)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(draw_contact_sheet(frames, 25, TEXT)))
    other = draw_contact_sheet(frames, 25, SheetText("fox", "A cat runs.", "step 1"))
    assert not np.array_equal(np.asarray(other), np.asarray(draw_contact_sheet(frames, 25, TEXT)))
    assert [entry.name for entry in path.parent.iterdir()] == ["fox.png"]


def test_the_envelope_leaves_no_sample_out():
    random = np.random.default_rng(0)
    for samples, columns in ((1000, 7), (7, 100), (1, 5), (48000, 640)):
        channel = random.standard_normal(samples)
        lows, highs = envelope(channel, columns)
        assert lows.min() == channel.min() and highs.max() == channel.max() and (lows <= highs).all()
    spike = np.zeros(48000)
    spike[24000] = 1.0
    assert np.flatnonzero(envelope(spike, 640)[1]).tolist() == [320]


def strip_of(sheet, plain):
    """The part of the sheet that the sound added, without margins: [height, width, 3] floats."""
    return np.asarray(sheet).astype(float)[plain.height - MARGIN :, MARGIN:-MARGIN]


def test_the_wave_stands_where_it_sounds():
    """A tone in the second half of the left channel, louder than one in the first half of the right."""
    time = np.arange(48000) / 48000
    tone = np.sin(2 * np.pi * 3000 * time)
    audio = np.stack([0.8 * tone * (time >= 0.5), 0.2 * tone * (time < 0.5)]).astype(np.float32)
    frames = noise(25, 64, 96)
    plain = draw_contact_sheet(frames, 25, TEXT)
    sheet = draw_contact_sheet(frames, 25, TEXT, audio)
    assert np.array_equal(np.asarray(sheet)[: plain.height - MARGIN], np.asarray(plain)[: plain.height - MARGIN])
    strip = strip_of(sheet, plain)
    coloured = [np.abs(strip - colour).max(-1) < 12 for colour in WAVES]
    columns, half = [mask.sum(0) for mask in coloured], strip.shape[1] // 2
    assert not columns[0][: half - 2].any() and not columns[1][half + 2 :].any()
    assert columns[0][half + 2 :].min() > 0.8 * WAVE_HEIGHT
    assert 0.1 * WAVE_HEIGHT < np.median(columns[1][: half - 2]) < 0.35 * WAVE_HEIGHT
    assert np.flatnonzero(coloured[0].any(1)).max() < np.flatnonzero(coloured[1].any(1)).min()


def test_equal_channels_are_drawn_once_and_silence_is_a_line():
    frames = noise(9, 64, 64)
    wave = np.sin(np.arange(9000) / 7)[None]
    both = np.concatenate([wave, -wave])
    heights = [draw_contact_sheet(frames, 25, TEXT, audio).height for audio in (wave, wave.repeat(2, 0), both)]
    assert heights[0] == heights[1] == heights[2] - WAVE_HEIGHT - 2
    plain = draw_contact_sheet(frames, 25, TEXT)
    for audio in (np.zeros((2, 9000)), np.zeros((2, 0)), np.full((2, 100), np.nan)):
        strip = strip_of(draw_contact_sheet(frames, 25, TEXT, audio), plain)
        assert not (np.abs(strip - WAVES[0]).max(-1) < 12).any()
