"""The data manifest: what a run goes on with when clips, their sound or their bits are other than at its beginning."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ltxforge.dataset.cached import CachedData, CachedSample
from ltxforge.errors import RunError
from ltxforge.recipe.schema import Memory
from ltxforge.run_directory import DataChanges, RunDirectory


@pytest.fixture
def data(tiny_plan) -> CachedData:
    """Three samples, the first two with sound."""
    samples = tuple(
        CachedSample(
            sample, {"n": n}, f"picture {n}", {"n": n}, f"prompt {n}",
            {"n": n} if n < 2 else None, f"sound {n}" if n < 2 else "",
        )
        for n, sample in enumerate(tiny_plan.data.samples[:3])
    )  # fmt: skip
    return CachedData(samples, {}, "empty")


@pytest.fixture
def home(data, tmp_path) -> RunDirectory:
    """A run that has begun with that data."""
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    found.save_data(data.to_json())
    (found.path / "checkpoints" / "step-000002").mkdir(parents=True)
    assert found.has_run()
    return found


def changed(data: CachedData, number: int, **fields) -> CachedData:
    samples = list(data.samples)
    samples[number] = dataclasses.replace(samples[number], **fields)
    return dataclasses.replace(data, samples=tuple(samples))


def test_the_same_data_goes_on(home, data):
    assert home.compare_data(data.to_json()) == DataChanges()


@pytest.mark.parametrize(
    ("part", "words"), [("latents", "pictures"), ("prompt", "captions"), ("audio", "sound")]
)  # fmt: skip
def test_other_bits_are_told(home, data, part, words):
    found = home.compare_data(changed(data, 1, **{f"{part}_digest": "other"}).to_json())
    assert found == DataChanges(encoded={part: (data.samples[1].sample.path,)})
    assert found.encoded_words() == f"the {words} of 1 sample (1.mp4)"


def test_the_empty_caption_is_no_sample(home, data):
    samples = tuple(dataclasses.replace(item, prompt_digest="other") for item in data.samples)
    found = home.compare_data(CachedData(samples, {}, "other").to_json())
    assert found.encoded_words() == "the captions of 3 samples (0.mp4, 1.mp4, 2.mp4), the empty caption"
    assert home.compare_data(data.to_json()).encoded_words() == ""


def test_many_samples_are_counted_and_a_few_clips_named():
    paths = tuple(f"/clips/{n // 2}.mp4" for n in range(14))
    words = DataChanges(encoded={"prompt": paths}).encoded_words()
    assert words == "the captions of 14 samples (0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4, …)"


def test_another_base_is_refused_in_the_recipe_s_words(home, tiny_plan):
    """What follows from it is not named, and every key of [memory] is accounted for."""
    other = dataclasses.replace(tiny_plan.memory, base_precision="nf4", double_quant=True)
    with pytest.raises(RunError) as refused:
        home.require_same_run(tiny_plan, dataclasses.replace(tiny_plan, memory=other))
    text = str(refused.value)
    assert "memory.base_precision: bf16 -> nf4" in text and "memory.double_quant" not in text
    for name in set(Memory.model_fields) - {"base_precision", "double_quant"}:
        assert name in text, name
    whole = dataclasses.replace(tiny_plan, memory=other)
    with pytest.raises(RunError, match="memory.double_quant: true -> false"):
        home.require_same_run(whole, dataclasses.replace(whole, memory=dataclasses.replace(other, double_quant=False)))


def test_sound_that_vanished_stops_the_run(home, data):
    with pytest.raises(RunError, match=r"(?s)1 samples' sound.*/clips/1\.mp4"):
        home.compare_data(changed(data, 1, audio_key=None, audio_digest="").to_json())


def test_sound_that_newly_appeared_is_left_out(home, data):
    late = changed(data, 2, audio_key={"n": 2}, audio_digest="sound 2")
    found = home.compare_data(late.to_json())
    assert found == DataChanges(late_sound=frozenset({data.samples[2].identity}))
    assert late.without_sound(found.late_sound) == data


def test_samples_that_vanished_or_appeared(home, data):
    with pytest.raises(RunError, match="1 samples that this run began with"):
        home.compare_data(data.without({data.samples[0].identity}).to_json())
    (home.path / "data.json").write_text(
        json.dumps(data.without({data.samples[2].identity}).to_json()), encoding="utf-8"
    )
    assert home.compare_data(data.to_json()) == DataChanges(late=frozenset({data.samples[2].identity}))


def test_a_manifest_from_before_there_was_sound_has_none(home, data):
    """Its samples go on without."""
    old = data.to_json()
    for entry in old["samples"]:
        del entry["audio"]
    (home.path / "data.json").write_text(json.dumps(old), encoding="utf-8")
    found = home.compare_data(data.to_json())
    assert found.late_sound == {item.identity for item in data.samples[:2]} and not found.encoded


def test_an_unreadable_manifest_is_an_error(home, data):
    (home.path / "data.json").write_text("[", encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read"):
        home.compare_data(data.to_json())
