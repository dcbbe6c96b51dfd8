"""The grammar of sources, digests and their memo."""

import hashlib
import os
import subprocess
import sys

import pytest

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.sources import parse_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lightricks/LTX-Video", ("Lightricks/LTX-Video", "", "")),
        ("Lightricks/LTX-Video@abc123", ("Lightricks/LTX-Video", "", "abc123")),
        ("Lightricks/LTX-Video:vae", ("Lightricks/LTX-Video", "vae", "")),
        ("org/name:ltxv-13b-0.9.8.safetensors", ("org/name", "ltxv-13b-0.9.8.safetensors", "")),
        ("org/name:a/b c/d.safetensors@refs/pr/3", ("org/name", "a/b c/d.safetensors", "refs/pr/3")),
    ],
)  # fmt: skip
def test_hub_names(text, expected):
    source = parse_source(text)
    assert source.kind == "hub"
    assert (source.repository, source.inside, source.revision) == expected


@pytest.mark.parametrize(
    "text", ["./models", "../x", "/abs/x.safetensors", "~/x", "C:\\models\\ltx", "c:/x", "a\\b", "."]
)
def test_what_looks_like_a_path_is_local(text):
    assert parse_source(text).kind == "local"


def test_a_folder_that_exists_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name").kind == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_source("org/name").kind == "local"


def test_built_in_models_and_their_misspellings():
    assert parse_source("tiny/ltx-video").kind == "builtin"
    with pytest.raises(WeightsError, match=r"Did you mean 'tiny/ltx-video-0.9.1'"):
        parse_source("tiny/ltx-video-09.1")


@pytest.mark.parametrize(
    "text", ["", "ltx", "a/b/c", "org/name:", "org/name:../../etc/passwd", "https://x/y", "org/na me"]
)
def test_what_is_nothing_is_refused(text):
    with pytest.raises(WeightsError, match="is no source of weights"):
        parse_source(text)


def test_digests_are_remembered_until_the_file_changes(tmp_path):
    file, memo = tmp_path / "w.safetensors", tmp_path / "memo" / "weights.json"
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    file.write_bytes(b"one")
    os.utime(file, ns=(2, 2))
    with FileDigests(memo) as digests:
        assert digests.of(file) == one
    memo.write_text(memo.read_text(encoding="utf-8").replace(one, "0" * 64), encoding="utf-8")
    assert FileDigests(memo).of(file) == "0" * 64  # taken from the memo, so it was not hashed again
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert FileDigests(memo).of(file) == two


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    """It could be written again within its timestamp's resolution."""
    file, memo = tmp_path / "w.safetensors", tmp_path / "memo.json"
    file.write_bytes(b"one")
    with FileDigests(memo) as digests:
        assert digests.of(file) == hashlib.sha256(b"one").hexdigest()
        status = file.stat()
        file.write_bytes(b"two")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert digests.of(file) == hashlib.sha256(b"two").hexdigest()
    assert not memo.exists()


def test_a_damaged_memo_is_no_harm(tmp_path):
    file, memo = tmp_path / "w", tmp_path / "memo.json"
    file.write_bytes(b"one")
    for damage in ("{", "[1]", '{"x": 1}'):
        memo.write_text(damage, encoding="utf-8")
        assert FileDigests(memo).of(file) == hashlib.sha256(b"one").hexdigest()


def test_planning_does_not_import_torch():
    code = "import sys; import ltxforge.models.detect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
