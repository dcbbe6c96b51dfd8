"""What must not change a bit of the result, and files that must not change at all."""

from __future__ import annotations

import os
import pty
import shutil
import threading
from pathlib import Path

import pytest

EVERY_GUIDANCE = (
    "validation.guidance=3", "validation.audio_guidance=3", "validation.stg=1", "validation.modality_guidance=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sets"),
    [
        pytest.param("ltx-video", ["validation.every=8"], marks=pytest.mark.sweep),
        ("ltx-video", ["validation.every=5", "validation.at_start=true", "validation.guidance=3"]),
        ("ltx-video", ["memory.checkpointing=true"]),
        pytest.param("ltx-video", ["checkpoint.every=1", "checkpoint.keep=2"], marks=pytest.mark.sweep),
        pytest.param("ltx-video", ["memory.checkpointing=2"], marks=pytest.mark.sweep),
        ("ltx2", ["validation.every=9", "validation.at_start=true", *EVERY_GUIDANCE]),
        ("ltx2", ["validation.every=7", "validation.frugal=true"]),
        ("ltx2", ["memory.checkpointing=true"]),  # dropout is on
        pytest.param("ltx2", ["memory.checkpointing=2"], marks=pytest.mark.sweep),
        ("ltx2", ['cache.text_cache="features"']),
        ("ltx-video", ["memory.dry_run=true", "validation.every=5", "validation.at_start=true"]),
        ("ltx2", ["memory.dry_run=true", "memory.checkpointing=true"]),
    ],
)
def test_what_surrounds_training_changes_no_bit(sets, work, reference):
    shown = work.run(*sets)
    assert "no sample" not in shown.text
    reference.require(work.out())


@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
def test_a_live_display_changes_no_bit(work, reference):
    """Without --plain, in a terminal."""
    leader, follower = pty.openpty()
    shown = bytearray()
    reader = threading.Thread(target=drain, args=(leader, shown))
    reader.start()
    child = work.start_in_terminal(os.ttyname(follower))
    child.wait()
    os.close(follower)
    reader.join()
    os.close(leader)
    assert child.code == 0, shown.decode("utf-8", "replace")
    assert b"\x1b[" in shown, "it drew nothing"
    reference.require(work.out())


def drain(descriptor: int, into: bytearray) -> None:
    """Read a terminal until its other side is closed."""
    try:
        while data := os.read(descriptor, 65536):
            into += data
    except OSError:  # how Linux says it
        pass


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("family", ["ltx2"])
def test_one_modality_alone_is_stopped_and_resumed(modality, work):
    """The other one is nowhere: not in the cache, not in the adapter, not in the log."""
    outcome = require_same_bits_when_stopped(work, f"training.modalities={modality}", 'cache.directory="alone"')
    names = [name for name in outcome if "diffusion_model" in name]
    assert names and {"audio_attn" in name for name in names} == {modality == "audio"}
    assert (work.folder / "alone/audio").exists() == (modality == "audio")
    assert (work.folder / "alone/latents").exists() == (modality == "video")
    alone = {event["audio_loss"] == event["loss"] for event in work.events("StepDone")}
    assert alone == {modality == "audio"}


@pytest.mark.parametrize("family", ["ltx2"])
@pytest.mark.parametrize(
    "sets",
    [
        ["audio.sigma=shared", "audio.loss_weight=0.5", "cache.latents=sample"],  # drawn from posteriors, by address
        pytest.param(["cache.text_cache=features", "memory.checkpointing=true"], marks=pytest.mark.sweep),
        pytest.param(["lora.modalities=video", 'lora.targets=["attention", "cross_modal"]'], marks=pytest.mark.sweep),
    ],
)
def test_other_ways_to_train_with_sound_are_stopped_and_resumed(sets, work):
    require_same_bits_when_stopped(work, *sets)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("ltx-video", "ademamix8bit"),
        *(
            pytest.param(family, name, marks=pytest.mark.sweep)
            for family in ("ltx-video", "ltx2")
            for name in ("adamw8bit", "paged_adamw8bit", "lion8bit", "paged_lion8bit", "ademamix8bit")
            if (family, name) != ("ltx-video", "ademamix8bit")
        ),
    ],
)
def test_moments_in_8_bits_are_stopped_and_resumed(name, work):
    """At rank 64 each tensor of the small models has the 4096 numbers from which on moments are in 8 bits."""
    outcome = require_same_bits_when_stopped(work, f"optimizer.name={name}", "lora.rank=64")
    moments = [value[0] for key, value in outcome.items() if key.startswith("optimizer ") and "/state" in key]
    assert moments and set(moments) == {"U8"}


def require_same_bits_when_stopped(work, *sets):
    """Five steps with a stop and a new process between them are those of a run without; gives what they came to."""
    sets = (*sets, "run.steps=5", "validation.every=0")
    work.run(*sets, out="whole")
    work.run(*sets, code=143, signal_at={"at": {"event": "StepDone", "step": 2}, "signal": 15})
    assert "resumed     after step 2," in work.run(*sets).text
    outcome = work.outcome(step=5)
    assert outcome == work.outcome("whole", step=5)
    return outcome


