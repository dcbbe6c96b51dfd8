"""Sound: the right samples at the right time, folded and resampled as ffmpeg does, and verdicts for what is broken."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ltxforge.media.audio import read_audio, sound_beside, sounds_named
from ltxforge.media.decode import DecodeError
from ltxforge.media.probe import ProbeError, probe, probe_sound

FREQUENCIES = (440.0, 550.0, 660.0, 180.0, 770.0, 880.0, 990.0, 1100.0)
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is the oracle")


def tones(channels: int, rate: int, seconds: float, start: float = 0.0, loudness: float = 0.3) -> np.ndarray:
    """A sine of its own frequency and phase in every channel, of the clip's time: float64 [channels, samples]."""
    time = start + np.arange(round(seconds * rate)) / rate
    return np.stack([loudness * np.sin(2 * np.pi * FREQUENCIES[n] * time + 0.3 * n) for n in range(channels)])


@pytest.fixture
def make_clip(tmp_path: Path) -> Callable[..., Path]:
    """Writes a clip with grey pictures (none where `picture_seconds` is 0) and the given samples; returns its path."""

    def make(
        name: str,
        samples: np.ndarray | None,
        rate: int = 48000,
        *,
        codec: str = "pcm_s16le",
        layout: str = "stereo",
        sound_at: float = 0.0,
        picture_at: float = 0.0,
        picture_seconds: float = 2.0,
        kept: Callable[[int], bool] = lambda _packet: True,
        bit_rate: int = 256_000,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            video = sound = None
            if picture_seconds:
                video = container.add_stream("libvpx" if name.endswith("webm") else "mpeg4", rate=25)
                video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            if samples is not None:
                sound = container.add_stream(codec, rate=rate, layout=layout)
                if not codec.startswith(("pcm", "flac")):
                    sound.codec_context.bit_rate = bit_rate
            if video is not None:
                for index in range(round(picture_seconds * 25)):
                    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8), "rgb24")
                    frame.pts, frame.time_base = round((picture_at + index / 25) * 25), Fraction(1, 25)
                    container.mux(video.encode(frame))
                container.mux(video.encode(None))
            if sound is not None:
                packets = [*sound.encode(as_frame(samples, rate, layout, sound_at)), *sound.encode(None)]
                container.mux([packet for n, packet in enumerate(packets) if kept(n)])
        return path

    return make


