"""Runs that go on from a LoRA file: the adapter they start with, what they refuse, and that they need it only once."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxforge import run
from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache
from ltxforge.errors import LtxforgeError, RunError
from ltxforge.events import StepDone
from ltxforge.lora.files import provenance
from ltxforge.lora.inject import load_adapter
from ltxforge.models.load import load_model
from ltxforge.plan import Plan, from_json
from ltxforge.recipe.parse import parse
from ltxforge.session import make_trainable
from ltxforge.signals import StopRequest
from ltxforge.trackers.jsonl import last_per_step, read_events
from ltxforge.trainer import train
from ltxforge.ui.screen import screen_for

RECIPE = """
[model]
base = "tiny/ltx-video"
[run]
steps = 2
[[dataset]]
path = "builtin/shapes"
resolution = "64x64"
frames = 9
[training]
batch_size = 2
[optimizer]
learning_rate = 0.05
warmup_steps = 0
[lora]
rank = 4
targets = ["attention", "feed_forward"]
save_precision = "fp32"
[conditioning]
prompt_tokens = 32
[checkpoint]
every = 1
"""
OLD = ["lora.alpha=6"]
CPU = torch.device("cpu")


def start(*overrides: str, out: Path, plan_only: bool = False) -> str:
    screen = io.StringIO()
    verb = run.plan_only if plan_only else run.run
    verb(parse(RECIPE, "mine.toml", overrides), out, screen_for(screen, plain=True))
    return screen.getvalue()


def plan_of(home: Path) -> Plan:
    return from_json(Plan, json.loads((home / "plan.json").read_text(encoding="utf-8")))


def adapter_at(home: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(home / f"checkpoints/step-{step:06d}/adapter.safetensors")


def losses(home: Path) -> list[float]:
    return [event["loss"] for event in last_per_step(read_events(home / "events.jsonl")).values()]


def first_loss(plan: Plan, adapter: dict[str, torch.Tensor]) -> float:
    """The loss of a plan's first step with an adapter that no file was read for."""
    found: list[StepDone] = []

    def keep(event) -> None:
        found.extend([event] if isinstance(event, StepDone) else [])

    model, cache = load_model(plan.model, CPU, torch.float32), Cache(Path(plan.cache.directory), keep)
    data = run.settle_data(plan, model, cache, keep, StopRequest())
    optimizer = make_trainable(plan, model, keep)
    load_adapter(model.transformer, adapter)
    once = dataclasses.replace(plan, steps=1)
    train(once, model, Batches(plan, data, cache), optimizer, 0, keep, StopRequest(), lambda _step: None)
    return found[0].loss


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A folder with a finished run in `old` and a cache that all share."""
    folder = tmp_path_factory.mktemp("init-from")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start(*OLD, out=folder / "old")
        yield folder


@pytest.fixture
def file(here, tmp_path) -> Path:
    """A copy of the finished run's LoRA, to move and to change."""
    return Path(shutil.copy(here / "old/lora.safetensors", tmp_path / "mine.safetensors"))


def test_a_run_starts_with_exactly_the_finished_run_s_adapter(here, file, tmp_path):
    shown = start(*OLD, f"lora.init_from={file}", out=tmp_path / "new")
    plan, old = plan_of(tmp_path / "new"), adapter_at(here / "old", 2)
    assert plan.lora.init_from == str(file) and len(plan.lora.init_digest) == 64
    assert f"layers start from {file}" in shown and "start fresh" not in shown
    expected = first_loss(plan, old)
    assert losses(tmp_path / "new")[0] == pytest.approx(expected, rel=1e-6)
    assert abs(losses(here / "old")[0] - expected) > 1e-3, "the old adapter changes no loss: no proof"


def test_another_scale_and_more_layers_start_with_the_same_product(here, tmp_path, file):
    """alpha / √R = 5 over the file's 1.5 folded in; the feed-forward's layers that the file lacks add nothing yet."""
    narrow = {name: value for name, value in load_file(file).items() if ".ff." not in name}
    save_file(narrow, file)
    settings = ["lora.alpha=10", "lora.rslora=true", f"lora.init_from={file}"]
    shown = " ".join(start(*settings, out=tmp_path / "new").split())
    old = adapter_at(here / "old", 2)
    fresh = sum(".ff." in name for name in old) // 2
    assert f"{fresh} of the {len(old) // 2} trained layers are not in lora.init_from and start fresh" in shown
    kept = {
        name: value * (6 / 4 / 5 if "lora_B" in name else 1) * (0 if ".ff." in name and "lora_B" in name else 1)
        for name, value in old.items()
    }
    assert losses(tmp_path / "new")[0] == pytest.approx(first_loss(plan_of(tmp_path / "new"), kept), rel=1e-6)


