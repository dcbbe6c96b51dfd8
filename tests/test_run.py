"""Whole runs as a user starts them: the shipped recipes on the tiny model, folders of clips, mistakes and refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ltxforge import hardware, run, session
from ltxforge.dataset import cached
from ltxforge.errors import DataError, KernelError, PlanError, RecipeError, RunError
from ltxforge.lora.inject import inject, load_adapter
from ltxforge.lora.targets import match
from ltxforge.media import demo
from ltxforge.media.decode import read_image
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.load import load_model
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import Plan, from_json
from ltxforge.quant.keep import Keep
from ltxforge.recipe.parse import load
from ltxforge.trackers.jsonl import last_per_step, read_events
from ltxforge.ui.screen import screen_for
from ltxforge.validation import sample as sampling
from ltxforge.validation.sample import sample

ROOT = Path(__file__).resolve().parent.parent
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SMALL = [
    "run.steps=3", "checkpoint.every=2", "training.batch_size=2", "lora.rank=4", "optimizer.warmup_steps=1",
    "validation.every=3", "validation.steps=2", "dataset.0.resolution=64x64", "dataset.0.frames=9",
    "validation.resolution=64x64", "validation.frames=9", "conditioning.prompt_tokens=32",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clips(here) -> Path:
    return demo.render(here / "clips")


def start(recipe: Path, *overrides: str, out: Path | None = None) -> str:
    screen = io.StringIO()
    run.run(load(recipe, overrides), out, screen_for(screen, plain=True))
    return screen.getvalue()


def plan_of(directory: Path) -> Plan:
    return from_json(Plan, json.loads((directory / "plan.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_run(recipe, here, clips):
    image = here / "first.png"
    Image.new("RGB", (200, 100), "teal").save(image)
    base, rate = ("tiny/ltx2", 24) if recipe.stem.startswith("ltx2") else ("tiny/ltx-video", 25)
    overrides = [f"model.base={base}", f"dataset.0.path={clips}", *SMALL]
    if "image" in recipe.stem:
        overrides += [f"validation.prompt.0.image={image}", "optimizer.warmup_steps=0"]
    shown = start(recipe, *overrides)
    home = here / "runs" / recipe.stem
    names = [prompt.name for prompt in plan_of(home).validation.prompts]
    assert names
    for step in (0, 3):
        for name in names:
            folder = home / "samples" / f"step-{step:06d}"
            with av.open(folder / f"{name}.mp4") as video:
                assert video.streams.video[0].average_rate == rate
                assert len(video.streams.audio) == (base == "tiny/ltx2")
                frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert len(frames) == 9 and frames[0].shape == (64, 64, 3)
            with Image.open(folder / f"{name}.png") as sheet:
                assert sheet.size[0] > 300
    assert "<svg" in (home / "loss.svg").read_text(encoding="utf-8")
    assert list(last_per_step(read_events(home / "events.jsonl"))) == [1, 2, 3]
    assert "finished" in shown
    assert sorted(path.name for path in (home / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.sweep
def test_the_quickstart_takes_less_than_two_minutes(tmp_path, record_property):
    """The README's promise, as a user runs it: a process of its own, nothing cached, nothing overridden."""
    command = [sys.executable, "-m", "ltxforge", "run", str(ROOT / "recipes/quickstart.toml")]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    environment.pop("OMP_NUM_THREADS", None)
    began = time.perf_counter()
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    record_property("count", f"quickstart: {seconds:.0f} s")
    assert result.returncode == 0, result.stderr
    assert seconds < 120
    home = tmp_path / "runs/quickstart"
    losses = [event["loss"] for event in last_per_step(read_events(home / "events.jsonl")).values()]
    assert len(losses) == 200 and sum(losses[-20:]) < 0.75 * sum(losses[:20])
    assert (home / "lora.safetensors").exists() and (home / "samples/step-000200/red-disc.mp4").exists()


