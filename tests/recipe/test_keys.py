"""Every key of the schema can be found, misspelt, misplaced, and stood in for."""

import random
import string

import pytest
from pydantic import BaseModel

from ltxforge.recipe.judge import judge
from ltxforge.recipe.keys import ALIASES, field_at, legal_keys, suggestion, table_at, table_in
from ltxforge.recipe.rules import RULES
from ltxforge.recipe.schema import NOT_YET, Recipe
from ltxforge.recipe.suggest import distance, nearest
from ltxforge.recipe.wording import expected

SECTIONS = {name: keys for name, keys in legal_keys().items() if name}


def typos(word: str, draw: random.Random) -> set[str]:
    """One letter left out, doubled, replaced or swapped with its neighbour, at every place."""
    letters = string.ascii_lowercase
    made = set()
    for spot in range(len(word)):
        made.add(word[:spot] + word[spot + 1 :])
        made.add(word[:spot] + word[spot] + word[spot:])
        made.add(word[:spot] + draw.choice(letters) + word[spot + 1 :])
        made.add(word[:spot] + word[spot + 1 : spot + 2] + word[spot] + word[spot + 2 :])
    return made - {word, ""}


def test_one_edit_typos_of_every_key_get_the_right_key() -> None:
    draw = random.Random(0)
    right = total = 0
    for section, keys in SECTIONS.items():
        for key in keys:
            for typo in typos(key, draw) - set(keys):
                hint, _ = suggestion((*section.split("."), typo))
                right += f"`{key}`" in hint
                total += 1
    assert total > 1500
    assert right / total >= 0.9


def test_one_edit_typos_of_every_section_get_the_right_section() -> None:
    draw = random.Random(0)
    cases = [(typo, name) for name in Recipe.model_fields for typo in typos(name, draw) if len(name) > 3]
    right = sum(f"[{name}]" in suggestion((typo,))[0] for typo, name in cases)
    assert right / len(cases) >= 0.9


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_in_another_section_are_sent_home(section: str) -> None:
    for key in SECTIONS[section]:
        others = [name for name in SECTIONS if key not in SECTIONS[name] and name != "dataset"]
        for other in others:
            hint, _ = suggestion((*other.split("."), key))
            assert "belongs in" in hint
            assert f"[{section}]" in hint or hint.count("[") >= 3


def test_other_trainers_names_lead_to_keys_that_exist() -> None:
    for alias, key in ALIASES.items():
        section, _, name = key.rpartition(".")
        assert name in SECTIONS[section]
        assert alias not in SECTIONS[section]


def test_keys_for_later_releases_are_no_keys_yet() -> None:
    assert not [name for name in NOT_YET if field_at(tuple(name.split(".")))]
    for name in NOT_YET:
        parts = name.split(".")
        assert len(parts) == 1 or parts[0] in Recipe.model_fields


def test_rules_read_keys_that_exist() -> None:
    for rule in RULES:
        for key in rule.keys:
            assert field_at(tuple(part for part in key if part not in ("*", "**"))), key


@pytest.mark.parametrize("section", legal_keys())
def test_every_key_says_what_it_takes(section: str) -> None:
    for key in legal_keys()[section]:
        item = field_at((*section.split("."), key) if section else (key,))
        assert item is not None
        assert expected(item.annotation, item.metadata)


def required(table: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, item in table.model_fields.items():
        inner, _ = table_in(item.annotation)
        if inner:
            found += required(inner, (*prefix, name))
        elif item.is_required():
            found.append((*prefix, name))
    return found


def test_examples_of_required_keys_are_legal() -> None:
    """They are shown to users, and stand in for what is missing while the other rules are judged."""
    assert len(required(Recipe)) >= 4
    verdict = judge({"validation": {"prompt": [{}]}})
    assert {fault.key for fault in verdict.faults} == {("model",), ("dataset",), ("validation", "prompt", 0, "name"),
                                                       ("validation", "prompt", 0, "prompt")}  # fmt: skip
    for key in required(Recipe):
        item = field_at(key)
        assert item is not None
        assert item.examples


def test_one_faulty_value_hides_no_other() -> None:
    """Each key of a section faulty in turn: the other faults stay."""
    for key in legal_keys()["optimizer"]:
        data = {"model": 3, "run": {"seed": -1}, "dataset": [{"path": ""}], "optimizer": {key: {}}}
        faults = {fault.key for fault in judge(data).faults}
        assert faults == {("model",), ("run", "seed"), ("dataset", 0, "path"), ("optimizer", key)}


def test_tables_are_found() -> None:
    assert table_at(()) is Recipe
    assert table_at(("dataset", 3)) is Recipe.model_fields["dataset"].annotation.__args__[0]
    assert table_at(("model", "base")) is None


@pytest.mark.parametrize(
    ("left", "right", "edits"),
    [("", "abc", 3), ("abc", "abc", 0), ("abc", "acb", 1), ("ca", "abc", 3), ("kitten", "sitting", 3), ("rank", "", 4)],
)
def test_distance(left: str, right: str, edits: int) -> None:
    assert distance(left, right) == distance(right, left) == edits


def test_nothing_near_is_nothing() -> None:
    assert nearest("quux", ["rank", "alpha"]) is None
    assert nearest("", ["rank"]) is None
    assert nearest("Learning-Rate", ["learning_rate", "rank"]) == "learning_rate"
