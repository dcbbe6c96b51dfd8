"""Sound in the cache: the right stretch of the right file, in its own entries, and what becomes of clips without."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltxforge.dataset import cached, encode
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.encode_samples import SILENT_PEAK, is_silent
from ltxforge.dataset.phase import weighed
from ltxforge.durable import file_digest
from ltxforge.errors import DataError
from ltxforge.events import ClipJudged, Note, PhaseAdvanced, PhaseEnded, PhaseStarted
from ltxforge.media import demo
from ltxforge.media.audio import read_audio
from ltxforge.models.interface import Latents, PromptEmbeddings, WantedPrompt
from ltxforge.models.ltx2_tiny import tiny_parts
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.plan import CachePlan, ComponentPlan, DataPlan, PromptPlan, SamplePlan, TrainingPlan, ValidationPlan
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY

SHAPE = ClipShape(64, 64, 9)
PARTS = (
    "transformer", "vae", "audio_vae", "vocoder", "connectors", "text_encoder", "tokenizer", "scheduler",
)  # fmt: skip


class Levels:
    """Encoders that tell what they were given: a latent of the sound is its stretch's level, one channel a side."""

    vae_dtype = text_dtype = torch.float32
    sound_rate = 16000

    def __init__(self) -> None:
        self.held = ""
        self.encoded: list[str] = []

    @contextlib.contextmanager
    def hold(self, name: str):
        assert not self.held, f"{name} asked for while {self.held} is held"
        self.held = name
        yield
        self.held = ""

    def vae(self):
        return self.hold("vae")

    def audio_vae(self):
        return self.hold("audio_vae")

    def encode_prompts(self, wanted, tokens, on_read):
        with self.hold("text"):
            for prompt in wanted:
                self.encoded.append(f"prompt {prompt.modalities} {prompt.text}")
                assert callable(on_read)
                names = ("video", "audio") if prompt.modalities == "both" else (prompt.modalities,)
                yield PromptEmbeddings({name: torch.zeros(tokens, 8) for name in names}, 3)

    def encode_clip(self, frames):
        assert self.held == "vae"
        self.encoded.append("clip")
        mean = frames.float().mean().expand(2, 2, 2, 2).clone()
        return Latents(mean, torch.ones_like(mean))

    def sound_length(self, seconds):
        return max(1, round(25 * seconds))

    def encode_sound(self, waveform, length):
        assert self.held == "audio_vae" and waveform.dtype == torch.float32 and waveform.shape[0] == 2
        self.encoded.append("sound")
        parts = waveform.tensor_split(length, dim=1)
        mean = torch.stack([part.square().mean(1).sqrt() for part in parts])
        return Latents(mean, torch.full_like(mean, 0.5))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    return demo.render(tmp_path_factory.mktemp("clips") / "shapes")


@pytest.fixture
def folder(rendered, tmp_path) -> Path:
    """A clip with a track of its own and one without."""
    (tmp_path / "data").mkdir()
    for name in ("red_disc", "two_discs"):
        shutil.copy(rendered / f"{name}.mp4", tmp_path / "data" / f"{name}.mp4")
    return tmp_path / "data"


@pytest.fixture
def make(plan_maker, tmp_path):
    """A plan of samples for the modalities, with LTX-2's parts."""
    part = ComponentPlan(source="tiny/ltx2", kind="builtin", digest="builtin:tiny/ltx2")

    def build(samples, modalities="both", **changes):
        plan = plan_maker(data=DataPlan(tuple(samples), ()), training=TrainingPlan(2, 1, 1.0, None, modalities))
        model = dataclasses.replace(plan.model, components=dict.fromkeys(PARTS, part))
        return dataclasses.replace(plan, model=model, **changes)

    return build


@pytest.fixture
def fill(tmp_path):
    """Caches and returns (data, events, what was encoded)."""

    def run(plan, model=None):
        model, events = model or Levels(), []
        data = encode.fill(plan, model, store(plan), events.append, StopRequest())
        return data, events, getattr(model, "encoded", [])

    return run


