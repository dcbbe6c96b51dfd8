"""`bench` end to end with small models on this machine's CPU; its FLOPs against a count by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import ltxforge_kernels
import pytest
import torch
from ltxforge_kernels.gelu import reference as gelu_reference

from ltxforge import benchmark
from ltxforge.benchmarks import ceilings, kernels
from ltxforge.benchmarks.bench import Bench
from ltxforge.benchmarks.ops.table import SUBJECTS
from ltxforge.errors import BenchmarkError, PlanError, RunError, Stopped
from ltxforge.hardware import detect
from ltxforge.models import random_weights
from ltxforge.specs import SPECS, TINY
from ltxforge.suites.kernels import KernelCase, KernelResult
from ltxforge.suites.read import SUITES, KernelSuite, StepSuite, Suite, find
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
        "base_precision": "bf16", "double_quant": True, "block_swap": 0, "group_offload": None,
        "blocks_per_group": 1, "use_stream": None, "offload_activations": False, "compile": False,
        "optimizer": "adamw",
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


def gpu_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OUT": "", **environment}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], cwd=ROOT.parent, env=environment, capture_output=True,
        text=True, encoding="utf-8", timeout=1200,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(("arguments", "told"), [
    (["results", "kernel"], "no suite bench/kernel.toml"),
    (["kernels"], "OUT comes before the stages"),
    (["--form", "x"], "no option --form"),
    (["--minutes", "soon"], "wants a number"),
    (["--from", "nowhere"], "a folder with earlier results"),
])  # fmt: skip
def test_what_the_gpu_script_refuses(arguments, told):
    result = gpu_script(*arguments)
    assert result.returncode == 2 and told in result.stderr
    assert not (ROOT / "results").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_gpu_script_says_how_it_is_called():
    result = gpu_script("--help")
    assert result.returncode == 0 and "bench/gpu.sh [--minutes N]" in result.stdout and "set -uo" not in result.stdout


# Stands for a Python on a machine with a GPU: notes which files of tests it is given, and fails those it is told to.
TESTS_NOTED = """#!/usr/bin/env bash
case "$*" in
    *"-m pytest"*) basename "$3" .py >> "$NOTES"; [[ " $FAILING " != *" $(basename "$3" .py) "* ]] ;;
    *"print(int"*) exec REAL "$@" ;;
esac
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_gpu_script_goes_on_behind_the_tests_that_passed(tmp_path):
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(TESTS_NOTED.replace("REAL", sys.executable), encoding="utf-8")
    python.chmod(0o755)
    every = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py"))

    def given(out: str, *options: str, failing: str = "") -> tuple[list[str], int]:
        notes.write_text("", encoding="utf-8")
        result = gpu_script(
            *options, str(tmp_path / out), "truth", PYTHON=str(python), NOTES=str(notes), FAILING=failing
        )
        return notes.read_text(encoding="utf-8").split(), result.returncode

    assert given("a", "--minutes", "0") == ([], 0), "no time for any"
    assert given("a", failing="test_gelu test_rope") == (every, 1)
    assert given("a", failing="test_rope") == (["test_gelu", "test_rope"], 1)
    (tmp_path / "a" / "truth" / "test_nf4.passed").write_text("other sources", encoding="utf-8")
    (tmp_path / "a" / "truth" / "test_nf4.txt").unlink()
    assert given("b", "--from", str(tmp_path / "a")) == (["test_nf4", "test_rope"], 0), "the one never begun first"
    assert given("b") == ([], 0)


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_gpu_script_runs_from_the_source_tree(tmp_path):
    result = gpu_script(str(tmp_path))
    assert result.returncode == 0, result.stderr
    cases = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["cases"]
    assert {case["outcome"] for case in cases} == {"measured", "skipped"}


def kernel_case(name: str, **changes: object) -> KernelCase:
    settings = {"name": name, "op": "gelu", "tokens": 8, "width": 16, "device": "cpu", "rounds": 3,
                "implementations": ["eager"], "peers": ["PyTorch"], "floors": {"PyTorch": 500.0}}  # fmt: skip
    return KernelCase(**{**settings, **changes})


