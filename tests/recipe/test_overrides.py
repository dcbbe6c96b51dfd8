"""`--set key=value`: what it changes, and that it is checked like the recipe itself."""

import pytest

from ltxforge.errors import RecipeError
from ltxforge.recipe.parse import Parsed, parse

BASE = """
[model]
base = "Lightricks/LTX-Video-0.9.5"
[run]
steps = 100
[[dataset]]
path = "clips"
"""
TWO = (
    BASE
    + """id = "dogs"
[[dataset]]
path = "more"
id = "cats"
[lora]
targets = ["attention"]
[[validation.prompt]]
name = "fox"
prompt = "a fox"
"""
)


def read(*overrides: str, text: str = BASE) -> Parsed:
    return parse(text, "x.toml", overrides)


def refusal(*overrides: str, text: str = BASE) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read(*overrides, text=text)
    return caught.value


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.steps=7", "run", "steps", 7),
        ("run.steps = 1_000", "run", "steps", 1000),
        ("model.base=tiny/ltx-video", "model", "base", "tiny/ltx-video"),
        ('model.base="tiny/ltx-video"', "model", "base", "tiny/ltx-video"),
        ("model.version=0.9.5", "model", "version", "0.9.5"),
        ("model.vae=C:\\new\\vae", "model", "vae", "C:\\new\\vae"),
        ("run.directory=123", "run", "directory", "123"),
        ("run.directory=a = b # c", "run", "directory", "a = b # c"),
        ("optimizer.learning_rate=5e-5", "optimizer", "learning_rate", 5e-5),
        ("optimizer.schedule=cosine", "optimizer", "schedule", "cosine"),
        ("lora.rslora=true", "lora", "rslora", True),
        ('lora.targets=["attention", "feed_forward"]', "lora", "targets", ["attention", "feed_forward"]),
        ("flow.shift=auto", "flow", "shift", "auto"),
        ("flow.shift=3", "flow", "shift", 3.0),
        ("memory.checkpointing=2", "memory", "checkpointing", 2),
        ('"run"."seed"=3', "run", "seed", 3),
        ("run={ steps = 5, seed = 1 }", "run", "seed", 1),
    ],
)
def test_values(override: str, section: str, key: str, value: object) -> None:
    parsed = read(override)
    assert getattr(getattr(parsed.recipe, section), key) == value
    assert f"{section}.{key}" in parsed.said
    assert f"{section}.{key}" in parsed.overridden


def test_datasets_by_number_by_id_and_the_only_one() -> None:
    assert read("dataset.path=other").recipe.dataset[0].path == "other"
    recipe = read("dataset.1.repeats=4", "dataset.dogs.enabled=false", text=TWO).recipe
    assert [(item.repeats, item.enabled) for item in recipe.dataset] == [(1, False), (4, True)]


def test_prompts_by_name() -> None:
    recipe = read("validation.prompt.fox.prompt=a red fox", "validation.prompt.seed=3", text=TWO).recipe
    assert (recipe.validation.prompt[0].prompt, recipe.validation.prompt[0].seed) == ("a red fox", 3)


def test_a_dataset_can_be_added() -> None:
    recipe = read("dataset.2.path=third", "dataset.2.frames=49", text=TWO).recipe
    assert [(item.path, item.frames) for item in recipe.dataset][2:] == [("third", 49)]
    bare = BASE.replace('[[dataset]]\npath = "clips"\n', "")
    assert read("dataset.path=clips", text=bare).recipe.dataset[0].path == "clips"


def test_later_ones_win() -> None:
    assert read("run.steps=7", "run.steps=8").recipe.run.steps == 8


def test_an_empty_value_takes_the_key_out() -> None:
    parsed = read("run.steps=", "run.epochs=2.5")
    assert (parsed.recipe.run.steps, parsed.recipe.run.epochs) == (None, 2.5)
    assert "run.steps" not in parsed.said


def test_taking_out_a_dataset_keeps_the_places_of_the_others() -> None:
    parsed = read("dataset.dogs=", text=TWO)
    assert [item.id for item in parsed.recipe.dataset] == ["cats"]
    assert "dataset.0.id" in parsed.said
    (problem,) = refusal("dataset.dogs=", text=TWO.replace('path = "more"', 'path = ""')).problems
    assert problem.text == 'path = ""'


def test_the_file_keeps_what_is_not_overridden() -> None:
    parsed = read("run.seed=3")
    assert parsed.said == {"model.base", "run.steps", "run.seed", "dataset.0.path"}
    assert parsed.overridden == {"run.seed"}


def test_both_lengths_still_conflict() -> None:
    error = refusal("run.epochs=3")
    assert "--set run.epochs= takes a key out" in str(error)
    assert "steps is on line 5" in str(error)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.learning_rat=1", "learning_rat"),
        ("optimizer.learning_rate=-1", "-1"),
        ("run.steps=many", "many"),
        ("dataset.frames=48", "48"),
        ("dataset.9.path=x", "9"),
        ("lora.targets=['x', 3]", "3"),
        ("optim.lr=1", "optim"),
        ("lora.targets=['x'", "['x'"),
        ("run={ steps = 5, sede = 1 }", "sede"),
        ("validation.attention=sage", "attention"),
        ("model.base.x=1", "x"),
    ],
)
def test_problems_point_into_the_argument(override: str, part: str) -> None:
    (problem,) = refusal(override).problems
    assert problem.where == f"--set {override}"
    assert problem.text == override
    assert problem.column - 1 == override.rindex(part)
    assert problem.length == len(part)


def test_rules_see_overrides() -> None:
    (problem,) = refusal("optimizer.warmup_steps=100").problems
    assert problem.where == "--set optimizer.warmup_steps=100"
    assert "steps is on line 5" in problem.hint
    error = refusal("run.steps=5", text=BASE + "[optimizer]\nwarmup_steps = 5\n")
    assert error.problems[0].line == 9
    assert "steps comes from --set run.steps=5" in error.problems[0].hint


def test_mistakes_in_file_and_arguments_come_together() -> None:
    error = refusal("run.sede=1", "nonsense", text=BASE + "frames = 48\n")
    assert {problem.line for problem in error.problems} == {0, 8}
    assert len(error.problems) == 3


def test_an_override_mends_the_file() -> None:
    assert read("dataset.frames=49", text=BASE + "frames = 48\n").recipe.dataset[0].frames == 49