def store(plan) -> Cache:
    return Cache(Path(plan.cache.directory), lambda _event: None)


def sample(path: Path, start: float = 0.0, sound: str | None = None, **changes) -> SamplePlan:
    beside = next(iter(path.parent.glob(f"{path.stem}.wav")), None)
    if sound is None:
        sound = file_digest(beside) if beside else "own"
    made = SamplePlan("data", file_digest(path), str(path), f"a {path.stem}", SHAPE, 25.0, start, sound=sound)
    return dataclasses.replace(made, **changes)


def levels(plan, item) -> torch.Tensor:
    return cached.read(store(plan), "audio", item.audio_key)["mean"]


def judged(events) -> list[ClipJudged]:
    return [event for event in events if isinstance(event, ClipJudged)]


def notes(events) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def test_phases_follow_each_other_and_sound_has_its_own_entries(folder, make, fill):
    with_sound, without = sample(folder / "red_disc.mp4", 0.25), sample(folder / "two_discs.mp4", sound="")
    plan = make([with_sound, without])
    data, events, encoded = fill(plan)
    assert [event.phase for event in events if isinstance(event, PhaseStarted)] == ["prompts", "latents", "audio"]
    assert encoded[-3:] == ["clip", "clip", "sound"]
    first, second = data.samples
    assert second.audio_key is None and second.audio_digest == "" and second.latents_digest
    assert levels(plan, first).shape == (9, 2)
    # The same stretch of the file by the reader itself.
    heard = torch.from_numpy(read_audio(folder / "red_disc.mp4", 0.25, 9 / 25, 16000))
    expected = torch.stack([part.square().mean(1).sqrt() for part in heard.tensor_split(9, dim=1)])
    assert torch.equal(levels(plan, first), expected)
    latents = cached.read(store(plan), "latents", first.latents_key)
    assert latents.keys() == {"mean"}


def test_the_file_beside_is_heard_from_the_window_s_start_and_padded_with_silence(folder, make, fill, make_wav):
    make_wav(folder / "two_discs.wav", [(0.4, 0.5), (0.1, 0.25)])
    clip = folder / "two_discs.mp4"
    plan = make([sample(clip, 0.0), sample(clip, 0.32), sample(clip, 1.0)])
    data, events, _ = fill(plan)
    first, second, third = data.samples
    assert levels(plan, first) == pytest.approx(torch.full((9, 2), 0.5), abs=1e-4)
    # 0.08 s at 0.5 are two latents, 0.1 s at 0.25 two and a half; then the file is over.
    assert levels(plan, second)[:4, 0] == pytest.approx(torch.tensor([0.5, 0.5, 0.25, 0.25]), abs=1e-4)
    assert levels(plan, second)[5:].abs().max() == 0
    assert third.audio_key is None and third.latents_key is not None, "its window lies wholly behind the sound's end"
    assert "alone: 1, of two_discs.mp4" in notes(events) and not judged(events)


def test_what_was_made_is_kept_and_nothing_is_loaded_again(folder, make, fill, make_wav):
    make_wav(folder / "two_discs.wav", [(0.4, 0.5)])
    plan = make([sample(folder / "two_discs.mp4", 0.0), sample(folder / "two_discs.mp4", 1.0)])
    first = fill(plan)[0]
    again, events, encoded = fill(plan)
    assert again == first and encoded == []
    assert "alone: 1, of two_discs.mp4" in notes(events), "told at every start"


def test_an_edited_file_beside_makes_only_the_sound_anew(folder, make, fill, make_wav):
    beside = make_wav(folder / "two_discs.wav", [(0.4, 0.5)])
    fill(make([sample(folder / "two_discs.mp4")]))
    make_wav(beside, [(0.4, 0.25)])
    plan = make([sample(folder / "two_discs.mp4")])
    data, _, encoded = fill(plan)
    assert encoded == ["sound"]
    assert levels(plan, data.samples[0])[:, 0] == pytest.approx(torch.full((9,), 0.25), abs=1e-4)


