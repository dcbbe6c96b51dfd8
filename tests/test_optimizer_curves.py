"""AdamW in 8 bits beside paged Lion, clipped at 1.0 and at 0.01, over an NF4 base: where 500 steps of each end.

`COMMAND` writes what came out as JSON and as a table. Draws are addressed, so that step n of every run sees the same
clips, noise and sigma: losses of equal steps are compared, and one run that learns nothing says what they are without a
LoRA. The model is the built-in LTX-Video with random weights; what it teaches is which setting trains at all, and which
falls apart, never how well a real one learns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS, WINDOW = 500, 50
RESULT = "bench/results/cpu-x86-64/optimizers"
COMMAND = f"python tests/test_optimizer_curves.py {RESULT}"
RECIPE = """
[model]
base = "tiny/ltx-video"

[run]
seed = 7
steps = {steps}

[[dataset]]
path = "builtin/shapes"
resolution = "64x64"
frames = 9
fps = 25

[training]
batch_size = 2
clip_norm = {clip}

[optimizer]
name = "{optimizer}"
learning_rate = {rate}
warmup_steps = {warmup}

[lora]
rank = 64
targets = ["attention"]

[memory]
base_precision = "{base}"

[checkpoint]
every = {steps}

[validation]
every = 0
at_start = false
"""
# Rank 64 makes every tensor large enough for moments in 8 bits. Lion moves every number by its whole rate: a tenth.
RATES = {"adamw8bit": 1e-3, "paged_lion8bit": 1e-4}
CLIPS = (1.0, 0.01)
STILL = ("adamw", 1e-12, 1.0)
WORKERS = min(2, os.cpu_count() or 1)


def run(folder: Path, optimizer: str, rate: float, clip: float, base: str, steps: int) -> list[dict[str, Any]]:
    """Every step's event of a run in a process of its own."""
    name = f"{optimizer}-{rate:g}-{clip:g}-{base}"
    recipe = folder / f"{name}.toml"
    settings = {"optimizer": optimizer, "rate": rate, "clip": clip, "base": base, "steps": steps}
    recipe.write_text(RECIPE.format(**settings, warmup=min(20, steps // 5)), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "ltxforge", "run", str(recipe), "--out", str(folder / name), "--plain"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / name / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "StepDone"]


def compared(folder: Path, steps: int = STEPS, bases: tuple[str, ...] = ("nf4",)) -> list[dict[str, Any]]:
    """One entry for each setting: the mean loss of its last steps, and that of no training at the same ones."""
    settings = [(optimizer, rate, clip) for optimizer, rate in RATES.items() for clip in CLIPS]
    wanted = [(*each, base, steps) for base in bases for each in (STILL, *settings)]
    with ThreadPoolExecutor(WORKERS) as pool:
        events = dict(zip(wanted, pool.map(lambda each: run(folder, *each), wanted), strict=True))
    return [
        judged(each, events[each], events[(*STILL, *each[3:])], min(WINDOW, steps // 2))
        for each in wanted
        if each[:3] != STILL
    ]


def judged(
    setting: tuple[str, float, float, str, int], events: list[dict[str, Any]], still: list[dict[str, Any]], window: int
) -> dict[str, Any]:
    """A run beside the one that learns nothing, step by step."""
    ends, untrained = (statistics.fmean(event["loss"] for event in each[-window:]) for each in (events, still))
    names = ("optimizer", "learning_rate", "clip_norm", "base", "steps")
    return {
        **dict(zip(names, setting, strict=True)),
        "loss": ends, "untrained_loss": untrained, "share": ends / untrained,
        "highest_share": max(one["loss"] / other["loss"] for one, other in zip(events, still, strict=True)),
        "median_gradient_norm": statistics.median(event["grad_norm"] for event in events),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """The same for readers, in Markdown."""
    rows = [
        "| base | optimizer | rate | clip_norm | loss at the end | of the untrained | worst step | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        base = "not quantised" if each["base"] == "bf16" else each["base"]
        rows.append(
            f"| {base} | {each['optimizer']} | {each['learning_rate']:g} | {each['clip_norm']:g} | {each['loss']:.4f}"
            f" | {each['share']:.3f} | {each['highest_share']:.2f} | {each['median_gradient_norm']:.3g} |"
        )
    return "\n".join(rows)


def main(target: str) -> None:
    """Measure, and write `target`.json and `target`.md."""
    with tempfile.TemporaryDirectory() as folder:
        found = compared(Path(folder))
    head = __doc__.split("\n", 1)[0]
    told = {"what": head, "command": COMMAND, "model": "tiny/ltx-video, random"}
    path = Path(target)
    path.with_suffix(".json").write_text(json.dumps({**told, "settings": found}, indent=1) + "\n", encoding="utf-8")
    text = f"# {head}\n\n{table(found)}\n\n{NOTE}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


NOTE = f"""\
Mean of the last {WINDOW} of {STEPS} steps. `of the untrained` divides it by what the same steps cost without a LoRA:
below 1 is learnt, 1 is nothing; `worst step` is the largest such share of any step. `gradient norm` is the median
before clipping. The model is the built-in one, with random weights, on a CPU, where a paged optimiser is the plain one:
which setting trains at all is to be seen here, and nothing about real weights."""


@pytest.mark.sweep
def test_every_setting_trains_over_nf4(tmp_path):
    """Eighty steps of each already show it."""
    found = compared(tmp_path, steps=80)
    assert {(each["optimizer"], each["clip_norm"]) for each in found} == {(o, c) for o in RATES for c in CLIPS}
    assert all(each["share"] < 0.97 for each in found), table(found)


def test_the_committed_table_is_that_of_the_committed_numbers():
    told = json.loads((ROOT / RESULT).with_suffix(".json").read_text(encoding="utf-8"))
    settings = told["settings"]
    assert {each["steps"] for each in settings} == {STEPS} and "nf4" in {each["base"] for each in settings}
    assert table(settings) in (ROOT / RESULT).with_suffix(".md").read_text(encoding="utf-8")
    assert told["command"] == COMMAND


if __name__ == "__main__":
    main(sys.argv[1])
