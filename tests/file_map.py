"""Writes the README's file map from each module's first docstring sentence: `python tests/file_map.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "## File map\n"
LONGEST = 115


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    for end in (". ", "; "):
        text = text.partition(end)[0]
    if len(text) > LONGEST:
        text = text.partition(": ")[0]
    return text.rstrip(".:;").replace("`", "")


def lines() -> list[str]:
    """One line per file of the package, folders first named."""
    found = []
    files = [path for path in (ROOT / "ltxforge").rglob("*.py") if path.name != "__init__.py"]
    for path in sorted(files, key=lambda p: (len(p.relative_to(ROOT).parts), p.relative_to(ROOT).as_posix())):
        name = path.relative_to(ROOT / "ltxforge").as_posix()
        found.append(f"{name:<28} {first_sentence(path)}")
    return found


def file_map() -> str:
    """The section of the README."""
    tree = "\n".join(lines())
    return f"{MARK}\nIn `ltxforge/` (floors and rules: `docs/architecture.md`):\n\n```\n{tree}\n```\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text[: text.index(MARK)] + file_map(), encoding="utf-8")