class KernelBench:
    """The verb over cases of single ops, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.out, self.shown = folder / "kernels.json", ""

    def __call__(self, *cases: KernelCase, **request: object) -> dict:
        stream = io.StringIO()
        suite = KernelSuite(suite="kernels", case=list(cases))
        named = tuple(request.pop("named", ()))
        try:
            asked = benchmark.Request(named, self.out, **request)
            benchmark.run([(suite, Path("bench/kernels.toml"))], asked, Plain(stream))
        finally:
            self.shown = stream.getvalue()
        return self.written()

    def written(self) -> dict:
        return json.loads(self.out.read_text(encoding="utf-8"))


@pytest.fixture
def kernel_bench(tmp_path, monkeypatch) -> KernelBench:
    monkeypatch.setattr(ceilings, "SMALL", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)
    return KernelBench(tmp_path)


def names(results: dict) -> list[str]:
    return [entry["name"] for entry in results["cases"]]


def test_a_table_a_plot_and_the_ceilings_lie_beside_the_results(kernel_bench):
    results = kernel_bench(kernel_case("a"))
    assert results["ceilings"]["copy bandwidth"] > 0 and results["left"] == []
    (entry,) = results["cases"]
    assert entry["medians"].keys() == {"eager", "PyTorch"} and entry["seconds"].keys() == {"eager"}
    assert "PyTorch" in kernel_bench.out.with_suffix(".md").read_text(encoding="utf-8")
    svg = ElementTree.parse(kernel_bench.out.with_suffix(".svg")).getroot()
    assert svg.tag.endswith("svg")


def test_what_was_finished_stays_and_time_that_is_over_leaves_the_rest(kernel_bench):
    first = kernel_bench(kernel_case("a"))
    cases = [kernel_case("a"), kernel_case("b")]
    late = kernel_bench(*cases, resume=True, minutes=0.0)
    assert late["cases"] == first["cases"] and late["left"] == ["b"] and "no time is left for b" in kernel_bench.shown
    whole = kernel_bench(*cases, resume=True)
    assert names(whole) == ["a", "b"] and whole["left"] == [] and whole["cases"][0] == first["cases"][0]
    again = kernel_bench(*cases, resume=True)
    assert again["cases"] == whole["cases"] and again["ceilings"] == whole["ceilings"] and again["how"]
    assert kernel_bench(*cases)["cases"][0] != first["cases"][0], "measured anew where nobody asked to go on"


def test_a_named_case_leaves_the_others_results_where_they_are(kernel_bench):
    """Without --resume, too; the file is still the whole suite's."""
    first = kernel_bench(kernel_case("a"), kernel_case("b"), minutes=0.0)
    assert first["left"] == ["a", "b"]
    whole = kernel_bench(kernel_case("a"), kernel_case("b"))
    named = kernel_bench(kernel_case("a"), named=["a"])
    assert names(named) == ["a", "b"] and named["cases"][1] == whole["cases"][1] != named["cases"][0]
    assert named["cases"][0] != whole["cases"][0] and named["command"] == whole["command"]
    assert names(kernel_bench(kernel_case("c"), named=["c"], resume=True)) == ["a", "b", "c"]
    assert [path.name for path in kernel_bench.out.parent.glob("*.json")] == ["kernels.json"]


def test_a_named_case_of_an_unfinished_suite_leaves_the_others_to_do(kernel_bench):
    kernel_bench(kernel_case("a"), kernel_case("b"), minutes=0.0)
    assert kernel_bench(kernel_case("b"), named=["b"])["left"] == ["a"]


def test_what_was_found_beside_other_cases_stays(kernel_bench, monkeypatch):
    """Ceilings, which a case that is skipped does not measure, and what the compiler says of other ops."""
    compiled = json.loads((ROOT / "bench/results/cpu-x86-64/kernels.json").read_text(encoding="utf-8"))["resources"][0]
    monkeypatch.setattr(kernels, "resources_of", lambda ops, tell: [{**compiled, "launch": op} for op in sorted(ops)])
    cases = [kernel_case("a"), kernel_case("b", device="gpu"), kernel_case("c", device="gpu", op="adaln_rms_norm",
                                                                           peers=[], floors={})]  # fmt: skip
    first = kernel_bench(*cases)
    again = kernel_bench(cases[2], named=["c"])
    assert [each["launch"] for each in again["resources"]] == ["adaln_rms_norm", "gelu"]
    assert again["ceilings"] == first["ceilings"] != {}


@pytest.mark.parametrize("asked", [{}, {"resume": True}, {"named": ["a"]}])
def test_what_may_not_stay_is_kept_aside_and_told(kernel_bench, monkeypatch, asked):
    kernel_bench(kernel_case("a"), kernel_case("b"))
    before = kernel_bench.out.read_bytes()
    monkeypatch.setattr(benchmark, "kernels_digest", lambda: "other")
    assert names(kernel_bench(kernel_case("a"), **asked)) == ["a"]
    (aside,) = (path for path in kernel_bench.out.parent.glob("*.json") if path != kernel_bench.out)
    assert aside.name.startswith("kernels.2") and aside.read_bytes() == before
    shown = " ".join(kernel_bench.shown.split())
    assert "the results before are kept in" in shown and "other sources of our kernels" in shown