def test_the_exported_file_samples_what_the_trainer_samples(here):
    """A fresh stock pipeline with the exported float32 LoRA gives the trainer's validation sample, bit for bit."""
    prompt = ["validation.prompt=", "validation.prompt.0.name=disc", "validation.prompt.0.prompt=a red disc"]
    settings = [*SMALL, *prompt, "lora.save_precision=fp32", "validation.guidance=1.0", "optimizer.learning_rate=0.05"]
    start(ROOT / "recipes/quickstart.toml", *settings)
    home, cpu = here / "runs/quickstart", torch.device("cpu")
    plan = plan_of(home)
    model = load_model(plan.model, cpu, torch.float32)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(plan.lora.targets, model.spec), plan.seed)
    load_adapter(model.transformer, load_file(home / "checkpoints/step-000003/adapter.safetensors"))
    (embedding,) = model.encode_prompts([WantedPrompt("a red disc")], 32)
    embeddings = {"a red disc": embedding}
    ours = sample(model, plan.validation.prompts[0], embeddings, 32).frames

    parts, sampling = tiny_parts(model.spec), model.spec.sampling
    text_encoder, tokenizer = parts.text_encoder(cpu, torch.float32)
    pipeline = LTXConditionPipeline(
        scheduler=parts.scheduler(), vae=parts.vae(cpu, torch.float32), text_encoder=text_encoder, tokenizer=tokenizer,
        transformer=parts.transformer(Keep(cpu, torch.float32)),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray:
        frames = pipeline(
            prompt="a red disc", width=64, height=64, num_frames=9, frame_rate=25.0, guidance_scale=1.0,
            num_inference_steps=2, decode_timestep=sampling.decode_timestep, max_sequence_length=32,
            decode_noise_scale=sampling.decode_noise_scale, output_type="np",
            generator=torch.Generator().manual_seed(42),
        ).frames[0]  # fmt: skip
        return np.rint(frames * 255).astype(np.uint8)

    base = picture()
    pipeline.load_lora_weights(str(home), weight_name="lora.safetensors")
    assert np.array_equal(picture(), ours) and not np.array_equal(base, ours)


def test_user_files_are_never_changed(here, clips):
    def digests() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(clips.iterdir())}

    before, times = digests(), {path.name: path.stat().st_mtime_ns for path in clips.iterdir()}
    start(ROOT / "recipes/quickstart.toml", *SMALL, "dataset.0.path=clips", "validation.every=0")
    assert digests() == before
    assert {path.name: path.stat().st_mtime_ns for path in clips.iterdir()} == times


def test_the_adapter_of_the_checkpoint_is_the_exported_one(here):
    start(ROOT / "recipes/quickstart.toml", *SMALL, "lora.alpha=6.0", "validation.every=0")
    home = here / "runs/quickstart"
    adapter = load_file(home / "checkpoints/step-000003/adapter.safetensors")
    exported = load_file(home / "lora.safetensors")
    inside = load_file(home / "checkpoints/step-000003/lora.safetensors")
    assert all(torch.equal(exported[name], inside[name]) for name in exported)
    for name, value in adapter.items():
        assert value.dtype == torch.float32
        scale = 1.5 if "lora_B" in name else 1.0
        assert torch.equal(exported[f"diffusion_model.{name}"], (value * scale).to(torch.bfloat16))


def test_epochs_become_steps(here, clips):
    start(ROOT / "recipes/quickstart.toml", *SMALL, "run.steps=", "run.epochs=2", "validation.every=0")
    plan = plan_of(here / "runs/quickstart")
    assert plan.steps == round(2 * plan.steps_per_epoch) and plan.steps > 3


def test_out_and_cache_directories(here):
    start(
        ROOT / "recipes/quickstart.toml", *SMALL, "cache.directory=elsewhere", "validation.every=0", out=here / "mine"
    )
    assert (here / "mine/lora.safetensors").exists() and (here / "elsewhere/latents").is_dir()
    assert not (here / "runs").exists() and not (here / "cache").exists()


def test_everything_missing_is_told_at_once(here):
    with pytest.raises(PlanError) as refused:
        start(
            ROOT / "recipes/ltx-video-image-to-video.toml", "model.base=./no-weights", "dataset.0.path=no-clips",
            "validation.library=no-library.toml",
        )  # fmt: skip
    message = str(refused.value)
    assert all(name in message for name in ("no-weights", "no-clips", "no-library.toml", "data/first-frame.png"))


