"""The way from text to recipe as a whole: what is said, what it costs, what it imports, what editors are told."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import tomli

from ltxforge.errors import RecipeError
from ltxforge.recipe.json_schema import recipe_schema
from ltxforge.recipe.parse import load, parse
from ltxforge.recipe.schema import Recipe
from ltxforge.specs import TINY

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))
RICH = Path(__file__).parent / "rich.toml"
RICH_LTX2 = RICH.with_stem("rich_ltx2")
GOLDEN = Path(__file__).parent / "golden"
VALIDATOR = jsonschema.Draft7Validator(recipe_schema())


def test_said_is_what_the_text_says() -> None:
    parsed = parse(
        'model.base = "tiny/ltx-video"\nrun = { steps = 3 }\n[[dataset]]\npath = "a"\n[[dataset]]\npath = "b"\n'
        '[validation]\n[[validation.prompt]]\nname = "x"\nprompt = "y"\n[lora]\ntargets = ["all"]\n',
        "x.toml",
    )
    assert parsed.said == {
        "model.base", "run.steps", "dataset.0.path", "dataset.1.path", "lora.targets",
        "validation.prompt.0.name", "validation.prompt.0.prompt",
    }  # fmt: skip
    assert not parsed.overridden
    assert not parsed.warnings


def test_the_rich_recipes_are_right_and_say_most_keys() -> None:
    """What the other tests spoil must be whole before."""
    said = {key for path in (RICH, RICH_LTX2) for key in load(path).said}
    assert not [warning for path in (RICH, RICH_LTX2) for warning in load(path).warnings]
    for section in ("model", "training", "audio", "lora", "conditioning", "memory", "cache", "validation"):
        keys = Recipe.model_fields[section].annotation.model_fields
        assert {f"{section}.{key}" for key in keys} - said <= {"training.clip_norm", "validation.prompt"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_leave_no_doubt(path: Path) -> None:
    """As they are, and with the small models of every wiring in the place of the real one."""
    small = [name for name in TINY if name.startswith("tiny/ltx2") and path.stem.startswith("ltx2")]
    for overrides in ([], *([f"model.base={name}"] for name in small)):
        assert not load(path, overrides).warnings


def test_a_parsed_file_knows_its_path_and_text() -> None:
    parsed = load(RICH)
    assert parsed.path == str(RICH)
    assert parsed.text == RICH.read_text(encoding="utf-8")
    assert parsed.recipe == Recipe.model_validate(tomli.loads(parsed.text))


def test_a_lion_s_epsilon_is_told_to_be_read_by_nobody() -> None:
    overrides = ["optimizer.name=paged_lion8bit", "optimizer.epsilon=1e-6"]
    (warning,) = load(SHIPPED[0], overrides).warnings
    assert 'epsilon means nothing to "paged_lion8bit"' in warning
    assert not load(SHIPPED[0], ["optimizer.name=ademamix8bit", "optimizer.epsilon=1e-6"]).warnings


def test_warnings_are_located_lines() -> None:
    (warning,) = load(SHIPPED[0], ["optimizer.schedule=polynomial", "checkpoint.every=99999"]).warnings
    assert warning.startswith("--set checkpoint.every=99999  every = 99999: a run of ")


def test_many_problems_are_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("\n".join(f"[x{number}]" for number in range(500)), "x.toml")
    assert len(str(caught.value).split("\n")) < 200
    assert "only the first 50 of" in str(caught.value)


@pytest.mark.parametrize("path", [*SHIPPED, RICH, RICH_LTX2], ids=lambda path: path.stem)
def test_recipes_fit_the_json_schema(path: Path) -> None:
    VALIDATOR.validate(tomli.loads(path.read_text(encoding="utf-8")))


def test_json_schema_is_one() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    jsonschema.Draft7Validator.check_schema(schema)
    assert "null" not in json.dumps(schema)
    for name, table in schema["definitions"].items():
        assert table["additionalProperties"] is False
        for key, item in table["properties"].items():
            assert item.get("description"), f"{name}.{key}"


@pytest.mark.parametrize(
    "name",
    ["key_typo", "missing_base", "missing_path", "clip_zero", "alpha_zero", "rank_out_of_range", "number_in_quotes",
     "choice_typo", "targets_as_text", "size_unreadable", "betas_one", "windows_zero", "section_double_brackets",
     "prompt_name_unsafe", "keep_one", "shift_negative", "no_datasets", "blank_path"],
)  # fmt: skip
def test_editors_see_the_mistake_too(name: str) -> None:
    data = tomli.loads((GOLDEN / f"{name}.toml").read_text(encoding="utf-8"))
    assert not VALIDATOR.is_valid(data)


def test_no_torch_and_soon() -> None:
    """A new process imports, parses and refuses without torch, in well under half a second.

    Judged by the processor's time, the interpreter's start included: other tests share the cores.
    """
    program = (
        "import sys, time\n"
        "from ltxforge.recipe.parse import load\n"
        "from ltxforge.errors import RecipeError\n"
        "load(sys.argv[1])\n"
        "try: load(sys.argv[1], ['lora.rnk=3', 'dataset.frames=48'])\n"
        "except RecipeError: pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'av', 'PIL', 'rich'} & sys.modules.keys()\n"
        "print(time.process_time(), *heavy)"
    )
    command = [sys.executable, "-c", program, str(SHIPPED[0])]
    runs = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, *heavy = done.stdout.split()
        assert not heavy
        runs.append(float(seconds))
    assert min(runs) < 0.4, runs


@pytest.mark.parametrize(
    ("path", "key"), [(path, key) for path in (RICH, RICH_LTX2) for key in sorted(load(path).said)]
)
def test_one_faulty_key_is_one_problem(path: Path, key: str) -> None:
    """Nothing is judged by the default or example that stands in for a faulty value."""
    with pytest.raises(RecipeError) as caught:
        load(path, [f"{key}={{}}"])
    assert [problem.key for problem in caught.value.problems] == [key]