def as_frame(samples: np.ndarray, rate: int, layout: str, at: float = 0.0) -> av.AudioFrame:
    """A float32 frame of any number of channels; PyAV fills arrays of eight planes at most, so interleaved."""
    interleaved = np.ascontiguousarray(samples.T.reshape(1, -1), np.float32)
    frame = av.AudioFrame.from_ndarray(interleaved, "flt", layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(at * rate), Fraction(1, rate)
    return frame


def ffmpeg(*arguments: object) -> np.ndarray:
    """What the ffmpeg program gives as stereo float32 samples: [2, samples]."""
    command = ["ffmpeg", "-v", "error", *map(str, arguments), "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(-1, 2).T


def inner(samples: np.ndarray, cut: int = 200) -> np.ndarray:
    return samples[:, cut:-cut]


def delay(found: np.ndarray, start: float, rate: int = 16000) -> float:
    """How much later (s) than `tones` says two channels are, by the phases of their sines; between ±4 ms."""
    time, window = start + np.arange(found.shape[1]) / rate, np.hanning(found.shape[1])
    late = 0.0
    for reach, step in ((4e-3, 1e-5), (1e-5, 1e-8)):
        lags, score = np.arange(late - reach, late + reach, step), 0.0
        for n, channel in enumerate(found):
            phase = np.angle((channel * window * np.exp(-2j * np.pi * FREQUENCIES[n] * time)).sum())
            score = score + np.cos(phase + np.pi / 2 - 0.3 * n + 2 * np.pi * FREQUENCIES[n] * lags)
        late = float(lags[np.argmax(score)])
    return late


# Container, codec, its largest error on these sines, how late or early it may be (s), and sampling rates.
CODECS = [
    ("mov", "pcm_s16le", 5e-5, 7e-5, (8000, 22050, 48000)),
    ("mkv", "flac", 5e-5, 6e-4, (16000, 44100, 96000)),
    ("mp4", "aac", 0.02, 3e-5, (24000, 44100, 48000)),
    ("mkv", "aac", 0.02, 6e-4, (44100,)),
    ("mkv", "libopus", 0.03, 6e-4, (48000,)),
    ("ts", "aac", 0.02, 6e-4, (48000,)),
    ("avi", "pcm_s16le", 5e-5, 2e-5, (44100,)),
    ("webm", "libopus", 0.03, 6e-4, (48000,)),
]
CASES = [(suffix, codec, error, late, rate) for suffix, codec, error, late, rates in CODECS for rate in rates]


@pytest.mark.parametrize(("suffix", "codec", "error", "late", "rate"), CASES)
def test_the_wave_is_where_it_was(suffix: str, codec: str, error: float, late: float, rate: int, make_clip) -> None:
    """Frequency, phase and level of both channels, at a start that is no multiple of anything."""
    clip = make_clip(f"a.{suffix}", tones(2, rate, 2.0), rate, codec=codec)
    found = read_audio(clip, 0.537, 1.0, 16000)
    assert found.shape == (2, 16000) and found.dtype == np.float32
    assert delay(found, 0.537) == pytest.approx(0, abs=late)
    assert np.abs(inner(found - tones(2, 16000, 1.0, 0.537 - delay(found, 0.537)))).max() < error


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.webm", "a.ogg"])
def test_vorbis_from_ffmpeg_is_where_it_was(name: str, tmp_path: Path) -> None:
    """ffmpeg's times for Vorbis swing by half a block; the wave must neither tear nor move."""
    waves = "0.3*sin(2*PI*440*t)|0.3*sin(2*PI*550*t+0.3)"
    sound = ["-f", "lavfi", "-i", f"aevalsrc='{waves}':s=44100:d=2", "-c:a", "libvorbis", "-b:a", "256k"]
    picture = ["-f", "lavfi", "-i", "color=gray:s=32x32:r=25:d=2", "-c:v", "libvpx"] if name == "a.webm" else []
    subprocess.run(["ffmpeg", "-v", "error", *sound[:4], *picture[:4], *sound[4:], *picture[4:], tmp_path / name])
    found = read_audio(tmp_path / name, 0.25, 1.5, 16000)
    assert delay(found, 0.25) == pytest.approx(0, abs=1e-3)
    assert np.abs(inner(found - tones(2, 16000, 1.5, 0.25 - delay(found, 0.25)))).max() < 0.03


@pytest.mark.parametrize(
    ("codec", "error"),
    [("pcm_u8", 8e-3), ("pcm_s16le", 4e-5), ("pcm_s24le", 2e-6), ("pcm_s32le", 1e-6), ("pcm_f32le", 1e-6),
     ("pcm_f64le", 1e-6)],
)  # fmt: skip
def test_every_format_has_full_scale_one(codec: str, error: float, make_clip) -> None:
    samples = tones(2, 16000, 1.0, loudness=0.99)
    clip = make_clip("a.mkv", samples, 16000, codec=codec)
    assert np.abs(read_audio(clip, 0.0, 1.0, 16000) - samples).max() < error


def test_mono_is_heard_on_both_sides_at_its_own_level(make_clip) -> None:
    samples = tones(1, 16000, 1.0)
    clip = make_clip("a.mov", samples, 16000, layout="mono")
    found = read_audio(clip, 0.0, 1.0, 16000)
    assert np.abs(found - samples).max() < 4e-5 and np.array_equal(found[0], found[1])
    assert (probe(clip).audio_layout, probe(clip).audio_channels, probe(clip).audio_rate) == ("mono", 1, 16000)
    facts = probe(make_clip("b.mp4", tones(6, 44100, 1.0), 44100, codec="aac", layout="5.1"))
    assert (facts.audio_layout, facts.audio_channels, facts.audio_rate, facts.audio_codec) == ("5.1", 6, 44100, "aac")


def test_one_channel_is_the_mean_of_both(make_clip) -> None:
    clip = make_clip("a.mov", tones(2, 48000, 1.0))
    both, one = (read_audio(clip, 0.1, 0.5, 16000, channels) for channels in (2, 1))
    assert one.shape == (1, 8000) and np.allclose(one[0], both.mean(0), atol=1e-7)


# ITU-R BS.775: centre and surrounds at -3 dB, the low-frequency channel left out.
H = np.sqrt(0.5)
FOLDS = {
    "5.1": [[1, 0, H, 0, H, 0], [0, 1, H, 0, 0, H]],
    "5.1(side)": [[1, 0, H, 0, H, 0], [0, 1, H, 0, 0, H]],
    "7.1": [[1, 0, H, 0, H, 0, H, 0], [0, 1, H, 0, 0, H, 0, H]],
    "quad": [[1, 0, H, 0], [0, 1, 0, H]],
}


@pytest.mark.parametrize("layout", FOLDS)
def test_surround_is_folded_by_the_known_coefficients(layout: str, make_clip) -> None:
    fold = np.array(FOLDS[layout])
    samples = tones(fold.shape[1], 48000, 1.0)
    clip = make_clip("a.wav", samples, codec="pcm_f32le", layout=layout, picture_seconds=0)
    assert np.abs(read_audio(clip, 0.0, 1.0, 48000) - fold @ samples).max() < 2e-6


@needs_ffmpeg
@pytest.mark.parametrize(
    ("layout", "codec", "suffix"),
    [("5.1", "pcm_s16le", "mkv"), ("7.1", "pcm_s24le", "mkv"), ("5.1", "aac", "mp4"), ("7.1", "flac", "mkv"),
     ("5.1(side)", "ac3", "mp4"), ("7.1", "libopus", "mkv")],
)  # fmt: skip
def test_surround_is_folded_as_ffmpeg_folds_it(layout: str, codec: str, suffix: str, make_clip) -> None:
    samples = tones(av.AudioLayout(layout).nb_channels, 48000, 1.0)
    clip = make_clip(
        f"a.{suffix}", samples, codec=codec, layout=layout, bit_rate=448_000, picture_seconds=0
    )  # so that time 0 is the first sample, as it is for ffmpeg
    found, expected = read_audio(clip, 0.0, 0.9, 48000), ffmpeg("-i", clip, "-map", "0:a", "-ac", 2)
    # Decoders of two ffmpeg versions differ by rounding; the lossless ones not at all.
    bound = 1e-6 if codec.startswith(("pcm", "flac")) else 1e-4
    assert np.abs(inner(found - expected[:, : found.shape[1]])).max() < bound


@needs_ffmpeg
@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (48000, 16000), (22050, 24000), (96000, 48000)])
def test_resampling_equals_ffmpeg_s(rate: int, wanted: int, make_clip) -> None:
    noise = 0.3 * np.random.default_rng(0).standard_normal((2, rate))
    clip = make_clip("a.mkv", noise, rate, codec="pcm_f32le", picture_seconds=0)
    expected = ffmpeg("-i", clip, "-af", f"aresample={wanted}")
    assert np.abs(read_audio(clip, 0.0, 1.0, wanted) - expected[:, :wanted])[:, 100:-100].max() < 2e-6
    # A stretch from the middle has real sound on both sides, so that its ends are those of the whole. It begins at a
    # whole number of samples of both rates.
    found = read_audio(clip, 0.4, 0.2, wanted)
    assert np.abs(found - expected[:, round(0.4 * wanted) : round(0.6 * wanted)]).max() < 2e-6


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(("sound_at", "picture_at"), [(0.48, 0.0), (0.0, 0.4), (1.0, 3.0)])
def test_time_zero_is_the_first_picture(suffix: str, sound_at: float, picture_at: float, make_clip) -> None:
    """A track that starts later is silent until then; one that starts earlier is cut."""
    codec = "aac" if suffix == "mp4" else "pcm_s16le"
    clip = make_clip(
        f"a.{suffix}", tones(2, 48000, 4.0, sound_at), codec=codec, sound_at=sound_at, picture_at=picture_at
    )
    found, silent = read_audio(clip, 0.0, 1.0, 16000), round(max(0.0, sound_at - picture_at) * 16000)
    assert np.abs(found[:, : max(0, silent - 1100)]).max(initial=0) == 0  # AAC swells in over one packet
    after = found[:, silent + 400 :]
    # Both containers keep a track's beginning in milliseconds.
    assert delay(after, picture_at + (silent + 400) / 16000) == pytest.approx(0, abs=1e-3)
    assert np.abs(after).max() == pytest.approx(0.3, abs=0.02)


