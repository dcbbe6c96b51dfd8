"""Every located key and value of random TOML documents is the text that tomli read there."""

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tomli

from ltxforge.recipe.faults import Key
from ltxforge.recipe.locate import DEEPEST, Source, locate, locate_value, statements


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key and list item below `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in pairs:
        yield (*key, part), item
        yield from walk(item, (*key, part))


def assert_all_located(text: str) -> None:
    """Each key of the document has a place; key texts spell the key, value texts parse to the value."""
    source, data = Source("x.toml", text), tomli.loads(text)
    places = locate(source)
    found = {key: value for key, value in walk(data) if len(key) <= DEEPEST}
    assert places.keys() == found.keys()
    for key, value in found.items():
        place = places[key]
        if place.key is not None:
            name = next(part for part in reversed(key) if isinstance(part, str))
            assert tomli.loads(f"{text[place.key.start : place.key.end]} = 1") == {name: 1}
        if place.value is not None:
            again = tomli.loads(f"x = {text[place.value.start : place.value.end]}")["x"]
            assert repr(again) == repr(value)
        assert place.key is not None or place.value is not None
        if not isinstance(value, (dict, list)):
            assert place.value is not None


class Writer:
    """Writes random TOML documents, every form of TOML 1.1 with some probability."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.count = 0

    def pick(self, *forms: Callable[[], str]) -> str:
        return self.random.choice(forms)()

    def name(self) -> str:
        """A key part that was not used before, bare or quoted."""
        self.count += 1
        letters = "".join(self.random.choices(string.ascii_lowercase + "-_", k=self.random.randint(0, 6)))
        name = f"k{self.count}{letters}"
        return self.pick(
            lambda: name,
            lambda: name,
            lambda: f"'{name} #['",
            lambda: f'"{name}.\\"\\u00e9\\t]="',
            lambda: f'"{name}名"',
        )

    def dotted(self) -> str:
        return self.pick(lambda: ".", lambda: " . ").join(
            self.name() for _ in range(self.random.choice((1, 1, 1, 2, 3)))
        )

    def space(self) -> str:
        return self.random.choice(("", " ", "  ", "\t"))

    def blank(self) -> str:
        """What may stand between the items of an array or inline table in TOML 1.1."""
        return self.random.choice(("", " ", "\n", "  \n\t", " # ] } , \" ''' [\n ", "\n# x = 1\n"))

    def string(self) -> str:
        return self.pick(
            lambda: '"plain # [x] = y"',
            lambda: r'"a \" b \\ \u00e9 \e \x41"',
            lambda: r"'C:\clips\new'",
            lambda: '"""\nlines\n[not.a.table]\nx = 1 # no comment\n"" two "quotes\\"""\\n"""',
            lambda: '"""ends with quotes"""""',
            lambda: "'''literal\n[[no]]\n\"\"\" '' x'''''",
            lambda: '"悪い品質 \U0001f600"',
            lambda: '""',
            lambda: "''",
            lambda: '""""""',
            lambda: '"""joined \\\n   next"""',
        )

    def scalar(self) -> str:
        return self.pick(
            self.string,
            lambda: self.random.choice(("1", "-17", "1_000", "0xdead_beef", "0b101", "0o17")),
            lambda: self.random.choice(("1e-4", "3.14", "+inf", "nan", "6.02E+23", "1_0.5")),
            lambda: self.random.choice(("true", "false")),
            lambda: self.random.choice(("1979-05-27", "1979-05-27 07:32:00", "07:32", "1979-05-27T07:32:00.5Z")),
        )

    def value(self, depth: int) -> str:
        if depth <= 0:
            return self.scalar()
        return self.pick(self.scalar, lambda: self.array(depth - 1), lambda: self.inline_table(depth - 1))

    def array(self, depth: int) -> str:
        items = [f"{self.blank()}{self.value(depth)}{self.blank()}" for _ in range(self.random.randint(0, 4))]
        comma = "," if items and self.random.random() < 0.4 else ""
        return f"[{','.join(items)}{comma}{self.blank()}]"

    def inline_table(self, depth: int) -> str:
        items = [f"{self.blank()}{self.pair(depth)}{self.blank()}" for _ in range(self.random.randint(0, 3))]
        comma = "," if items and self.random.random() < 0.4 else ""
        return f"{{{','.join(items)}{comma}{self.blank()}}}"

    def pair(self, depth: int) -> str:
        return f"{self.dotted()}{self.space()}={self.space()}{self.value(depth)}"

    def lines(self) -> str:
        lines = []
        for _ in range(self.random.randint(0, 4)):
            comment = self.random.choice(("", "", " # [comment] x = ']'"))
            lines.append(f"{self.space()}{self.pair(2)}{comment}")
            if self.random.random() < 0.3:
                lines.append(self.random.choice(("", "# [[comment]]", "\t")))
        return "\n".join(lines)

    def document(self) -> str:
        """Pairs, then tables and arrays of tables, some of them inside one another."""
        parts, open_names = [self.lines()], list[str]()
        for _ in range(self.random.randint(0, 6)):
            inside = f"{self.random.choice(open_names)}." if open_names and self.random.random() < 0.4 else ""
            name = inside + self.dotted()
            if self.random.random() < 0.5:
                parts += [f"[[{name}]]\n{self.lines()}" for _ in range(self.random.randint(1, 3))]
            else:
                parts.append(f"[ {name} ]  # [x]\n{self.lines()}")
            open_names.append(name)
        return "\n".join(parts) + self.random.choice(("", "\n"))


@pytest.mark.parametrize("block", range(10))
def test_random_documents(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        assert_all_located(Writer(seed).document())


def test_random_documents_reach_every_form() -> None:
    text = "\n".join(Writer(seed).document() for seed in range(600))
    for form in ("[[", "'''", '"""', "{\n", " . ", "# ] }", "07:32:00", "},", "名"):
        assert form in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        "a.b.c = 1\na.b.d = 2",
        "[a.b]\nx = 1\n[a]\ny = 2",
        "[[a]]\n[[a.b]]\nx = 1\n[[a.b]]\nx = 2\n[[a]]\n[[a.b]]\nx = 3\n[a.c]\ny = 1",
        "d = 1979-05-27 07:32:00   # with a space\n",
        "x = [1979-05-27 07:32:00, 2]",
        "x = [{a = [{b = 1}, {}]}, [[]], []]",
        "x = {\n a = 1, # }\n b = [\n ],\n}",
        "3.14 = 'pi'\n",
        "'' = 1\n",
    ],
)
def test_documents_with_a_catch(text: str) -> None:
    assert_all_located(text)


def test_own_header_wins_over_mention() -> None:
    text = "[a.b]\nx = 1\n[a]\ny = 2"
    place = locate(Source("x", text))["a",]
    assert place.key is not None
    assert Source("x", text).line_and_column(place.key.start) == (3, 2)


def test_lines_and_columns_count_characters() -> None:
    source = Source("x", "é = 1\n\t名 = 2\n")
    assert source.line_and_column(source.text.index("名")) == (2, 2)
    assert source.line(2) == "\t名 = 2"
    assert source.line(3) == ""


def test_value_inside_an_argument() -> None:
    source = Source("--set", "lora.targets=['x', {a = 3}]")
    places = locate_value(source, source.text.index("["), ("lora", "targets"))
    span = places["lora", "targets", 1, "a"].value
    assert span is not None
    assert source.text[span.start : span.end] == "3"


def test_statements_stop_before_what_is_not_valid() -> None:
    text = "a = 1\n[b]\nc = { d = 1, d = 2, ] = } \n"
    found = statements(Source("x", text), text.index(", ]"))
    assert [item.key for item in found] == [("a",), ("b",), ("b", "c"), ("b", "c", "d"), ("b", "c", "d")]


def test_deep_keys_take_no_time() -> None:
    places = locate(Source("x", ".".join(["a"] * 20_000) + " = 1\n"))
    assert max(map(len, places)) == DEEPEST