def test_an_unreachable_hub_is_one_clear_message(here, clips):
    code = "from ltxforge.cli import main; main()"
    command = ["plan", str(ROOT / "recipes/ltx-video-lora.toml"), "--set", "dataset.0.path=clips", "--plain"]
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(here / "hf"),
        "PATH": "",
        "PYTHONPATH": SOURCES,
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 69, result.stderr
    assert "Traceback" not in result.stderr and "Lightricks/LTX-Video-0.9.5" in result.stderr


def test_a_recipe_mistake_ends_with_2_and_starts_nothing(here):
    recipe = here / "mine.toml"
    recipe.write_text(
        '[model]\nbase = "tiny/ltx-video"\n[run]\nsteps = 3\n[[dataset]]\npath = "x"\nframes = 61\n', "utf-8"
    )
    command = [sys.executable, "-m", "ltxforge", "run", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": SOURCES, "PATH": ""})
    assert result.returncode == 2 and "57 or 65" in result.stderr and "mine.toml:7:" in result.stderr
    assert [path.name for path in here.iterdir()] == ["mine.toml"]
    with pytest.raises(RecipeError):
        start(recipe)


def test_a_sample_that_fails_costs_the_sample_and_not_the_run(here, monkeypatch):
    """The first frame's file goes away after the plan has looked at it; a run of hours goes on."""
    image = here / "first.png"
    Image.new("RGB", (64, 64), "teal").save(image)

    def gone(path: Path, size: tuple[int, int]):
        image.unlink(missing_ok=True)
        return read_image(path, size)

    monkeypatch.setattr(sampling, "read_image", gone)
    prompt = 'validation.prompt=[{name="a", prompt="x", image="first.png"}]'
    shown = start(ROOT / "recipes/quickstart.toml", *SMALL, "model.base=tiny/ltx-video-0.9.1", prompt)
    home = here / "runs/quickstart"
    assert "no sample a after step 3" in shown and "finished" in shown
    assert (home / "lora.safetensors").exists() and not (home / "samples/step-000003/a.mp4").exists()


def test_a_rope_that_is_not_the_version_s_own_can_be_sampled(here):
    prompt = 'validation.prompt=[{name="a", prompt="x"}]'
    shown = start(
        ROOT / "recipes/quickstart.toml", *SMALL, "model.base=tiny/ltx-video-0.9.1", "model.rope=causal", prompt
    )
    assert (here / "runs/quickstart/samples/step-000003/a.mp4").exists() and "no sample" not in shown


def test_a_run_inside_the_clips_folder_does_not_take_its_samples_for_clips(clips, monkeypatch):
    monkeypatch.chdir(clips)
    settings = [*SMALL, "dataset.0.path=.", "validation.every=1", "optimizer.schedule=constant"]
    for steps in (2, 3):
        start(ROOT / "recipes/quickstart.toml", *settings, f"run.steps={steps}")
    assert len({sample.path for sample in plan_of(clips / "runs/quickstart").data.samples}) == 6


def test_a_run_that_moves_keeps_its_data_and_says_that_bits_may_differ(here, clips, monkeypatch):
    """As from a machine whose torch is another: the same clips, other versions."""
    start(ROOT / "recipes/quickstart.toml", *SMALL, "dataset.0.path=clips", "validation.every=0")
    real = hardware.detect()
    elsewhere = dataclasses.replace(real, has_bf16=True, versions={**real.versions, "torch": "9.9.9"})
    monkeypatch.setattr(hardware, "detect", lambda: elsewhere)
    settings = [*SMALL, "dataset.0.path=clips", "validation.every=0", "run.steps=4", "optimizer.decay_steps=4"]
    shown = start(ROOT / "recipes/quickstart.toml", *settings)
    assert "not bit for bit from here on" in shown and "9.9.9" in shown and "finished" in shown
    plan = plan_of(here / "runs/quickstart")
    assert (plan.device.precision, plan.device.encoder_precision, plan.device.exactness) == (
        "fp32",
        "fp32",
        "statistical",
    )


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_folder_for_weights_that_cannot_be_written_is_refused_with_the_plan(here, clips, verb):
    """Before anything is encoded, and without a trace of it."""
    settings = ["dataset.0.path=clips", "memory.group_offload=block_level", "memory.offload_to_disk=nowhere/waiting"]
    with pytest.raises(PlanError, match="streamed weights cannot be put here"):
        start_or_plan(verb, ROOT / "recipes/quickstart.toml", *SMALL, *settings)
    assert not (here / "nowhere").exists() and not (here / "cache/latents").exists()
    assert not (here / "runs/quickstart/plan.json").exists()


def start_or_plan(verb: str, recipe: Path, *overrides: str) -> None:
    carry_out = {"run": run.run, "plan": run.plan_only}[verb]
    carry_out(load(recipe, overrides), None, screen_for(io.StringIO(), plain=True))


def test_data_that_is_encoded_anew_is_the_same_data(here, clips, monkeypatch):
    """A release that encodes differently raises the version: every entry is made anew, and the run goes on."""
    start(ROOT / "recipes/quickstart.toml", *SMALL, "dataset.0.path=clips", "validation.every=0")
    monkeypatch.setattr(cached, "LATENTS_VERSION", cached.LATENTS_VERSION + 1)
    settings = [*SMALL, "dataset.0.path=clips", "validation.every=0", "run.steps=4", "optimizer.decay_steps=4"]
    assert "finished" in start(ROOT / "recipes/quickstart.toml", *settings)


def test_a_false_start_leaves_nothing_to_the_next_run(here, monkeypatch):
    """Stopped before its first checkpoint, then started with another seed: no old sample, no old loss."""
    settings = [*SMALL, "validation.at_start=true", "checkpoint.every=100", "run.steps=5", "optimizer.warmup_steps=0"]
    with monkeypatch.context() as patch:
        patch.setattr(session, "train", lambda *_arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(ROOT / "recipes/quickstart.toml", *settings)
    sheet = here / "runs/quickstart/samples/step-000000/red-disc.png"
    before = sheet.read_bytes()
    start(ROOT / "recipes/quickstart.toml", *settings, "run.seed=7", "validation.seed=8")
    assert sheet.read_bytes() != before
    plans = [event for event in read_events(here / "runs/quickstart/events.jsonl") if event["event"] == "PlanMade"]
    assert [event["plan"]["seed"] for event in plans] == [7]


def test_overrides_are_kept_with_the_recipe(here):
    overrides = [*SMALL, "validation.every=0", 'lora.targets=["to_q", "to_k"]', "validation.negative_prompt=it's dull"]
    start(ROOT / "recipes/quickstart.toml", *overrides)
    kept = here / "runs/quickstart/recipe.toml"
    told, flags = kept.read_text(encoding="utf-8").splitlines()[-2:]
    assert told.startswith("# Started with overrides")
    words = shlex.split(flags.removeprefix("# "))
    assert words[::2] == ["--set"] * len(overrides) and words[1::2] == overrides
    assert load(kept, words[1::2]).recipe == load(ROOT / "recipes/quickstart.toml", overrides).recipe
    assert plan_of(here / "runs/quickstart").origins["run.steps"] == "--set"


def plan_text(*overrides: str) -> str:
    screen = io.StringIO()
    run.plan_only(load(ROOT / "recipes/quickstart.toml", overrides), None, screen_for(screen, plain=True))
    return screen.getvalue()


def test_a_plan_tells_where_the_run_stands(here):
    settings = [*SMALL, "validation.every=0", "optimizer.schedule=constant"]
    assert "this run is" not in plan_text(*settings)
    start(ROOT / "recipes/quickstart.toml", *settings)
    told = plan_text(*settings)
    assert "this run is finished at step 3; raise run.steps to go on" in told and "continues it" not in told
    told = plan_text(*settings, "run.steps=5")
    assert "this run is at step 3; `run` continues it: 2 steps at" in told and "finished" not in told


@pytest.mark.parametrize(
    ("image", "why", "is_elsewhere"),
    [("clips", "it is a folder", False), ("none.png", "it does not exist", True), ("a.png", "not an image", False)],
)
def test_an_image_that_is_none_is_told_by_what_it_is(image, why, is_elsewhere, here, clips):
    (here / "a.png").write_text("no picture", encoding="utf-8")
    prompt = ["validation.prompt=", "validation.prompt.0.name=a", "validation.prompt.0.prompt=b"]
    with pytest.raises(PlanError) as refused:
        plan_text(*SMALL, *prompt, f"validation.prompt.0.image={image}")
    assert why in str(refused.value)
    assert ("Paths are relative" in str(refused.value)) == is_elsewhere


@pytest.mark.parametrize(
    ("weight", "told"),
    [(1, " of 3 steps trained sound\n"), (0, " of 3 steps had sound, as context only: audio.loss_weight is 0\n")],
)
def test_what_the_steps_did_with_sound_is_told_at_the_end(weight, told, here, clips):
    settings = ["model.base=tiny/ltx2", f"dataset.0.path={clips}", "validation=", f"audio.loss_weight={weight}"]
    shown = start(ROOT / "recipes/ltx2-lora.toml", *SMALL, "conditioning.prompt_tokens=128", *settings)
    assert told in shown
    with safe_open(here / "runs/ltx2-lora/lora.safetensors", "pt") as file:
        assert any("audio" in key for key in file.keys()) == bool(weight)  # noqa: SIM118


def test_several_processes_are_refused(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="several GPUs"):
        start(ROOT / "recipes/quickstart.toml")


def test_targets_that_match_nothing_are_refused_before_training(here):
    with pytest.raises(PlanError, match="match no linear layer"):
        start(ROOT / "recipes/quickstart.toml", *SMALL, 'lora.targets=["to_qkv"]')


def test_too_many_unreadable_clips_stop_the_run(here, clips):
    for name in ("one", "two"):
        (clips / f"{name}.mp4").write_bytes(b"")
        (clips / f"{name}.txt").write_text("a caption", encoding="utf-8")
    with pytest.raises(DataError, match="2 of 8 clips were rejected"):
        start(ROOT / "recipes/quickstart.toml", *SMALL, "dataset.0.path=clips")
    shown = start(ROOT / "recipes/quickstart.toml", *SMALL, "dataset.0.path=clips", "run.max_rejected=1.0")
    assert "rejected" in shown and "finished" in shown


def test_an_old_run_is_not_overwritten_by_another_recipe(here):
    start(ROOT / "recipes/quickstart.toml", *SMALL, "validation.every=0")
    saved = (here / "runs/quickstart/lora.safetensors").read_bytes()
    with pytest.raises(RunError, match="optimizer.learning_rate"):
        start(ROOT / "recipes/quickstart.toml", *SMALL, "validation.every=0", "optimizer.learning_rate=1e-5")
    assert (here / "runs/quickstart/lora.safetensors").read_bytes() == saved


REJECTED = {
    "zero_byte.mp4", "text_renamed.mp4", "truncated_no_moov.mp4", "audio_only.mp4", "bad_caption_utf8.mp4",
    "missing_caption.mp4", "roof_portrait_hdr.mp4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("quickstart", []), ("ltx2-lora", ["model.base=tiny/ltx2", "dataset.0.windows=2", "validation.every=0"])],
)
def test_real_clips_with_nasty_ones_among_them(recipe, changes, here, test_data):
    folder = here / "clips"
    shutil.copytree(test_data / "clips", folder)
    shutil.copytree(test_data / "nasty", folder / "nasty")
    settings = ["dataset.0.path=clips", "run.max_rejected=1.0", "dataset.0.resolution=96x64", "dataset.0.frames=17"]
    shown = start(ROOT / f"recipes/{recipe}.toml", *SMALL[:-4], *settings, "conditioning.prompt_tokens=32", *changes)
    home = here / "runs" / recipe
    verdicts = verdicts_of(home)
    media = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"]
    assert verdicts.keys() == {path.name for path in media}
    assert {name for name, verdict in verdicts.items() if verdict["verdict"] == "rejected"} == REJECTED
    assert {name for name, verdict in verdicts.items() if verdict["verdict"] == "dropped"} == {"one_frame.mp4"}
    assert all(verdict["reason"] for verdict in verdicts.values() if verdict["verdict"] != "ok")
    assert verdicts["truncated_mid_stream.mp4"]["warnings"]
    assert (home / "lora.safetensors").exists() and "finished" in shown


def verdicts_of(home: Path) -> dict[str, dict]:
    """The last verdict of each clip, by its file's name."""
    events = read_events(home / "events.jsonl")
    return {Path(event["path"]).name: event for event in events if event["event"] == "ClipJudged"}


WITHOUT_SOUND = {"cars_12fps.mp4", "city_night.mpg", "sign_thanks.mkv", "sign_walk.mkv"}
SILENT, HDR = "flower.webm", "roof_portrait_hdr.mp4"


@pytest.mark.parametrize(
    ("recipe", "base"),
    [
        *((recipe, "tiny/ltx2") for recipe in ("ltx2-lora", "ltx2-video-only", "ltx2-image-to-video", "ltx2-audio")),
        ("ltx2-lora", "tiny/ltx2.3"),
        ("ltx2-lora", "tiny/ltx2.5"),
    ],
)
def test_ltx2_recipes_on_real_clips(recipe, base, here, test_data):
    overrides = [*SMALL, f"model.base={base}", f"dataset.0.path={test_data / 'clips'}", "dataset.0.windows=2"]
    if "image" in recipe:
        overrides.append(f"validation.prompt.0.image={test_data / 'images/leopard.jpg'}")
    shown = start(ROOT / f"recipes/{recipe}.toml", *overrides, "validation.at_start=false")
    home = here / "runs" / recipe
    modalities = plan_of(home).training.modalities
    verdicts = verdicts_of(home)
    assert verdicts.keys() == {path.name for path in (test_data / "clips").iterdir() if path.suffix != ".txt"}
    left_out = WITHOUT_SOUND | {SILENT} if modalities == "audio" else {HDR}
    assert {name for name, verdict in verdicts.items() if verdict["verdict"] != "ok"} == left_out
    if modalities == "audio":
        assert {verdicts[name]["verdict"] for name in left_out} == {"dropped"}
        assert all("no sound" in verdicts[name]["reason"] for name in left_out)
    require_trained(home, verdicts.keys() - left_out, modalities)
    require_lora(home / "lora.safetensors", modalities)
    for prompt in plan_of(home).validation.prompts:
        require_sound_ends_with_picture(home / f"samples/step-000003/{prompt.name}.mp4", frames=9, fps=24)
    told = "samples without sound, which train their picture alone: 2, of flower.webm"
    assert (told in shown) == (modalities == "both")
    heard = sum(event["audio_loss"] is not None for event in last_per_step(read_events(home / "events.jsonl")).values())
    assert (f"{heard} of 3 steps trained sound" in shown) == (modalities != "video")
    assert bool(heard) == (modalities != "video")


def require_trained(home: Path, clips: set[str], modalities: str) -> None:
    """Two windows of each clip are trained on, by what each has of picture and sound."""
    data = json.loads((home / "data.json").read_text(encoding="utf-8"))["samples"]
    found = {name: [each for each in data if Path(each["path"]).name == name] for name in clips}
    assert sum(map(len, found.values())) == len(data)
    for name, samples in found.items():
        is_heard = modalities != "video" and name not in WITHOUT_SOUND | {SILENT}
        assert [bool(each["audio"]) for each in samples] == [is_heard] * 2, name
        assert [bool(each["latents"]) for each in samples] == [modalities != "audio"] * 2, name


def require_lora(path: Path, modalities: str) -> None:
    """Layers of what was trained, those between the modalities only where both were."""
    names = set(load_file(path))
    between = {name for name in names if "audio_to_video" in name or "video_to_audio" in name}
    own = {"audio" if "audio" in name else "video" for name in names - between}
    assert own == ({"video", "audio"} if modalities == "both" else {modalities})
    assert bool(between) == (modalities == "both")


def require_sound_ends_with_picture(path: Path, frames: int, fps: int) -> None:
    """Both tracks decode, and end within one frame of each other."""
    with av.open(path) as file:
        pictures = list(file.decode(video=0))
    with av.open(path) as file:
        sounds = list(file.decode(audio=0))
    assert len(pictures) == frames
    picture_end = pictures[-1].time + 1 / fps
    sound_end = sounds[-1].time + sounds[-1].samples / sounds[-1].sample_rate
    assert abs(picture_end - sound_end) < 1 / fps


def test_a_kernel_that_cannot_start_is_told_with_the_way_out():
    """A real error of Triton's, as a GPU with too little shared memory raises it; others pass as they are."""
    errors = pytest.importorskip("triton.runtime.errors")
    told = []
    with pytest.raises(KernelError, match="out of resource") as raised, run.failures_logged(told.append):
        raise errors.OutOfResources(147_512, 101_376, "shared memory")
    assert "--set kernels.all=eager" in str(raised.value) and told[0].level == "error"
    with pytest.raises(ZeroDivisionError), run.failures_logged(told.append):
        raise ZeroDivisionError
    assert len(told) == 1