def test_sound_of_other_length_than_the_picture(make_clip) -> None:
    clip = make_clip("short.mkv", tones(2, 16000, 1.0), 16000)
    found = read_audio(clip, 0.5, 1.5, 16000)
    assert found.shape == (2, 24000)
    assert np.abs(found[:, :8000] - tones(2, 16000, 0.5, 0.5)).max() < 4e-5 and not found[:, 8000:].any()
    assert read_audio(clip, 1.2, 0.5, 16000) is None  # nothing there
    assert read_audio(make_clip("long.mkv", tones(2, 16000, 5.0), 16000), 0.0, 2.0, 16000).shape == (2, 32000)
    assert read_audio(clip, 0.0, 49 / 24, 16000).shape == (2, round(49 / 24 * 16000))


def test_a_gap_stays_a_gap(make_clip) -> None:
    """Packets of 20 ms; a tenth of a second of them is missing."""
    samples = tones(2, 48000, 2.0)
    clip = make_clip("gap.mkv", samples, codec="libopus", kept=lambda packet: not 50 <= packet < 60)
    found = read_audio(clip, 0.0, 2.0, 16000)
    assert delay(found[:, :15000], 0) == pytest.approx(0, abs=6e-4)
    assert np.abs(found[:, 16400:18800]).max() < 0.01
    assert delay(found[:, 21000:], 21000 / 16000) == pytest.approx(0, abs=1.2e-3)


