"""Captions: reading `<stem>.txt` beside a clip. Torch-free.

Decides what a valid caption is. Text is normalised to NFC, so that the same words typed on a Mac (decomposed accents)
and elsewhere give the same tokens and the same cache key. Never writes.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from ltxforge.printable import printable

MAX_BYTES = 64 * 1024
_LAYOUT = frozenset("\t\n\r\f\v\x85")  # control characters that only lay text out


class CaptionError(Exception):
    """A caption that cannot be used; the message says why, in plain words and safe to print."""


def caption_path(media: Path) -> Path:
    """Where the caption of a media file stands: the same stem, `.txt`, or `.TXT` where that is what there is."""
    usual, shouted = media.with_suffix(".txt"), media.with_suffix(".TXT")
    return shouted if not usual.exists() and shouted.exists() else usual


def read_caption(media: Path) -> str:
    """The caption of a media file: UTF-8, NFC, every run of white space one space. Raises CaptionError."""
    path = caption_path(media)
    name = printable(path.name)
    try:
        if not path.is_file():
            raise CaptionError(f"no caption: {name} is missing")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CaptionError(f"caption {name} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise CaptionError(f"caption {name} is longer than {MAX_BYTES // 1024} KiB")
    return _clean(_decode(data, name), name)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        # The codec counts from behind a byte order mark.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        reason = f"caption {name} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}{hint}; save it as UTF-8"
        raise CaptionError(reason) from error


def _clean(text: str, name: str) -> str:
    for position, char in enumerate(text):
        if unicodedata.category(char) == "Cc" and char not in _LAYOUT:
            raise CaptionError(f"caption {name} has a control character, U+{ord(char):04X}, at character {position}")
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if not text:
        raise CaptionError(f"caption {name} is empty")
    return text
