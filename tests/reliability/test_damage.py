"""Damaged checkpoints and cache entries: named, never trained on, and the same bits in the end."""

from __future__ import annotations

import itertools
import shutil
import signal

import pytest

from ltxforge.durable import verify_folder

KILL_AT_10 = {"at": {"event": "StepDone", "step": 10}, "signal": signal.SIGKILL}
STOP_AT_4 = {"at": {"event": "StepDone", "step": 4}, "signal": signal.SIGTERM}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def blank(path):
    """What a power cut leaves: the right size and a whole header, zeros behind."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))


def delete(path):
    path.unlink()


def empty_folder(path):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "adapter.safetensors"),
        pytest.param(blank, "optimizer.safetensors", marks=pytest.mark.sweep),
        pytest.param(cut, "lora.safetensors", marks=pytest.mark.sweep),
        pytest.param(delete, "adapter.safetensors", marks=pytest.mark.sweep),
        (flip, "manifest.json"),
        pytest.param(empty_folder, "manifest.json", marks=pytest.mark.sweep),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(damage, name, work, reference):
    work.run(code=-signal.SIGKILL, signal_at=KILL_AT_10)
    assert work.steps() == [6, 9]
    damage(work.out() / "checkpoints" / "step-000009" / name)
    resumed = work.run()
    assert "resumed     after step 6" in resumed.text
    assert "step-000009" in resumed.text and name in resumed.text
    reference.require(work.out())


def test_every_byte_of_a_manifest_counts(work):
    """No changed byte in a manifest passes for a whole checkpoint with other facts."""
    work.run("run.steps=3", "validation.every=0")
    folder = work.out() / "checkpoints" / "step-000003"
    path = folder / "manifest.json"
    whole = path.read_bytes()
    facts = verify_folder(folder)
    assert facts[0]["step"] == 3 and facts[1] == ""
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        found = verify_folder(folder)
        assert found == facts or found[1], f"byte {position} of the manifest"


def test_all_checkpoints_damaged_is_an_error_with_ways_out(work):
    work.run(code=-signal.SIGKILL, signal_at=KILL_AT_10)
    for step in work.steps():
        flip(work.out() / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors")
    before = {path: path.read_bytes() for path in (work.out() / "checkpoints").rglob("*") if path.is_file()}
    done = len(work.events("StepDone"))
    refused = work.run(code=73)
    assert "no checkpoint can be trusted" in refused.text and "--out" in refused.text
    assert "step-000006" in refused.text and "step-000009" in refused.text
    assert len(work.events("StepDone")) == done, "it trained"
    assert {path: path.read_bytes() for path in (work.out() / "checkpoints").rglob("*") if path.is_file()} == before


def test_damaged_checkpoints_ahead_never_push_out_good_ones(work, reference):
    """Retention goes by what can be restored: two damaged ones must not fill both places of `keep`."""
    work.run("checkpoint.keep=3", code=143, signal_at={**KILL_AT_10, "signal": signal.SIGTERM})
    assert work.steps() == [6, 9, 10]
    for step in (9, 10):
        flip(work.out() / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors")
    work.run(code=143, signal_at={"at": {"event": "StepDone", "step": 7}, "signal": signal.SIGTERM})
    assert set(work.steps()) >= {6, 7}
    resumed = work.run()
    assert "resumed     after step 7" in resumed.text
    reference.require(work.out())
    assert work.steps() == [9, 12]


@pytest.mark.parametrize("name", ["plan.json", "data.json"])
def test_a_damaged_record_of_the_run_is_told_and_trains_nothing(name, work):
    work.run(code=143, signal_at=STOP_AT_4)
    cut(work.out() / name)
    done = len(work.events("StepDone"))
    refused = work.run(code=73)
    assert name in refused.text and "--out" in refused.text
    assert len(work.events("StepDone")) == done


def test_a_torn_line_in_the_log_costs_that_line_alone(work, reference):
    work.run(code=143, signal_at=STOP_AT_4)
    with (work.out() / "events.jsonl").open("ab") as log:
        log.write(b'{"event": "StepDone", "step": 3, "lo')
    work.run()
    reference.require(work.out())


ALL_DAMAGE = (flip, cut, blank, delete, "another's content")
USUAL = {
    ("ltx-video", "latents", flip), ("ltx-video", "latents", "another's content"), ("ltx-video", "prompts", delete),
    ("ltx2", "audio", flip), ("ltx2", "audio", "another's content"), ("ltx2", "prompts", flip),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind", "damage"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.sweep)
        for case in itertools.chain(
            itertools.product(["ltx-video"], ["latents", "prompts"], ALL_DAMAGE),
            itertools.product(["ltx2"], ["audio", "prompts"], ALL_DAMAGE),
        )
    ],
)
def test_a_damaged_cache_entry_is_made_again(damage, kind, work, reference):
    work.run(code=143, signal_at=STOP_AT_4)
    entries = sorted((work.folder / "cache" / kind).rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in entries}
    for number, path in enumerate(entries):
        if damage == "another's content":
            path.write_bytes(whole[entries[number - 1]])
        else:
            damage(path)
    resumed = work.run()
    assert ("is made again" in resumed.text) == (damage is not delete)
    assert "not bit for bit" not in resumed.text
    assert all(path.exists() for path in entries)
    reference.require(work.out())


@pytest.mark.parametrize(("family", "kind"), [("ltx-video", "latents"), ("ltx2", "audio")])
def test_an_entry_that_goes_bad_while_training_stops_the_run(kind, work, reference):
    """It is noticed at the read, not trained on; the next start makes it again."""
    child = work.start(signal_at={"at": {"event": "StepDone", "step": 4}, "signal": signal.SIGSTOP})
    child.until(lambda: len(work.events("StepDone")) == 4, "step 4")
    for path in (work.folder / "cache" / kind).rglob("*.safetensors"):
        flip(path)
    child.go_on()
    child.require(65)
    assert "damaged or removed while the run used it" in child.text and "same command" in child.text
    work.run()
    reference.require(work.out())