def test_a_whole_suite_measured_anew_keeps_the_old_file_aside(kernel_bench):
    kernel_bench(kernel_case("a"))
    before = kernel_bench.out.read_bytes()
    kernel_bench(kernel_case("a"))
    (aside,) = (path for path in kernel_bench.out.parent.glob("*.json") if path != kernel_bench.out)
    assert aside.read_bytes() == before and "anew" in kernel_bench.shown


def begun(bench: KernelBench) -> dict[str, int]:
    return {name: before["times"] for name, before in bench.written()["begun"].items()}


@pytest.fixture
def interrupted(monkeypatch) -> Callable[[int], None]:
    """Makes the norm's cases receive a signal while they are measured."""
    subject = SUBJECTS["adaln_rms_norm"]

    def with_signal(number: int) -> None:
        def killed(case, device):
            os.kill(os.getpid(), number)
            return subject(case, device)

        monkeypatch.setitem(SUBJECTS, "adaln_rms_norm", killed)

    return with_signal


def test_a_case_that_is_cut_off_again_and_again_is_given_up(kernel_bench, interrupted):
    cases = [kernel_case("a"), kernel_case("endless", op="adaln_rms_norm", peers=[], floors={}), kernel_case("b")]
    interrupted(signal.SIGTERM)
    for times in (1, 2):
        with pytest.raises(Stopped, match="in the middle of endless"):
            kernel_bench(*cases, resume=True)
        assert names(kernel_bench.written()) == ["a"] and begun(kernel_bench) == {"endless": times}
    results = kernel_bench(*cases, resume=True)
    assert [each["outcome"] for each in results["cases"]] == ["measured", "not finished", "measured"]
    assert "began 2 times" in results["cases"][1]["reason"] and results["begun"] == {} and results["left"] == []
    assert results["cases"][1]["op"] == "", "it has the fields of its suite"
    assert kernel_bench(*cases, resume=True)["cases"] == results["cases"]
    with pytest.raises(Stopped):
        kernel_bench(cases[1], named=["endless"])


