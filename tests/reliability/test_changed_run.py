"""What may change between two attempts of a run and what may not. Never: starting over by itself."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import av
import pytest

STOP_AT_5 = {"at": {"event": "StepDone", "step": 5}, "signal": signal.SIGTERM}


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run but its lock and its log, which note each attempt.

    Of a LoRA file the tensors alone: safetensors writes metadata in any order.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock.json", "events.jsonl"))
    return {str(path.relative_to(folder)): tensor_part(path) for path in files}


def tensor_part(path: Path) -> bytes:
    """A file's bytes, without its header where it has one."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :] if path.suffix == ".safetensors" else data


def named(text: str) -> set[str]:
    """The fields that the message names."""
    return set(re.findall(r"^    (\S.*): \S.* -> .*$", text, re.MULTILINE))


def own_clips(work) -> Path:
    """Make the linked clips a folder of the test's own."""
    folder = work.folder / "clips"
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    return folder


def other_caption(work):
    (own_clips(work) / "clip2.txt").write_text("Something else.\n", encoding="utf-8")


def other_clip(work):
    folder = own_clips(work)
    shutil.copyfile(folder / "clip1.mp4", folder / "clip2.mp4")


def one_clip_less(work):
    (own_clips(work) / "clip4.mp4").unlink()


def other_sound_beside(work):
    folder = own_clips(work)
    sound = bytearray((folder / "clip3.wav").read_bytes())
    sound[1000] ^= 1
    (folder / "clip3.wav").write_bytes(sound)


def no_sound_beside(work):
    """Its own track comes into its right."""
    (own_clips(work) / "clip3.wav").unlink()


def sound_beside_a_mute_clip(work):
    folder = own_clips(work)
    shutil.copyfile(folder / "clip3.wav", folder / "clip0.wav")


def lost_track(work):
    """The same picture, bit for bit, in a file without the sound track."""
    folder = own_clips(work)
    with av.open(folder / "clip1.mp4") as old, av.open(folder / "mute.mp4", "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    (folder / "mute.mp4").replace(folder / "clip1.mp4")


EVERY_CLIP = {f"data: clip{n}.mp4" for n in range(5)}


WITHOUT_SOUND = {"audio.loss_weight", "audio.sigma", "lora.modalities", "training.modalities"}


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("optimizer.learning_rate=2e-3", {"optimizer.learning_rate"}),
        ("optimizer.schedule=linear", {"optimizer.schedule"}),
        ("lora.rank=8", {"lora.rank", "lora.alpha"}),  # alpha follows the rank unless the recipe says it
        ("lora.dropout=0.0", {"lora.dropout"}),
        ("run.seed=8", {"seed"}),
        ("training.batch_size=1", {"training.batch_size", "steps_per_epoch"}),
        ("training.clip_norm=0.5", {"training.clip_norm"}),
        ("training.precision=bf16", {"device.precision"}),
        ("memory.base_precision=nf4", {"memory.base_precision"}),  # whether its scales are quantised follows from it
        ("conditioning.first_frame=0.4", {"conditioning.first_frame"}),
        ("flow.sigma=uniform", {"flow.sigma", "flow.stretch", "flow.uniform_fraction"}),
        ("dataset.0.resolution=96x64", EVERY_CLIP),
        (other_caption, {"data: clip2.mp4"}),
        (other_clip, {"data: clip2.mp4"}),
        (one_clip_less, {"data: clip4.mp4"}),
    ],
)
def test_another_recipe_or_other_data_is_refused_by_name(change, fields, finished):
    require_refused(change, fields, finished)


@pytest.mark.parametrize("family", ["ltx2"])
@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("audio.sigma=shared", {"audio.sigma"}),
        ("audio.loss_weight=0.5", {"audio.loss_weight"}),
        ("audio.loss_weight=0", {"audio.loss_weight", "lora.modalities"}),  # context only: its layers stay out
        ("training.modalities=video", WITHOUT_SOUND),
        ("lora.modalities=video", {"lora.modalities"}),
        ("cache.text_cache=features", {"cache.text"}),
        ("conditioning.prompt_tokens=256", {"conditioning.prompt_tokens"}),
        ("model.base=tiny/ltx2.3", {"model.version"}),
        (other_sound_beside, {"data: clip3.mp4"}),
        (no_sound_beside, {"data: clip3.mp4"}),
        (sound_beside_a_mute_clip, {"data: clip0.mp4"}),
        (lost_track, {"data: clip1.mp4"}),
    ],
)
def test_other_sound_is_another_run(change, fields, finished):
    require_refused(change, fields, finished)


