"""Written video: read back by PyAV, right in colour, rate and layout; whole or absent."""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ltxforge.media import write
from ltxforge.media.audio import read_audio
from ltxforge.media.probe import probe
from ltxforge.media.write import exact_rate, write_video

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is the oracle")


def smooth(count: int, width: int = 96, height: int = 64) -> np.ndarray:
    n, y, x = np.mgrid[0:count, 0:height, 0:width]
    channels = [128 + 100 * np.sin((x + 3 * n) / 20), 128 + 100 * np.cos(y / 15), 128 + 80 * np.sin((x + y + n) / 30)]
    return np.stack(channels, -1).astype(np.uint8)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    frames = smooth(17)
    write_video(tmp_path / "deep" / "sample.mp4", frames, 25.0)
    with av.open(str(tmp_path / "deep" / "sample.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.frames, stream.average_rate) == ("h264", "yuv420p", 17, 25)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        back = np.stack(
            [f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in container.decode(stream)]
        ).astype(float)
    error = np.mean((back - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 36


def test_flat_colours_keep_within_a_step(tmp_path: Path) -> None:
    for colour in ((200, 60, 30), (20, 180, 220), (0, 0, 0), (255, 255, 255)):
        write_video(tmp_path / "flat.mp4", np.full((3, 64, 64, 3), colour, np.uint8), 24)
        with av.open(str(tmp_path / "flat.mp4")) as container:
            frame = next(container.decode(video=0))
        y, cb, cr = (float(np.frombuffer(bytes(plane), np.uint8)[0]) for plane in frame.planes)
        red, green, blue = (channel / 255 for channel in colour)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
        assert np.abs(np.array([y, cb, cr]) - expected).max() <= 1.6, colour


def test_the_index_comes_first(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth(5), 25)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (25.0, Fraction(25)), (24, Fraction(24)), (29.97, Fraction(30000, 1001)), (23.976, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)), (12.5, Fraction(25, 2)), (30.0, Fraction(30)), (7.3, Fraction(73, 10)),
        (Fraction(30000, 1001), Fraction(30000, 1001)), (1.0, Fraction(1)),
    ],
)  # fmt: skip
def test_rates(fps: float | Fraction, rate: Fraction, tmp_path: Path) -> None:
    assert exact_rate(fps) == rate
    write_video(tmp_path / "rate.mp4", smooth(4, 32, 32), fps)
    assert probe(tmp_path / "rate.mp4").timestamps == pytest.approx([n / float(rate) for n in range(4)], abs=2e-4)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    write_video(tmp_path / "a.mp4", smooth(5), 25)
    before = (tmp_path / "a.mp4").read_bytes()

    def fail(*_arguments: object) -> None:
        raise RuntimeError("stopped in the middle")

    monkeypatch.setattr(write, "_yuv", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_video(tmp_path / "a.mp4", smooth(9), 25)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def chord(seconds: float, rate: int) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 660 * time + 1)])


@pytest.mark.parametrize("rate", [16000, 24000, 44100, 48000])
@pytest.mark.parametrize(("count", "fps"), [(9, 25.0), (49, 24.0), (97, 29.97), (1, 25.0), (17, 60.0)])
def test_sound_begins_and_ends_with_the_picture(count: int, fps: float, rate: int, tmp_path: Path) -> None:
    """Both as players see it, by the index, and as it decodes; whether too much or too little sound was given."""
    path, seconds = tmp_path / "a.mp4", count / float(exact_rate(fps))
    for given in (seconds + 0.5, 0.8 * seconds):
        sound = chord(given, rate).astype(np.float32)
        write_video(path, smooth(count, 32, 32), fps, audio=sound, sample_rate=rate, threads=1)
        with av.open(str(path)) as container:
            picture, track = container.streams.video[0], container.streams.audio[0]
            ends = [float((s.start_time + s.duration) * s.time_base) for s in (picture, track)]
            assert (track.codec_context.name, track.codec_context.layout.name, track.rate) == ("aac", "stereo", rate)
            assert abs(ends[0] - ends[1]) <= 1 / fps and abs(ends[1] - seconds) <= 1 / fps
        found = read_audio(path, 0.0, seconds, rate)
        kept = min(found.shape[1], sound.shape[1])
        # AAC is lossy, most so where the wave sets in or breaks off.
        error = np.abs(found[:, :kept] - sound[:, :kept])
        assert error[:, 1024:-1024].max(initial=0) < 0.03 and error[:, :1024].max() < 0.1
        assert np.abs(found[:, kept + 2048 :]).max(initial=0) < 0.01


@needs_ffmpeg
def test_ffprobe_sees_tracks_of_one_length(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth(49), 24, audio=chord(3.0, 48000), sample_rate=48000)
    wanted = ["-show_entries", "stream=start_time,duration", "-of", "csv=p=0"]
    told = subprocess.run(["ffprobe", "-v", "error", *wanted, tmp_path / "a.mp4"], capture_output=True, text=True)
    starts, durations = zip(*(map(float, line.split(",")) for line in told.stdout.split()), strict=True)
    assert starts == (0.0, 0.0)
    assert durations[0] == pytest.approx(49 / 24, abs=1e-3) and abs(durations[0] - durations[1]) <= 1 / 24


def test_one_channel_becomes_two_and_loud_sound_is_bounded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth(25), 25, audio=4 * chord(1.0, 48000)[:1], sample_rate=48000)
    found = read_audio(tmp_path / "a.mp4", 0.0, 1.0, 48000)
    assert np.abs(found[0] - found[1]).max() < 0.05 and 0.9 < np.abs(found).max() < 1.3


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, smooth(9), 25, audio=chord(0.3, 16000), sample_rate=16000, threads=1)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("audio", "rate"),
    [(np.zeros((6, 100)), 48000), (np.zeros(100), 48000), (np.zeros((2, 100), np.int16), 48000),
     (np.zeros((2, 100)), 17000)],
)  # fmt: skip
def test_impossible_sound(audio: np.ndarray, rate: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"audio must|AAC knows"):
        write_video(tmp_path / "a.mp4", smooth(5), 25, audio=audio, sample_rate=rate)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("shape", [(3, 33, 32, 3), (3, 32, 33, 3), (0, 32, 32, 3), (3, 32, 32, 4)])
def test_impossible_frames(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames must|even sides"):
        write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), 25)
