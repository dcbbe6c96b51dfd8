"""`plan --gpu --ram`: a machine that is not here, without a network, without a file being written."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ltxforge import run
from ltxforge.assumed import Elsewhere, machine
from ltxforge.errors import PlanError, WeightsError
from ltxforge.events import ignore
from ltxforge.facts import ask, places
from ltxforge.media import demo
from ltxforge.models.published import TEXT_ENCODERS, parts
from ltxforge.plan import Plan
from ltxforge.planner import make_plan
from ltxforge.recipe.parse import load
from ltxforge.run_directory import RunDirectory
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS
from ltxforge.ui.plain import Plain

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, and no network: every connection is a failure of the test."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a plan for another machine asks no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def shown(recipe: str, gpu: str, ram: str | None = None, *overrides: str) -> str:
    """The plan's screen, folded to one line."""
    stream = io.StringIO()
    run.plan_elsewhere(load(ROOT / f"recipes/{recipe}.toml", overrides), None, Plain(stream), gpu, ram)
    return " ".join(stream.getvalue().split())


def planned(recipe: str, gpu: str, *overrides: str) -> tuple[Plan, dict[str, str]]:
    """The plan, whatever it takes: nobody counts its memory here, and so nothing is refused for its size."""
    parsed = load(ROOT / f"recipes/{recipe}.toml", overrides)
    world = Elsewhere(places(parsed, None), machine(gpu, None), 1)
    facts = dataclasses.replace(ask(world, parsed, ignore, StopRequest()), costs_of=None)
    return make_plan(parsed.recipe, facts), world.assumptions


def told(recipe: str, gpu: str, *overrides: str) -> str:
    """`planned` as a screen, folded to one line."""
    stream = io.StringIO()
    run.show_plan(planned(recipe, gpu, *overrides)[0], Plain(stream))
    return " ".join(stream.getvalue().split())


@pytest.mark.parametrize(
    ("recipe", "card"),
    [
        ("ltx-video-lora", "RTX 4090"),
        pytest.param("ltx-video-image-to-video", "RTX 4090", marks=pytest.mark.sweep),
        pytest.param("ltx2-lora", "H200", marks=pytest.mark.sweep),
        pytest.param("ltx2-audio", "H200", marks=pytest.mark.sweep),
    ],
)
def test_a_recipe_without_weights_and_clips_has_a_plan_and_leaves_no_trace(recipe, card, alone):
    """As the verb does it, memory counted."""
    text = shown(recipe, card, "64GB")
    assert f"device cuda ({card}) assumed" in text and f"assumed device: {card} with 64 GB of host memory" in text
    assert re.search(r"phase device.* host.* step .*?[0-9.]+ GB", text), "what each phase takes"
    assert "assumed weights: Lightricks/LTX-" in text and "assumed data: data/my-clips:" in text
    assert list(alone.iterdir()) == []


def test_a_machine_s_own_plan_of_it_is_refused_as_ever():
    with pytest.raises(PlanError, match="things are missing"):
        run.plan_only(load(ROOT / "recipes/ltx-video-lora.toml", ()), None, Plain(io.StringIO()))


def test_the_data_has_the_recipe_s_own_size_and_rate():
    plan, assumptions = planned("ltx2-lora", "16GB", "dataset.0.resolution=960x544", "dataset.0.frames=49")
    (bucket,) = plan.data.buckets
    assert (str(bucket.shape), bucket.fps, bucket.with_sound) == ("960x544x49", 24.0, 1)
    assert "960x544x49" in assumptions["data"]


def test_parts_weigh_what_is_published():
    """Files on the Hub, in GB: LTX-2's transformer 37.8, T5's two shards 9.52, Gemma 3's 24.4."""
    plan, _ = planned("ltx2-lora", "16GB")
    sizes = {name: part.bytes / 1e9 for name, part in plan.model.components.items()}
    assert sizes["transformer"] == pytest.approx(37.75, abs=0.01) and sizes["text_encoder"] == pytest.approx(
        24.37, abs=0.01
    )
    assert all(part.digest == "" and part.kind == "assumed" for part in plan.model.components.values())
    assert parts(SPECS["0.9.5"])["transformer"] == 1_923_385_472 and 2 * TEXT_ENCODERS["t5"] == 9_524_621_312


