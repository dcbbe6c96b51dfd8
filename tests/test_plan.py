"""The plan's pure parts: schedules against closed forms, JSON round trip, what is identity and what is free."""

import dataclasses
import math

import pytest

from ltxforge import plan as planning
from ltxforge.plan import OptimizerPlan, differences, from_json, learning_rate_at, to_json

BASE = OptimizerPlan("adamw", 2e-4, (0.9, 0.999), 1e-8, 0.0, "constant", 10, 110, 0.0, 2.0)


def rate(step: int, **changes) -> float:
    return learning_rate_at(dataclasses.replace(BASE, **changes), step)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial"])
def test_warm_up_is_linear_and_reaches_the_full_rate(schedule):
    rates = [rate(step, schedule=schedule) for step in range(1, 11)]
    assert rates == pytest.approx([2e-4 * n / 10 for n in range(1, 11)], rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: math.cos(math.pi * p / 2) ** 2),
        ("polynomial", lambda p: (1 - p) * (1 - p)),
    ],
)
def test_schedules_follow_their_closed_forms(schedule, expected):
    for step in range(11, 112):
        assert rate(step, schedule=schedule) == pytest.approx(2e-4 * expected((step - 11) / 100), abs=1e-18)
    assert rate(11, schedule=schedule) == 2e-4 and rate(110, schedule=schedule) > 0


def test_end_fraction_is_where_the_schedule_ends_and_stays():
    assert rate(111, schedule="cosine", end_fraction=0.1) == pytest.approx(2e-5)
    assert rate(500, schedule="cosine", end_fraction=0.1) == pytest.approx(2e-5)


def test_no_warm_up_starts_at_the_full_rate():
    assert rate(1, warmup_steps=0) == 2e-4


def test_json_round_trip(tiny_plan):
    assert from_json(planning.Plan, to_json(tiny_plan)) == tiny_plan


def test_an_unknown_field_is_refused(tiny_plan):
    with pytest.raises(KeyError, match="surprise"):
        from_json(planning.Plan, {**to_json(tiny_plan), "surprise": 1})


def test_free_fields_are_no_difference(tiny_plan):
    moved = dataclasses.replace(
        tiny_plan,
        steps=tiny_plan.steps * 2,
        directory="/elsewhere",
        checkpoint=planning.CheckpointPlan(1, 9),
        data=dataclasses.replace(
            tiny_plan.data, samples=tuple(dataclasses.replace(s, path="/moved") for s in tiny_plan.data.samples)
        ),
    )
    assert differences(tiny_plan, moved) == []
    assert moved.identity_digest() == tiny_plan.identity_digest()


def _leaves(value, prefix=()):
    """Every scalar identity field of a plan, as a path of field names."""
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if item.metadata.get("free"):
            continue
        if dataclasses.is_dataclass(inner):
            yield from _leaves(inner, (*prefix, item.name))
        elif isinstance(inner, (int, float, str)) or inner is None:
            yield (*prefix, item.name), inner


def _with(value, path, new):
    inner = new if len(path) == 1 else _with(getattr(value, path[0]), path[1:], new)
    return dataclasses.replace(value, **{path[0]: inner})


def test_every_identity_field_is_told_when_it_changes(tiny_plan):
    leaves = list(_leaves(tiny_plan))
    assert len(leaves) >= 30
    for path, value in leaves:
        changed = _with(tiny_plan, path, f"{value}-other" if isinstance(value, str) else (value or 0) + 1)
        assert [name for name, _, _ in differences(tiny_plan, changed)] == [".".join(path)]
        assert changed.identity_digest() != tiny_plan.identity_digest()


def test_changed_samples_are_told_by_clip(tiny_plan):
    samples = tiny_plan.data.samples

    def told(*changed):
        data = dataclasses.replace(tiny_plan.data, samples=changed, buckets=())
        return differences(tiny_plan, dataclasses.replace(tiny_plan, data=data, steps_per_epoch=99.0))

    def first(**changes):
        return (dataclasses.replace(samples[0], **changes), *samples[1:])

    assert told(*samples[1:]) == [("data: 0.mp4", "there", "gone")]
    assert told(*first(caption="x")) == [("data: 0.mp4", "as it was", "other caption")]
    assert told(*first(clip="x", start_seconds=1.0)) == [("data: 0.mp4", "as it was", "other content, windows")]
    assert told(*samples, *first(path="/clips/new.mp4", clip="x")[:1]) == [("data: new.mp4", "absent", "there")]
    assert told(*(dataclasses.replace(s, path=f"/clips/{n}.mp4", clip="x") for n, s in enumerate(samples * 2)))[-1] == (
        "data: others", "4", "likewise",
    )  # fmt: skip


def test_moved_and_renamed_clips_are_no_difference(tiny_plan):
    moved = [dataclasses.replace(s, path=f"/elsewhere/x{n}.mp4") for n, s in enumerate(tiny_plan.data.samples)]
    data = dataclasses.replace(tiny_plan.data, samples=tuple(moved))
    assert differences(tiny_plan, dataclasses.replace(tiny_plan, data=data)) == []
