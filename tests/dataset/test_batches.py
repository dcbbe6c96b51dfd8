"""Batches are a function of the step: every sample once per epoch, equal shapes within a batch, draws by address."""

import dataclasses
from collections import Counter

import pytest
import torch

from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.cached import CachedData, CachedSample
from ltxforge.plan import CachePlan, ConditioningPlan, TrainingPlan
from ltxforge.randomness import address
from ltxforge.specs import TINY


def made_up_data(plan, cache, channels=16, width=8):
    """Cache entries with random latents for the plan's samples; every value is the sample's own."""
    samples = []
    for number, sample in enumerate(plan.data.samples):
        shape, generator = sample.shape.latent(), torch.Generator().manual_seed(number)
        mean = torch.randn(channels, shape.frames, shape.height, shape.width, generator=generator)
        keys = {"clip": sample.clip}, {"caption": sample.caption}
        latents = cache.write("latents", keys[0], {"mean": mean, "std": torch.full_like(mean, 0.5)})
        prompt = cache.write(
            "prompts",
            keys[1],
            {"embeds": torch.full((3 + number, width), float(number)), "tokens": torch.tensor(3 + number)},
        )
        samples.append(CachedSample(sample, keys[0], latents.digest, keys[1], prompt.digest))
    empty = {"caption": ""}
    nothing = cache.write("prompts", empty, {"embeds": torch.full((1, width), -1.0), "tokens": torch.tensor(1)})
    return CachedData(tuple(samples), empty, nothing.digest)


@pytest.fixture
def make(plan_maker, tmp_path):
    def build(**changes):
        plan = plan_maker(**changes)
        cache = Cache(tmp_path / "cache", lambda _event: None)
        return Batches(plan, made_up_data(plan, cache, TINY["tiny/ltx-video"].latent_channels), cache)

    return build


@pytest.mark.parametrize(("size", "accumulate", "per_epoch"), [(1, 1, 6), (2, 2, 3), (4, 1, 2), (8, 3, 2)])
def test_an_epoch_sees_every_sample_once_in_batches_of_one_shape(make, size, accumulate, per_epoch):
    batches = make(training=TrainingPlan(size, accumulate, 1.0, None))
    assert batches.per_epoch == per_epoch
    steps = 5 * per_epoch  # whole epochs whatever accumulate is
    seen = [batches.index_at(step, micro) for step in range(1, steps + 1) for micro in range(accumulate)]
    for epoch in range(len(seen) // per_epoch):
        part = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(n for index in part for n in index.samples) == dict.fromkeys(range(6), 1)
    for index in seen:
        assert len({n < 4 for n in index.samples}) == 1, "the first four samples have another shape than the rest"
    assert len({tuple(i.samples for i in seen[e * per_epoch : (e + 1) * per_epoch]) for e in range(5)}) > 1


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 2), (8, 3)])
def test_the_largest_micro_batch_is_one_with_most_tokens(make, size, accumulate):
    """Four samples have 8 tokens each and two have 18: the rows of a batch count too."""
    batches = make(training=TrainingPlan(size, accumulate, 1.0, None))
    step, micro = batches.largest()
    chosen = batches.load(step, micro)
    everything = [batches.load(s, m) for s in range(1, 2 * batches.per_epoch + 1) for m in range(accumulate)]
    assert chosen.clean.numel() == max(batch.clean.numel() for batch in everything)
    assert micro < accumulate


def test_repeats_count(make, tiny_plan):
    samples = tuple(dataclasses.replace(s, repeats=3 if n == 5 else 1) for n, s in enumerate(tiny_plan.data.samples))
    batches = make(data=dataclasses.replace(tiny_plan.data, samples=samples), training=TrainingPlan(1, 1, 1.0, None))
    seen = Counter(batches.index_at(step, 0).samples[0] for step in range(1, 9))
    assert batches.per_epoch == 8 and seen == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 3}


def test_indices_run_through_the_whole_step(make):
    batches = make(training=TrainingPlan(3, 4, 1.0, None))
    for step in range(1, 6):
        numbers = []
        for micro in range(4):
            index = batches.index_at(step, micro)
            numbers += range(index.first_index, index.first_index + len(index.samples))
        assert numbers == list(range(batches.count_at(step).video))


def test_order_of_asking_changes_nothing(make):
    forwards, backwards = make(), make()
    asked = [(step, micro) for step in range(1, 8) for micro in range(2)]
    first = {at: forwards.index_at(*at) for at in asked}
    second = {at: backwards.index_at(*at) for at in reversed(asked)}
    assert first == second


def test_a_batch_holds_its_samples_content(make):
    batches = make(conditioning=ConditioningPlan(0.0, 0.0, 32))
    index, batch = batches.index_at(2, 1), batches.load(2, 1)
    assert not batch.clean.any()
    for row, number in enumerate(index.samples):
        assert batch.samples[row].sample.clip == f"clip{number}"
        assert (batch.prompts[row].tensors["embeds"] == number).all() and batch.prompts[row].tokens == 3 + number


def test_conditioning_is_drawn_with_its_probability_and_by_address(make):
    batches = make(conditioning=ConditioningPlan(0.5, 0.25, 32), training=TrainingPlan(2, 1, 1.0, None))
    kept, dropped, count = 0, 0, 0
    for step in range(1, 301):
        batch = batches.load(step, 0)
        area = batch.shape.height * batch.shape.width
        for row in range(len(batch.prompts)):
            count += 1
            kept += bool(batch.clean[row].any())
            dropped += bool((batch.prompts[row].tensors["embeds"] == -1).all())
            assert batch.clean[row].sum() in (0, area) and not batch.clean[row, area:].any()
    # Standard deviations are about 0.02.
    assert kept / count == pytest.approx(0.5, abs=0.08) and dropped / count == pytest.approx(0.25, abs=0.08)
    assert torch.equal(batches.load(17, 0).clean, batches.load(17, 0).clean)


