"""Where each key and each value of a TOML text stands.

A scanner for text that tomli has already accepted: it recognises where things begin and end and judges nothing. Knows
every form of TOML 1.1: dotted and quoted keys, tables, arrays of tables, inline tables over several lines, all strings.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import tomli

from ltxforge.recipe.faults import Key

DEEPEST = 16
"""Keys nested deeper than this are not located; no recipe key is deeper than 4."""

MAX_OFFSET = 2**62

_BLANK = re.compile(r"(?:[ \t\n]+|#[^\n]*)*")
_SPACES = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = {
    '"': re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    "'": re.compile(r"'[^'\n]*'"),
    '"""': re.compile(r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})', re.DOTALL),
    "'''": re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL),
}
_SCALAR = re.compile(r"[^,\]}#\n]*")  # dates may hold a space, so blanks are cut off afterwards


@dataclass(frozen=True)
class Span:
    """Part of a source's text: characters `start` to `end`, the end not included."""

    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A text that a user wrote: a recipe file, or one `--set` argument (then it has no line numbers)."""

    name: str
    text: str
    lines_counted: bool = True

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *(match.end() for match in re.finditer("\n", self.text))]

    def line_and_column(self, offset: int) -> tuple[int, int]:
        """Line and column of a character, both from 1; the column counts characters."""
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of one line, from 1, without its end."""
        start = self._starts[number - 1]
        end = self._starts[number] - 1 if number < len(self._starts) else len(self.text)
        return self.text[start:end]


@dataclass(frozen=True)
class Place:
    """Where one key stands. `value` is None for tables that a header opens."""

    source: Source
    key: Span | None
    value: Span | None


@dataclass(frozen=True)
class Statement:
    """One header or `key = value`: the full path it defines, its key's span, and whether it is in an inline table."""

    key: Key
    span: Span
    inline: bool = False


def locate(source: Source) -> dict[Key, Place]:
    """The place of every key and list item of a valid TOML text.

    A table that several headers mention is placed at its own header, else where it is mentioned first.
    """
    scanner = _Scanner(source)
    scanner.document()
    return scanner.places


def statements(source: Source, until: int) -> list[Statement]:
    """The statements that begin at or before `until`; the text up to there must be valid."""
    scanner = _Scanner(source, until=until)
    scanner.document()
    return scanner.statements


def locate_value(source: Source, start: int, key: Key) -> dict[Key, Place]:
    """The places inside one value that begins at `start` and belongs to `key`."""
    scanner = _Scanner(source)
    scanner.pos = start
    scanner.value(key)
    return scanner.places


@dataclass
class _Scanner:
    source: Source
    until: int = MAX_OFFSET
    pos: int = 0
    inline: int = 0
    places: dict[Key, Place] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    tables_in: dict[Key, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.source.text

    def skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.pos)
        if match:
            self.pos = match.end()

    def at(self, what: str) -> bool:
        return self.text.startswith(what, self.pos)

    def done(self) -> bool:
        return self.pos >= len(self.text) or self.pos > self.until

    def document(self) -> None:
        """Scan statements as long as they begin at or before `until`."""
        table: Key = ()
        while True:
            self.skip(_BLANK)
            if self.done():
                return
            if self.at("["):
                table = self.header()
            else:
                self.pair(table)

    def header(self) -> Key:
        """`[table]` or `[[table]]`; returns the key of the table that is open now."""
        brackets = 2 if self.at("[[") else 1
        self.pos += brackets
        parts = self.key_parts()
        self.pos += brackets
        key: Key = ()
        for name, span in parts[:-1]:
            key = self.into((*key, name))
            self.note(key, Place(self.source, span, None))
        name, span = parts[-1]
        key = (*key, name)
        self.statements.append(Statement(key, Span(parts[0][1].start, span.end)))
        place = Place(self.source, span, None)
        if brackets == 2:
            self.note(key, place)
            count = self.tables_in.get(key, 0)
            self.tables_in[key] = count + 1
            key = (*key, count)
        if len(key) <= DEEPEST:
            self.places[key] = place
        return key

    def into(self, key: Key) -> Key:
        """A header that goes through an array of tables means its newest table."""
        return (*key, self.tables_in[key] - 1) if key in self.tables_in else key

    def pair(self, table: Key) -> None:
        """`key = value`, in a table or an inline table."""
        parts = self.key_parts()
        key = table
        for name, span in parts[: DEEPEST + 1]:
            key = (*key, name)
            self.note(key, Place(self.source, span, None))
        self.statements.append(Statement(key, Span(parts[0][1].start, parts[-1][1].end), self.inline > 0))
        self.skip(_SPACES)
        self.pos += 1
        self.skip(_SPACES)
        span = self.value(key)
        self.note(key, Place(self.source, parts[-1][1], span), replace=True)

    def key_parts(self) -> list[tuple[str, Span]]:
        """A key's parts and their spans, quotes included."""
        parts = []
        while True:
            self.skip(_SPACES)
            start = self.pos
            quote = self.text[start : start + 1]
            if quote and quote in "\"'":
                self.skip(_STRING[quote])
                name = tomli.loads(f"x = {self.text[start : self.pos]}")["x"]
            else:
                self.skip(_BARE_KEY)
                name = self.text[start : self.pos]
            parts.append((name, Span(start, self.pos)))
            self.skip(_SPACES)
            if not self.at("."):
                return parts
            self.pos += 1

    def value(self, key: Key) -> Span:
        """One value and everything inside it."""
        start = self.pos
        first = self.text[start : start + 1]
        if first and first in "\"'":
            self.skip(_STRING[first * 3 if self.at(first * 3) else first])
        elif first and first in "[{":
            self.items(key, first)
        else:
            self.pos += len(_SCALAR.match(self.text, start).group().rstrip())  # type: ignore[union-attr]
        return Span(start, self.pos)

    def items(self, key: Key, opening: str) -> None:
        """The inside of an array or inline table, from its opening bracket to past the closing one."""
        closing = "]" if opening == "[" else "}"
        self.pos += 1
        self.inline += 1
        count = 0
        while not self.done():
            self.skip(_BLANK)
            if self.at(closing):
                self.pos += 1
                break
            if opening == "[":
                item = (*key, count)
                self.note(item, Place(self.source, None, self.value(item)), replace=True)
            else:
                self.pair(key)
            count += 1
            self.skip(_BLANK)
            if self.at(","):
                self.pos += 1
        self.inline -= 1

    def note(self, key: Key, place: Place, *, replace: bool = False) -> None:
        if len(key) <= DEEPEST and (replace or key not in self.places):
            self.places[key] = place
