"""The step suite: what a measured step is, its FLOPs counted by hand, peers in turns, no speed from a red gate."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics

import pytest
import torch
from torch.nn import functional

from ltxforge import trainer
from ltxforge.benchmarks import step
from ltxforge.benchmarks.step import ROUNDS, count_flops, measure
from ltxforge.benchmarks.step_watch import StepWatch, SyntheticData, train_watched
from ltxforge.benchmarks.synthetic import plan_of, synthetic_batch, tokens_of
from ltxforge.errors import PlanError, Stopped
from ltxforge.hardware import detect
from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import match
from ltxforge.models.random_weights import random_model
from ltxforge.session import make_trainable
from ltxforge.signals import StopRequest
from ltxforge.suites.step import COMPILED_PEER, EAGER_PEER, StepCase, StepResult

CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", name="Some CPU (R) @ 2.0 GHz")
CASES = [
    ("tiny/ltx-video", "video", {"video": 8, "prompt": 256}),
    ("tiny/ltx2", "both", {"video": 8, "audio": 9, "prompt": 128}),  # 9 frames at 24 fps: 0.375 s · 25 = 9.4
    ("tiny/ltx2", "video", {"video": 8, "prompt": 128}),
    ("tiny/ltx2", "audio", {"audio": 9, "prompt": 128}),
    ("tiny/ltx2.3", "both", {"video": 8, "audio": 9, "prompt": 128}),
]


def make_case(model: str = "tiny/ltx2", **changes: object) -> StepCase:
    settings = {"name": "a", "size": "64x64x9", "precision": "fp32", "steps": 3, "warmup_steps": 1, "rank": 4,
                "overfit_steps": 0}  # fmt: skip
    return StepCase(model=model, **{**settings, **changes})


def measured(case: StepCase) -> StepResult:
    """The case's result, measured once for all tests."""
    return _measured(case.model_dump_json())


@functools.cache
def _measured(case: str) -> StepResult:
    return measure(StepCase.model_validate_json(case), CPU_HARDWARE, lambda _text: None, StopRequest())


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
    train_watched(plan, model, synthetic_batch(case, model), optimizer, watch, StopRequest())
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


def test_a_stop_leaves_an_unfinished_case_out():
    stop = StopRequest()
    stop.request()
    with pytest.raises(Stopped):
        measure(make_case(), CPU_HARDWARE, lambda _text: None, stop)


def test_the_batch_has_the_shapes_of_full_size_models():
    """The issue's two sizes: T = F·16·24, L = 25 · frames / 24."""
    for frames, video, audio in ((49, 2688, 51), (121, 6144, 126)):
        case = make_case("2.0-dev", size=f"768x512x{frames}", precision="bf16")
        model = random_model(case.spec, torch.device("meta"), torch.bfloat16, "both")
        batch = synthetic_batch(case, model)
        assert tokens_of(batch) == {"video": video, "audio": audio, "prompt": 1024}
        assert batch.latents.audio.shape == (1, audio, 128)


def test_peers_take_turns_with_ours_over_the_same_steps():
    """Every round begins with a step that is not timed; all of ours are in one run of the trainer."""
    case = make_case("tiny/ltx-video", steps=6, warmup_steps=2, peers=[EAGER_PEER], floors={EAGER_PEER: 1.5})
    result = measured(case)
    assert len(result.step_seconds) == len(result.peers[EAGER_PEER].step_seconds) == 6
    assert len(result.losses) == 2 + 6 + (ROUNDS - 1)
    theirs, ours = result.peers[EAGER_PEER].step_seconds, result.step_seconds
    assert result.ratios == {EAGER_PEER: statistics.median(theirs) / statistics.median(ours)}
    entry = result.entry()
    low, high = (entry["peers"][EAGER_PEER][f"step_seconds_{end}"] for end in ("p20", "p80"))
    assert min(theirs) <= low <= statistics.median(theirs) <= high <= max(theirs)
    slow = dataclasses.replace(result, ratios={EAGER_PEER: 1.4})
    assert slow.missed_floors() == [f"1.40 times as fast as {EAGER_PEER}, less than 1.5"]


def test_a_peer_that_fails_is_left_out_and_told(monkeypatch):
    """Here: there is no C++ compiler for torch.compile."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    result = measure(
        make_case("tiny/ltx-video", peers=[COMPILED_PEER, EAGER_PEER]), CPU_HARDWARE, lambda _text: None, StopRequest()
    )
    assert result.outcome == "measured" and len(result.step_seconds) == 3
    assert result.peers.keys() == result.ratios.keys() == {EAGER_PEER}
    assert "compiler" in result.unavailable[COMPILED_PEER].lower()


def test_a_red_gate_reports_no_speed(monkeypatch):
    """A LoRA branch that is 2 % too strong: no shape is wrong and nothing crashes."""
    whole = LoraLinear.forward

    def too_strong(self: LoraLinear, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        base = self.base_layer(functional.gelu(x, approximate="tanh") if activation == "gelu" else x)
        return base + 1.02 * (whole(self, x, activation=activation) - base)

    monkeypatch.setattr(LoraLinear, "forward", too_strong)
    result = measure(make_case("tiny/ltx-video"), CPU_HARDWARE, lambda _text: None, StopRequest())
    assert result.outcome == "gate failed" and "against stock float32" in result.reason
    assert result.step_seconds == () and result.seconds() == {} and result.faults() == [result.reason]
    assert any(not gate.passed for gate in result.gates)


def test_the_overfit_curve_is_one_of_the_gates():
    gates = measured(make_case("tiny/ltx-video", steps=1, overfit_steps=3)).gates
    assert [gate.passed for gate in gates] == [True] * 3 and "3 steps of overfitting" in gates[-1].what


def test_kernels_are_the_plan_s_unless_the_case_says():
    plan = plan_of(make_case(kernels="eager"), CPU_HARDWARE)
    assert {choice.implementation for choice in plan.kernels.choices} == {"eager"}
    gpu = dataclasses.replace(CPU_HARDWARE, kind="cuda", capability=(9, 0), triton="3.7.1", interpreted=False)
    assert "triton" in {choice.implementation for choice in plan_of(make_case(), gpu).kernels.choices}
    with pytest.raises(PlanError, match="need an NVIDIA or AMD GPU"):
        step.begin([make_case(kernels="triton")], CPU_HARDWARE, lambda _text: None, StopRequest())