SWAP = ("memory.block_swap=2", "memory.checkpointing=2")
DISK = ("memory.group_offload=leaf_level", "memory.offload_to_disk=waiting", "memory.offload_activations=true")
GROUPS = ("memory.group_offload=block_level", "memory.blocks_per_group=2", "memory.checkpointing=true")
AWAY = ("memory.checkpointing=true", "memory.offload_activations=true")


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("ltx-video", SWAP, DISK),
        ("ltx2", DISK, (*SWAP, "memory.offload_activations=true")),
        *(
            pytest.param(family, *ways, marks=pytest.mark.sweep)
            for family in ("ltx-video", "ltx2")
            for ways in ((GROUPS, GROUPS), (AWAY, AWAY), (GROUPS, ()), ((), AWAY), (DISK, DISK), (SWAP, SWAP))
        ),
    ],
)
def test_where_weights_and_activations_wait_changes_no_bit_when_stopped_and_resumed(before, after, work, reference):
    """A run goes on under another strategy than it was begun with, and ends as one that had none."""
    (work.folder / "waiting").mkdir()
    work.run(*before, code=143, signal_at={"at": {"event": "StepDone", "step": 4}, "signal": 15})
    assert "resumed     after step 4," in work.run(*after).text
    reference.require(work.out())
    assert not list((work.folder / "waiting").iterdir()), "what waited on the disk is gone with the process"


@pytest.mark.parametrize(
    ("family", "sets"),
    [
        ("ltx-video", ["memory.base_precision=nf4", "memory.checkpointing=2", *DISK]),
        *(
            pytest.param(family, [f"memory.base_precision={name}", *more], marks=pytest.mark.sweep)
            for family in ("ltx-video", "ltx2")
            for name, more in (
                ("nf4", ()), ("nf4", ("memory.double_quant=false", *SWAP)), ("int8", GROUPS), ("int8-w8a8", AWAY),
                ("fp8", ("memory.quantise_on=host",)),
            )
        ),
    ],
)  # fmt: skip
def test_a_quantised_base_is_stopped_and_resumed(sets, work):
    """Quantised at the first start, read from the cache at the next ones: another base than the plain run's."""
    (work.folder / "waiting").mkdir()
    outcome = require_same_bits_when_stopped(work, *sets)
    work.run("run.steps=5", "validation.every=0", out="plain")
    plain = work.outcome("plain", step=5)
    assert outcome.keys() == plain.keys() and outcome != plain


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["ltx-video", "ltx2"])
def test_a_compiled_run_is_stopped_and_resumed(work, reference):
    """Other code and so other sums; no promise of bits, which the plan says, and the same steps but for rounding."""
    sets = ("training.compile=true", "run.steps=4", "validation.every=0", "lora.dropout=0", *SWAP)
    work.run(*sets, code=143, signal_at={"at": {"event": "StepDone", "step": 2}, "signal": 15})
    resumed = work.run(*sets)
    assert "statistical" in resumed.text and "resumed     after step 2," in resumed.text
    work.run(*sets, "training.compile=false", out="plain")
    losses = [{event["step"]: event["loss"] for event in work.events("StepDone", out)} for out in ("run", "plain")]
    assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4}
    assert all(abs(losses[0][step] - losses[1][step]) <= 1e-3 * losses[1][step] for step in losses[0])


@pytest.mark.parametrize("family", ["ltx2"])
def test_picture_and_sound_are_both_trained_where_both_are(reference):
    """What the other tests compare: steps with sound and, because of first frames and mute clips, sums of different
    lengths.
    """
    steps = [value for name, value in reference.outcome.items() if name.endswith(" audio_loss_by_sample")]
    assert len(steps) == 12 and {len(each) for each in steps} >= {2, 3}
    names = "".join(reference.outcome)
    assert all(part in names for part in (".attn1.", ".audio_attn1.", ".audio_to_video_attn.", ".video_to_audio_attn."))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "base"),
    [("ltx-video", "tiny/ltx-video"), *(("ltx2", base) for base in ("tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"))],
)
def test_the_built_in_clips_stopped_and_resumed(base, fresh):
    """The quickstart's data: rendered, cached, stopped, resumed, compared with a run that was not stopped."""
    fresh.change('path = "clips"', 'path = "builtin/shapes"')
    require_same_bits_when_stopped(fresh, f"model.base={base}")


@pytest.mark.parametrize("family", ["ltx-video", pytest.param("ltx2", marks=pytest.mark.sweep)])
def test_the_user_s_files_stay_as_they_are(fresh):
    """Bytes, times, modes and names, with a clip and a caption that are refused among them."""
    link = fresh.folder / "clips"
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    (link / "broken.mp4").write_bytes(b"no video")
    (link / "broken.txt").write_text("A caption.\n", encoding="utf-8")
    (link / "clip3.mp4").chmod(0o444)
    before = state(link)
    fresh.run(code=143, signal_at={"at": {"event": "StepDone", "step": 2}, "signal": 15})
    fresh.run(code=-9, signal_at={"at": {"event": "StepDone", "step": 5}, "signal": 9})
    fresh.run()
    assert state(link) == before


def state(folder: Path) -> dict:
    """All that a file system tells about a folder's files, but the time of last reading."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_ino,
                    path.read_bytes() if path.is_file() else None)
        for path in paths
    }  # fmt: skip
