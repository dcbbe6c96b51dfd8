"""Decoding: the right frame for every time, orientation, pixel aspect, colour, and what happens at the end."""

from __future__ import annotations

import bisect
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ltxforge.media.decode import DecodeError, decode, read_image

QUADRANTS = {(0, 0): (220, 30, 30), (0, 1): (30, 200, 40), (1, 0): (40, 60, 220), (1, 1): (230, 220, 60)}


def quadrants(width: int, height: int) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for (row, column), colour in QUADRANTS.items():
        rows = slice(0, height // 2) if row == 0 else slice(height // 2, None)
        columns = slice(0, width // 2) if column == 0 else slice(width // 2, None)
        picture[rows, columns] = colour
    return picture


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_60_fps_at_25_keeps_its_speed(suffix: str, make_video, counter_frames, index_of) -> None:
    path = make_video(f"counter.{suffix}", counter_frames(120), fps=60, pix_fmt="yuv420p")
    frames = decode(path, [n / 25 for n in range(49)], (32, 32))
    assert frames.shape == (49, 32, 32, 3) and frames.dtype == np.uint8
    assert index_of(frames) == [n * 60 // 25 for n in range(49)]


def test_12_fps_at_25_repeats_frames(make_video, counter_frames, index_of) -> None:
    path = make_video("slow.mp4", counter_frames(24), fps=12)
    frames = decode(path, [n / 25 for n in range(40)], (32, 32))
    assert index_of(frames) == [n * 12 // 25 for n in range(40)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_follows_timestamps(suffix: str, make_video, counter_frames, index_of) -> None:
    times = [0, 100, 200, 300, 333, 367, 400, 900, 917, 933, 950, 1200]
    path = make_video(f"vfr.{suffix}", counter_frames(len(times)), milliseconds=times)
    wanted = [n / 24 for n in range(29)]
    expected = [bisect.bisect_right([t / 1000 for t in times], t + 1e-3) - 1 for t in wanted]
    assert index_of(decode(path, wanted, (32, 32))) == expected


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_first_frame_counts_as_time_zero(suffix: str, make_video, counter_frames, index_of) -> None:
    path = make_video(f"late.{suffix}", counter_frames(10), milliseconds=[5000 + 40 * n for n in range(10)])
    assert index_of(decode(path, [0.0, 0.12, 0.36], (32, 32))) == [0, 3, 9]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_far_windows_are_found_by_seeking(suffix: str, make_video, counter_frames, index_of) -> None:
    options = {"crf": "4", "preset": "fast", "g": "25", "bf": "3", "x264-params": "open-gop=1"}
    path = make_video(f"long.{suffix}", counter_frames(120), fps=10, options=options, pix_fmt="yuv420p")
    for start in (2.05, 4.95, 5.0, 7.31, 11.0):
        wanted = [start + n / 10 for n in range(9)]
        assert index_of(decode(path, wanted, (32, 32))) == [int(10 * t + 0.01) for t in wanted]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_and_mirroring(degrees: int, mirror: bool, make_video) -> None:
    stored = quadrants(64, 32)
    path = make_video("turned.mp4", [stored] * 3, rotation=degrees, mirror=mirror)
    expected = np.rot90(stored, degrees // 90)  # both count counter-clockwise
    expected = expected[:, ::-1] if mirror else expected
    size = expected.shape[1], expected.shape[0]
    shown = decode(path, [0.0], size)[0]
    assert np.abs(shown.astype(int) - expected).max() <= 3


def test_pixel_aspect_is_applied_before_cropping(make_video) -> None:
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:, 16:48] = 255  # shown 128 wide, the white part is 64 wide
    path = make_video("wide.mkv", [stored] * 2, pixel_aspect=Fraction(2, 1))
    assert decode(path, [0.0], (48, 48))[0].min() > 250  # the middle 48 of 128 are white
    whole = decode(path, [0.0], (128, 48))[0]
    assert whole[:, :30].max() < 5 and whole[:, 34:94].min() > 250 and whole[:, 98:].max() < 5


@pytest.mark.parametrize("size", [(33, 27), (32, 64), (96, 32)])
def test_odd_sizes_cover_and_crop(size: tuple[int, int], make_video) -> None:
    path = make_video("odd.mkv", [quadrants(51, 37)] * 2, codec="ffv1", options={})
    shown = decode(path, [0.0], size)[0]
    assert shown.shape == (size[1], size[0], 3)
    for (row, column), colour in QUADRANTS.items():
        assert np.abs(shown[-row, -column].astype(int) - colour).max() <= 3


def yuv_frame(rgb: tuple[int, int, int], kr: float, kb: float, full: bool, bits: int, size: tuple[int, int]):
    """A flat frame by the definition in ITU-R BT.601/709/2020, in float64."""
    red, green, blue = (channel / 255 for channel in rgb)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    if full:
        values = [y * top, cb * top + 2 ** (bits - 1), cr * top + 2 ** (bits - 1)]
    else:
        values = [(219 * y + 16) * scale, (224 * cb + 128) * scale, (224 * cr + 128) * scale]
    frame = av.VideoFrame(*size, "yuv420p" if bits == 8 else "yuv420p10le")
    for plane, value in zip(frame.planes, values, strict=True):
        number = round(value)
        plane.update(
            (number.to_bytes(1 if bits == 8 else 2, "little")) * (plane.buffer_size // (1 if bits == 8 else 2))
        )
    return frame


MATRICES = {"bt709": (1, 0.2126, 0.0722), "bt601": (6, 0.299, 0.114), "bt2020": (9, 0.2627, 0.0593)}


@pytest.mark.parametrize("rgb", [(200, 60, 30), (20, 180, 220), (255, 255, 255)])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", list(MATRICES))
def test_colours_survive(matrix: str, full: bool, bits: int, rgb: tuple[int, int, int], make_video) -> None:
    number, kr, kb = MATRICES[matrix]
    frame = yuv_frame(rgb, kr, kb, full, bits, (64, 64))
    path = make_video(
        "colour.mkv",
        [frame],
        codec="libx264",
        pix_fmt=frame.format.name,
        colours={"colorspace": number, "color_range": 2 if full else 1},
    )
    # One 8-bit step of chroma is up to two steps of red or blue.
    assert np.abs(decode(path, [0.0], (32, 32))[0].astype(int) - rgb).max() <= (2 if bits == 8 else 1)


@pytest.mark.parametrize(("height", "matrix"), [(576, "bt601"), (720, "bt709")])
def test_unspecified_colours_are_709_from_720_lines_on(height: int, matrix: str, make_video) -> None:
    _, kr, kb = MATRICES[matrix]
    frame = yuv_frame((200, 60, 30), kr, kb, False, 8, (64, height))
    path = make_video("untagged.mkv", [frame], pix_fmt="yuv420p")
    assert np.abs(decode(path, [0.0], (32, 32))[0].astype(int) - (200, 60, 30)).max() <= 2


def test_resizing_is_antialiased(make_video) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8)
    path = make_video("noise.mkv", [noise], codec="ffv1", pix_fmt="bgr0", options={})
    ours = decode(path, [0.0], (48, 32))[0].astype(float)
    pillow = np.asarray(Image.fromarray(noise).resize((48, 32), Image.Resampling.BICUBIC)).astype(float)
    point = noise[2::4, 2::4].astype(float)
    assert np.abs(ours - pillow).mean() < 3 < 20 < np.abs(ours - point).mean()


def test_beyond_the_end_is_an_error_with_the_good_count(make_video, counter_frames) -> None:
    path = make_video("short.mp4", counter_frames(10))
    assert len(decode(path, [0.36, 0.38], (32, 32))) == 2  # the last frame is shown until 0.40
    with pytest.raises(DecodeError, match="wanted") as caught:
        decode(path, [0.0, 0.2, 0.36, 0.6], (32, 32))
    assert caught.value.good == 3


def test_a_cut_file_gives_frames_until_there(make_video) -> None:
    rng = np.random.default_rng(1)
    noise = list(rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8))  # every frame takes as many bytes
    path = make_video("cut.mkv", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DecodeError) as caught:
        decode(path, [n / 25 for n in range(40)], (64, 64))
    assert 18 <= caught.value.good <= 21
    assert len(decode(path, [n / 25 for n in range(18)], (64, 64))) == 18


def test_times_must_make_sense(make_video, counter_frames) -> None:
    path = make_video("any.mp4", counter_frames(3))
    for times in ([], [0.08, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="timestamps"):
            decode(path, times, (32, 32))


def test_exif_orientation_of_images(tmp_path: Path) -> None:
    stored = quadrants(64, 32)
    for number in range(1, 9):
        path = tmp_path / f"{number}.png"
        exif = Image.Exif()
        exif[0x0112] = number
        Image.fromarray(stored).save(path, exif=exif)
        turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
        turned |= {5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1), 8: np.rot90(stored)}
        turned[7] = np.rot90(stored.swapaxes(0, 1), 2)
        expected = turned[number]
        assert np.array_equal(read_image(path, (expected.shape[1], expected.shape[0])), expected), number


def test_images_and_video_share_the_crop(tmp_path: Path, make_video) -> None:
    # Smooth, so that only geometry and not the two programs' filters can differ.
    y, x = np.mgrid[0:120, 0:200]
    picture = np.stack([x * 255 // 199, y * 255 // 119, (x + y) * 255 // 318], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "still.png")
    video = make_video("still.mkv", [picture], codec="ffv1", pix_fmt="bgr0", options={})
    for size in ((64, 96), (128, 32), (96, 96)):
        still, frame = read_image(tmp_path / "still.png", size), decode(video, [0.0], size)[0]
        assert np.abs(still.astype(int) - frame).max() <= 2


def test_broken_images_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    Image.fromarray(quadrants(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    for name in ("text.png", "half.png", "absent.png"):
        with pytest.raises(DecodeError):
            read_image(tmp_path / name, (32, 32))


def test_transparency_shows_black(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert abs(int(read_image(tmp_path / "half.png", (32, 32))[0, 0, 0]) - 128) <= 1


def test_real_clips_decode_alike_with_and_without_seeking(test_data: Path) -> None:
    for name in ("bee.mp4", "crystal.webm", "sign_walk.mkv", "city_night.mpg"):
        path = test_data / "clips" / name
        far = [2.5 + n / 25 for n in range(5)]
        assert np.array_equal(decode(path, far, (64, 64)), decode(path, [0.0, *far], (64, 64))[1:]), name


def test_a_real_window_equals_plain_pyav(test_data: Path) -> None:
    path = test_data / "clips" / "rabbit320.mp4"
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = [3.0 + n / 25 for n in range(17)]
    ours = decode(path, wanted, (320, 240))
    for picture, seconds in zip(ours, wanted, strict=True):
        theirs = frames[int(seconds * 30 + 0.03)]
        # PyAV's default conversion interpolates chroma less carefully.
        assert np.abs(picture.astype(int) - theirs).mean() < 1.5
