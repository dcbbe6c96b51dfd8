"""`bench` end to end with small models on this machine's CPU; its FLOPs against a count by hand."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltxforge import benchmark, trainer
from ltxforge.benchmarks import step
from ltxforge.benchmarks.step import StepWatch, SyntheticData, count_flops, measure, plan_of, synthetic_batch
from ltxforge.errors import BenchmarkError, PlanError, Stopped
from ltxforge.hardware import detect
from ltxforge.lora.targets import match
from ltxforge.models import random_weights
from ltxforge.models.random_weights import random_model
from ltxforge.session import make_trainable
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS, TINY
from ltxforge.suites.read import StepSuite, Suite
from ltxforge.suites.step import StepCase, StepResult
from ltxforge.ui.plain import Plain

ROOT = Path(__file__).resolve().parent.parent
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", name="Some CPU (R) @ 2.0 GHz")
CASES = [
    ("tiny/ltx-video", "video", {"video": 8, "prompt": 256}),
    ("tiny/ltx2", "both", {"video": 8, "audio": 9, "prompt": 128}),  # 9 frames at 24 fps: 0.375 s · 25 = 9.4
    ("tiny/ltx2", "video", {"video": 8, "prompt": 128}),
    ("tiny/ltx2", "audio", {"audio": 9, "prompt": 128}),
    ("tiny/ltx2.3", "both", {"video": 8, "audio": 9, "prompt": 128}),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests measure nothing that a GPU should be held for."""
    monkeypatch.setattr(benchmark, "detect", lambda: CPU_HARDWARE)


def make_case(model: str = "tiny/ltx2", **changes: object) -> StepCase:
    settings = {"name": "a", "size": "64x64x9", "precision": "fp32", "steps": 3, "warmup_steps": 1, "rank": 4}
    return StepCase(model=model, **{**settings, **changes})


def measured(case: StepCase) -> StepResult:
    """The case's result, measured once for all tests."""
    return _measured(case.model_dump_json())


@functools.cache
def _measured(case: str) -> StepResult:
    return measure(StepCase.model_validate_json(case), CPU_HARDWARE, lambda _text: None, StopRequest())


def results_of(suite: Suite, out: Path) -> tuple[dict, str]:
    """The results file, and what was shown."""
    shown = io.StringIO()
    benchmark.run([(suite, Path("bench/step.toml"))], benchmark.Request(out=out), Plain(shown))
    return json.loads(out.read_text(encoding="utf-8")), shown.getvalue()


@pytest.mark.parametrize(("model", "modalities", "tokens"), CASES)
def test_a_case_is_measured(model, modalities, tokens):
    result = measured(make_case(model, modalities=modalities))
    assert result.outcome == "measured" and result.reason == ""
    assert result.tokens == tokens
    assert len(result.step_seconds) == 3 and min(result.step_seconds) > 0
    assert result.phase_seconds.keys() == {"data", "forward", "backward", "optimizer"}
    assert len(result.losses) == 4 and all(map(math.isfinite, result.losses))
    assert result.model_flops > 0 and result.trained_parameters > 0
    assert result.weights_bytes == 4 * result.parameters


def test_parameters_are_the_base_s_own_and_the_adapter_is_counted_apart():
    case = make_case(modalities="both")
    whole = random_model(case.spec, torch.device("meta"), torch.float32, "both")
    whole.load_transformer()
    layers = match(case.targets, case.spec, "both", "both")
    result = measured(case)
    assert result.parameters == sum(parameter.numel() for parameter in whole.transformer.parameters())
    assert result.trained_parameters == layers.parameters(case.rank)


def test_sound_costs_nothing_where_only_video_is_trained():
    joint, alone = measured(make_case(modalities="both")), measured(make_case(modalities="video"))
    assert alone.model_flops < joint.model_flops
    assert alone.trained_parameters < joint.trained_parameters
    assert alone.case["modalities"] == "video"


def test_batch_and_accumulation_multiply_the_work():
    def flops(**changes: int) -> int:
        case = make_case("tiny/ltx-video", **changes)
        return count_flops(case, plan_of(case, CPU_HARDWARE))

    assert flops(accumulate=3) == 3 * flops()
    assert flops(batch_size=2) == 2 * flops()