def test_a_gap_behind_the_first_packets_moves_nothing(make_clip) -> None:
    clip = make_clip("gap.mkv", tones(2, 48000, 2.0), codec="libopus", kept=lambda packet: not 3 <= packet < 40)
    found = read_audio(clip, 0.0, 2.0, 16000)
    assert np.abs(found[:, 200:700]).max() > 0.25 and np.abs(found[:, 1100:12500]).max() < 0.01
    assert delay(found[:, 14000:], 14000 / 16000) == pytest.approx(0, abs=1.2e-3)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mkv", "libopus"), ("mkv", "pcm_s16le")])
def test_far_stretches_are_found_by_seeking(suffix: str, codec: str, make_clip) -> None:
    clip = make_clip(f"far.{suffix}", tones(2, 48000, 30.0), codec=codec, picture_seconds=30.0)
    for start in (11.0, 17.31, 28.9):
        found = read_audio(clip, start, 1.0, 16000)
        assert delay(found, start) == pytest.approx(0, abs=6e-4)
        assert np.abs(inner(found)).max() == pytest.approx(0.3, abs=0.02)


def test_files_beside_the_clip(make_clip) -> None:
    """They replace the clip's own track, and their first sample is time 0."""
    clip = make_clip("a.mp4", tones(2, 48000, 2.0), codec="aac", picture_at=1.0)
    assert sound_beside(clip) is None
    quiet = tones(2, 44100, 2.0, loudness=0.05)
    for name, codec in (("a.mp3", "mp3"), ("a.m4a", "aac"), ("a.FLAC", "flac"), ("a.wav", "pcm_s16le")):
        beside = make_clip(name, quiet, 44100, codec=codec, picture_seconds=0)
        assert sound_beside(clip) == beside
        found = read_audio(clip, 0.5, 1.0, 16000)
        assert np.abs(inner(found - tones(2, 16000, 1.0, 0.5, 0.05))).max() < 2e-3, name
        assert sound_beside(beside) is None
        assert np.array_equal(read_audio(beside, 0.5, 1.0, 16000), found)
    beside.write_bytes(b"no sound at all")
    with pytest.raises(DecodeError, match=r"a\.wav beside it"):
        read_audio(clip, 0.0, 1.0, 16000)


def test_clips_without_sound(make_clip) -> None:
    clip = make_clip("mute.mp4", None)
    assert read_audio(clip, 0.0, 1.0, 16000) is None
    assert not probe(clip).has_audio and probe(clip).audio_channels == 0
    assert read_audio(make_clip("empty.mkv", tones(2, 48000, 1.0), kept=lambda _: False), 0.0, 1.0, 16000) is None
    beside = make_clip("other.mp4", None)
    make_clip("only.mp4", None).rename(beside.with_suffix(".m4a"))  # a picture where sound was promised
    with pytest.raises(DecodeError, match="no sound in it"):
        read_audio(beside, 0.0, 1.0, 16000)


