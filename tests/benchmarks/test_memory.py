"""The memory suite: processes of their own, what is red under a cap, and small models where nothing can be capped."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from ltxforge.benchmarks import memory, memory_process
from ltxforge.benchmarks.memory import asked, judged, measure
from ltxforge.benchmarks.step_peers import bitsandbytes_nf4
from ltxforge.errors import PlanError
from ltxforge.hardware import detect
from ltxforge.models.random_weights import empty_transformer
from ltxforge.signals import StopRequest
from ltxforge.suites import read
from ltxforge.suites.memory import OURS, RESIDENT, MemoryCase
from ltxforge.suites.step import COMPILED_PEER, EAGER_PEER, NF4_PEER
from ltxforge.ui.results_table import memory_row

ROOT = Path(__file__).resolve().parents[2]
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", memory_bytes=0)
GPU_HARDWARE = dataclasses.replace(detect(), kind="cuda", memory_bytes=80 * 2**30)
CAP = 1_000_000_000


def make_case(model: str = "tiny/ltx-video", **changes: object) -> MemoryCase:
    settings = {"name": "a", "size": "64x64x9", "precision": "fp32", "rank": 4, "cap_gb": 8, "steps": 2}
    return MemoryCase(model=model, **{**settings, **changes})


def test_ours_runs_in_a_process_of_its_own():
    """A Python with PyTorch and diffusers takes hundreds of megabytes; nothing is capped on a CPU."""
    told: list[str] = []
    result = measure(make_case(), CPU_HARDWARE, told.append, StopRequest())
    assert told == [f"a: {OURS}"] and result.outcome == "measured", result.reason
    assert result.cap_bytes is None and result.medians.keys() == result.peak_bytes.keys() == {OURS}
    assert result.seconds() == result.medians and result.medians[OURS] > 0
    if sys.platform == "linux":
        assert result.peak_bytes[OURS]["resident"] > 100e6
    row = memory_row(result.entry())
    assert row["cap"] == "none" and {f"peak, {OURS}", f"step, {OURS}"} <= row.keys()


@pytest.mark.parametrize("base", ["tiny/ltx-video-0.9.0", "tiny/ltx2.3"])
@pytest.mark.parametrize("name", [OURS, EAGER_PEER])
def test_a_contender_answers_what_it_took(base, name):
    found = memory_process.answer(make_case(base, warmup_steps=1), name, None, CPU_HARDWARE)
    assert found["outcome"] == "measured" and found["median"] > 0 and found["reason"] == ""


def test_too_little_memory_is_an_answer():
    huge = make_case(size="4096x4096x121", batch_size=100_000_000)
    found = memory_process.answer(huge, OURS, None, CPU_HARDWARE)
    assert found["outcome"] == "out of memory" and "allocate" in found["reason"]


def test_a_process_that_dies_has_failed_and_the_suite_goes_on(monkeypatch):
    """Here: it does not even begin."""
    monkeypatch.setattr(memory, "PROCESS", "ltxforge.benchmarks.nowhere")
    found = asked(make_case(), OURS, None, CPU_HARDWARE)
    assert found["outcome"] == "failed" and "its process ended with 1" in found["reason"]
    assert "ltxforge.benchmarks.nowhere" in found["reason"]
    result = judged(make_case(), None, {OURS: found})
    assert result.outcome == "failed" and result.faults() == [found["reason"]]


def answer(outcome: str = "measured", reserved: int = CAP // 2, **rest: object) -> dict:
    known = {"reason": "", "peak_bytes": {"allocated": reserved - 1, "reserved": reserved}}
    return {"outcome": outcome, **({"median": 0.5} if outcome == "measured" else {}), **known, **rest}


def test_ours_must_fit_and_the_peer_need_not():
    fits = judged(make_case(), CAP, {OURS: answer(), EAGER_PEER: answer("out of memory", reason="CUDA out of memory")})
    assert fits.outcome == "measured" and fits.faults() == [] and fits.ratios == {}
    assert fits.unavailable == {EAGER_PEER: "out of memory: CUDA out of memory"}
    assert fits.medians == {OURS: 0.5} and fits.peak_bytes[EAGER_PEER]["reserved"] == CAP // 2
    row = memory_row(fits.entry())
    assert (row["cap"], row["clip"], row["base"]) == ("1.0 GB", "64x64x9", "fp32")
    assert row["planned"] == ""
    for ours, told in (
        (answer("out of memory", reason="CUDA out of memory"), "does not fit into 1.00 GB: CUDA out of memory"),
        (answer(reserved=CAP + 10**7), "PyTorch reserved 1.01 GB of 1.00"),
    ):
        red = judged(make_case(), CAP, {OURS: ours, EAGER_PEER: answer()})
        assert red.outcome == "over the cap" and red.reason == told and red.faults() == [told]
    both = judged(make_case(), CAP, {OURS: answer(), EAGER_PEER: answer(median=1.0)})
    assert both.ratios == {EAGER_PEER: 2.0}


def test_a_row_says_what_a_card_and_a_host_need():
    """And, of ours, what the planner said of the tensors."""
    peaks = {"allocated": 2 * CAP, "reserved": 3 * CAP, "resident": 5 * CAP}
    case, each = make_case(base_precision="nf4"), answer(peak_bytes=peaks)
    row = memory_row(judged(case, 4 * CAP, {OURS: each, EAGER_PEER: each}, 2 * CAP).entry())
    assert row["base"] == "nf4" and (row["tensors"], row["planned"]) == ("2.0 GB", "2.0 GB")
    for name in (OURS, EAGER_PEER):
        assert (row[f"peak, {name}"], row[f"RAM, {name}"], row[f"step, {name}"]) == ("3.0 GB", "5.0 GB", "500 ms")


def test_the_cap_is_the_card_less_what_the_desktop_takes():
    assert make_case(cap_gb=8).cap_bytes == round(7.3 * 2**30)
    larger = measure(make_case(cap_gb=96), GPU_HARDWARE, lambda _text: None, StopRequest())
    assert larger.outcome == "skipped" and "less memory than a card of 96 GB" in larger.reason


def test_the_cap_is_set_before_anything_is_built(monkeypatch):
    """As a share of the GPU's memory, which is how PyTorch counts."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    hardware = dataclasses.replace(CPU_HARDWARE, memory_bytes=10 * CAP)
    memory_process.answer(make_case(warmup_steps=1, steps=1), OURS, CAP, hardware)
    assert shares == [0.1]


