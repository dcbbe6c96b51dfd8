"""Probing: facts against files of known content, and a plain reason for every kind of hostile file."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ltxforge.media.decode import decode
from ltxforge.media.probe import ProbeError, probe
from ltxforge.media.supervisor import worker


def refusal(path: Path) -> str:
    with pytest.raises(ProbeError) as caught:
        probe(path)
    assert caught.value.is_certain
    return caught.value.reason


def test_facts_of_a_plain_file(make_video, counter_frames) -> None:
    found = probe(make_video("plain.mp4", counter_frames(30, 64, 48), fps=30, pix_fmt="yuv420p"))
    assert (found.width, found.height, found.coded_width, found.rotation) == (64, 48, 64, 0)
    assert (found.codec, found.pixel_format, found.bit_depth, found.has_audio) == ("h264", "yuv420p", 8, False)
    assert found.timestamps == pytest.approx([n / 30 for n in range(30)], abs=1e-4)
    assert found.duration_seconds == pytest.approx(1.0, abs=1e-3)
    assert found.nominal_fps == pytest.approx(30)
    assert not found.is_hdr and found.warnings == found.picture_warnings == ()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_times_are_in_order_despite_b_frames(suffix: str, make_video, counter_frames) -> None:
    options = {"crf": "10", "bf": "3"}
    found = probe(make_video(f"b.{suffix}", counter_frames(60), options=options, pix_fmt="yuv420p"))
    assert found.timestamps == pytest.approx([n / 25 for n in range(60)], abs=1.1e-3)


def test_variable_rate(make_video, counter_frames) -> None:
    times = [0, 100, 200, 300, 333, 367, 400, 433, 467, 500]
    found = probe(make_video("vfr.mkv", counter_frames(10), milliseconds=times))
    assert found.timestamps == pytest.approx([t / 1000 for t in times])
    assert found.frame_seconds == pytest.approx(0.034, abs=1e-3)


def test_size_is_as_shown(make_video, counter_frames) -> None:
    frames = counter_frames(3, 64, 48)
    turned = probe(make_video("turned.mp4", frames, rotation=90))
    assert (turned.size, turned.rotation, turned.mirrored) == ((48, 64), 270, False)  # stated clockwise
    assert probe(make_video("half.mp4", frames, rotation=180)).rotation == 180
    assert probe(make_video("mirror.mp4", frames, mirror=True)).mirrored
    wide = probe(make_video("wide.mp4", frames, pixel_aspect=Fraction(4, 3)))
    assert (wide.size, wide.pixel_aspect) == ((85, 48), (4, 3))
    both = probe(make_video("both.mp4", frames, pixel_aspect=Fraction(1, 2), rotation=270))
    assert both.size == (96, 64)


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg")])
def test_hdr_is_told(transfer: int, name: str, make_video, counter_frames) -> None:
    colours = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    found = probe(make_video("hdr.mp4", counter_frames(3), pix_fmt="yuv420p10le", colours=colours))
    assert found.is_hdr and found.colour_transfer == name and found.bit_depth == 10


def test_a_gap_is_a_warning_and_an_abyss_a_refusal(make_video, counter_frames) -> None:
    found = probe(make_video("gap.mkv", counter_frames(4), milliseconds=[0, 40, 80, 2580]))
    assert "stands still for 2.5 s at 0.08 s" in found.picture_warnings[0]
    assert "unusable times" in refusal(make_video("abyss.mkv", counter_frames(4), milliseconds=[0, 40, 80, 400_080]))


def test_a_file_cut_short_is_used_as_far_as_it_decodes(make_video) -> None:
    noise = list(np.random.default_rng(1).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8))
    for name, options in (("cut.mkv", None), ("cut.mp4", {"qp": "0", "bf": "2"})):
        path = make_video(name, noise, options=options)
        whole = path.read_bytes()
        if path.suffix == ".mp4":  # the index is written last; copy the file with it in front
            with (
                av.open(str(path)) as source,
                av.open(str(path.with_name("front.mp4")), "w", options={"movflags": "faststart"}) as target,
            ):
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            whole = path.with_name("front.mp4").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found = probe(path)
        assert 15 <= len(found.timestamps) <= 21, name
        assert "truncated or damaged" in found.warnings[0]
        assert len(decode(path, found.timestamps, (64, 64))) == len(found.timestamps)


def test_damage_in_the_middle_ends_the_clip_there_or_is_found_when_decoding(make_video) -> None:
    """A probe does not decode everything; whatever it promises and cannot keep is an error, not a broken picture."""
    noise = list(np.random.default_rng(1).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8))
    path = make_video("hole.mkv", noise, codec="ffv1", pix_fmt="bgr0", options={"slicecrc": "1"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = os.urandom(64)
    path.write_bytes(bytes(data))
    found = probe(path)
    with av.open(str(make_video("good.mkv", noise, codec="ffv1", pix_fmt="bgr0", options={}))) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for index, seconds in enumerate(found.timestamps[:12]):
        assert np.array_equal(decode(path, [seconds], (64, 64))[0], truth[index])


def test_an_index_that_was_never_written(make_video, counter_frames) -> None:
    path = make_video("whole.mp4", counter_frames(30))
    cut = path.with_name("cut.mp4")
    cut.write_bytes(path.read_bytes()[: path.read_bytes().index(b"moov") - 8])
    assert "index is missing" in refusal(cut)


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert refusal(tmp_path / "empty.mp4") == "the file is empty"
    (tmp_path / "text.mp4").write_text("a caption, perhaps", encoding="utf-8")
    assert refusal(tmp_path / "text.mp4") == "not a video file"
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(50_000))
    assert refusal(tmp_path / "noise.mkv") == "not a video file"
    assert "no such file" in refusal(tmp_path / "absent.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "a folder" in refusal(tmp_path / "folder.mp4")


def test_playlists_open_nothing_else(tmp_path: Path, make_video, counter_frames) -> None:
    inner = make_video("inner.ts", counter_frames(30), pix_fmt="yuv420p")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{inner}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist, encoding="utf-8")
    assert refusal(tmp_path / "list.mp4") == "not a video file"
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{inner.name}'\n", encoding="utf-8")
    assert refusal(tmp_path / "concat.mp4") == "not a video file"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file kinds")
def test_special_files_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "named pipe" in refusal(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    assert "device" in refusal(tmp_path / "device.mp4")
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    assert "symbolic links" in refusal(tmp_path / "a.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.mp4"))
        assert "socket" in refusal(tmp_path / "s.mp4")


def write_audio(path: Path, cover: bool) -> None:
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        if cover:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            container.mux(picture.encode(frame) + picture.encode(None))
        container.mux(audio.encode(sound) + audio.encode(None))


def test_sound_without_picture(tmp_path: Path) -> None:
    write_audio(tmp_path / "sound.mp4", cover=False)
    assert refusal(tmp_path / "sound.mp4") == "no picture in it (audio only)"
    write_audio(tmp_path / "album.mp4", cover=True)
    with av.open(str(tmp_path / "album.mp4")) as container:  # the trap is set: ffmpeg does call it video
        assert len(container.streams.video) == 1
    assert refusal(tmp_path / "album.mp4") == "no picture in it (audio only, with a cover image)"


def test_huge_pictures(make_video) -> None:
    path = make_video("huge.mkv", [np.zeros((16, 8208, 3), np.uint8)], codec="ffv1", pix_fmt="bgr0", options={})
    assert refusal(path).startswith("too large: 8208x16, and the limit is 8192 a side")


def test_names_that_look_like_something_else(tmp_path: Path, make_video, counter_frames, monkeypatch) -> None:
    data = make_video("plain.mp4", counter_frames(3)).read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip.mp4", "-i.mp4", "a b%03d.mp4", "ünï😀.mp4"):
        Path(name).write_bytes(data)
        assert len(probe(Path(name)).timestamps) == 3


def test_titles_in_other_encodings_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "title.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "CAFXXXX"
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")) + stream.encode(None))
    data = path.read_bytes()
    assert b"CAFXXXX" in data
    path.write_bytes(data.replace(b"CAFXXXX", b"CAF\xe9\xe8\xff\xfe"))
    assert len(probe(path).timestamps) == 1


def test_files_stay_as_they_were(make_video, counter_frames) -> None:
    path = make_video("mine.mp4", counter_frames(30))
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    decode(path, probe(path).timestamps, (32, 32))
    assert before == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)


def test_one_worker_serves_all(make_video, counter_frames, tmp_path: Path) -> None:
    path = make_video("mine.mp4", counter_frames(3))
    probe(path)
    served_by = worker().process_id
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    refusal(tmp_path / "text.mp4")
    probe(path)
    assert worker().process_id == served_by