@pytest.mark.parametrize("change", ["edited", "removed", "new"])
def test_sound_that_changes_during_caching_is_never_cached_under_its_old_name(folder, make, fill, make_wav, change):
    clip = folder / "red_disc.mp4"
    if change != "new":
        make_wav(folder / "red_disc.wav", [(1.0, 0.5)])
    plan = make([sample(clip)])
    if change == "removed":
        (folder / "red_disc.wav").unlink()
    else:
        make_wav(folder / "red_disc.wav", [(1.0, 0.25)])
    data, events, _ = fill(plan)
    assert data.samples[0].audio_key is None and data.samples[0].latents_key is not None
    (verdict,) = judged(events)
    assert verdict.verdict == "ok" and "changed since it was scanned" in verdict.warnings[0]
    assert store(plan).read("audio", cached.audio_key(plan, plan.data.samples[0], 9)) is None


def test_sound_that_does_not_decode_costs_only_the_sound(folder, make, fill):
    (folder / "two_discs.wav").write_text("no sound", encoding="utf-8")
    samples = [sample(folder / "red_disc.mp4"), sample(folder / "two_discs.mp4"), sample(folder / "two_discs.mp4", 0.5)]
    data, events, _ = fill(make(samples))
    assert [bool(item.audio_key) for item in data.samples] == [True, False, False]
    (verdict,) = judged(events)
    assert (verdict.verdict, verdict.samples) == ("ok", 2) and "sound of 2 of 2 windows" in verdict.warnings[0]
    alone, events, _ = fill(make(samples, "audio"))
    assert [item.sample for item in alone.samples] == samples[:1]
    (verdict,) = judged(events)
    assert (verdict.verdict, verdict.samples) == ("rejected", 0) and "two_discs.wav beside it" in verdict.reason


def test_sound_alone_encodes_no_pictures_and_drops_the_silent(folder, make, fill, make_wav):
    make_wav(folder / "two_discs.wav", [(0.4, 0.5)])
    clip = folder / "two_discs.mp4"
    plan = make([sample(clip), sample(clip, 1.0), sample(folder / "red_disc.mp4")], "audio")
    data, events, encoded = fill(plan)
    assert [event.phase for event in events if isinstance(event, PhaseStarted)] == ["prompts", "audio"]
    assert "clip" not in encoded and not (Path(plan.cache.directory) / "latents").exists()
    assert [item.sample for item in data.samples] == [plan.data.samples[0], plan.data.samples[2]]
    assert all(item.latents_key is None and item.latents_digest == "" for item in data.samples)
    (verdict,) = judged(events)
    assert (verdict.verdict, verdict.samples) == ("ok", 1) and "no sound in 1 of 2 windows" in verdict.warnings[0]
    only_silent = make([sample(clip, 1.0), sample(folder / "red_disc.mp4")], "audio")
    (verdict,) = judged(fill(only_silent)[1])
    assert verdict.verdict == "dropped" and "digital silence" in verdict.reason
    with pytest.raises(DataError, match="nothing to train on"):
        fill(make([sample(clip, 1.0)], "audio"))


def test_epochs_are_counted_anew_once_someone_has_listened(folder, make, fill, make_wav):
    """Batches of two, accumulated in pairs by the plan's own count: 5 samples are 3 batches, 2 are one."""
    make_wav(folder / "two_discs.wav", [(0.8, 0.5), (1.2, 0.0)])
    samples = [sample(folder / "two_discs.mp4", start) for start in (0.0, 0.4, 0.8, 1.2, 1.6)]
    plan = make(samples, "audio", steps=6)
    _, events, _ = fill(plan)
    assert "2 of 5 planned samples have sound: 6 steps are now 6 epochs" in notes(events)
    assert "planned samples" not in notes(fill(make(samples[:2], "audio", steps=6))[1])


def test_a_sound_file_that_is_the_clip(folder, make, fill, make_wav):
    path = make_wav(folder / "bell.wav", [(0.4, 0.5), (0.6, 0.25)])
    plan = make([sample(path, 0.5, sound="own")], "audio")
    data, _, _ = fill(plan)
    assert torch.allclose(levels(plan, data.samples[0]), torch.tensor(0.25), atol=2e-3)


