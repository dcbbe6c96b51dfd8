"""A suite's mistakes: all at once, located, with the nearest legal thing; and the suites that come with ltxforge."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltxforge.errors import PlanError, RecipeError
from ltxforge.shapes import ClipShape
from ltxforge.suites import read as suites

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = 'suite = "step"\n[[case]]\nname = "a"\nmodel = "tiny/ltx2"\nsize = "64x64x9"\n'


def problems(text: str) -> list[tuple[str, str, str, int]]:
    """(key, message, hint, line) of each problem."""
    with pytest.raises(RecipeError) as caught:
        suites.parse(text, "my.toml")
    return [(problem.key, problem.what, problem.hint, problem.line) for problem in caught.value.problems]


def test_defaults_follow_the_model():
    case = suites.parse(GOOD, "my.toml").case[0]
    assert (case.trained, case.rate, case.shape) == ("both", 24.0, ClipShape(64, 64, 9))
    silent = suites.parse(GOOD.replace("tiny/ltx2", "0.9.5"), "my.toml").case[0]
    assert (silent.trained, silent.rate) == ("video", 25.0)
    assert (case.steps, case.rank, case.checkpointing, case.precision, case.batch_size) == (20, 32, 1, "bf16", 1)


@pytest.mark.parametrize(
    ("line", "key", "message", "hint"),
    [
        ("warmup_step = 3", "case.0.warmup_step", "unknown key `warmup_step` in [[case]]", "`warmup_steps`"),
        ("zzz = 3", "case.0.zzz", "unknown key `zzz` in [[case]]", "legal here: name, peers, floors, model, size"),
        ('modalities = "vidoe"', "case.0.modalities", 'must be one of "video", "audio", "both"', '"video"'),
        ("steps = 0", "case.0.steps", "steps must be a whole number from 1 to 100000000, not 0", ""),
        ("warmup_steps = 0", "case.0.warmup_steps", "warmup_steps must be a whole number from 1 to 1000, not 0", ""),
        ("rank = 8.5", "case.0.rank", "rank must be a whole number from 1 to 1024, not 8.5", ""),
        ("targets = []", "case.0.targets", "targets is empty", "at least one"),
        ('targets = ["re:("]', "case.0.targets", "is no regular expression", ""),
        ("fps = 0", "case.0.fps", "fps must be a number above 0 and at most 240, not 0", ""),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_told_with_the_nearest_right_one(line, key, message, hint):
    found = problems(GOOD + line + "\n")
    assert len(found) == 1, found
    assert found[0][0] == key and found[0][3] == 6
    assert message in found[0][1] and hint in found[0][2], found


@pytest.mark.parametrize(
    ("size", "message", "hint"),
    [
        ("768x512", "is no size", '"768x512x49"'),
        ("760x512x49", "multiples of 32", "nearest: 768x512x49"),
        ("768x512x50", "8k + 1", "nearest: 768x512x49 or 768x512x57"),
    ],
)
def test_a_size_that_cannot_be_encoded_is_told_with_the_nearest(size, message, hint):
    found = problems(GOOD.replace("64x64x9", size))
    assert len(found) == 1 and message in found[0][1], found
    assert hint in found[0][2]


def test_an_unknown_version_gets_the_nearest():
    (found,) = problems(GOOD.replace("tiny/ltx2", "tiny/ltx3"))
    assert "model must be one of" in found[1] and found[2] in (
        'did you mean "tiny/ltx2"?',
        'did you mean "tiny/ltx2.3"?',
    )


def test_all_mistakes_come_at_once():
    text = 'suit = "step"\n[[case]]\nnam = "a"\nmodel = "2.0-dev"\nsize = "64x64x9"\nsteps = "many"\n'
    keys = {key for key, *_ in problems(text)}
    assert keys == {"suit", "suite", "case.0.nam", "case.0.name", "case.0.steps"}


@pytest.mark.parametrize(("text", "message"), [
    ('suite = "step"\ncase = []\n', "cases are tables"),
    ('suite = "step"\n', "`case` is missing"),
    ('suite = "step"\ncase = "all"\n', "cases are tables"),
    ('suite = "step"\ncase = [3]\n', "cases are tables"),
    ('suite = "kernel"\n' + GOOD.partition("\n")[2], 'suite must be one of "kernels", "step", "encode", "memory"'),
    ("suite = step\n", "`step` is no value"),
])  # fmt: skip
def test_the_file_s_own_shape(text, message):
    assert any(message in what for _, what, *_ in problems(text)), problems(text)


def test_what_no_single_key_can_know():
    doubled = GOOD + GOOD.partition("\n")[2]
    (found,) = problems(doubled)
    assert found[0] == "case.1.name" and 'two cases are called "a"' in found[1] and "line 3" in found[2]
    (found,) = problems(GOOD.replace("tiny/ltx2", "tiny/ltx-video") + 'modalities = "audio"\n')
    assert found[0] == "case.0.modalities" and "tiny/ltx-video makes no sound" in found[1]


def test_named_cases_alone_are_kept(tmp_path):
    path = tmp_path / "step.toml"
    path.write_text(GOOD + GOOD.partition("\n")[2].replace('"a"', '"second"'), encoding="utf-8")
    assert [case.name for case in suites.load(path).case] == ["a", "second"]
    assert [case.name for case in suites.load(path, ["second"]).case] == ["second"]
    with pytest.raises(PlanError, match="(?s)no case 'secnd'.*Did you mean second"):
        suites.load(path, ["secnd"])
    with pytest.raises(PlanError, match="no such suite"):
        suites.load(tmp_path / "absent.toml")


def test_the_issue_s_cases_are_in_the_step_suite():
    """LTX-2 19B with sound at 768x512, 49 and 121 frames, twenty steps each."""
    cases = suites.load(ROOT / "bench" / "step.toml").case
    wanted = [c for c in cases if c.model == "2.0-dev" and c.trained == "both" and c.steps == 20]
    assert {str(case.shape) for case in wanted} >= {"768x512x49", "768x512x121"}
    assert any(case.spec.tiny for case in cases), "something must run without a GPU"
