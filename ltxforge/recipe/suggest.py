"""The nearest legal word to a wrong one. Pure; knows words and distances, no recipe."""

from __future__ import annotations

from collections.abc import Iterable

# What others call a word of ours that looks otherwise.
SYNONYMS = {
    **dict.fromkeys(("joint", "av", "all", "audio+video", "video+audio", "audio_video", "video_audio"), "both"),
    "sound": "audio",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def distance(left: str, right: str) -> int:
    """Edit distance that counts a swap of neighbours as one edit (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def nearest(word: str, legal: Iterable[str]) -> str | None:
    """The legal word that `word` was probably meant to be, or None if nothing is near.

    Case and the choice between `-`, `_` and space cost nothing. A third of the word may be wrong, and one letter
    always; ties go to the word that begins alike. What others call a legal word is known too.
    """
    legal, plain = list(legal), _plain(word)[:80]
    if (meant := SYNONYMS.get(plain)) in legal:
        return meant
    best: tuple[int, int, str] | None = None
    for candidate in legal:
        target = _plain(candidate)
        edits = distance(plain, target)
        if edits > max(1, min(len(plain), len(target)) // 3) or edits >= len(target):
            continue
        rank = (edits, -_common_start(plain, target), candidate)
        best = rank if best is None else min(best, rank)
    return best[2] if best else None


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_").replace(" ", "_")


def _common_start(left: str, right: str) -> int:
    return next((place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))
