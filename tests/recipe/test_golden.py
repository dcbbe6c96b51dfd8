"""What `check` says about wrong recipes, word for word.

Each golden/NAME.toml is a recipe with a mistake, golden/NAME.txt the report. A line `#$ --set key=value` in the recipe
is an override. After a change of wording run `LTXFORGE_REWRITE_GOLDEN=1 pytest tests/recipe/test_golden.py` and read
the diff.
"""

import os
from pathlib import Path

import pytest

from ltxforge.errors import RecipeError
from ltxforge.recipe.parse import load, parse
from ltxforge.recipe.report import render

GOLDEN = Path(__file__).parent / "golden"
MISTAKES = sorted(path.stem for path in GOLDEN.glob("*.toml"))


def report_on(name: str) -> str:
    """The report, with the file named as a user in its folder would see it; no backtrace of how it was reached."""
    path = GOLDEN / f"{name}.toml"
    marks = [line for line in path.read_bytes().split(b"\n") if line.startswith(b"#$ --set ")]
    overrides = [mark.decode().removeprefix("#$ --set ") for mark in marks]
    try:
        parsed = load(path, overrides)
    except RecipeError as error:
        assert any(problem.level == "error" for problem in error.problems)
        return str(error).replace(str(path), path.name) + "\n"
    assert parsed.doubts, f"{name} is a recipe without any mistake"
    return render(parsed.doubts).replace(str(path), path.name) + "\n"


@pytest.mark.parametrize("name", MISTAKES)
def test_report(name: str) -> None:
    expected = GOLDEN / f"{name}.txt"
    report = report_on(name)
    if os.environ.get("LTXFORGE_REWRITE_GOLDEN"):
        expected.write_bytes(report.encode())
    assert report == expected.read_text(encoding="utf-8")


def test_every_text_has_its_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(MISTAKES)
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize("name", MISTAKES)
def test_nothing_raw_reaches_the_terminal(name: str) -> None:
    """No control character but the line ends, whatever the recipe holds."""
    assert all(character == "\n" or character.isprintable() for character in report_on(name))


def test_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"no such file\n.*did you mean .*quickstart\.toml"):
        load(tmp_path / "quickstrat.toml")


def test_folder_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"this is a folder(.|\n)*a\.toml"):
        load(tmp_path)


def test_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.toml"
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="at most 1,048,576"):
        load(path)


def test_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    recipe = b'[model]\nbase = "tiny/ltx-video"\n[run]\nsteps = 1\n[[dataset]]\npath = "clips"\n'
    path.write_bytes(recipe + b"#" * (2**20 - len(recipe)))
    assert load(path).recipe.run.steps == 1


def test_line_ends_do_not_matter() -> None:
    text = (GOLDEN / "key_typo.toml").read_text(encoding="utf-8")
    with pytest.raises(RecipeError) as unix:
        parse(text, "x.toml")
    with pytest.raises(RecipeError) as windows:
        parse(text.replace("\n", "\r\n"), "x.toml")
    assert str(unix.value) == str(windows.value)
