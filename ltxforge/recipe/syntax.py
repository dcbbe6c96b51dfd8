"""Bytes → TOML data, or the one problem that keeps the text from being TOML at all.

Words tomli's messages anew: what is wrong, and what was probably meant. Says nothing about keys and their values.
"""

from __future__ import annotations

import re
from typing import Any

import tomli

from ltxforge.recipe.faults import Key, dotted
from ltxforge.recipe.keys import header
from ltxforge.recipe.locate import Place, Source, Span, Statement, locate, statements
from ltxforge.recipe.report import Problem

MAX_BYTES = 2**20

_WINDOWS_PATH = re.compile(r'"(?:[A-Za-z]:|~|\.{1,2}|\\)\\')
_OPEN_QUOTE = re.compile(r"""(?:[^"'\n]|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')*(?P<open>["'])""")
_TWICE = (
    "Cannot overwrite a value",
    "Cannot declare",
    "Duplicate inline table key",
    "Cannot mutate immutable",
    "Cannot redefine",
)


class NotToml(Exception):
    """The text is no TOML; `problem` says where and why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.what)


def decode(raw: bytes, name: str) -> str:
    """A recipe file's text: at most 1 MiB of UTF-8, a byte order mark tolerated, line ends as `\\n`."""
    if len(raw) > MAX_BYTES:
        what = f"this file has {len(raw):,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise NotToml(Problem(name, what, hint="Is this the right file?"))
    try:
        return unmarked(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotToml(_not_utf8(raw, error, name)) from None


def unmarked(text: str) -> str:
    """Without byte order mark, lines ending in `\\n`: what tomli and the scanner both count on."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_toml(source: Source) -> tuple[dict[str, Any], dict[Key, Place]]:
    """The data of a TOML text and the place of each key, or NotToml with the text's first problem."""
    try:
        return tomli.loads(source.text), locate(source)
    except tomli.TOMLDecodeError as error:
        raise NotToml(_located(source, error)) from None
    except RecursionError:
        offset = _deepest(source.text)
        raise NotToml(_problem(source, Span(offset, offset + 1), "brackets are nested too deeply here")) from None
    except ValueError:  # int() refuses numbers of thousands of digits
        found = re.search(r"\d[\d_]{2000,}", source.text)
        span = Span(*found.span()) if found else Span(0, 1)
        raise NotToml(_problem(source, span, "this number has too many digits")) from None


def _not_utf8(raw: bytes, error: UnicodeDecodeError, name: str) -> Problem:
    line = raw.count(b"\n", 0, error.start) + 1
    begin = raw.rfind(b"\n", 0, error.start) + 1
    end = raw.find(b"\n", error.start)
    before = raw[begin : error.start].decode("utf-8")
    after = raw[error.start : end if end >= 0 else len(raw)].decode("utf-8", errors="replace")
    text = (before + after).removeprefix("\ufeff").rstrip("\r")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        hint = "this looks like UTF-16; save it as UTF-8"
    else:
        hint = "save the file as UTF-8"
    what = f"byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8 text"
    return Problem(name, what, line, len(before.removeprefix("\ufeff")) + 1, 1, text, hint)


def _located(source: Source, error: tomli.TOMLDecodeError) -> Problem:
    pos = min(error.pos, len(source.text))
    if error.msg.startswith(_TWICE):
        return _twice(source, pos)
    if error.msg.startswith(("Unescaped '\\'", "Invalid hex value", "Escaped character")):
        return _bad_escape(source, pos)
    if error.msg == "Unterminated string" or error.msg == "Illegal character '\\n'":
        return _unclosed_string(source, pos)
    word = re.compile(r"[^\s,\]}#=]{0,80}").match(source.text, pos).group()  # type: ignore[union-attr]
    what, hint = _worded(error.msg, source.text, pos, word)
    return _problem(source, Span(pos, pos + max(1, len(word))), what, hint)


def _worded(message: str, text: str, pos: int, word: str) -> tuple[str, str]:
    line_start = text.rfind("\n", 0, pos) + 1
    before, rest = text[line_start:pos], text[pos : pos + 1]
    if message == "Invalid value":
        return _invalid_value(word, rest)
    if message.startswith("Expected newline or end of document"):
        begin = re.search(r"=\s*([^=]*)$", before)
        value = f"{begin[1] if begin else ''}{word}".strip()
        hint = f'text stands in quotes: "{value}"' if re.fullmatch(r"[\w./:+-]+( [\w./:+-]+)*", value) else ""
        return f"`{word or rest}` is left over after the value", hint
    if message.startswith("Expected '='"):
        if rest == ":" or before.rstrip().endswith(":"):
            return "a key and its value are joined by `=`, not by `:`", "write key = value"
        return "a key is followed by `=` and a value", "write key = value"
    if message.startswith("Expected ']"):
        return "this header is not closed", "write [table] or [[table]] on a line of its own"
    if message.startswith("Unclosed"):
        kind, bracket = ("array", "]") if "array" in message else ("inline table", "}")
        return f"this {kind} is not closed", f"a comma or `{bracket}` is missing before this"
    if message.startswith(("Invalid statement", "Invalid initial character")):
        return f"a key or a header cannot begin with `{rest.strip()}`", "write key = value, [table] or [[table]]"
    if message.startswith("Illegal character"):
        return f"the character U+{ord(rest):04X} may not stand here" if rest else "the text ends too early", ""
    return message[:1].lower() + message[1:], ""


def _invalid_value(word: str, rest: str) -> tuple[str, str]:
    if not word:
        return ("a value is missing" if rest in ("", "\n", "#", ",", "]", "}") else f"`{rest}` begins no value"), ""
    plain = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
    if word.lower() in plain:
        return f"`{word}` is no value", f"write {plain[word.lower()]}"
    if word.lower() in ("none", "null", "nil"):
        return f"`{word}` is no value", "leave the key out to get the default"
    if re.fullmatch(r"[+-]?\.\d.*", word):
        return f"`{word}` is no number", f"write {word.replace('.', '0.', 1)}"
    return f"`{word}` is no value", f'text stands in quotes: "{word}"'


def _bad_escape(source: Source, pos: int) -> Problem:
    begin = source.text.rfind('"', 0, pos)
    pos = source.text.rfind("\\", 0, pos)
    span = Span(pos, pos + 2)
    if _WINDOWS_PATH.match(source.text, begin):
        hint = "a Windows path stands in single quotes, or takes forward slashes: 'C:\\clips' or \"C:/clips\""
        return _problem(source, span, 'in "…" a backslash begins an escape, and this is none', hint)
    what = f"`{source.text[pos : pos + 2]}` is no escape"
    return _problem(source, span, what, "write \\\\ for a backslash, or use single quotes")


def _unclosed_string(source: Source, pos: int) -> Problem:
    """tomli reports where a string breaks off; the reader wants to see where it begins."""
    start = max(0, pos - 1)
    line_start = source.text.rfind("\n", 0, start) + 1
    for quote in ('"""', "'''"):
        if source.text.count(quote, 0, pos) % 2:
            line_start = start = source.text.rfind(quote, 0, pos)
    if start != line_start:
        quotes = _OPEN_QUOTE.search(source.text, line_start, pos)
        start = quotes.start("open") if quotes else start
    return _problem(source, Span(start, max(start + 1, pos)), "this text is not closed", "the closing quote is missing")


def _twice(source: Source, pos: int) -> Problem:
    """A key or table that is said a second time; points at the second and names the first one's line."""
    said = statements(source, pos)
    start = max(place for place, item in enumerate(said) if not item.inline)
    pairs = [(item, _earlier(said[: start + place], item)) for place, item in enumerate(said[start:])]
    last, first = next((pair for pair in pairs if pair[1]), pairs[0])
    line = source.line_and_column(first.span.start)[0] if first else 0
    hint = f"the first is on line {line}; keep one of them" if first else "keep one of them"
    if source.text[max(0, last.span.start - 1)] == "[" and header(last.key).startswith("[["):
        hint = f"write {header(last.key)} for each item of the list; the first is on line {line}"
    return _problem(source, last.span, f"`{dotted(last.key)}` is said twice", hint, key=dotted(last.key))


def _earlier(said: list[Statement], item: Statement) -> Statement | None:
    """The statement that `item` contradicts: the same key, else a key inside it or around it."""
    same = next((other for other in said if other.key == item.key), None)
    return same or next(
        (other for other in said if all(a == b for a, b in zip(other.key, item.key, strict=False))), None
    )


def _deepest(text: str) -> int:
    """Where the longest run of opening brackets begins: an offset for a text that nests too deeply to be scanned."""
    runs = re.finditer(r"[\[{](?:[\[{\s]|[A-Za-z0-9_-]+\s*=)*", text)
    return max(runs, key=lambda run: run.end() - run.start()).start() if re.search(r"[\[{]", text) else 0


def _problem(source: Source, span: Span, what: str, hint: str = "", *, key: str = "") -> Problem:
    line, column = source.line_and_column(span.start)
    text = source.line(line)
    length = max(1, min(span.end - span.start, len(text) - column + 1))
    return Problem(source.name, what, line if source.lines_counted else 0, column, length, text, hint, key)