def test_a_person_s_stop_says_nothing_about_a_case(kernel_bench, interrupted):
    interrupted(signal.SIGINT)
    with pytest.raises(Stopped):
        kernel_bench(kernel_case("a", op="adaln_rms_norm", peers=[], floors={}))
    assert kernel_bench.written()["begun"] == {} and kernel_bench.written()["left"] == ["a"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(kernel_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "engine", lambda kind: pytest.fail("nothing may begin"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    for out in (tmp_path / "file" / "x.json", tmp_path / "folder.json"):
        kernel_bench.out = out
        with pytest.raises(RunError):
            kernel_bench(kernel_case("a"))


def test_a_stop_before_the_first_case_names_no_file(kernel_bench, monkeypatch):
    def stopping(cases, hardware, told, stop):
        stop.request(signal.SIGINT)
        return Bench(lambda case: pytest.fail("nothing may be measured"), {})

    monkeypatch.setattr(benchmark, "engine", lambda kind: SimpleNamespace(begin=stopping))
    with pytest.raises(Stopped, match="stopped before a; nothing was measured"):
        kernel_bench(kernel_case("a"))
    assert not kernel_bench.out.exists()


WITHOUT_MEDIA = """
import sys
sys.modules["av"] = None
from ltxforge import benchmark
loaded = {"PIL", "diffusers", "transformers", "peft"} & set(sys.modules)
assert not loaded, loaded
assert benchmark.engine("kernels").begin
assert not [name for name in sys.modules if name.startswith(("ltxforge.media", "ltxforge.validation"))]
try:
    benchmark.engine("step")
except benchmark.PlanError as error:
    print(error)
"""


def test_ops_are_measured_without_what_only_clips_need():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEDIA], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert "the suite step needs the package av, which is not installed" in result.stdout


def test_a_red_gate_is_an_error_after_everything_is_written(kernel_bench, monkeypatch):
    """The op's own definition is damaged, in bf16 alone."""
    right = gelu_reference.gelu
    monkeypatch.setattr(gelu_reference, "gelu", lambda x: right(x) * (1 if x.dtype == torch.float64 else 1.1))
    other = kernel_case("other", op="adaln_rms_norm", peers=[], floors={})
    with pytest.raises(BenchmarkError, match="(?s)a: eager: output 0: relative error 1.0.*measured and written"):
        kernel_bench(kernel_case("a"), other)
    first, second = kernel_bench.written()["cases"]
    assert first["outcome"] == "gate failed" and first["times"] == {} and second["outcome"] == "measured"


def test_floors_hold_on_a_gpu_alone(kernel_bench):
    """500 times as fast as PyTorch's GELU nothing is."""
    results = kernel_bench(kernel_case("a"))
    assert results["cases"][0]["faults"] == []
    result = KernelResult("a", "measured", {"floors": {"PyTorch": 500.0, "absent": 2.0}}, ratios={"PyTorch": 1.5})
    assert result.missed_floors() == ["1.50 times as fast as PyTorch, less than 500"]
    for kind, faults in (("cuda", 1), ("rocm", 1), ("cpu", 0), ("mps", 0)):
        hardware = dataclasses.replace(CPU_HARDWARE, kind=kind)
        suite = KernelSuite(suite="kernels", case=[kernel_case("a")])
        session = benchmark._Session(suite, Path("k.toml"), benchmark.Request(), hardware, None)
        assert len(session._faults(result)) == faults


def test_slower_than_the_baseline_is_an_error(kernel_bench, tmp_path):
    kernel_bench(kernel_case("a"))
    results = kernel_bench.written()
    for factor, passes in ((100.0, True), (0.001, False)):
        baseline = tmp_path / "baseline.json"
        entry = results["cases"][0]
        slower = {**entry, "seconds": {"eager": entry["seconds"]["eager"] * factor}}
        baseline.write_text(json.dumps({**results, "cases": [slower]}), encoding="utf-8")
        with contextlib.nullcontext() if passes else pytest.raises(BenchmarkError, match="a: eager takes .* baseline"):
            kernel_bench(kernel_case("a"), against=baseline)
        assert "ratio" in kernel_bench.shown and (" slower" in kernel_bench.shown) is not passes


def test_a_baseline_of_another_device_is_refused_before_anything_is_measured(kernel_bench, tmp_path):
    results = kernel_bench(kernel_case("a"))
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({**results, "device": {"kind": "cpu", "name": "Other"}}), encoding="utf-8")
    with pytest.raises(PlanError, match="another device: Other"):
        kernel_bench(kernel_case("b"), against=baseline)
    assert names(kernel_bench.written()) == ["a"]


def test_the_command_names_our_own_suites_by_a_word():
    assert benchmark.command(find("kernels"), ()) == "ltxforge bench kernels"
    assert benchmark.command(Path("my/kernels.toml"), ["a b"]) == "ltxforge bench my/kernels.toml --case 'a b'"


def test_two_suites_lie_in_one_folder(kernel_bench, tmp_path):
    suites = [
        (KernelSuite(suite="kernels", case=[kernel_case("a")]), Path(f"bench/{name}.toml")) for name in ("k", "l")
    ]
    benchmark.run(suites, benchmark.Request(out=tmp_path / "out"), Plain(io.StringIO()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "k.json", "k.md", "k.svg", "l.json", "l.md", "l.svg",
    ]  # fmt: skip


def test_a_stop_keeps_what_was_measured(kernel_bench, interrupted):
    """The signal comes while the second of three cases is measured."""
    interrupted(signal.SIGTERM)
    second = kernel_case("second", op="adaln_rms_norm", peers=[], floors={})
    with pytest.raises(Stopped, match="in the middle of second"):
        kernel_bench(kernel_case("first"), second, kernel_case("third"))
    assert names(kernel_bench.written()) == ["first"] and kernel_bench.written()["left"] == ["second", "third"]
    assert kernel_bench.out.with_suffix(".md").exists()


def test_one_file_holds_one_suite(tmp_path):
    suite = (KernelSuite(suite="kernels", case=[kernel_case("a")]), Path("bench/kernels.toml"))
    for request in (benchmark.Request(out=tmp_path / "x.json"), benchmark.Request(against=tmp_path / "b.json")):
        with pytest.raises(PlanError, match="about one suite"):
            benchmark.run([suite, suite], request, Plain(io.StringIO()))


def test_kernels_are_others_where_a_source_that_runs_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(ltxforge_kernels, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for name, text in (("op.py", "1"), ("op.py", "2"), ("choice.py", "3"), ("other.py", "4")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        digests.append(benchmark.kernels_digest())
    assert digests[1] == digests[2] and len(set(digests)) == 3


def test_committed_results_were_measured():
    """What lies in bench/results/ is what the code writes: every measured case has its steps, and they add up."""
    files = [path for path in sorted((ROOT / "bench" / "results").glob("*/*.json")) if path.stem in SUITES]
    assert {path.name for path in files} >= {"kernels.json", "step.json"}
    for path in files:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert results["format"] == benchmark.FORMAT and path.with_suffix(".md").exists()
        if results["suite"] == "step":
            for entry in results["cases"]:
                assert len(entry["step_seconds"]) == (entry["case"]["steps"] if entry["outcome"] == "measured" else 0)