def test_watching_changes_no_loss():
    """The same plan through the trainer alone gives the same losses."""
    case = make_case(accumulate=2)
    plan = plan_of(case, CPU_HARDWARE)
    model = random_model(case.spec, torch.device("cpu"), torch.float32, case.trained)
    losses: list[float] = []
    optimizer = make_trainable(plan, model, lambda _event: None)
    data = SyntheticData(plan, synthetic_batch(case, model), StepWatch(model.device))
    trainer.train(plan, model, data, optimizer, 0, lambda e: losses.append(e.loss), StopRequest(), lambda _step: None)
    assert tuple(losses) == measured(case).losses


def test_phases_lie_within_their_step():
    case = make_case(accumulate=2)
    plan, watch = plan_of(case, CPU_HARDWARE), StepWatch(torch.device("cpu"))
    model = random_model(case.spec, torch.device("cpu"), torch.float32, case.trained)
    optimizer = make_trainable(plan, model, lambda _event: None)
    step.train_watched(plan, model, synthetic_batch(case, model), optimizer, watch, StopRequest())
    assert len(watch.step_seconds) == len(watch.phase_seconds) == 4
    for whole, phases in zip(watch.step_seconds, watch.phase_seconds, strict=True):
        assert all(seconds > 0 for seconds in phases.values())
        assert sum(phases.values()) <= whole
        assert phases["forward"] > phases["data"] and phases["backward"] > phases["data"]


def flops_by_hand(case: StepCase) -> int:
    """LTX-Video's step, from the architecture: 2·in·out for each row through a matrix, 4·T·S·D for attention.

    Backward goes to a matrix's input where something below it is trained: not before the first block's LoRA, not to
    prompt and timestep. LoRA's A and B get gradients themselves. Attention's backward has four products for the
    forward's two.
    """
    spec, r = case.spec, case.rank
    t = case.shape.latent().tokens
    d, p = spec.width, spec.default_prompt_tokens
    inner = spec.transformer_config["attention_head_dim"] * spec.transformer_config["num_attention_heads"]
    assert inner == d
    total = 2 * t * spec.latent_channels * d  # proj_in
    total += 2 * p * (spec.caption_channels * d + d * d)  # caption projection
    total += 2 * (256 * d + d * d + d * 6 * d)  # the timestep's embedding
    total += 2 * 2 * t * d * spec.latent_channels  # proj_out, and back
    for block in range(spec.blocks):
        # (rows, in, out, whether the gradient goes on to the input)
        layers = [(t, d, d, block > 0)] * 3 + [(t, d, d, True)]  # attn1: q, k, v; out
        layers += [(t, d, d, True), (p, d, d, False), (p, d, d, False), (t, d, d, True)]  # attn2
        layers += [(t, d, 4 * d, True), (t, 4 * d, d, True)]
        for rows, into, out, onwards in layers:
            total += 2 * rows * into * out * (1 + onwards)
            total += 2 * rows * into * r * (2 + onwards)  # A: forward, its own gradient, the input's
            total += 2 * rows * r * out * 3  # B likewise
        total += 4 * t * (t + p) * d * 3
    return total


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx-video-13b"])
def test_flops_are_those_counted_by_hand(base):
    case = make_case(base, size="128x96x17")
    assert count_flops(case, plan_of(case, CPU_HARDWARE)) == flops_by_hand(case)


def test_what_checkpointing_recomputes_is_not_counted():
    case = make_case("tiny/ltx-video", checkpointing=1)
    plain = make_case("tiny/ltx-video", checkpointing=0)
    assert count_flops(case, plan_of(case, CPU_HARDWARE)) == count_flops(plain, plan_of(plain, CPU_HARDWARE))


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


def test_a_stop_leaves_an_unfinished_case_out():
    stop = StopRequest()
    stop.request()
    with pytest.raises(Stopped):
        measure(make_case(), CPU_HARDWARE, lambda _text: None, stop)


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
        "rank": 4, "targets": ["attention", "feed_forward"], "checkpointing": 1, "precision": "fp32", "steps": 3,
        "warmup_steps": 1,
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


def test_the_batch_has_the_shapes_of_full_size_models():
    """The issue's two sizes: T = F·16·24, L = 25 · frames / 24."""
    for frames, video, audio in ((49, 2688, 51), (121, 6144, 126)):
        case = make_case("2.0-dev", size=f"768x512x{frames}", precision="bf16")
        model = random_model(case.spec, torch.device("meta"), torch.bfloat16, "both")
        batch = synthetic_batch(case, model)
        assert step.tokens_of(batch) == {"video": video, "audio": audio, "prompt": 1024}
        assert batch.latents.audio.shape == (1, audio, 128)


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
