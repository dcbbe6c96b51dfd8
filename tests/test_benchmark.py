"""`bench` end to end with small models on this machine's CPU; its FLOPs against a count by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltxforge import benchmark
from ltxforge.errors import BenchmarkError, PlanError
from ltxforge.hardware import detect
from ltxforge.models import random_weights
from ltxforge.specs import SPECS, TINY
from ltxforge.suites.read import StepSuite, Suite
from ltxforge.suites.step import StepCase
from ltxforge.ui.plain import Plain

ROOT = Path(__file__).resolve().parent.parent
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", name="Some CPU (R) @ 2.0 GHz")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests measure nothing that a GPU should be held for."""
    monkeypatch.setattr(benchmark, "detect", lambda: CPU_HARDWARE)


def make_case(model: str = "tiny/ltx2", **changes: object) -> StepCase:
    settings = {"name": "a", "size": "64x64x9", "precision": "fp32", "steps": 3, "warmup_steps": 1, "rank": 4,
                "overfit_steps": 0}  # fmt: skip
    return StepCase(model=model, **{**settings, **changes})


def results_of(suite: Suite, out: Path) -> tuple[dict, str]:
    """The results file, and what was shown."""
    shown = io.StringIO()
    benchmark.run([(suite, Path("bench/step.toml"))], benchmark.Request(out=out), Plain(shown))
    return json.loads(out.read_text(encoding="utf-8")), shown.getvalue()


def test_too_little_memory_is_recorded_and_the_suite_goes_on(tmp_path):
    huge = make_case(name="huge", size="4096x4096x121", batch_size=100_000_000)
    fine = make_case("tiny/ltx-video", steps=1)
    results, shown = results_of(StepSuite(suite="step", case=[huge, fine]), tmp_path / "out.json")
    first, second = results["cases"]
    assert first["outcome"] == "out of memory" and "allocate" in first["reason"]
    assert "peak_bytes" in first and first["step_seconds"] == [] and first["parameters"] is None
    assert second["outcome"] == "measured"
    assert "huge: out of memory" in shown


def test_full_size_is_skipped_without_a_gpu(tmp_path):
    results, shown = results_of(StepSuite(suite="step", case=[make_case("2.0-dev")]), tmp_path / "out.json")
    assert results["cases"][0]["outcome"] == "skipped"
    assert "needs a GPU" in shown and "no GPU" in shown


def test_a_loss_that_is_not_finite_is_written_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights, "WEIGHT_STD", 1e30)
    out = tmp_path / "out.json"
    with pytest.raises(BenchmarkError, match="a: the loss or gradient was NaN or infinite"):
        results_of(StepSuite(suite="step", case=[make_case()]), out)
    assert json.loads(out.read_text(encoding="utf-8"))["cases"][0]["outcome"] == "not finite"


def test_targets_that_match_nothing_are_refused_before_anything_is_built(tmp_path):
    suite = StepSuite(suite="step", case=[make_case(), make_case(name="b", targets=["to_nowhere"])])
    with pytest.raises(PlanError, match="to_nowhere"):
        results_of(suite, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_what_a_results_file_says(tmp_path):
    case = make_case(name="joint")
    results, shown = results_of(StepSuite(suite="step", case=[case]), tmp_path / "deep" / "out.json")
    assert results["command"] == "ltxforge bench bench/step.toml"
    assert results["suite"] == "step" and results["format"] == 2
    assert results["device"]["kind"] == "cpu" and results["device"]["name"] == CPU_HARDWARE.name
    assert results["versions"]["torch"] == torch.__version__ and results["versions"]["peft"]
    assert results["date"].endswith("+00:00")
    (entry,) = results["cases"]
    assert entry["name"] == "joint"
    assert entry["case"] == {
        "peers": [], "floors": {}, "model": "tiny/ltx2", "size": "64x64x9", "fps": 24.0,
        "modalities": "both", "batch_size": 1, "accumulate": 1,
        "rank": 4, "targets": ["attention", "feed_forward"], "checkpointing": 1, "precision": "fp32", "kernels": None,
        "steps": 3, "warmup_steps": 1, "overfit_steps": 0,
    }  # fmt: skip
    seconds = entry["step_seconds"]
    low, middle, high = sorted(seconds)
    found = [entry[f"step_seconds_{kind}"] for kind in ("min", "median", "max")]
    assert found == [low, middle, high]
    assert entry["tflops_per_second"] == pytest.approx(entry["model_flops"] / middle / 1e12)
    if sys.platform == "linux":
        assert entry["peak_bytes"]["resident"] > 50e6
    assert "allocated" not in entry["peak_bytes"], "nothing counts tensors on a CPU"
    assert "joint" in shown and "8 + 9" in shown


def test_results_lie_beside_the_suite_by_device():
    assert benchmark.results_file(Path("bench/step.toml"), None, CPU_HARDWARE) == Path(
        "bench/results/cpu-some-cpu-r-2-0-ghz/step.json"
    )
    gpu = dataclasses.replace(CPU_HARDWARE, kind="cuda", name="NVIDIA H200")
    assert benchmark.results_file(Path("bench/step.toml"), None, gpu) == Path("bench/results/nvidia-h200/step.json")


def test_the_verb_from_the_command_line(tmp_path):
    """As a person calls it, with the tiny case of the suite that comes with ltxforge, shortened."""
    text = (ROOT / "bench" / "step.toml").read_text(encoding="utf-8")
    suite = tmp_path / "step.toml"
    short = text.replace('precision = "fp32"', 'precision = "fp32"\nsteps = 1\nwarmup_steps = 1')
    suite.write_text(short, encoding="utf-8")
    command = [sys.executable, "-m", "ltxforge", "bench", "step.toml", "--case", "tiny-ltx2", "--plain"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "results").glob("*/step.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    assert [entry["name"] for entry in results["cases"]] == ["tiny-ltx2"]
    assert results["command"] == "ltxforge bench step.toml --case tiny-ltx2"
    assert f"results: {written.relative_to(tmp_path)}" in result.stdout


def test_tiny_specs_are_what_the_suite_calls_tiny():
    """The rule by which a CPU skips a case."""
    assert all(spec.tiny for spec in TINY.values()) and not any(spec.tiny for spec in SPECS.values())


def gpu_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OUT": ""}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], cwd=ROOT.parent, env=environment, capture_output=True,
        text=True, encoding="utf-8", timeout=1200,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_gpu_script_refuses_a_suite_that_is_not_there():
    result = gpu_script("results", "kernel")
    assert result.returncode == 2 and "no suite bench/kernel.toml" in result.stderr


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_gpu_script_runs_from_the_source_tree(tmp_path):
    result = gpu_script(str(tmp_path))
    assert result.returncode == 0, result.stderr
    cases = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["cases"]
    assert {case["outcome"] for case in cases} == {"measured", "skipped"}


def test_committed_results_were_measured():
    """What lies in bench/results/ is what the code writes: every measured case has its steps, and they add up."""
    files = sorted((ROOT / "bench" / "results").glob("*/step.json"))
    assert files
    for path in files:
        for entry in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            assert len(entry["step_seconds"]) == (entry["case"]["steps"] if entry["outcome"] == "measured" else 0)
