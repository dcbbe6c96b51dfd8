"""Foreign text made safe to print: file names, captions, names inside weights, other programs' messages.

Nothing that a file holds may move a cursor, turn a line around, or fail to encode.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, whatever is no printable character written as an escape: `\\x1b`, `\\u202e`, `\\udcff`."""
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