def test_broken_sound_is_a_verdict(make_clip, tmp_path: Path) -> None:
    whole = make_clip("whole.wav", tones(2, 48000, 2.0), picture_seconds=0).read_bytes()
    broken = {
        "empty": b"",
        "text": b"hello, this is no sound",
        "header": whole[:40],
        "rate": whole[:24] + (2_000_000_000).to_bytes(4, "little") + whole[28:],
        "channels": whole[:22] + (60000).to_bytes(2, "little") + whole[24:],
    }
    for name, data in broken.items():
        path = tmp_path / f"{name}.wav"
        path.write_bytes(data)
        with pytest.raises(DecodeError) as caught:
            read_audio(path, 0.0, 1.9, 16000)
        assert caught.value.reason and "\n" not in caught.value.reason, name
    with pytest.raises(DecodeError, match="no numbers"):
        read_audio(make_clip("nan.mkv", np.full((2, 48000), np.nan), codec="pcm_f32le"), 0.0, 1.0, 16000)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(DecodeError, match="a folder"):
        read_audio(tmp_path / "folder.wav", 0.0, 1.0, 16000)


def plain_wav(samples: np.ndarray) -> bytes:
    """int16 [channels, samples] at 48 kHz as the oldest kind of WAV, which tells how many channels and not which."""
    data, count = np.ascontiguousarray(samples.T).tobytes(), len(samples)
    facts = struct.pack("<HHIIHH", 1, count, 48000, 96000 * count, 2 * count, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + facts + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


def test_channels_without_names_are_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    for layout in ("5.1", "7.1"):
        samples = tones(len(FOLDS[layout][0]), 48000, 0.5)
        path.write_bytes(plain_wav((samples * 32768).astype(np.int16)))
        found = read_audio(path, 0.0, 0.5, 48000)
        assert np.abs(found - np.array(FOLDS[layout]) @ samples).max() < 2e-4
    path.write_bytes(plain_wav(np.zeros((9, 4800), np.int16)))
    with pytest.raises(DecodeError, match="9 channels.* cannot be folded"):
        read_audio(path, 0.0, 0.1, 48000)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("codec", ["aac", "flac"])
def test_noise_in_the_file_never_crashes(codec: str, seed: int, make_clip) -> None:
    """Either sound of the right shape and finite, or a verdict."""
    clip = make_clip("a.mp4", tones(2, 48000, 2.0), codec=codec)
    data = bytearray(clip.read_bytes())
    random = np.random.default_rng(seed)
    for place in random.integers(0, len(data), 40):
        data[place] = random.integers(0, 256)
    clip.write_bytes(bytes(data))
    try:
        found = read_audio(clip, 0.1, 1.5, 16000)
        assert found is None or (found.shape == (2, 24000) and np.isfinite(found).all())
    except DecodeError as error:
        assert error.reason


@pytest.mark.parametrize(
    "wanted", [(-1.0, 1.0, 16000, 2), (0.0, 0.0, 16000, 2), (0.0, 1.0, 0, 2), (0.0, 1.0, 16000, 6)]
)
def test_impossible_wishes(wanted: tuple[float, float, int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted"):
        read_audio(tmp_path / "a.mp4", *wanted)


WITH_SOUND = {
    "bee.mp4": 4.0, "butterfly_portrait.mp4": 6.0, "crystal.webm": 12.0, "dog_phone.mp4": 1.5, "friday.mp4": 6.1,
    "flower.webm": 5.0, "frog.webm": 8.2, "rabbit320.mp4": 7.8, "roof_portrait_hdr.mp4": 4.2, "station_60fps.mp4": 5.0,
    "stream.mp4": 3.0,
}  # fmt: skip


def test_real_clips(test_data: Path) -> None:
    for clip in sorted(path for path in (test_data / "clips").iterdir() if path.suffix != ".txt"):
        facts = probe(clip)
        seconds = facts.duration_seconds
        found = read_audio(clip, 0.0, seconds, 16000)
        assert (found is not None) == facts.has_audio == (clip.name in WITH_SOUND), clip.name
        if found is not None:
            assert found.shape == (2, round(seconds * 16000))
            assert seconds == pytest.approx(WITH_SOUND[clip.name], abs=0.1)
            assert found.any() == (clip.name != "flower.webm")  # digital silence
            heard = np.flatnonzero(found.any(0)) / 16000
            begins = 0.35 if clip.name == "dog_phone.mp4" else 0.15  # the phone's microphone was late
            assert not len(heard) or (heard[0] < begins and heard[-1] > seconds - 0.15), clip.name


@needs_ffmpeg
def test_a_real_clip_equals_ffmpeg_s(test_data: Path) -> None:
    """Clips whose sound and picture begin together, so that ffmpeg's plain conversion has the same time line."""
    for name in ("bee.mp4", "friday.mp4", "rabbit320.mp4"):
        clip = test_data / "clips" / name
        expected = ffmpeg("-i", clip, "-map", "0:a", "-ac", 2, "-ar", 16000)
        assert np.abs(read_audio(clip, 0.0, 3.0, 16000) - expected[:, :48000])[:, 100:].max() < 1e-5, name


def test_nasty_files(test_data: Path) -> None:
    nasty = test_data / "nasty"
    for name in ("zero_byte.mp4", "text_renamed.mp4", "truncated_no_moov.mp4"):
        with pytest.raises(DecodeError):
            read_audio(nasty / name, 0.0, 1.0, 16000)
    cut = nasty / "truncated_mid_stream.mp4"
    assert read_audio(cut, 0.0, 1.0, 16000).any()
    with pytest.raises(DecodeError, match=r"ends at 2\.\d+ s|damaged at 2\.\d+ s"):
        read_audio(cut, 0.0, 5.0, 16000)
    assert read_audio(nasty / "audio_only.mp4", 5.0, 1.0, 16000).any()


def test_a_sound_file_has_facts_or_is_refused(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    found = probe_sound(make_clip("good.wav", tones(2, 16000, 0.05), 16000, picture_seconds=0))
    assert (found.seconds, found.fault, found.has_picture, found.audio_rate) == (0.05, "", False, 16000)
    found = probe_sound(make_clip("good.mka", tones(1, 44100, 1.0), 44100, layout="mono", picture_seconds=0))
    assert (found.seconds, found.fault, found.audio_channels) == (pytest.approx(1.0, abs=1e-3), "", 1)
    assert probe_sound(make_clip("film.mp4", tones(2, 48000, 1.0), codec="aac")).has_picture
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    (tmp_path / "picture.wav").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(5).bytes(5000))
    (tmp_path / "header.wav").write_bytes(plain_wav(np.zeros((2, 0), np.int16)))
    (tmp_path / "empty.flac").touch()
    (tmp_path / "folder.mp3").mkdir()
    make_clip("film.mkv", None).rename(tmp_path / "film.mka")
    for name, words in (
        ("text.wav", "not a sound file"), ("picture.wav", "not a sound file"), ("noise.wav", "sound"),
        ("header.wav", "no sound in it"), ("empty.flac", "empty"), ("folder.mp3", "folder"), ("film.mka", "no sound"),
    ):  # fmt: skip
        with pytest.raises(ProbeError, match=words) as caught:
            probe_sound(tmp_path / name)
        assert "video" not in caught.value.reason, name


# Container, codec, and whether sound behind a damaged place can be used: only where each frame carries its own time.
STORED = [
    ("wav", "pcm_s16le", True), ("flac", "flac", True), ("m4a", "aac", True), ("mka", "libopus", True),
    ("mp3", "mp3", False), ("aac", "aac", False), ("ogg", "flac", False), ("opus", "libopus", False),
]  # fmt: skip


@pytest.fixture
def noise_file(make_clip) -> Callable[[str, str], Path]:
    """Five seconds of stereo noise, so that every codec has as many bytes in each of them."""

    def make(suffix: str, codec: str) -> Path:
        noise = 0.2 * np.random.default_rng(0).standard_normal((2, 5 * 48000)).clip(-4, 4)
        return make_clip(f"noise.{suffix}", noise, codec=codec, picture_seconds=0)

    return make


@pytest.mark.parametrize("filler", ["noise", "zeros"])
@pytest.mark.parametrize(("suffix", "codec", "goes_on"), [stored for stored in STORED if stored[0] != "wav"])
def test_a_damaged_stretch_is_an_error_and_never_silence(
    suffix: str, codec: str, goes_on: bool, filler: str, noise_file
) -> None:
    """The middle third is overwritten: nothing that touches it may come out as silence, or as sound from elsewhere."""
    path = noise_file(suffix, codec)
    whole = {start: read_audio(path, start, 0.35, 16000) for start in (0.0, 0.5, 3.9, 4.4)}
    assert probe_sound(path).fault == "" and probe_sound(path).seconds == pytest.approx(5.0, abs=0.07)
    data = path.read_bytes()
    third = len(data) // 3
    junk = np.random.default_rng(1).bytes(third) if filler == "noise" else bytes(third)
    path.write_bytes(data[:third] + junk + data[2 * third :])
    for start in (0.0, 0.5):
        assert np.array_equal(read_audio(path, start, 0.35, 16000), whole[start])
    for start in (1.45, 1.6, 2.3, 3.0):
        with pytest.raises(DecodeError, match=r"its sound is damaged at [01]\.\d\d s"):
            read_audio(path, start, 0.35, 16000)
    for start in (3.9, 4.4):
        if goes_on and suffix != "mka":  # Matroska is found again at its next cluster, which may be its last
            assert np.array_equal(read_audio(path, start, 0.35, 16000)[:, 500:], whole[start][:, 500:])
        else:
            with pytest.raises(DecodeError, match="damaged"):
                read_audio(path, start, 0.35, 16000)
    assert "its sound is damaged at" in probe_sound(path).fault


@pytest.mark.parametrize("suffix_and_codec", [(suffix, codec) for suffix, codec, _ in STORED if suffix != "m4a"])
def test_a_file_that_was_cut_is_an_error_from_there_on(suffix_and_codec: tuple[str, str], noise_file) -> None:
    path = noise_file(*suffix_and_codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.416)])
    assert np.abs(read_audio(path, 0.0, 0.35, 16000)).max() > 0.3
    for start in (1.9, 2.3, 4.4):
        with pytest.raises(DecodeError, match=r"(cut short: it ends|damaged) at [12]\.\d\d s"):
            read_audio(path, start, 0.35, 16000)
    assert probe_sound(path).fault


def test_a_wav_written_to_a_pipe_states_no_length(noise_file) -> None:
    path = noise_file("wav", "pcm_s16le")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data[:-5001])
    assert (probe_sound(path).fault, read_audio(path, 4.9, 0.5, 16000) is not None) == ("", True)


