"""Mutated recipes: each gives a Recipe or located problems, soon, and never another exception. Seeds are fixed."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ltxforge.errors import RecipeError
from ltxforge.recipe.parse import Parsed, parse

ROOT = Path(__file__).parents[2]
RICH = (Path(__file__).parent / "rich.toml").read_text(encoding="utf-8")
SHIPPED = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.toml"))}
MUTANTS = 300

VALUES = [
    "0", "-1", "1", "2", "9", "48", "0.5", "2.5", "-0.0", "1e-400", "1e400", "nan", "inf", "-inf", "9" * 300,
    "0x" + "f" * 5000, "true", "false", '""', '"x"', '"768x512"', '"auto"', "'C:\\new'", '"C:\\new"', '"\\u0000"',
    '"悪い\u202e"', '"\\u001b[2J"', "[]", "[1]", "[[[1]]]", '["attention", 3, {}]', "{}", "{ a = 1 }",
    "{ steps = 1, every = 2 }", "1979-05-27", "07:32:00", "1979-05-27 07:32:00",
]  # fmt: skip
BROKEN_VALUES = ["bare", "None", "=", "[", "{", '"', "'''", '"""', "[" * 600, "9" * 5000, "{ a = 1, a = 2 }", "\\", ""]
NAMES = ["x", "''", '"a b"', "rank", '"名"', "a.b.c", "steps", "dataset", "lr", "a" * 3000, "0", "-", '"\\u0000"']
BROKEN_NAMES = ["名", ".", "a b", "[x]", "= 1 #"]
HEADERS = [
    "[x]",
    "[[x]]",
    "[dataset.x]",
    "[[dataset]]",
    "[[validation.prompt]]",
    "[a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r]",
]
BROKEN_HEADERS = ["[run]", "[[run]]", "[dataset]", "[validation.prompt]", "[model.base]", "[", "[]", "[[]]", "[x"]

Mutation = Callable[[random.Random, list[str]], None]


def _pairs(lines: list[str]) -> list[int]:
    return [place for place, line in enumerate(lines) if re.match(r"\s*[\w.\"']+\s*=", line)] or [0]


def _one_of(draw: random.Random, sound: list[str], broken: list[str]) -> str:
    return draw.choice(broken if draw.random() < 0.1 else sound)


def change_value(draw: random.Random, lines: list[str]) -> None:
    place = draw.choice(_pairs(lines))
    lines[place] = f"{lines[place].partition('=')[0]}= {_one_of(draw, VALUES, BROKEN_VALUES)}"


def borrow_value(draw: random.Random, lines: list[str]) -> None:
    place, other = draw.choice(_pairs(lines)), draw.choice(_pairs(lines))
    lines[place] = f"{lines[place].partition('=')[0]}={lines[other].partition('=')[2]}"


def drop_pair(draw: random.Random, lines: list[str]) -> None:
    del lines[draw.choice(_pairs(lines))]
    lines.append("")


def rename_key(draw: random.Random, lines: list[str]) -> None:
    place = draw.choice(_pairs(lines))
    key, _, value = lines[place].partition("=")
    spot = draw.randrange(len(key) or 1)
    without, with_more = key[:spot] + key[spot + 1 :], key[:spot] + draw.choice("abz_-") + key[spot:]
    lines[place] = f"{draw.choice((without, with_more, _one_of(draw, NAMES, BROKEN_NAMES)))} ={value}"


def add_pair(draw: random.Random, lines: list[str]) -> None:
    pair = f"{_one_of(draw, NAMES, BROKEN_NAMES)} = {_one_of(draw, VALUES, BROKEN_VALUES)}"
    lines.insert(draw.choice(_pairs(lines)), pair)


def add_header(draw: random.Random, lines: list[str]) -> None:
    lines.insert(draw.choice(_pairs(lines)), _one_of(draw, HEADERS, BROKEN_HEADERS))


def move_line(draw: random.Random, lines: list[str]) -> None:
    lines.insert(draw.randrange(len(lines) + 1), lines.pop(draw.randrange(len(lines))))


def repeat_lines(draw: random.Random, lines: list[str]) -> None:
    start = draw.randrange(len(lines))
    lines[start:start] = lines[start : start + draw.randint(1, 6)]


def drop_lines(draw: random.Random, lines: list[str]) -> None:
    start = draw.randrange(len(lines))
    del lines[start : start + draw.randint(1, 4)]
    lines.append("")


def truncate(draw: random.Random, lines: list[str]) -> None:
    text = "\n".join(lines)
    lines[:] = text[: draw.randrange(len(text) + 1)].split("\n")