def test_a_resumed_run_needs_the_file_no_more(here, file, tmp_path):
    settings = [*OLD, f"lora.init_from={file}"]
    start(*settings, "run.steps=4", out=tmp_path / "whole")
    start(*settings, out=tmp_path / "new")
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    assert "start from" not in _after_table(start(*settings, "run.steps=3", out=tmp_path / "new"))
    shutil.copy(here / "old/checkpoints/step-000001/lora.safetensors", file)
    assert "is another file than this run began from" in start(*settings, "run.steps=4", out=tmp_path / "new")
    shortened(file)
    assert "is another file than this run began from" in start(*settings, "run.steps=4", out=tmp_path / "new")
    resaved(shutil.copy(moved, file), lambda tensors: {name: 2 * value for name, value in tensors.items()})
    for name, value in adapter_at(tmp_path / "whole", 4).items():
        assert torch.equal(adapter_at(tmp_path / "new", 4)[name], value)
    assert "done after 4 steps" in start(*OLD, "run.steps=4", f"lora.init_from={moved}", out=tmp_path / "new")
    for other in ([f"lora.init_from={file}"], []):  # the plan that is there now names the moved file
        with pytest.raises(RunError, match=r"lora\.init_digest"):
            start(*OLD, "run.steps=5", *other, out=tmp_path / "new")
    with pytest.raises(LtxforgeError, match="no such LoRA file"):
        start(*OLD, "run.steps=5", "lora.init_from=nowhere.safetensors", out=tmp_path / "new")


def _after_table(shown: str) -> str:
    return shown.partition("resumed")[2]


def test_the_plan_shows_it(file, tmp_path):
    shown = start(*OLD, f"lora.init_from={file}", out=tmp_path / "new", plan_only=True)
    line = next(line for line in shown.splitlines() if "starts from" in line)
    assert line.split()[2] in str(file)
    assert "starts from" not in start(*OLD, out=tmp_path / "new", plan_only=True)


def resaved(path: Path, change=lambda tensors: tensors, metadata: dict[str, str] | None = None) -> None:
    save_file(change(load_file(path)), path, metadata=metadata)


def renamed(path: Path) -> Path:
    return path.rename(path.with_suffix(".bin"))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.ones(value.shape[0], 2 * value.shape[1]) if "lora_A" in name else value
        for name, value in tensors.items()
    }


WRONG = {
    "missing": (lambda path: path.unlink(), [], "no such LoRA file"),
    "pickle": (renamed, [], "pickle format"),
    "damaged": (shortened, [], "ends early"),
    "a model": (lambda path: resaved(path, lambda _: {"proj_in.weight": torch.ones(2, 2)}), [], "holds no LoRA"),
    "LoKr": (lambda path: resaved(path, lambda _: {"a.lokr_w1": torch.ones(2, 2)}), [], "holds no LoRA"),
    "DoRA": (lambda path: resaved(path, lambda t: t | {"a.dora_scale": torch.ones(2)}), [], "no plain LoRA"),
    "fp8": (
        lambda path: resaved(path, lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()}), [], "F8_E4M3",
    ),
    "rank": (lambda path: None, ["lora.rank=8"], r"lora\.rank is 8\n.*Write lora\.rank = 4"),
    "layers": (lambda path: None, ['lora.targets=["attention"]'], r'Write lora\.targets = \["attention", "feed_f'),
    "other sizes": (lambda path: resaved(path, wide), [], "layers of other sizes"),
    "other version": (
        lambda path: resaved(path, metadata=provenance({"name": "x", "version": "0.9.0"})), [],
        "was trained on 0.9.0, and .* differs in",
    ),
    "scale": (lambda path: resaved(path, metadata={"lora_adapter_metadata": "{"}), [], "PEFT's configuration"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "settings", "reason"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_gone_on_with_is_refused_before_anything_starts(change, settings, reason, file, tmp_path):
    path = change(file) or file
    with pytest.raises(LtxforgeError, match=reason) as refused:
        start(*OLD, f"lora.init_from={path}", *settings, out=tmp_path / "new")
    assert path.name in str(refused.value)
    assert not (tmp_path / "new/plan.json").exists()


def test_a_false_start_needs_the_file_again(file, tmp_path):
    start(*OLD, f"lora.init_from={file}", out=tmp_path / "new")
    shutil.rmtree(tmp_path / "new/checkpoints")
    file.unlink()
    with pytest.raises(LtxforgeError, match="no such LoRA file"):
        start(*OLD, f"lora.init_from={file}", out=tmp_path / "new")