def test_a_damaged_file_beside_is_named_and_its_silence_never_trained(folder, make, fill):
    """Two seconds of noise, the middle third overwritten: windows there have no sound and a verdict that says why."""
    clip, beside = folder / "two_discs.mp4", folder / "two_discs.flac"
    with av.open(str(beside), "w") as target:
        stream = target.add_stream("flac", rate=16000, layout="stereo")
        noise = (np.random.default_rng(0).standard_normal((1, 2 * 2 * 16000)) * 5000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(noise, "s16", "stereo")
        frame.sample_rate = 16000
        target.mux([*stream.encode(frame), *stream.encode(None)])
    whole = beside.read_bytes()
    third = len(whole) // 3
    beside.write_bytes(whole[:third] + np.random.default_rng(1).bytes(third) + whole[2 * third :])
    digest = file_digest(beside)
    windows = [sample(clip, start, digest) for start in (0.0, 0.6, 0.8, 1.6)]
    for modalities, words in (("both", "picture alone"), ("audio", "cannot be decoded")):
        data, events, _ = fill(make(windows, modalities))
        (verdict,) = judged(events)
        assert "two_discs.flac beside it: its sound is damaged at 0." in verdict.warnings[0]
        assert words in verdict.warnings[0] and "2 of 4" in verdict.warnings[0] and "silence" not in notes(events)
        heard = [item.sample.start_seconds for item in data.samples if item.audio_key]
        assert heard == [0.0, 1.6]


@pytest.mark.parametrize(("level", "is_heard"), [(0.0, False), (2 / 32767, False), (5 / 32767, True)])
def test_what_lies_below_80_dbfs_is_silence(folder, make, fill, make_wav, level, is_heard):
    make_wav(folder / "two_discs.wav", [(1.0, level)])
    data, events, _ = fill(make([sample(folder / "two_discs.mp4")]))
    assert bool(data.samples[0].audio_key) is is_heard
    warned = [event for event in events if isinstance(event, Note) and event.level == "warning"]
    assert bool(warned) is not is_heard, "all sound of the run is silent"


def test_a_run_without_sound_asks_nothing_of_an_audio_vae(folder, make, fill):
    data, events, encoded = fill(make([sample(folder / "red_disc.mp4", sound="")], "video"))
    assert "sound" not in encoded and data.samples[0].audio_key is None
    assert "audio" not in {event.phase for event in events if isinstance(event, PhaseStarted)}


@pytest.mark.parametrize("fps", [24.0, 25.0, 29.97, 30.0])
@pytest.mark.parametrize("frames", [9, 17, 25])
def test_audio_latents_are_within_one_of_25_a_second(folder, make, fill, fps, frames):
    plan = make([sample(folder / "red_disc.mp4", fps=fps, shape=ClipShape(64, 64, frames))], "audio")
    data, _, _ = fill(plan)
    found = len(levels(plan, data.samples[0]))
    assert found == round(25 * frames / fps) == data.samples[0].audio_key["length"]


@pytest.mark.parametrize(
    "change",
    [
        {"start_seconds": 0.125}, {"fps": 24.0}, {"shape": ClipShape(64, 64, 17)}, {"clip": "edited"},
        {"sound": "other"},
    ],
)  # fmt: skip
def test_every_input_of_the_sound_is_in_its_key(folder, make, change):
    item = sample(folder / "red_disc.mp4")
    plan = make([item])
    before = cached.audio_key(plan, item, 9)
    assert before != cached.audio_key(plan, dataclasses.replace(item, **change), 9)
    assert before != cached.audio_key(plan, item, 10)
    other = dataclasses.replace(plan.model.components["audio_vae"], digest="other")
    parts = {**plan.model.components, "audio_vae": other}
    assert before != cached.audio_key(
        dataclasses.replace(plan, model=dataclasses.replace(plan.model, components=parts)), item, 9
    )
    assert before != cached.audio_key(dataclasses.replace(plan, cache=CachePlan("x", "sample")), item, 9)
    moved = dataclasses.replace(item, path="/elsewhere", caption="other", repeats=9, shape=ClipShape(96, 32, 9))
    assert before == cached.audio_key(plan, moved, 9)
    # A file's own track and the same file beside a clip have other beginnings.
    beside = dataclasses.replace(item, sound=item.clip)
    assert before != cached.audio_key(plan, beside, 9)


def test_prompts_are_made_for_what_is_trained_and_for_joint_samples(folder, make, fill):
    prompts = (
        PromptPlan("a", "guided", "no blur", "", SHAPE, 25.0, 2, 1.0, 1, audio_guidance=7.0),
        PromptPlan("b", "a red_disc", "unused", "", SHAPE, 25.0, 2, 1.0, 1, audio_guidance=1.0),
    )
    plan = make([sample(folder / "red_disc.mp4")], "video", validation=ValidationPlan(1, True, prompts))
    data, events, encoded = fill(plan)
    made = {text.removeprefix("prompt ") for text in encoded if text.startswith("prompt")}
    assert made == {"video a red_disc", "video ", "both guided", "both no blur", "both a red_disc"}
    cache = store(plan)
    kept = cached.read_prompt_at(cache, data.samples[0].prompt_key)
    assert kept.tensors.keys() == {"video"} and kept.tokens == 3
    joint = cached.read_prompt(plan, cache, WantedPrompt("a red_disc", "both"), torch.float32)
    assert joint.tensors.keys() == {"video", "audio"}
    (told,) = [event.detail for event in events if isinstance(event, PhaseEnded) and event.phase == "prompts"]
    # [32 tokens, 8] in float32 are 1024 bytes.
    assert told == "2 captions, 1.02 kB each; 3 validation prompts, 2.05 kB each"


def test_connectors_and_what_is_kept_of_a_caption_are_in_a_prompt_s_key(folder, make):
    plan = make([sample(folder / "red_disc.mp4")])
    wanted = WantedPrompt("a", "both")
    before = cached.prompt_key(plan, wanted, torch.float32)
    features = dataclasses.replace(plan, cache=dataclasses.replace(plan.cache, text="features"))
    other = dataclasses.replace(plan.model.components["connectors"], digest="other")
    model = dataclasses.replace(plan.model, components={**plan.model.components, "connectors": other})
    assert before != cached.prompt_key(features, wanted, torch.float32)
    assert before != cached.prompt_key(dataclasses.replace(plan, model=model), wanted, torch.float32)


def ltx2(name: str, modalities: str, text_cache: str = "connectors") -> LTX2Video:
    spec, cpu = TINY[name], torch.device("cpu")
    return LTX2Video(
        spec, spec.rope, tiny_parts(spec), cpu, torch.float32, modalities=modalities, text_cache=text_cache
    )


def test_tiny_ltx2_caches_real_clips(test_data, make, fill, make_wav, tmp_path):
    """Own tracks, digital silence, no track and a file beside, at a rate that is no divisor of anything."""
    clips = test_data / "clips"
    shutil.copy(clips / "sign_walk.mkv", tmp_path / "sign_walk.mkv")
    make_wav(tmp_path / "sign_walk.wav", [(0.2, 0.5), (0.2, 0.1)])
    wanted = [("bee.mp4", 1.5), ("flower.webm", 0.0), ("cars_12fps.mp4", 0.0), ("stream.mp4", 1.0)]
    has_none = {"cars_12fps.mp4"}
    samples = [
        sample(clips / name, start, sound="" if name in has_none else "own", fps=29.97) for name, start in wanted
    ]
    samples.append(sample(tmp_path / "sign_walk.mkv", 0.1, fps=29.97))
    plan = make(samples)
    data, events, _ = fill(plan, ltx2("tiny/ltx2", "both"))
    heard = {Path(item.sample.path).name for item in data.samples if item.audio_key}
    assert len(data.samples) == 5 and heard == {"bee.mp4", "stream.mp4", "sign_walk.mkv"}
    assert "flower.webm" in notes(events) and "cars_12fps.mp4" not in notes(events)
    length, width = round(25 * 9 / 29.97), 32
    for item in data.samples:
        if item.audio_key:
            mean = levels(plan, item)
            assert mean.shape == (length, width) and mean.isfinite().all() and mean.std() > 0.1
    details = {event.phase: event.detail for event in events if isinstance(event, PhaseEnded)}
    assert details["audio"] == f"3 samples with sound, {length * width * 4 / 1e3:.3g} kB each"
    assert details["latents"] == f"5 samples, {16 * 2 * 2 * 2 * 4 / 1e3:.3g} kB each"


@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.3"])
@pytest.mark.parametrize("modalities", ["video", "audio", "both"])
def test_a_caption_weighs_what_the_formula_says(name, modalities, folder, make, fill):
    """All P positions of each trained modality's connector, as wide as it is, in the text encoder's dtype."""
    plan = make([sample(folder / "red_disc.mp4", sound="own" if modalities != "video" else "")], modalities)
    spec, tokens = TINY[name], 128
    conditioning = dataclasses.replace(plan.conditioning, prompt_tokens=tokens)
    part = ComponentPlan(source=name, kind="builtin", digest=f"builtin:{name}")
    model = dataclasses.replace(plan.model, components=dict.fromkeys(PARTS, part))
    _, events, _ = fill(dataclasses.replace(plan, conditioning=conditioning, model=model), ltx2(name, modalities))
    config = spec.connectors_config
    width = {
        kind: config[f"{kind}_connector_num_attention_heads"] * config[f"{kind}_connector_attention_head_dim"]
        for kind in ("video", "audio")
    }
    each = tokens * 4 * (width["video"] + width["audio"] if modalities == "both" else width[modalities])
    (told,) = [event.detail for event in events if isinstance(event, PhaseEnded) and event.phase == "prompts"]
    assert told == f"2 captions, {each / 1e3:.3g} kB each"


def test_a_stop_between_sounds_keeps_what_is_made(folder, make):
    plan = make([sample(folder / "red_disc.mp4", start) for start in (0.0, 0.5, 1.0)])
    stop = StopRequest()

    def stop_in_audio(event):
        if isinstance(event, PhaseAdvanced) and event.phase == "audio" and event.done == 1:
            stop.request()

    with pytest.raises(Exception, match="stopped while caching audio"):
        encode.fill(plan, Levels(), store(plan), stop_in_audio, stop)
    model = Levels()
    assert len(encode.fill(plan, model, store(plan), lambda _event: None, StopRequest()).samples) == 3
    assert model.encoded == ["sound", "sound"]


# Guard of AUDIO_VERSION = 1, as those in test_encode.py: the mean absolute level of a known stretch after tiny/ltx2's
# audio VAE. Another MIXDOWN, front end or length rule changes it, and must raise the version.
GOLDEN_AUDIO = 1.385533


def test_the_meaning_of_an_audio_entry_changes_only_with_its_version(folder, make, fill, make_wav):
    make_wav(folder / "two_discs.wav", [(0.2, 0.5), (0.2, 0.1)])
    plan = make([sample(folder / "two_discs.mp4")], "audio")
    data, _, _ = fill(plan, ltx2("tiny/ltx2", "audio"))
    assert cached.AUDIO_VERSION == 1
    assert levels(plan, data.samples[0]).abs().mean().item() == pytest.approx(GOLDEN_AUDIO, rel=1e-3)


def test_the_level_of_silence_is_80_dbfs():
    assert 20 * np.log10(SILENT_PEAK) == pytest.approx(-80)
    assert is_silent(np.full((2, 5), 0.9e-4, np.float32)) and not is_silent(np.array([[0, 0], [0, -1e-3]]))


def test_weights_are_told_in_units_that_read_well():
    assert weighed("captions", [15_728_640] * 12) == "12 captions, 15.7 MB each"
    assert weighed("captions", [12_582_912, 6_000_000]) == "2 captions, 12.6 MB each at most"
    assert weighed("samples", [768, 768]) == "2 samples, 0.768 kB each" and weighed("samples", []) == ""
