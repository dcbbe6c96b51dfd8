"""What a rule between keys is, and the list of all of them. Holds no rule itself.

A rule names the keys that it reads and runs only when all of them hold what the user said. `*` stands for any item of
a list, `**` for everything below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ltxforge.recipe.faults import Fault, Key
from ltxforge.recipe.schema import Recipe

Judge = Callable[[Recipe], Iterator[Fault]]


@dataclass(frozen=True)
class Rule:
    """`judge` gives the faults of a recipe; `keys` are patterns of the keys it reads."""

    keys: tuple[Key, ...]
    judge: Judge

    def can_judge(self, unjudged: set[Key]) -> bool:
        """Whether none of the keys that the rule reads is faulty or inside something faulty."""
        return not any(_covers(bad, key) for bad in unjudged for key in self.keys)


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Judge], None]:
    """Put a function into RULES, with the dotted patterns of the keys it reads."""

    def register(judge: Judge) -> None:
        RULES.append(Rule(tuple(map(key_of, keys)), judge))

    return register


def key_of(dotted: str) -> Key:
    """`"run.steps"` as a key."""
    return tuple(dotted.split("."))


def warning(key: Key, what: str, hint: str = "", other: Key | None = None) -> Fault:
    """A fault that is shown and starts anyway."""
    return Fault(key, what, hint, other=other, level="warning")


def _covers(bad: Key, key: Key) -> bool:
    """Whether `bad` is `key` or a table around it."""
    if key[-1] == "**" and len(bad) >= len(key):
        bad = (*bad[: len(key) - 1], "**")
    return len(bad) <= len(key) and all(
        a == b or (b == "*" and isinstance(a, int)) for a, b in zip(bad, key, strict=False)
    )
