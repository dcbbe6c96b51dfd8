"""Captions: what is accepted, what is refused and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltxforge.dataset.captions import MAX_BYTES, CaptionError, read_caption
from ltxforge.printable import printable


def caption(folder: Path, data: bytes) -> str:
    (folder / "clip.txt").write_bytes(data)
    return read_caption(folder / "clip.mp4")


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(CaptionError) as caught:
        caption(folder, data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"A red disc.\n", "A red disc."),
        (b"\xef\xbb\xbfA red disc.", "A red disc."),
        (b"  two\r\n\r\nlines,\tone  tab \n", "two lines, one tab"),
        ("Le café à l'été".encode(), "Le café à l'été"),
        ("cafe\u0301".encode(), "caf\u00e9"),  # decomposed, as macOS types it
        ("一只猫 🐈\u200d⬛".encode(), "一只猫 🐈\u200d⬛"),
        (b"a" * MAX_BYTES, "a" * MAX_BYTES),
    ],
)
def test_accepted(tmp_path: Path, data: bytes, text: str) -> None:
    assert caption(tmp_path, data) == text
    assert (tmp_path / "clip.txt").read_bytes() == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty"]),
        (b"\xef\xbb\xbf \n", ["empty"]),
        (b"caf\xe9", ["not UTF-8", "byte 0xe9 at offset 3"]),
        (b"\xef\xbb\xbfcaf\xe9", ["byte 0xe9 at offset 6"]),
        ("A cat".encode("utf-16"), ["byte 0xff at offset 0", "UTF-16"]),
        (b"a\xed\xa0\x80", ["not UTF-8", "offset 1"]),  # a lone surrogate
        (b"red\x1b[31m", ["control character, U+001B, at character 3"]),
        (b"a\x00b", ["U+0000"]),
        (b"a\x1cb", ["U+001C"]),  # Python calls it white space
        (b"a" * (MAX_BYTES + 1), ["longer than 64 KiB"]),
    ],
)
def test_refused(tmp_path: Path, data: bytes, words: list[str]) -> None:
    reason = refusal(tmp_path, data)
    assert "clip.txt" in reason and reason.isprintable()
    for word in words:
        assert word in reason


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="clip.txt is missing"):
        read_caption(tmp_path / "clip.mp4")
    (tmp_path / "clip.txt").mkdir()
    with pytest.raises(CaptionError, match="clip.txt is missing"):
        read_caption(tmp_path / "clip.mp4")


def test_stem_keeps_inner_dots(tmp_path: Path) -> None:
    (tmp_path / "take.2.txt").write_text("the second", encoding="utf-8")
    assert read_caption(tmp_path / "take.2.mp4") == "the second"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 猫", "plain ünï 猫"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\nb", "a\\x0ab"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "caf\\udce9"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