def test_posterior_samples_are_drawn_by_address(make, tiny_plan):
    batches = make(cache=CachePlan(tiny_plan.cache.directory, "sample"), training=TrainingPlan(4, 1, 1.0, None))
    first, again, later = batches.load(1, 0), batches.load(1, 0), batches.load(3, 0)
    first, again, later = (batch.latents.video for batch in (first, again, later))
    assert torch.equal(first, again)
    assert first.shape != later.shape or not torch.equal(first, later)


def test_the_rate_of_epochs(make):
    batches = make(training=TrainingPlan(2, 2, 1.0, None))
    assert batches.per_epoch == 3 and batches.epoch_at(3) == 2.0


def with_sound(data, cache, positions, length=9, channels=4):
    """The data with made-up sound for the samples at these positions, every value the sample's own."""
    samples = list(data.samples)
    for position in positions:
        mean = torch.full((length, channels), 100.0 + position)
        entry = cache.write("audio", {"sound": position}, {"mean": mean, "std": torch.full_like(mean, 0.5)})
        samples[position] = dataclasses.replace(
            samples[position], audio_key={"sound": position}, audio_digest=entry.digest
        )
    return dataclasses.replace(data, samples=tuple(samples))


@pytest.fixture
def make_with_sound(plan_maker, tmp_path):
    def build(positions, size=4, accumulate=1, modalities="both", kept="mean", **changes):
        plan = plan_maker(training=TrainingPlan(size, accumulate, 1.0, None, modalities), **changes)
        cache = Cache(tmp_path / "cache", lambda _event: None)
        data = with_sound(made_up_data(plan, cache), cache, positions)
        if kept == "mean":
            for item in data.samples:
                for kind, key in (("latents", item.latents_key), ("audio", item.audio_key)):
                    if key is not None:
                        cache.write(kind, key, {"mean": cache.read(kind, key).tensors["mean"]})
        if modalities == "audio":
            silent = [item.identity for item in data.samples if item.audio_key is None]
            data = data.without(silent)
            data = dataclasses.replace(
                data, samples=tuple(dataclasses.replace(item, latents_key=None) for item in data.samples)
            )
        return Batches(plan, data, cache)

    return build


def test_sound_of_those_that_have_it_and_zeros_for_the_others(make_with_sound):
    batches = make_with_sound([0, 2])  # of the first bucket's four; the second bucket's two have none
    for step in (1, 2):
        index, batch = batches.index_at(step, 0), batches.load(step, 0)
        heard = [position in (0, 2) for position in index.samples]
        if not any(heard):
            assert batch.latents.audio is None and batch.present is None
            assert batches.count_at(step).audio is None
            continue
        assert batch.latents.audio.shape == (4, 9, 4) and batch.present.tolist() == heard
        assert batches.count_at(step).audio == 2
        for row, position in enumerate(index.samples):
            assert (batch.latents.audio[row] == (100 + position if heard[row] else 0)).all()
    assert batches.count_at(1).video + batches.count_at(2).video == 6


def test_counts_are_of_the_whole_step(make_with_sound):
    batches = make_with_sound([0, 4, 5], size=1, accumulate=3)
    for step in range(1, 9):
        found = [batches.load(step, micro).present for micro in range(3)]
        assert batches.count_at(step).video == 3
        assert (batches.count_at(step).audio or 0) == sum(
            int(present.sum()) for present in found if present is not None
        )


def test_sound_alone_has_no_pictures_but_their_lengths(make_with_sound):
    batches = make_with_sound([0, 1, 2, 4], size=2, modalities="audio")
    for step in range(1, 7):
        batch = batches.load(step, 0)
        assert batch.latents.video is None and batch.present.all() and batch.fps == 25.0
        assert batches.count_at(step).video is None and batches.count_at(step).audio == len(batch.samples)
        assert batch.shape == batch.samples[0].sample.shape.latent()


def test_how_many_steps_have_sound(make_with_sound):
    batches = make_with_sound([1], size=1, accumulate=2)
    counted = [batches.count_at(step).audio is not None for step in range(1, 31)]
    assert sum(counted) == 10, "one of six samples, two of them a step: one step of an epoch's three"
    assert batches.steps_with_sound(1, 30) == 10
    assert batches.steps_with_sound(5, 17) == sum(counted[4:17]) and batches.steps_with_sound(3, 2) == 0
    assert make_with_sound([]).steps_with_sound(1, 30) == 0


def test_sound_is_drawn_from_its_posterior_at_its_own_address(make_with_sound):
    batches = make_with_sound([0, 1, 2, 3, 4, 5], kept="sample")
    first, again, later = (batches.load(step, 0) for step in (1, 1, 3))
    assert torch.equal(first.latents.audio, again.latents.audio)
    draws = []
    for batch in (first, later):
        means = torch.tensor([100.0 + int(item.sample.clip[4:]) for item in batch.samples])
        draws.append((batch.latents.audio - means[:, None, None]) / 0.5)
    for drawn in draws:
        assert 0.5 < drawn.std() < 1.5 and len(drawn.unique(dim=0)) == len(drawn)
    assert not torch.equal(draws[0][0], draws[1][0])
    generator = torch.Generator().manual_seed(address(42, "audio-posterior", 1, 0))
    assert draws[0][0] == pytest.approx(torch.randn(9, 4, generator=generator), abs=1e-4)
    # Another than the picture's, which is at "posterior".
    other = torch.Generator().manual_seed(address(42, "posterior", 1, 0))
    assert draws[0][0] != pytest.approx(torch.randn(9, 4, generator=other), abs=1e-4)
