"""The built-in clips: real files, the same every time, repaired when damaged, and they move."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from ltxforge import durable
from ltxforge.dataset.scan import scan
from ltxforge.media import demo
from ltxforge.media.audio import read_audio
from ltxforge.signals import StopRequest


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.render(tmp_path_factory.mktemp("demo") / "builtin" / "shapes")


def test_all_clips_are_samples(shapes: Path) -> None:
    clips = scan(
        shapes, dataset_id="shapes", resolution=(128, 96), frames=17, fps=25.0, emit=lambda _: None, stop=StopRequest()
    )
    assert len(clips) == 6
    assert {clip.verdict for clip in clips} == {"ok"} and not any(clip.warnings for clip in clips)
    assert all(len(clip.starts) == 2 for clip in clips)
    assert {(clip.shape.width, clip.shape.height) for clip in clips} == {(128, 96), (96, 128)}
    assert {round(clip.probe.nominal_fps) for clip in clips} == {25, 50}
    assert len({clip.caption for clip in clips}) == 6


def test_every_clip_moves(shapes: Path) -> None:
    for path in shapes.glob("*.mp4"):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]
        assert (np.abs(frames[-1] - frames[len(frames) // 2]) > 20).mean() > 0.01, path.name


def test_rendering_repeats_itself(shapes: Path, tmp_path: Path) -> None:
    again = demo.render(tmp_path / "shapes")
    for path in shapes.iterdir():
        assert durable.file_digest(path) == durable.file_digest(again / path.name), path.name


def test_reused_when_whole_and_repaired_when_not(tmp_path: Path) -> None:
    folder = demo.render(tmp_path / "shapes")
    clip = folder / "red_disc.mp4"
    born, good = clip.stat().st_mtime_ns, clip.read_bytes()
    demo.render(folder)
    assert clip.stat().st_mtime_ns == born
    clip.write_bytes(good[:-1])
    demo.render(folder)
    assert clip.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_four_clips_sound_and_two_have_no_track(shapes: Path) -> None:
    heard = {path.stem: read_audio(path, 0.0, demo.SECONDS, demo.SAMPLE_RATE) for path in shapes.glob("*.mp4")}
    assert {name for name, sound in heard.items() if sound is None} == {"yellow_star", "two_discs"}
    for name, sound in heard.items():
        assert sound is None or 0.1 < np.abs(sound).max() < 0.9, name


def test_the_triangle_s_tone_rises_from_220_to_880_hz(shapes: Path) -> None:
    sound = read_audio(shapes / "green_triangle.mp4", 0.0, demo.SECONDS, demo.SAMPLE_RATE)[0]
    window = demo.SAMPLE_RATE // 10
    for start, expected in ((0.0, 236.5), (0.95, 550.0), (1.85, 847.0)):  # 220 + 330 t in the middle of each window
        begin = round(start * demo.SAMPLE_RATE)
        spectrum = np.abs(np.fft.rfft(sound[begin : begin + window] * np.hanning(window)))
        assert abs(spectrum.argmax() * demo.SAMPLE_RATE / window - expected) < 25
