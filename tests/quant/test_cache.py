"""Quantised weights kept for the next start: the same bits, verified, made again where need be, never half there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from base_files import folder_of, loaded, same, stored_as, transformer_of

from ltxforge.events import BaseQuantised, Note
from ltxforge.models import base_weights
from ltxforge.quant import cache
from ltxforge.quant.formats import FORMATS
from ltxforge.ui.lines import line

BASE = "tiny/ltx-video"


class Told:
    """Hears events."""

    def __init__(self) -> None:
        self.events = []

    def __call__(self, event) -> None:
        self.events.append(event)

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note)]


def entries(directory) -> list:
    return sorted(path for path in (directory / "quantised").glob("*") if not path.name.startswith("."))


@pytest.fixture
def never_quantised(monkeypatch):
    """Quantising anything from here on is a mistake."""

    def forbid() -> None:
        def refuse(*_):
            raise AssertionError("a weight was quantised again")

        monkeypatch.setattr("ltxforge.quant.place.quantised", refuse)

    return forbid


@pytest.mark.parametrize(("base", "format"), [*((BASE, format) for format in FORMATS), ("tiny/ltx2", "nf4")])
def test_the_next_start_has_the_same_bits_and_the_same_report(tmp_path, never_quantised, base, format):
    folder, told = folder_of(tmp_path / "model", base), Told()
    asked = {"base_precision": format, "cache": tmp_path / "cache", "emit": told}
    first = loaded(base, folder, **asked)
    never_quantised()
    second = loaded(base, folder, **asked)
    assert same(first.transformer, second.transformer)
    assert second.base_report.layers == first.base_report.layers and second.base_report.source == "cache"
    one, other = (line(event)[1] for event in told.events if isinstance(event, BaseQuantised))
    assert other == f"{one}; from the cache" and not told.notes
    (entry,) = entries(tmp_path / "cache")
    assert len(list(entry.glob("*.safetensors"))) == len(first.transformer.transformer_blocks)


def test_parked_blocks_come_from_the_cache_too(tmp_path, never_quantised):
    folder, asked = folder_of(tmp_path / "model", BASE), {"base_precision": "nf4", "cache": tmp_path / "cache"}
    taken = []
    for _ in range(2):
        parked = {}
        loaded(BASE, folder, **asked, parked=frozenset({0, 2}), park=lambda *key, p=parked: p.update({key[:2]: key[2]}))
        taken.append(parked)
        never_quantised()
    assert taken[0].keys() == taken[1].keys() and len(taken[0]) == 2 * 10 * 4
    assert all(taken[0][key].equal(taken[1][key]) for key in taken[0])


def test_format_double_and_content_have_entries_of_their_own(tmp_path):
    folder, where = folder_of(tmp_path / "model", BASE), tmp_path / "cache"
    loaded(BASE, folder, base_precision="nf4", cache=where)
    loaded(BASE, folder, base_precision="nf4", double_quant=False, cache=where)
    loaded(BASE, folder, base_precision="fp8", cache=where)
    loaded(BASE, folder, base_precision="fp8", double_quant=False, cache=where)  # which means nothing there
    assert len(entries(where)) == 3
    loaded(BASE, folder_of(tmp_path / "other", BASE, torch.float16), base_precision="fp8", cache=where)
    assert len(entries(where)) == 4


def test_built_in_and_plain_bases_are_not_kept(tmp_path):
    loaded(BASE, None, base_precision="nf4", cache=tmp_path)
    loaded(BASE, folder_of(tmp_path / "model", BASE), cache=tmp_path)
    assert not (tmp_path / "quantised").exists()


def flip(path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def rename_key(entry) -> None:
    """A whole entry of another key in this one's place."""
    manifest = json.loads((entry / "manifest.json").read_bytes())
    manifest["facts"]["key"]["transformer"] = "other"
    body = {"facts": manifest["facts"], "files": manifest["files"]}
    (entry / "manifest.json").write_text(json.dumps({**body, "digest": cache_digest(body)}))


def cache_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