def test_one_flipped_bit_of_flac_is_found(noise_file) -> None:
    path = noise_file("flac", "flac")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))
    with pytest.raises(DecodeError, match="damaged"):
        read_audio(path, 2.2, 0.6, 16000)
    assert read_audio(path, 0.0, 1.0, 16000) is not None and read_audio(path, 4.0, 1.0, 16000) is not None


def test_tags_behind_the_end_are_no_damage(noise_file) -> None:
    for suffix, codec in (("mp3", "mp3"), ("flac", "flac"), ("ogg", "flac")):
        path = noise_file(suffix, codec)
        path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
        assert probe_sound(path).fault == "" and read_audio(path, 4.9, 1.0, 16000) is not None


def test_the_first_of_several_files_of_a_name_is_used(make_clip) -> None:
    clip = make_clip("a.mp4", None)
    assert sounds_named(clip) == []
    named = [make_clip(name, tones(2, 16000, 0.1), 16000, codec=codec, picture_seconds=0)
             for name, codec in (("a.flac", "flac"), ("a.wav", "pcm_s16le"))]  # fmt: skip
    assert sounds_named(clip) == named[::-1] and sound_beside(clip) == named[1]


def test_where_a_track_of_its_own_ends(make_clip) -> None:
    """By the header, on the picture's time line: this one begins half a second before the picture."""
    for suffix, codec in (("mp4", "aac"), ("mkv", "pcm_s16le"), ("mov", "pcm_s16le")):
        clip = make_clip(f"a.{suffix}", tones(2, 48000, 1.2), codec=codec, picture_at=0.48)
        assert probe(clip).audio_seconds == pytest.approx(0.72, abs=0.03), suffix
    assert probe(make_clip("mute.mp4", None)).audio_seconds == 0