def require_refused(change, fields, finished):
    """The run goes on for no change of these; every field that differs is named, and no file has changed."""
    before, log = content(finished.out()), (finished.out() / "events.jsonl").read_bytes()
    sets = [change] if isinstance(change, str) else []
    if callable(change):
        change(finished)
    refused = finished.run(*sets, code=73)
    assert named(refused.text) == fields and "--out another/directory" in refused.text
    assert content(finished.out()) == before
    assert (finished.out() / "events.jsonl").read_bytes().startswith(log)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("ltx-video", ["run.steps=12", "checkpoint.every=2", "checkpoint.keep=5"]),
        ("ltx-video", ["validation.every=6", "validation.seed=3", "validation.at_start=true"]),
        ("ltx-video", ["memory.checkpointing=true"]),
        pytest.param("ltx-video", ["lora.save_precision=bf16", "run.max_rejected=0.5"], marks=pytest.mark.sweep),
        ("ltx2", ["validation.every=12", "validation.frugal=true", "memory.checkpointing=true"]),
    ],
)
def test_free_fields_may_change(change, work, reference):
    work.run(code=143, signal_at=STOP_AT_5)
    work.run(*change)
    reference.require(work.out())


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
def test_more_steps_continue_a_finished_run(work):
    """As if it had been planned so, where the schedule does not depend on the length."""
    constant = ("optimizer.schedule=constant", "validation.every=0")
    work.run(*constant, "run.steps=5", out="raised")
    work.run(*constant, "run.steps=8", out="raised")
    work.run(*constant, "run.steps=8", out="whole")
    assert work.outcome("raised", step=8) == work.outcome("whole", step=8)


@pytest.mark.sweep
def test_raised_steps_keep_the_schedule_that_the_run_began_with(work):
    ending = "optimizer.end_fraction=0.1"
    work.run("run.steps=6", ending, out="once")
    work.run("run.steps=6", ending, out="twice")
    work.run("run.steps=9", ending, out="once")
    work.run("run.steps=7", ending, out="twice")
    work.run("run.steps=9", ending, out="twice")
    assert work.outcome("once", step=9) == work.outcome("twice", step=9)
    rates = {event["step"]: event["learning_rate"] for event in work.events("StepDone", "once")}
    assert rates[3] > rates[7] == rates[9] > 0


@pytest.mark.sweep
def test_a_schedule_that_ended_at_rate_0_asks_to_be_stretched(work):
    work.run("run.steps=6")
    assert "optimizer.decay_steps = 9" in work.run("run.steps=9", code=2).text
    work.run("run.steps=9", "optimizer.decay_steps=9")
    rates = {event["step"]: event["learning_rate"] for event in work.events("StepDone")}
    assert all(rates[step] > 0 for step in range(1, 10))


def test_a_finished_run_started_again_stays_as_it_is(finished, reference):
    finished.run()  # notes in the plan where the folders are now
    before = content(finished.out())
    again = finished.run()
    assert content(finished.out()) == before and "resumed     after step 12" in again.text
    reference.require(finished.out())


def test_a_finished_run_comes_back_after_its_lora_was_deleted(finished, reference):
    (finished.out() / "lora.safetensors").unlink()
    finished.run()
    reference.require(finished.out())


def test_fewer_steps_than_are_done_are_refused(finished):
    """A LoRA of step 12 must not pass for one of step 6."""
    before = content(finished.out())
    refused = finished.run("run.steps=6", code=73)
    assert "step 12" in refused.text and "6" in refused.text and "--out" in refused.text
    assert content(finished.out()) == before


def test_never_resume_refuses_and_changes_nothing(finished):
    before = content(finished.out())
    refused = finished.run("run.resume=never", code=73)
    assert "run.resume" in refused.text and "--out" in refused.text
    assert content(finished.out()) == before


def test_a_directory_without_a_checkpoint_holds_nothing_to_lose(work, reference):
    """Killed before the first checkpoint, the recipe may still be corrected."""
    kill = {"at": {"event": "StepDone", "step": 1}, "signal": signal.SIGKILL}
    work.run("run.seed=99", code=-signal.SIGKILL, signal_at=kill)
    work.run()
    reference.require(work.out())


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
def test_everything_may_move(work, reference):
    """Run directory, cache, recipe and clips in other folders, under other names."""
    work.run(code=143, signal_at=STOP_AT_5)
    clips = own_clips(work)
    clips.rename(work.folder / "pictures")
    (work.folder / "cache").rename(work.folder / "store")
    work.out().rename(work.out("elsewhere"))
    work.change('path = "clips"', 'path = "pictures"')
    work.recipe.rename(work.folder / "renamed.toml")
    (work.folder / "renamed.toml").rename(work.recipe)
    resumed = work.run('cache.directory="store"', out="elsewhere")
    assert "resumed     after step 5" in resumed.text
    reference.require(work.out("elsewhere"))


def test_one_of_several_processes_is_refused(work):
    refused = work.run(code=2, environment={"WORLD_SIZE": "2", "RANK": "0"})
    assert "2 processes" in refused.text and not work.out().exists()


def test_plan_of_an_existing_run_changes_nothing(finished):
    everything = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    shown = finished.run(verb="plan")
    assert "at step 12" in shown.text
    after = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file() and path != shown.log}
    assert after == everything
