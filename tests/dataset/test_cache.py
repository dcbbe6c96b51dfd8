"""The store: what is not provably the right content is not given back."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxforge.dataset.cache import Cache, content_digest

KEY = {"stage": "latents", "clip": "abc", "start": 0.25}
TENSORS = {"mean": torch.arange(24.0).reshape(2, 3, 4), "std": torch.ones(2, 3, 4, dtype=torch.bfloat16)}


@pytest.fixture
def notes() -> list:
    return []


@pytest.fixture
def cache(tmp_path, notes) -> Cache:
    return Cache(tmp_path, notes.append)


def test_what_was_written_comes_back(cache):
    written = cache.write("latents", KEY, TENSORS)
    read = cache.read("latents", dict(reversed(KEY.items())))
    assert read.digest == written.digest == content_digest(TENSORS)
    assert all(torch.equal(read.tensors[name], value) and read.tensors[name].dtype == value.dtype
               for name, value in TENSORS.items())  # fmt: skip


def test_another_key_is_another_entry(cache):
    cache.write("latents", KEY, TENSORS)
    for other in ({**KEY, "start": 0.5}, {**KEY, "clip": "abd"}, {k: v for k, v in KEY.items() if k != "start"}):
        assert cache.read("latents", other) is None
    assert cache.read("prompts", KEY) is None


def test_every_flipped_byte_is_noticed(cache, notes):
    """No single-byte change in the file, header and metadata included, gives other tensors or a crash."""
    cache.write("latents", KEY, TENSORS)
    path = cache.path("latents", KEY)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        entry = cache.read("latents", KEY)
        assert entry is None or content_digest(entry.tensors) == content_digest(TENSORS), position
    assert len(notes) > len(whole) * 0.9 and all(note.level == "warning" for note in notes)


@pytest.mark.parametrize("size", [0, 1, 7, 100, -1])
def test_truncation_is_noticed(cache, size):
    cache.write("latents", KEY, TENSORS)
    path = cache.path("latents", KEY)
    path.write_bytes(path.read_bytes()[:size])
    assert cache.read("latents", KEY) is None


def test_an_entry_swapped_with_another_is_noticed(cache):
    other = {**KEY, "clip": "other"}
    cache.write("latents", KEY, TENSORS)
    cache.write("latents", other, {"mean": torch.zeros(2)})
    shutil.copy(cache.path("latents", other), cache.path("latents", KEY))
    assert cache.read("latents", KEY) is None


def test_a_file_with_the_right_name_and_no_digest_is_not_trusted(cache):
    cache.write("latents", KEY, TENSORS)
    path = cache.path("latents", KEY)
    save_file(load_file(path), path)
    assert cache.read("latents", KEY) is None


def test_a_damaged_entry_can_be_written_again(cache):
    cache.write("latents", KEY, TENSORS)
    cache.path("latents", KEY).write_bytes(b"")
    assert cache.read("latents", KEY) is None
    cache.write("latents", KEY, TENSORS)
    assert cache.read("latents", KEY).digest == content_digest(TENSORS)
    assert [p.name for p in cache.path("latents", KEY).parent.iterdir()] == [cache.path("latents", KEY).name]
