"""Batches are a function of the step: every sample once per epoch, equal shapes within a batch, draws by address."""

import dataclasses
from collections import Counter

import pytest
import torch

from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.cached import CachedData, CachedSample
from ltxforge.plan import CachePlan, ConditioningPlan, TrainingPlan
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
