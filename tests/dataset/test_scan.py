"""Scanning: every file gets its verdict, nothing of the user's changes, and what was found is remembered."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from ltxforge import digests
from ltxforge.dataset import scan as scanning
from ltxforge.dataset.scan import Clip, enforce_max_rejected, scan
from ltxforge.errors import DataError, PlanError, RunError, Stopped
from ltxforge.events import ClipJudged, Event, Note, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.media import demo
from ltxforge.media.probe import ProbeError
from ltxforge.media.write import write_video
from ltxforge.signals import StopRequest


def look(folder: Path, events: list[Event] | None = None, **changes: object) -> dict[str, Clip]:
    rules = {"resolution": (128, 96), "frames": 17, "fps": 25.0, "stop": StopRequest()} | changes
    emit = (lambda _: None) if events is None else events.append
    return {clip.name: clip for clip in scan(folder, dataset_id="test", emit=emit, **rules)}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.render(tmp_path_factory.mktemp("demo") / "shapes")


@pytest.fixture
def folder(rendered: Path, tmp_path: Path) -> Path:
    """Two good clips."""
    for name in ("red_disc", "blue_square"):
        for suffix in (".mp4", ".txt"):
            (tmp_path / "data").mkdir(exist_ok=True)
            shutil.copy(rendered / (name + suffix), tmp_path / "data" / (name + suffix))
    return tmp_path / "data"


def test_a_good_clip_has_all_facts(folder: Path) -> None:
    clip = look(folder)["red_disc.mp4"]
    assert (clip.verdict, clip.reason, clip.warnings) == ("ok", "", ())
    assert clip.digest == hashlib.sha256(clip.path.read_bytes()).hexdigest()
    assert clip.caption.startswith("A red disc") and clip.probe.size == (128, 96)
    assert str(clip.shape) == "128x96x17" and clip.starts == (0.0, 1.32)


def test_events_tell_every_verdict(folder: Path) -> None:
    (folder / "bad.mp4").touch()
    (folder / "bad.txt").write_text("words", encoding="utf-8")
    events: list[Event] = []
    look(folder, events)
    assert events[0] == PhaseStarted("scan", 3, "test")
    assert isinstance(events[-1], PhaseEnded)
    assert [event.done for event in events if isinstance(event, PhaseAdvanced)] == [1, 2, 3]
    judged = {Path(event.path).name: event for event in events if isinstance(event, ClipJudged)}
    assert (judged["bad.mp4"].verdict, judged["bad.mp4"].reason) == ("rejected", "the file is empty")
    assert (judged["red_disc.mp4"].verdict, judged["red_disc.mp4"].samples) == ("ok", 2)


def test_which_files_are_looked_at(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("deep/er/UPPER.MP4", ".hidden/a.mp4", ".b.mp4", "._red_disc.mp4", "notes.pdf", "image.png"):
        shutil.copy(folder / "red_disc.mp4", folder / name)
    assert list(look(folder)) == ["blue_square.mp4", "deep/er/UPPER.MP4", "red_disc.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "red_disc.mp4", tmp_path / "elsewhere.mp4")
    (folder / "red_disc.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (folder / "circle").symlink_to(folder)
    (folder / "broken.mp4").symlink_to(tmp_path / "absent.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    clips = look(folder)
    assert {name: clip.verdict for name, clip in clips.items()} == {
        "blue_square.mp4": "ok", "broken.mp4": "rejected", "loop.mp4": "rejected", "pipe.mp4": "rejected",
        "red_disc.mp4": "ok",
    }  # fmt: skip
    assert "named pipe" in clips["pipe.mp4"].reason


def test_the_recipes_limits_drop(folder: Path) -> None:
    assert look(folder, frames=49)["red_disc.mp4"].verdict == "ok"
    clip = look(folder, frames=57)["red_disc.mp4"]
    assert (clip.verdict, clip.shape, clip.starts) == ("dropped", None, ())
    assert clip.reason == "too short: 2.00 s (50 frames), and 57 frames at 25 fps need 2.28 s"
    clip = look(folder, resolution=(512, 384))["red_disc.mp4"]
    assert clip.verdict == "dropped" and clip.reason.startswith("too small: 128x96 must be enlarged 4.00 times")
    assert look(folder, resolution=(512, 384), max_upscale=4.0)["red_disc.mp4"].verdict == "ok"


def test_the_second_of_two_equal_clips_is_dropped(folder: Path) -> None:
    for suffix in (".mp4", ".txt"):
        shutil.copy(folder / f"red_disc{suffix}", folder / f"zz_copy{suffix}")
        shutil.copy(folder / f"red_disc{suffix}", folder / f"zz_other{suffix}")
    (folder / "zz_other.txt").write_text("The same picture in other words.", encoding="utf-8")
    clips = look(folder)
    assert (clips["zz_copy.mp4"].verdict, clips["zz_copy.mp4"].starts) == ("dropped", ())
    assert "red_disc.mp4" in clips["zz_copy.mp4"].reason
    assert clips["zz_other.mp4"].verdict == "ok"


def test_illegal_frames_are_our_mistake(folder: Path) -> None:
    with pytest.raises(ValueError, match="frame count"):
        look(folder, frames=18)


def test_no_folder_and_no_clips(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        look(tmp_path / "absent")
    with pytest.raises(PlanError, match=r"(?s)no clips.*\.webm"):
        look(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="is no folder"):
        look(tmp_path / "file")


def test_a_stop_is_honoured_between_clips(folder: Path, tmp_path: Path) -> None:
    stop = StopRequest()

    def stop_after_one(event: Event) -> None:
        if isinstance(event, PhaseAdvanced):
            stop.request()

    with pytest.raises(Stopped):
        scan(
            folder, dataset_id="test", resolution=(128, 96), frames=17, fps=25.0, emit=stop_after_one, stop=stop,
            memo_directory=tmp_path / "memo",
        )  # fmt: skip
    assert len(list((tmp_path / "memo" / "probes").iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names of arbitrary bytes")
def test_names_that_cannot_be_written_down(folder: Path) -> None:
    shutil.copy(folder / "red_disc.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    shutil.copy(folder / "red_disc.mp4", folder / "\x1b[31mred.mp4")
    shutil.copy(folder / "red_disc.txt", folder / "\x1b[31mred.txt")
    events: list[Event] = []
    clips = look(folder, events)
    assert clips["caf\\udce9.mp4"].verdict == "rejected"
    assert clips["\\x1b[31mred.mp4"].verdict == "ok"
    assert all(event.path.isprintable() for event in events if isinstance(event, ClipJudged))


def age(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))


def test_what_was_found_is_remembered(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (folder / "bad.mp4").write_text("no video", encoding="utf-8")
    (folder / "bad.txt").write_text("words", encoding="utf-8")
    age(folder)
    memo = tmp_path / "memo"
    first = look(folder, memo_directory=memo)

    def must_not(*_arguments: object) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "probe", must_not)
        patch.setattr(digests, "file_digest", must_not)
        assert look(folder, memo_directory=memo) == first
    # Another content under the old name and size is seen by its time.
    data = bytearray((folder / "red_disc.mp4").read_bytes())
    data[-1] ^= 1
    (folder / "red_disc.mp4").write_bytes(bytes(data))
    assert look(folder, memo_directory=memo)["red_disc.mp4"].digest != first["red_disc.mp4"].digest
    # A damaged memo counts as none.
    for path in [*memo.glob("*.json"), *memo.glob("probes/*")]:
        path.write_text('{"probe": {"width": ', encoding="utf-8")
    assert look(folder, memo_directory=memo)["blue_square.mp4"] == first["blue_square.mp4"]


def test_a_dead_worker_is_not_remembered(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def die(_path: Path) -> None:
        raise ProbeError("the decoder crashed on it", is_certain=False)

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "probe", die)
        assert look(folder, memo_directory=tmp_path / "memo")["red_disc.mp4"].verdict == "rejected"
    assert look(folder, memo_directory=tmp_path / "memo")["red_disc.mp4"].verdict == "ok"


def test_an_unwritable_memo_is_not_the_clips_fault(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "memo").mkdir()
    (tmp_path / "memo" / "probes").touch()  # a file where a folder must be
    with pytest.raises(RunError, match="cannot write into the cache"):
        look(folder, memo_directory=tmp_path / "memo")


# Of the built-in clips red_disc and blue_square have a track of their own, two_discs has none.


@pytest.fixture
def sounds(rendered: Path, folder: Path) -> Path:
    """Two good clips with sound, one without."""
    for suffix in (".mp4", ".txt"):
        shutil.copy(rendered / f"two_discs{suffix}", folder / f"two_discs{suffix}")
    return folder


def test_sound_is_looked_for_only_where_it_is_trained(sounds: Path) -> None:
    (sounds / "red_disc.wav").write_text("no sound", encoding="utf-8")
    assert {(clip.verdict, clip.sound) for clip in look(sounds).values()} == {("ok", "")}


def test_a_file_beside_the_clip_wins_over_its_own_track(sounds: Path, make_wav) -> None:
    beside = make_wav(sounds / "red_disc.wav", [(2.0, 0.5)])
    digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    for modalities in ("both", "audio"):
        clips = look(sounds, modalities=modalities)
        assert clips["red_disc.mp4"].sound == digest and clips["blue_square.mp4"].sound == "own"
        assert clips["red_disc.mp4"].verdict == clips["blue_square.mp4"].verdict == "ok"


def test_a_clip_without_sound_is_used_or_dropped(sounds: Path) -> None:
    events: list[Event] = []
    clip = look(sounds, events, modalities="both")["two_discs.mp4"]
    assert (clip.verdict, clip.sound, clip.warnings) == ("ok", "", ())
    assert [event.text for event in events if isinstance(event, Note)] == [
        "clips without sound, which train their picture alone: 1 of 3"
    ]
    clip = look(sounds, modalities="audio")["two_discs.mp4"]
    assert clip.verdict == "dropped" and clip.reason.startswith("no sound")


def test_a_broken_file_beside_a_clip_rejects_it(sounds: Path, make_wav) -> None:
    (sounds / "red_disc.flac").write_text("no sound", encoding="utf-8")
    (sounds / "blue_square.wav").touch()
    make_wav(sounds / "two_discs.wav", [(0.0, 0.0)])
    for modalities in ("both", "audio"):
        clips = look(sounds, modalities=modalities)
        assert {clip.verdict for clip in clips.values()} == {"rejected"}
        for name, words in (
            ("red_disc.flac", "repair it"),
            ("blue_square.wav", "empty"),
            ("two_discs.wav", "no sound"),
        ):
            reason = clips[f"{Path(name).stem}.mp4"].reason
            assert name in reason and words in reason and "take it away" in reason, reason


def test_a_track_that_cannot_be_decoded(sounds: Path) -> None:
    path = sounds / "red_disc.mp4"
    content = path.read_bytes()
    assert content.count(b"mp4a") == content.count(b"esds") == 1  # both name its codec
    path.write_bytes(content.replace(b"mp4a", b"zzzz").replace(b"esds", b"free"))
    clip = look(sounds, modalities="both")["red_disc.mp4"]
    assert (clip.verdict, clip.sound) == ("ok", "") and "codec is unknown" in clip.warnings[0]
    clip = look(sounds, modalities="audio")["red_disc.mp4"]
    assert clip.verdict == "rejected" and "codec is unknown" in clip.reason


def test_the_same_picture_with_another_sound_is_another_clip(sounds: Path, make_wav) -> None:
    for suffix in (".mp4", ".txt"):
        shutil.copy(sounds / f"red_disc{suffix}", sounds / f"zz_other{suffix}")
    make_wav(sounds / "zz_other.wav", [(2.0, 0.5)])
    assert look(sounds)["zz_other.mp4"].verdict == "dropped"
    assert look(sounds, modalities="both")["zz_other.mp4"].verdict == "ok"


def test_sound_alone_asks_nothing_of_the_picture(sounds: Path) -> None:
    large = {"resolution": (1024, 512), "buckets": "aspect"}
    assert look(sounds, **large)["red_disc.mp4"].verdict == "dropped"
    clips = look(sounds, modalities="audio", **large)
    assert (clips["red_disc.mp4"].verdict, str(clips["red_disc.mp4"].shape)) == ("ok", "1024x512x17")
    assert look(sounds, modalities="audio", frames=57)["red_disc.mp4"].reason.startswith("too short")


def test_a_sound_file_that_passed_is_not_tried_again(sounds: Path, tmp_path: Path, make_wav, monkeypatch) -> None:
    beside = make_wav(sounds / "red_disc.wav", [(2.0, 0.5)])
    age(sounds)
    rules = {"memo_directory": tmp_path / "memo", "modalities": "both"}
    first = look(sounds, **rules)

    def must_not(*_arguments: object) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "probe_sound", must_not)
        patch.setattr(digests, "file_digest", must_not)
        assert look(sounds, **rules) == first
    beside.write_text("no sound any more", encoding="utf-8")
    assert look(sounds, **rules)["red_disc.mp4"].verdict == "rejected"


def test_a_sound_of_another_length_is_told_and_counted(sounds: Path, make_wav) -> None:
    """The clips are 2.0 s long, their windows start at 0 and 1.32 s."""
    for seconds, words, heard in (
        (0.2, ("the sound is 0.2 s, the clip 2.0 s: silent from there on",), [True, False]),
        (1.7, ("the sound is 1.7 s, the clip 2.0 s: silent from there on",), [True, True]),
        (1.85, (), [True, True]),
        (2.9, (), [True, True]),
        (9.0, ("the sound is 9.0 s, the clip 2.0 s: the rest of the sound is not used",), [True, True]),
    ):
        make_wav(sounds / "red_disc.wav", [(seconds, 0.5)])
        clip = look(sounds, modalities="both")["red_disc.mp4"]
        assert (clip.verdict, clip.warnings, clip.starts) == ("ok", words, (0.0, 1.32)), seconds
        assert [bool(clip.sound_at(start)) for start in clip.starts] == heard
        clip = look(sounds, modalities="audio")["red_disc.mp4"]
        assert clip.warnings == words and clip.starts == (0.0, 1.32)[: sum(heard)]
    assert look(sounds)["red_disc.mp4"].warnings == ()


def test_a_track_of_its_own_may_be_too_short(sounds: Path) -> None:
    path = sounds / "red_disc.mp4"
    write_video(path, np.zeros((50, 96, 128, 3), np.uint8), 25)
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".mov")), "w") as target:
        picture, sound = target.add_stream_from_template(source.streams.video[0]), target.add_stream("pcm_s16le", 16000)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                target.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.full((1, 16000), 9000, np.int16), "s16", "mono")
        frame.sample_rate = 16000
        target.mux([*sound.encode(frame), *sound.encode(None)])
    path.unlink()
    clip = look(sounds, modalities="both")["red_disc.mov"]
    assert clip.warnings == ("the sound is 1.0 s, the clip 2.0 s: silent from there on",)
    assert [clip.sound_at(start) for start in clip.starts] == ["own", ""]


def test_damage_and_rivals_of_a_sound_file_are_told(sounds: Path, make_wav) -> None:
    beside = make_wav(sounds / "red_disc.wav", [(2.0, 0.5)])
    (sounds / "red_disc.flac").write_text("whatever", encoding="utf-8")
    beside.write_bytes(beside.read_bytes()[:64044])  # half of it
    clip = look(sounds, modalities="both")["red_disc.mp4"]
    assert clip.verdict == "ok" and clip.warnings == (
        "red_disc.flac is not used, red_disc.wav is",
        "red_disc.wav: its sound is cut short: it ends at 1.00 s, and its header promises 2.00 s; "
        "the sound of windows there is left out",
    )
    assert clip.sound_seconds == pytest.approx(1.0) and clip.sound_at(1.32) == ""
    beside.write_bytes(os.urandom(3000))
    reason = look(sounds, modalities="both")["red_disc.mp4"].reason
    assert "red_disc.wav beside it cannot be used" in reason and "video" not in reason


def test_sound_alone_is_a_clip_where_sound_alone_is_trained(sounds: Path, rendered: Path, make_wav) -> None:
    """Windows of 17 frames at 25 fps, 0.68 s each, from sound of 1.5 s: they spread over all of it."""
    make_wav(sounds / "bell.wav", [(1.5, 0.5)])
    make_wav(sounds / "short.wav", [(0.5, 0.5)])
    make_wav(sounds / "red_disc.wav", [(2.0, 0.5)])  # beside a clip
    make_wav(sounds / "wordless.wav", [(2.0, 0.5)])
    with av.open(str(rendered / "red_disc.mp4")) as source, av.open(str(sounds / "film.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    for name in ("bell", "short", "film"):
        (sounds / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")
    clips = look(sounds, modalities="audio", resolution=(1024, 512))
    assert set(clips) == {"bell.wav", "blue_square.mp4", "film.mp4", "red_disc.mp4", "short.wav", "two_discs.mp4",
                          "wordless.wav"}  # fmt: skip
    bell, film = clips["bell.wav"], clips["film.mp4"]
    assert (bell.verdict, bell.sound, bell.caption, bell.warnings) == ("ok", "own", "a bell", ())
    assert (str(bell.shape), bell.starts, bell.sound_seconds) == ("1024x512x17", (0.0, 0.82), 1.5)
    assert (film.verdict, film.sound, len(film.starts)) == ("ok", "own", 2)
    assert clips["short.wav"].reason == "too short: 0.50 s of sound, and 17 frames at 25 fps need 0.68 s"
    assert clips["wordless.wav"].reason.startswith("no caption")
    for modalities in ("both", "video"):
        clips = look(sounds, modalities=modalities)
        assert {name for name in clips if name.endswith(".wav")} == {"bell.wav", "short.wav"}, "those with a caption"
        assert clips["bell.wav"].verdict == "dropped" and 'training.modalities = "audio"' in clips["bell.wav"].reason
        assert clips["film.mp4"].verdict == "rejected" and "no picture" in clips["film.mp4"].reason


def test_sound_files_of_one_name_are_one_clip(tmp_path: Path, make_wav) -> None:
    make_wav(tmp_path / "bell.wav", [(1.0, 0.5)])
    make_wav(tmp_path / "bell.wav.wav", [(1.0, 0.5)]).rename(tmp_path / "bell.flac")
    (tmp_path / "bell.txt").write_text("a bell", encoding="utf-8")
    clips = look(tmp_path, modalities="audio")
    assert list(clips) == ["bell.wav"] and clips["bell.wav"].warnings == ("bell.flac is not used, bell.wav is",)
    (tmp_path / "bell.wav").write_bytes(os.urandom(2000))
    assert look(tmp_path, modalities="audio")["bell.wav"].verdict == "rejected"


def test_sound_alone_is_told_nothing_of_the_picture(sounds: Path) -> None:
    path = sounds / "red_disc.mp4"
    found = replace(scanning.probe(path), warnings=("cut",), picture_warnings=("wide",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "probe", lambda _path: found)
        told = {modalities: look(sounds, modalities=modalities)["red_disc.mp4"].warnings
                for modalities in ("video", "both", "audio")}  # fmt: skip
    assert told == {"video": ("cut", "wide"), "both": ("cut", "wide"), "audio": ("cut",)}


def verdicts(*words: str) -> list[Clip]:
    return [Clip(Path(f"{n}.mp4"), f"{n}.mp4", verdict=word, reason="why") for n, word in enumerate(words)]


def test_max_rejected() -> None:
    one_bad = verdicts("rejected", "ok")
    enforce_max_rejected(one_bad, 0.05)  # a single one never stops
    two_bad = verdicts("rejected", "rejected", *["ok"] * 20)
    with pytest.raises(DataError, match=r"(?s)2 of 22.*0\.mp4: why.*1\.mp4: why"):
        enforce_max_rejected(two_bad, 0.05)
    enforce_max_rejected(two_bad, 0.1)
    enforce_max_rejected(verdicts("rejected", "rejected"), 1.0)
    enforce_max_rejected(verdicts(*["dropped"] * 9, "ok"), 0.0)


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_real_clips(test_data: Path) -> None:
    before = fingerprint(test_data / "clips")
    clips = look(test_data / "clips")
    assert len(clips) == 15
    bad = {name: clip.reason for name, clip in clips.items() if clip.verdict != "ok"}
    assert bad == {"roof_portrait_hdr.mp4": "HDR (PQ) is refused until tone-mapping exists"}
    assert clips["butterfly_portrait.mp4"].shape.width < clips["butterfly_portrait.mp4"].shape.height
    # README's frame counts, by another program.
    counted = {"bee": 121, "cars_12fps": 75, "city_night": 190, "crystal": 359, "dog_phone": 41, "station_60fps": 300}
    for stem, count in counted.items():
        assert len(next(clip for name, clip in clips.items() if name.startswith(stem)).probe.timestamps) == count
    assert fingerprint(test_data / "clips") == before


def test_sound_of_real_clips(test_data: Path) -> None:
    before = fingerprint(test_data / "clips")
    silent = {"cars_12fps.mp4", "city_night.mpg", "sign_thanks.mkv", "sign_walk.mkv"}  # README's column
    both, alone = (look(test_data / "clips", modalities=modalities) for modalities in ("both", "audio"))
    assert {name for name, clip in both.items() if not clip.sound} == silent
    assert {name for name, clip in alone.items() if clip.verdict == "dropped"} == silent
    assert alone["roof_portrait_hdr.mp4"].verdict == "ok", "its picture is not trained"
    assert fingerprint(test_data / "clips") == before


def test_nasty_clips(test_data: Path) -> None:
    before = fingerprint(test_data / "nasty")
    clips = look(test_data / "nasty")
    told = {name: (clip.verdict, clip.reason) for name, clip in clips.items()}
    for name, verdict, words in (
        ("zero_byte.mp4", "rejected", "empty"),
        ("text_renamed.mp4", "rejected", "not a video"),
        ("truncated_no_moov.mp4", "rejected", "index is missing"),
        ("audio_only.mp4", "rejected", "no picture"),
        ("bad_caption_utf8.mp4", "rejected", "not UTF-8"),
        ("missing_caption.mp4", "rejected", "no caption"),
        ("one_frame.mp4", "dropped", "too short"),
        ("odd_321x243.webm", "ok", ""),
        ("vfr_10_then_30.mp4", "ok", ""),
        ("hevc_10bit.mp4", "ok", ""),
        ("thin_1280x32.mp4", "ok", ""),
        ("truncated_mid_stream.mp4", "ok", ""),
    ):
        assert told[name][0] == verdict and words in told[name][1], (name, told[name])
    assert "truncated" in clips["truncated_mid_stream.mp4"].warnings[0]
    assert str(clips["thin_1280x32.mp4"].shape) == "192x64x17"
    assert look(test_data / "nasty", buckets="fixed")["thin_1280x32.mp4"].reason.startswith("too small")
    assert fingerprint(test_data / "nasty") == before
