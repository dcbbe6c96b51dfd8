"""Prompt-library files: TOML, or JSON of nickname → prompt, read into a list of entries or refused with every reason.

Decides what such a file may say; which size, rate or number of steps a prompt is sampled with is the plan's part.
Torch-free, and reads nothing but the one file (whether an image exists is the planner's question).

    [[prompt]]                          {"fox": "A fox runs through snow.",
    name = "fox"                         "cat": {"prompt": "A cat.", "image": "cat.png", "seed": 7}}
    prompt = "A fox runs through snow."

TOML may also be written in the JSON's shape: `fox = "A fox …"`, or a table `[fox]` with a `prompt`.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from ltxforge.durable import is_safe_name
from ltxforge.errors import PlanError

MAX_BYTES = 2**20
FIELDS = ("prompt", "negative_prompt", "image", "seed")


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a library. None means that the library says nothing and the recipe's value holds."""

    name: str
    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None
    seed: int | None = None


def read_library(path: Path) -> list[PromptEntry]:
    """All prompts of a library file, in the file's order.

    Relative images are taken from the library's folder. Raises PlanError that names every fault of the file at once.
    """
    text = _read_text(path)
    pairs = _toml_pairs(path, text) if path.suffix.lower() == ".toml" else _json_pairs(path, text)
    faults: list[str] = []
    entries = [_entry(path.parent, name, value, faults) for name, value in pairs]
    faults += _name_faults([name for name, _ in pairs])
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise PlanError(f"the prompt library cannot be used:{listed}", where=str(path), remedy="Correct the file.")
    if not entries:
        raise _refused(path, "the prompt library holds no prompts", 'Add lines such as fox = "A fox runs."')
    return [entry for entry in entries if entry is not None]


def safe_spelling(name: str) -> str:
    """A name near `name` that may become a file name: "Été à Paris!" → "ete-a-paris"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    spelled = re.sub(r"[^a-z0-9_]+", "-", ascii_name).strip("-_")[:64].rstrip("-_")
    if is_safe_name(spelled):
        return spelled
    return f"{spelled}-prompt" if spelled else "prompt-1"


def _read_text(path: Path) -> str:
    if path.suffix.lower() not in (".toml", ".json"):
        raise _refused(path, "a prompt library ends in .toml or .json", "Rename it by what it holds.")
    try:
        if not path.is_file():
            missing = "is no file" if path.exists() else "does not exist"
            raise _refused(path, f"the prompt library {missing}", "Check validation.library in the recipe.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _refused(path, f"the prompt library cannot be read ({error})", "Check its permissions.") from error
    if len(data) > MAX_BYTES:
        raise _refused(path, "the prompt library is larger than 1 MiB", "Is this the right file? Split it if it is.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(f"{path}:{line}", "the prompt library is not UTF-8", "Save it as UTF-8.") from error


def _toml_pairs(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        data = tomli.loads(text.replace("\r\n", "\n"))
    except tomli.TOMLDecodeError as error:
        message = re.sub(r" \(at .*\)$", "", str(error))
        raise _refused(f"{path}:{error.lineno}:{error.colno}", f"TOML: {message}", "Correct this place.") from error
    except (RecursionError, ValueError) as error:
        raise _refused(path, f"TOML that cannot be read ({error})", "Write one prompt per line.") from error
    listed = data.pop("prompt") if isinstance(data.get("prompt"), list) else []
    tables = [dict(table) if isinstance(table, dict) else {"prompt": table} for table in listed]
    return [(table.pop("name", ""), table) for table in tables] + list(data.items())


def _json_pairs(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        # Objects become lists of pairs, so that a name given twice is seen and not silently the last one's.
        data = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        place, message = _json_fault(text, error)
        raise _refused(f"{path}:{_line_column(text, place)}", f"JSON: {message}", "Correct this place.") from error
    except (RecursionError, ValueError) as error:
        raise _refused(path, f"JSON that cannot be read ({error})", "Write one prompt per line.") from error
    if not isinstance(data, _Pairs):
        raise _refused(path, "the JSON is no object of name: prompt", 'Write {"fox": "A fox runs.", "cat": "A cat."}')
    return list(data)


class _Pairs(list):
    """A JSON object's pairs in the order of the file, duplicates kept."""


def _json_fault(text: str, error: json.JSONDecodeError) -> tuple[int, str]:
    """Position and wording of the fault. Python 3.11 and 3.13 point at different places of a trailing comma."""
    before = text[: error.pos].rstrip()
    for comma in (error.pos, len(before) - 1):
        if re.match(r",\s*[}\]]", text[max(comma, 0) :]):
            return comma, "a comma after the last entry"
    return error.pos, error.msg[:1].lower() + error.msg[1:]


def _line_column(text: str, position: int) -> str:
    return f"{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"


def _entry(folder: Path, name: Any, value: Any, faults: list[str]) -> PromptEntry | None:
    label = repr(name) if name else "a prompt without a name"
    fields = _fields(value)
    if fields is None:
        faults.append(f"{label}: expected a text or {{prompt = …}}, not {type(value).__name__}")
        return None
    found = [f"{label}: {fault}" for key, item in fields for fault in _field_faults(key, item)]
    found += [f"{label}: {key} is given twice" for key in _repeated(key for key, _ in fields)]
    given = dict(fields)
    if "prompt" not in given:
        found.append(f"{label}: has no prompt")
    faults += found
    if found:
        return None
    image = folder / given["image"] if "image" in given else None
    return PromptEntry(str(name), given["prompt"].strip(), given.get("negative_prompt"), image, given.get("seed"))


def _fields(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, str):
        return [("prompt", value)]
    if isinstance(value, _Pairs):
        return list(value)
    return list(value.items()) if isinstance(value, dict) else None


def _field_faults(key: str, value: Any) -> list[str]:
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1)
        return [f"unknown field {key!r}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FIELDS)}")]
    if key == "seed":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return [] if whole and 0 <= value < 2**63 else ["seed must be a whole number from 0 to 2^63 - 1"]
    if not isinstance(value, str):
        return [f"{key} must be a text"]
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return [f"{key} holds a NUL or half a surrogate pair"]
    if key != "negative_prompt" and not value.strip():
        return [f"{key} is empty"]
    return []


def _name_faults(names: list[Any]) -> list[str]:
    faults = []
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            faults.append(f"prompt {position}: a name must be a text, not {name!r}")
        elif not name:
            faults.append(f"prompt {position} has no name")
        elif not is_safe_name(name):
            faults.append(f"{name!r} becomes a file name and cannot be one everywhere; write {safe_spelling(name)!r}")
    folded = [name.casefold() for name in names if isinstance(name, str) and name]
    return faults + [f"{name!r} is there twice (upper and lower case are the same file)" for name in _repeated(folded)]


def _repeated(names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name for name, count in seen.items() if count > 1]


def _refused(where: Path | str, what: str, remedy: str) -> PlanError:
    return PlanError(what, where=str(where), remedy=remedy)
