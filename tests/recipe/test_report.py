"""How problems are drawn: carets under the right characters, nothing dangerous, nothing endless."""

import pytest

from ltxforge.printable import printable
from ltxforge.recipe.report import Problem, cells, one_line, render, render_one, shorten


def caret_columns(problem: Problem) -> tuple[str, str]:
    """The excerpt, and what of it stands above the carets, counted in terminal cells."""
    _, excerpt, carets = render_one(problem).split("\n")
    excerpt, carets = excerpt.partition("| ")[2], carets.partition("| ")[2]
    first, last = carets.index("^"), carets.rindex("^") + 1
    under, at = "", 0
    for character in excerpt:
        if first <= at < last:
            under += character
        at += cells(character)
    return excerpt, under


@pytest.mark.parametrize(
    "before", ["", "\t", "悪い ", "e\u0301 ", "\x1b[31m", "\u202e", "é = ", "\U0001f600", "x" * 500, "悪" * 300]
)
@pytest.mark.parametrize("word", ["rank", "悪い", "e\u0301a"])
@pytest.mark.parametrize("after", ["", " = 3", "y" * 500, "\t悪" * 200])
def test_carets_stand_under_the_word(before: str, word: str, after: str) -> None:
    text = f"{before}{word}{after}"
    problem = Problem("x.toml", "what", 3, len(before) + 1, len(word), text)
    excerpt, under = caret_columns(problem)
    assert under == word
    assert cells(excerpt) <= 100
    assert ("…" in excerpt) == (len(before) + len(after) >= 300)


def test_carets_of_a_long_word_stay_in_the_window() -> None:
    lines = render_one(Problem("x", "what", 1, 5, 3000, "x = " + "9" * 3000)).split("\n")
    assert max(map(cells, lines)) < 110


def test_carets_past_the_end_of_the_line() -> None:
    assert render_one(Problem("x", "what", 1, 4, 1, "a =")) == "x:1:4  what\n    1 | a =\n      |    ^"


@pytest.mark.parametrize(
    "nasty", ["\x1b[2J", "\x00", "\x7f", "\x9b31m", "\r", "\u202e", "\u2028", "\ufeff", "\ud800", "\u200b"]
)
def test_nothing_nasty_is_printed(nasty: str) -> None:
    problem = Problem(f"a{nasty}.toml", f"what {nasty}", 1, 1, 1, f"{nasty} = 1", f"hint {nasty}")
    for text in (render([problem]), one_line(problem)):
        assert nasty not in text
        text.encode("utf-8")
    assert "\\" in printable(nasty)


def test_shape_of_a_report() -> None:
    problems = [
        Problem("r.toml", "unknown key `a`", 14, 1, 3, "abc = 1", "did you mean `b`?"),
        Problem("r.toml", "odd", 120, 7, 1, "abc = 2", level="warning"),
        Problem("r.toml", "there is no such file", hint="look"),
    ]
    assert render(problems) == (
        "r.toml:14:1  unknown key `a`\n   14 | abc = 1\n      | ^^^ did you mean `b`?\n"
        "r.toml:120:7  warning: odd\n  120 | abc = 2\n      |       ^\n"
        "r.toml  there is no such file\n        look\n"
        "2 errors, 1 warning, nothing was started."
    )
    assert one_line(problems[0]) == "r.toml:14:1  unknown key `a` (did you mean `b`?)"
    assert render(problems[1:2]).endswith("\n1 warning.")


def test_shorten_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcdef…ijk"
