"""The encode suite on small VAEs: ours is the whole clip's latents, peers that blend are told apart, faults are red."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from ltxforge.benchmarks import encode
from ltxforge.benchmarks.encode import checked, contender, encoder_of, kernels_of, measure, synthetic_frames
from ltxforge.benchmarks.gate import relative_error
from ltxforge.errors import PlanError, Stopped
from ltxforge.hardware import detect
from ltxforge.models import vae_streaming
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.suites import read
from ltxforge.suites.case import Timing
from ltxforge.suites.encode import CHANNELS_LAST, FRAMEWISE, OURS, TILED, WHOLE, EncodeCase, EncodeResult
from ltxforge.ui.results_table import RATIOS, encode_row

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu")


def make_case(model: str = "tiny/ltx-video", **changes: object) -> EncodeCase:
    settings = {"name": "a", "size": "64x64x25", "precision": "fp32", "repeats": 3}
    return EncodeCase(model=model, **{**settings, **changes})


@functools.cache
def measured() -> EncodeResult:
    case = make_case(peers=[WHOLE, CHANNELS_LAST, FRAMEWISE, TILED], floors={WHOLE: 2.0}, most_gb=1.5)
    return measure(case, CPU_HARDWARE, lambda _text: None, StopRequest())


def test_ours_and_every_peer_are_timed_in_turns():
    result = measured()
    assert result.outcome == "measured" and not result.unavailable and result.reason == ""
    assert result.times.keys() == {OURS, WHOLE, CHANNELS_LAST, FRAMEWISE, TILED}
    for name, ratio in result.ratios.items():
        assert ratio == pytest.approx(result.times[name].median / result.times[OURS].median)
    assert result.seconds() == {OURS: result.times[OURS].median}
    assert result.peak_bytes == {}, "nothing counts tensors on a CPU"
    entry = result.entry()
    assert entry["frames_per_second"][OURS] == pytest.approx(25 / result.times[OURS].median)
    row = encode_row(entry)
    assert row["case"] == "a" and {"clip", "frames/s"} <= row.keys()
    assert WHOLE in row[RATIOS] and f"{FRAMEWISE} by 0." in row["another function"]


def test_peers_that_blend_are_told_by_how_far_they_are_from_the_clip():
    deviations = measured().deviations
    assert deviations.keys() == {FRAMEWISE, TILED}
    assert all(apart > 0.01 for apart in deviations.values())


@pytest.mark.parametrize("model", ["tiny/ltx-video-0.9.0", "tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_is_green_for_every_layout_of_encoder(model, precision):
    case = make_case(model, precision=precision)
    gates, _ = checked(case, kernels_of(case, CPU_HARDWARE), CPU)
    assert [gate.passed for gate in gates] == [True] * (1 if precision == "fp32" else 2)
    assert gates[0].error <= 2e-6 and gates[0].bound == max(2e-6, 1.1 * gates[0].eager_error)
    assert 1e-8 < gates[0].eager_error < 2e-6, "diffusers in float32 is not the truth, which is float64"
    if precision == "bf16":
        assert 0 < gates[1].eager_error < 0.1, "bf16 rounds, and so does diffusers"


def test_channels_last_is_the_same_function():
    case, frames = make_case(), synthetic_frames(ClipShape(64, 64, 17))
    whole, last = (
        contender(name, encoder_of(case, CPU, torch.float32), kernels_of(case, CPU_HARDWARE), CPU)(frames)
        for name in (WHOLE, CHANNELS_LAST)
    )
    assert whole.shape == (16, 3, 2, 2) and relative_error(last, whole) <= 2e-6


def test_a_state_that_is_forgotten_turns_the_gate_red(monkeypatch):
    """Every chunk then follows a black one: shapes fit, and nothing crashes."""
    whole = vae_streaming.EncoderStream.encode

    def forgetful(self: vae_streaming.EncoderStream, pixels: torch.Tensor) -> torch.Tensor:
        self.states = {conv: torch.zeros_like(state) for conv, state in self.states.items()}
        return whole(self, pixels)

    monkeypatch.setattr(vae_streaming.EncoderStream, "encode", forgetful)
    result = measure(make_case(), CPU_HARDWARE, lambda _text: None, StopRequest())
    assert result.outcome == "gate failed" and "streamed in float32" in result.reason
    assert result.times == {} and result.seconds() == {} and result.faults() == [result.reason]


@pytest.mark.parametrize(("ours", "passes"), [(3.2e-6, True), (3.4e-6, False)])
def test_where_diffusers_own_float32_is_coarser_than_the_bound_ours_may_be_as_coarse(monkeypatch, ours, passes):
    """As in deep encoders, whose many sums round."""
    errors = iter([3.0e-6, ours])
    monkeypatch.setattr(encode, "relative_error", lambda _result, _truth: next(errors))
    case = make_case()
    (gate,), _ = checked(case, kernels_of(case, CPU_HARDWARE), CPU)
    assert gate.passed is passes and gate.bound == pytest.approx(3.3e-6) and gate.eager_error == 3.0e-6


def test_a_bf16_that_is_coarser_than_diffusers_turns_the_gate_red(monkeypatch):
    stream = encode.encode_frames

    def coarser(vae: torch.nn.Module, *rest: object) -> object:
        found = stream(vae, *rest)
        noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(0)) * 0.02 * found.mean.std()
        return dataclasses.replace(found, mean=found.mean + noise) if vae.dtype == torch.bfloat16 else found

    monkeypatch.setattr(encode, "encode_frames", coarser)
    result = measure(make_case(precision="bf16"), CPU_HARDWARE, lambda _text: None, StopRequest())
    assert result.outcome == "gate failed" and "streamed in bf16" in result.reason


def test_memory_and_seconds_have_bounds_too():
    case = make_case(peers=[WHOLE], floors={WHOLE: 2.0}, most_gb=1.5)
    times = {OURS: Timing(1.0, 1.0, 1.0), WHOLE: Timing(1.9, 1.9, 1.9)}
    found = EncodeResult(
        "a", "measured", case.settings(), ratios={WHOLE: 1.9}, times=times, peak_bytes={OURS: 1600000000}
    )
    assert found.missed_floors() == [
        "1.90 times as fast as diffusers, less than 2",
        "takes 1.60 GB above the weights, more than 1.5",
    ]
    good = dataclasses.replace(found, ratios={WHOLE: 2.1}, peak_bytes={OURS: 1_400_000_000})
    assert good.missed_floors() == []
    for most, missed in ((1.1, []), (0.9, ["takes 1.000 s, more than 0.9"])):
        settings = case.model_copy(update={"most_seconds": most}).settings()
        assert dataclasses.replace(good, case=settings).missed_floors() == missed


def test_what_cannot_be_measured_here_is_told():
    full = measure(make_case("2.0-dev", size="768x512x121"), CPU_HARDWARE, lambda _text: None, StopRequest())
    assert full.outcome == "skipped" and "needs a GPU" in full.reason
    with pytest.raises(PlanError, match="need an NVIDIA or AMD GPU"):
        encode.begin([make_case(kernels="triton")], CPU_HARDWARE, lambda _text: None, StopRequest())
    stop = StopRequest()
    stop.request()
    with pytest.raises(Stopped):
        measure(make_case(), CPU_HARDWARE, lambda _text: None, stop)


def test_the_suite_has_every_encoder_at_every_length():
    cases = read.load(ROOT / "bench" / "encode.toml").case
    full = [case for case in cases if not case.spec.tiny]
    assert {(case.spec.vae_family, case.shape.frames) for case in full} >= {
        (case.spec.vae_family, frames) for case in full for frames in (49, 121, 257)
    }
    assert {case.model for case in full} == {"0.9.1", "0.9.5", "2.0-dev", "2.3-dev"}
    assert all(case.floors == {WHOLE: 2.0} and case.most_gb == 1.5 for case in full)
    assert {case.name: case.most_seconds for case in full if case.most_seconds} == {"ltx2-121": 0.33}