@pytest.mark.parametrize(
    ("words", "name", "arch", "gib"),
    [
        ("RTX 4090", "RTX 4090", 89, 24),
        ("rtx 4070 ti super", "RTX 4070 Ti SUPER", 89, 16),
        ("T4", "T4", 75, 16),
        ("V100", "V100", 70, 16),
        ("V100 32GB", "V100", 70, 32),
        ("A100 80 gb", "A100", 80, 80),
        ("MI300X", "MI300X", "gfx942", 192),
        ("16GB", "a card of 16 GB, like RTX 4080", 89, 16),
        ("rtx4090", "RTX 4090", 89, 24),
        ("4090", "RTX 4090", 89, 24),
        ("GeForce 3090ti", "RTX 3090 Ti", 86, 24),
        ("RTX4070TiSuper", "RTX 4070 Ti SUPER", 89, 16),
        ("a6000", "RTX A6000", 86, 48),
        ("2060 12gb", "RTX 2060", 75, 12),
        ("4GB", "a card of 4 GB, like RTX 3050 Laptop", 86, 4),
        ("6G", "a card of 6 GB, like RTX 3060 Laptop", 86, 6),
        ("11GB", "a card of 11 GB, like RTX 3080", 86, 11),
        ("12 gib", "a card of 12 GB, like RTX 4070", 89, 12),
    ],
)
def test_a_card_by_its_name_or_its_size(words, name, arch, gib):
    found = machine(words, None)
    assert (found.name, found.machine.arch, found.memory_bytes) == (name, arch, gib * GIB)
    assert found.host_bytes == 32 * GIB and found.is_assumed


@pytest.mark.parametrize(
    ("gpu", "ram", "said"),
    [
        ("RTX 4900", None, "Did you mean RTX 4090"),
        ("6000", None, "Did you mean Quadro RTX 6000 or RTX PRO 6000"),
        ("12", None, "Did you mean 12GB"),
        ("banana", None, r"Nearest in name are [^,.]+, [^,.]+, [^,.]+\. A size"),
        ("16GB", "plenty", "--ram 'plenty' is no amount of memory"),
        ("16GB", "64", "Did you mean 64GB"),
        ("16GB", "a lot", "as in 64GB"),
        ("0GB", None, "no memory at all"),
    ],
)
def test_words_that_mean_no_machine_are_told(gpu, ram, said):
    with pytest.raises(PlanError, match=said):
        machine(gpu, ram)


def test_memory_is_understood_in_any_unit():
    assert [machine("16GB", ram).host_bytes for ram in ("4TB", "64g", "2048 MiB")] == [4096 * GIB, 64 * GIB, 2 * GIB]


def test_a_card_without_bf16_units_is_told_so_with_the_choice():
    text = told("ltx-video-lora", "T4")
    assert "fp32 base, fp32 adapter, fp32 encoders device" in text
    assert "no bf16 units: computes in fp32." in text and "and this is sm_75" in text
    half = told("ltx-video-lora", "V100", "training.precision=fp16")
    assert "fp16 base, fp32 adapter, fp32 encoders" in half and "loss scale 16384, undone before clipping" in half


def test_what_is_here_is_used(alone):
    clips = demo.render(alone / "clips")
    kept = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    settings = ["dataset.0.path=clips", "dataset.0.resolution=64x64", "dataset.0.frames=9", "model.base=tiny/ltx2"]
    plan, assumptions = planned("ltx2-lora", "16GB", *settings, "conditioning.prompt_tokens=128", "validation=")
    assert assumptions.keys() == {"device"} and len({sample.clip for sample in plan.data.samples}) == len(
        list(clips.glob("*.mp4"))
    )
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == kept


def test_a_base_that_is_nowhere_names_what_is_known():
    with pytest.raises(WeightsError, match=r"nobody/nothing(.|\n)*Lightricks/LTX-Video-0.9.5") as raised:
        planned("ltx-video-lora", "16GB", "model.base=nobody/nothing")
    assert "model.version" in str(raised.value)
    plan, _ = planned("ltx-video-lora", "16GB", "model.base=./mine.safetensors", "model.version=0.9.7-dev")
    assert plan.model.version == "0.9.7-dev"


def test_a_file_that_is_here_and_wrong_is_told_and_not_assumed_away(alone):
    (alone / "mine.safetensors").write_bytes(b"none")
    with pytest.raises(WeightsError, match="mine.safetensors"):
        planned("ltx-video-lora", "16GB", "model.base=./mine.safetensors", "model.text_encoder=tiny/ltx-video")


def test_no_run_follows_it(alone):
    plan = dataclasses.replace(planned("ltx-video-lora", "16GB")[0], assumed=("device",))
    with pytest.raises(AssertionError, match="nobody looked at"):
        RunDirectory(alone / "run").save_plan(plan, "", ())
    assert not (alone / "run").exists()


def test_ram_alone_is_refused_before_torch_is_loaded():
    code = "import sys; from ltxforge.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "plan", str(ROOT / "recipes/quickstart.toml"), "--ram", "32GB"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 2 and "needs its --gpu" in result.stderr


@pytest.mark.parametrize("overrides", [("validation=",), ("validation.every=0", "validation.at_start=false")])
def test_a_run_without_samples_has_no_phases_of_them(overrides):
    parsed = load(ROOT / "recipes/ltx-video-lora.toml", overrides)
    facts = ask(Elsewhere(places(parsed, None), machine("80GB", "64GB"), 1), parsed, ignore, StopRequest())
    names = [phase.name for phase in make_plan(parsed.recipe, facts).estimates.phases]
    assert "step" in names and {"sample", "decode"}.isdisjoint(names)