def test_a_cpu_caps_nothing_and_says_so():
    told: list[str] = []
    cases = [make_case(), make_case("0.9.5", name="full", size="768x512x121")]
    memory.begin(cases, CPU_HARDWARE, told.append, StopRequest())
    assert len(told) == 1 and "caps need a GPU" in told[0]
    result = measure(cases[1], CPU_HARDWARE, told.append, StopRequest())
    assert result.outcome == "skipped" and "needs a GPU" in result.reason
    with pytest.raises(PlanError, match="to_nowhere"):
        memory.begin([make_case(targets=["to_nowhere"])], CPU_HARDWARE, told.append, StopRequest())


def test_the_suite_s_caps_are_cards():
    cases = read.load(ROOT / "bench" / "memory.toml").case
    assert {case.cap_gb for case in cases} >= {8, 12, 16, 24}
    assert all(case.peers and COMPILED_PEER not in case.peers for case in cases)
    assert all(RESIDENT in case.peers for case in cases if case.block_swap > 0 and case.floors)
    assert len([case for case in cases if not case.spec.tiny]) >= 12, "estimates are held against so many at least"
    assert any(case.spec.tiny for case in cases), "something must run without a GPU"


def test_what_is_promised_and_what_was_planned_are_held_on_a_gpu():
    case = make_case(most_gb=0.4)
    answers = {OURS: answer(reserved=CAP // 2)}
    taken = answers[OURS]["peak_bytes"]["allocated"]
    assert judged(make_case(), CAP, answers, round(taken * 1.04)).outcome == "measured"
    over = judged(case, CAP, answers, taken)
    assert over.outcome == "over the cap" and over.reason == "tensors took 0.50 GB, and 0.4 are promised"
    off = judged(make_case(), CAP, answers, round(taken * 1.06))
    assert off.outcome == "gate failed" and off.reason == "tensors took 0.50 GB, and the planner says 0.53"
    assert judged(case, None, answers, taken).outcome == "measured", "a CPU does not tell what tensors take"


@pytest.mark.parametrize("changes", [
    {"base_precision": "nf4"}, {"base_precision": "int8-w8a8", "optimizer": "adamw8bit"}, {"block_swap": 2},
    {"group_offload": "leaf_level", "base_precision": "nf4"}, {"offload_activations": True},
])  # fmt: skip
@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2"])
def test_cases_say_what_a_recipe_s_memory_says(base, changes):
    case = make_case(base, warmup_steps=1, **changes)
    for name in (OURS, RESIDENT):
        found = memory_process.answer(case, name, None, CPU_HARDWARE)
        assert found["outcome"] == "measured", found
    assert memory.estimate(case, GPU_HARDWARE) > 0


def test_the_nf4_peer_is_bitsandbytes_own():
    found = memory_process.answer(make_case(warmup_steps=1), NF4_PEER, None, CPU_HARDWARE)
    assert found["outcome"] == "measured"
    spec = make_case().spec
    made = bitsandbytes_nf4(empty_transformer(spec), torch.device("cpu"), torch.float32)
    layers = [module for module in made.transformer_blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert layers and all(type(layer).__name__ == "Linear4bit" and layer.weight.bnb_quantized for layer in layers)
    assert not any(each.device.type == "meta" for each in made.parameters())
