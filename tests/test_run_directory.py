"""The data manifest: what a run goes on with when clips, their sound or their bits are other than at its beginning."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ltxforge.dataset.cached import CachedData, CachedSample
from ltxforge.errors import RunError
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


@pytest.mark.parametrize("field", ["latents_digest", "prompt_digest", "audio_digest"])
def test_other_bits_are_told(home, data, field):
    found = home.compare_data(changed(data, 1, **{field: "other"}).to_json())
    assert found == DataChanges(encoded=(data.samples[1].sample.path,))


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
