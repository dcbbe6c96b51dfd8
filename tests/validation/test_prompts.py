"""Prompt libraries: both formats give the same entries; every fault is named, with its place."""

import json
import random
import subprocess
import sys

import pytest

from ltxforge.durable import is_safe_name
from ltxforge.errors import PlanError
from ltxforge.validation.prompts import MAX_BYTES, PromptEntry, read_library, safe_spelling


def library(tmp_path, text, suffix=".json"):
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path):
    with pytest.raises(PlanError) as caught:
        read_library(path)
    assert str(path) in caught.value.where
    assert caught.value.remedy
    return caught.value


def test_the_three_spellings_give_the_same_entries(tmp_path):
    expected = [
        PromptEntry("fox", "A fox runs."),
        PromptEntry("cat", "A cat.", "blurry", tmp_path / "images/cat.png", 7),
    ]
    extra = {"prompt": "A cat.", "negative_prompt": "blurry", "image": "images/cat.png", "seed": 7}
    as_json = json.dumps({"fox": "A fox runs.", "cat": extra})
    as_tables = """
    [[prompt]]
    name = "fox"
    prompt = "A fox runs."
    [[prompt]]
    name = "cat"
    prompt = "A cat."
    negative_prompt = "blurry"
    image = "images/cat.png"
    seed = 7
    """
    as_pairs = """
    fox = "A fox runs."
    [cat]
    prompt = "A cat."
    negative_prompt = "blurry"
    image = "images/cat.png"
    seed = 7
    """
    assert read_library(library(tmp_path, as_json)) == expected
    assert read_library(library(tmp_path, as_tables, ".toml")) == expected
    assert read_library(library(tmp_path, as_pairs, ".toml")) == expected


def test_a_prompt_may_be_nicknamed_prompt_and_a_byte_order_mark_is_no_fault(tmp_path):
    path = library(tmp_path, b'\xef\xbb\xbfprompt = "A fox."\r\n', ".toml")
    assert read_library(path) == [PromptEntry("prompt", "A fox.")]


def test_an_absolute_image_stays_where_it_is(tmp_path):
    path = library(tmp_path, json.dumps({"cat": {"prompt": "A cat.", "image": str(tmp_path / "c.png")}}))
    assert read_library(path)[0].image == tmp_path / "c.png"


def test_every_bad_name_is_told_at_once_with_a_safe_spelling(tmp_path):
    names = ["../escape", "My Fox", "con", "Été à Paris!", "fox", "a" * 65]
    error = refusal(library(tmp_path, json.dumps(dict.fromkeys(names, "text"))))
    for bad, good in [("../escape", "escape"), ("My Fox", "my-fox"), ("con", "con-prompt"), ("Été", "ete-a-paris")]:
        assert bad in error.what and repr(good) in error.what
    assert "'fox'" not in error.what and "a" * 65 in error.what


@pytest.mark.parametrize("name", ["", "...", "日本", "NUL", "-x-", "com1", "a" * 200, "ＦＯＸ", "x" * 63 + " y"])
def test_a_suggested_spelling_is_always_legal(name):
    assert is_safe_name(safe_spelling(name))


def test_duplicates_are_refused_in_both_formats_and_across_case(tmp_path):
    assert "there twice" in refusal(library(tmp_path, '{"fox": "a", "fox": "b"}')).what
    assert "there twice" in refusal(library(tmp_path, '{"fox": "a", "Fox": "b"}')).what
    tables = '[[prompt]]\nname = "fox"\nprompt = "a"\n' * 2
    assert "there twice" in refusal(library(tmp_path, tables, ".toml")).what


def test_faulty_json_names_line_and_column(tmp_path):
    error = refusal(library(tmp_path, '{\n "fox": "a",\n "cat": "b" ,\n}'))
    assert error.where.endswith(":3:13") and "comma after the last entry" in error.what
    error = refusal(library(tmp_path, '{\n "fox" "a"}'))
    assert error.where.endswith(":2:8")


def test_faulty_toml_names_line_and_column(tmp_path):
    error = refusal(library(tmp_path, 'fox = "a"\ncat = \n', ".toml"))
    assert error.where.endswith(":2:7") and "at line" not in error.what


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"fox": "caf\xe9"}', "not UTF-8"),
        (b"{}", "no prompts"),
        (b"", "JSON"),
        (b'["a fox"]', "no object"),
        (b'{"fox": 3}', "expected a text"),
        (b'{"fox": null}', "expected a text"),
        (b'{"fox": "  "}', "prompt is empty"),
        (b'{"fox": {"seed": 1}}', "has no prompt"),
        (b'{"fox": {"prompt": "a", "sed": 1}}', "did you mean seed?"),
        (b'{"fox": {"prompt": "a", "seed": -1}}', "seed must be"),
        (b'{"fox": {"prompt": "a", "seed": true}}', "seed must be"),
        (b'{"fox": {"prompt": "a", "seed": NaN}}', "seed must be"),
        (b'{"fox": {"prompt": "a", "prompt": "b"}}', "given twice"),
        (b'{"fox": {"prompt": "a", "image": ""}}', "image is empty"),
        (b'{"fox": "\\ud800"}', "surrogate"),
        (b'{"fox": "a\\u0000b"}', "NUL"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"fox": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (b'{"fox": "' + b"a" * MAX_BYTES + b'"}', "1 MiB"),
    ],
)
def test_each_fault_is_told(tmp_path, content, told):
    assert told in refusal(library(tmp_path, content)).what


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[[prompt]]\nprompt = 'a'\n", "prompt 1 has no name"),
        ("[[prompt]]\nname = 3\nprompt = 'a'\n", "must be a text"),
        ("fox = 'x'\nprompt = ['a']\n", "prompt 1 has no name"),
        ("fox = 2024-01-01\n", "expected a text"),
        ("", "no prompts"),
        ("a = " + "[" * 100_000, "TOML"),
    ],
)
def test_each_fault_of_toml_is_told(tmp_path, content, told):
    error = refusal(library(tmp_path, content, ".toml"))
    assert told in error.what


def test_a_missing_file_a_folder_and_another_ending_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.json").what
    (tmp_path / "folder.json").mkdir()
    assert "is no file" in refusal(tmp_path / "folder.json").what
    assert ".toml or .json" in refusal(library(tmp_path, "a", ".txt")).what


def test_mutated_libraries_give_entries_or_a_refusal(tmp_path):
    """No mutation of bytes gives any other exception, and what is accepted has safe, distinct names."""
    rng = random.Random(0)
    sources = {
        ".json": b'{"fox": "A fox.", "cat": {"prompt": "A cat.", "image": "c.png", "seed": 7}}',
        ".toml": b'fox = "A fox."\n[cat]\nprompt = "A cat."\nseed = 7\n[[prompt]]\nname = "x"\nprompt = "y"\n',
    }
    outcomes = set()
    for suffix, source in sources.items():
        for _ in range(300):
            data = bytearray(source)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.choice([*b'{}[]",:=\n\0ax', rng.randrange(256)])
            try:
                names = [entry.name for entry in read_library(library(tmp_path, bytes(data), suffix))]
            except PlanError:
                outcomes.add("refused")
            else:
                outcomes.add("accepted")
                assert all(map(is_safe_name, names)) and len(set(names)) == len(names)
    assert outcomes == {"refused", "accepted"}


def test_reading_prompts_needs_no_torch():
    code = "import sys, ltxforge.validation.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