def spoil_character(draw: random.Random, lines: list[str]) -> None:
    place = draw.randrange(len(lines))
    spot = draw.randrange(len(lines[place]) + 1)
    odd = draw.choice("\x00\x1b\u202e\ufeff\u2028悪\U0001f600\"'[]{}=.,#\\\t")
    lines[place] = lines[place][:spot] + odd + lines[place][spot + draw.randint(0, 1) :]


def change_header(draw: random.Random, lines: list[str]) -> None:
    headers = [place for place, line in enumerate(lines) if line.startswith("[")]
    lines[draw.choice(headers or [0])] = _one_of(draw, HEADERS, BROKEN_HEADERS)


MUTATIONS: list[Mutation] = [
    change_value, change_value, change_value, borrow_value, borrow_value, drop_pair, drop_pair, rename_key, rename_key,
    add_pair, add_header, move_line, repeat_lines, drop_lines, truncate, spoil_character, change_header,
]  # fmt: skip
OVERRIDES = [
    "run.steps={}", "dataset.path={}", "dataset.0.frames={}", "{}={}", "lora.{}={}", "validation.prompt.fox.{}={}",
    "dataset.{}.id={}", "model={}", "lora.targets.0={}", "{}", "a.b.c.d={}", "dataset={}", "run=",
]  # fmt: skip


def mutant(seed: int) -> tuple[str, list[str]]:
    """A mutated recipe and some overrides; every third is the rich recipe."""
    draw = random.Random(seed)
    lines = (RICH if seed % 3 == 0 else draw.choice(list(SHIPPED.values()))).split("\n")
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        draw.choice(MUTATIONS)(draw, lines)
    overrides = []
    if draw.random() < 0.3:
        form = draw.choice(OVERRIDES)
        words = [draw.choice(NAMES) if draw.random() < 0.5 else draw.choice(VALUES) for _ in range(form.count("{}"))]
        overrides.append(form.format(*words))
    return "\n".join(lines), overrides


def outcome(text: str, overrides: list[str]) -> Parsed | RecipeError:
    """What parsing gives, after checking what holds for every refusal."""
    begun = time.perf_counter()
    try:
        result: Parsed | RecipeError = parse(text, "x.toml", overrides)
    except RecipeError as error:
        result = error
    assert time.perf_counter() - begun < 1
    if isinstance(result, RecipeError):
        assert any(problem.level == "error" for problem in result.problems)
        for problem in result.problems:
            assert problem.what
            assert problem.column >= 1
            assert problem.line >= 1 or problem.where.startswith("--set ")
            if problem.line:
                assert text.removeprefix("\ufeff").split("\n")[problem.line - 1] == problem.text
            assert problem.column + problem.length - 1 <= len(problem.text) + 1
        assert str(result).isprintable() or set(filter(lambda c: not c.isprintable(), str(result))) == {"\n"}
        assert max(map(len, str(result).split("\n"))) < 700
    return result


@pytest.mark.parametrize("block", range(6))
def test_mutants(block: int) -> None:
    size = MUTANTS // 6
    for seed in range(block * size, (block + 1) * size):
        outcome(*mutant(seed))


def test_mutants_are_correct_wrong_and_broken() -> None:
    results = [outcome(*mutant(seed)) for seed in range(MUTANTS)]
    refused = [result for result in results if isinstance(result, RecipeError)]
    broken = [error for error in refused if not any(problem.key for problem in error.problems)]
    assert len(results) - len(refused) > MUTANTS * 0.05
    assert len(refused) - len(broken) > MUTANTS * 0.5
    assert len(broken) > MUTANTS * 0.1
    assert len({problem.what for error in refused for problem in error.problems}) > 150


def test_unspoilt_recipes_are_correct() -> None:
    assert not parse(RICH, "rich.toml").doubts
    for name, text in SHIPPED.items():
        assert not parse(text, name).doubts, name


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"key{number} = 1" for number in range(40_000)),
        "\n".join(f"[section{number}]" for number in range(40_000)),
        "[[dataset]]\n" * 20_000,
        ".".join(["a"] * 20_000) + " = 1",
        "[lora]\ntargets = [" + '"x", ' * 50_000 + "]",
        "[lora]\ntargets = [" + "3, " * 50_000 + "]",
        "x = " + "{a = " * 390 + "1" + "}" * 390,
        "x = " + "[" * 390 + "]" * 390,
        '[lora]\ntargets = ["' + "re:" + "(" * 50_000 + '"]',
        "x = '" + "\u202e" * 200_000 + "'",
        "\x00" * 1000,
    ],
    ids=["keys", "sections", "datasets", "dots", "texts", "numbers", "tables", "lists", "pattern", "marks", "nul"],
)
def test_large_nonsense_is_refused_soon(text: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(RecipeError):
        parse(text, "x.toml")
    assert time.perf_counter() - begun < 5