DAMAGES = {
    "a flipped bit": lambda entry: flip(entry / "block-001.safetensors", -5),
    "a lost block": lambda entry: (entry / "block-002.safetensors").unlink(),
    "a cut file": lambda entry: (entry / "block-000.safetensors").write_bytes(b""),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "another key": rename_key,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_entry_is_made_again(tmp_path, damage):
    folder, told = folder_of(tmp_path / "model", BASE), Told()
    asked = {"base_precision": "nf4", "cache": tmp_path / "cache", "emit": told}
    first = loaded(BASE, folder, **asked)
    (entry,) = entries(tmp_path / "cache")
    damage(entry)
    second = loaded(BASE, folder, **asked)
    assert same(first.transformer, second.transformer) and second.base_report.source == ""
    (note,) = told.notes
    assert "cannot be used" in note and str(entry) in note
    assert loaded(BASE, folder, **asked).base_report.source == "cache"
    assert entries(tmp_path / "cache") == [entry]


def test_a_load_that_fails_leaves_no_entry(tmp_path, monkeypatch):
    folder, where = folder_of(tmp_path / "model", BASE), tmp_path / "cache"
    real, calls = base_weights.place, []

    def fail(module, tensors, keep, **named):
        def broken():
            for number, each in enumerate(tensors):
                if number == 60:
                    raise OSError(5, "the disk is gone")
                yield each

        calls.append(1)
        return real(module, broken(), keep, **named)

    monkeypatch.setattr(base_weights, "place", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        loaded(BASE, folder, base_precision="nf4", cache=where)
    assert calls and not list((where / "quantised").iterdir())


@pytest.mark.parametrize("when", ["the first block", "the end"])
def test_a_full_disk_costs_the_entry_and_not_the_run(tmp_path, monkeypatch, when):
    folder, where, told = folder_of(tmp_path / "model", BASE), tmp_path / "cache", Told()

    def full(*_):
        raise OSError(28, "No space left on device")

    target = "ltxforge.quant.cache.save_tensors" if when == "the first block" else "ltxforge.durable._sync_file"
    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        model = loaded(BASE, folder, base_precision="nf4", cache=where, emit=told)
    assert same(model.transformer, loaded(BASE, folder, base_precision="nf4").transformer)
    assert not list((where / "quantised").iterdir())
    (note,) = told.notes
    assert "are not kept for the next start" in note


def test_a_folder_that_cannot_be_made_costs_nothing_either(tmp_path):
    told = Told()
    (tmp_path / "cache").write_text("a file where the cache should be")
    model = loaded(BASE, folder_of(tmp_path / "model", BASE), base_precision="fp8", cache=tmp_path / "cache", emit=told)
    assert model.base_report.quantised and len(told.notes) == 1


@pytest.mark.sweep
def test_killed_while_writing_the_entry_is_not_there(tmp_path):
    """A process that is killed once its first block is on disk; the next one makes the entry, and it is whole."""
    folder, where = folder_of(tmp_path / "model", BASE), tmp_path / "cache"
    code = (
        "import sys, time; sys.path.insert(0, 'tests/quant')\n"
        "from pathlib import Path\n"
        "from base_files import loaded\n"
        "from ltxforge.quant import cache\n"
        "real = cache.save_tensors\n"
        "def slow(path, tensors):\n    real(path, tensors); print('written', flush=True); time.sleep(30)\n"
        "cache.save_tensors = slow\n"
        f"loaded({BASE!r}, Path(sys.argv[1]), base_precision='nf4', cache=Path(sys.argv[2]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(where)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert child.stdout is not None and child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not entries(where) and len(list((where / "quantised").iterdir())) == 1
    left = next((where / "quantised").iterdir())
    old = time.time() - 2 * cache.LEFTOVER_SECONDS
    os.utime(left, (old, old))
    told = Told()
    loaded(BASE, folder, base_precision="nf4", cache=where, emit=told)
    assert loaded(BASE, folder, base_precision="nf4", cache=where).base_report.source == "cache"
    assert not told.notes and not left.exists() and len(entries(where)) == 1


def test_a_layer_below_its_floor_is_not_tried_again(tmp_path, never_quantised):
    """It comes from the model's own file, whole, and the report still says why."""
    tensors = transformer_of(BASE).bfloat16().state_dict()
    name = "transformer_blocks.1.ff.net.2"
    tensors[f"{name}.weight"] = torch.full_like(tensors[f"{name}.weight"], 0.12)
    tensors[f"{name}.weight"][:, ::64] = 1  # the rest of NF4's blocks lies half way between two codes
    folder = stored_as(tmp_path / "model", BASE, tensors)
    first = loaded(BASE, folder, base_precision="nf4", cache=tmp_path / "cache")
    never_quantised()
    second = loaded(BASE, folder, base_precision="nf4", cache=tmp_path / "cache")
    assert same(first.transformer, second.transformer)
    assert second.transformer.get_submodule(name).weight.equal(tensors[f"{name}.weight"])
    assert second.base_report.stayed == {"outside the blocks": 7, "below 15 dB": 1} == first.base_report.stayed
