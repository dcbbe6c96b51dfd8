"""The composition of phases and seconds, over made-up pieces whose sums are plain."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from ltxforge.memory.costs import (
    CUBLAS_BYTES,
    HOST_BASELINE,
    HOST_CONTEXT,
    BlockWork,
    Costs,
    Effort,
    Part,
    Pass,
    Rates,
    Weights,
    compare,
    phases,
    precision_key,
    standing,
    step_phase,
    step_seconds,
    waiting,
)
from ltxforge.memory.units import PAGE, groups, spread
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan, every_nth

MB, BLOCKS = 10**6, 8
WORK = BlockWork(
    kept_first=Pass(80 * MB, 120 * MB, 130 * MB, 1 * MB),
    kept=Pass(90 * MB, 130 * MB, 140 * MB, 1 * MB),
    again_first=Pass(10 * MB, 40 * MB, 130 * MB),
    again=Pass(10 * MB, 40 * MB, 140 * MB),
    given=20 * MB,
    head=60 * MB,
    tail=30 * MB,
    gradients=2 * MB,
    gradients_outside=0,
    weights=Weights(100 * MB, 40 * MB, MB, 50 * MB, idle=90 * MB, behind=3 * MB, idle_linear=10 * MB),
    effort=Effort(2e12, 2e10, 1e12, 4e9, 6e9),
    sampling=70 * MB,
)
QUANTISED = dataclasses.replace(
    WORK,
    weights=dataclasses.replace(WORK.weights, linear=26 * MB, largest=10 * MB, behind=0, quantising=300 * MB),
    effort=dataclasses.replace(WORK.effort, dequantised=2e9),
)
COSTS = Costs(
    device="cuda",
    dtype="bf16",
    blocks=BLOCKS,
    works={"bf16": WORK, "nf4-double": QUANTISED},
    tensors=(500_000,) * 8,
    captions={
        "bf16": (Part(9000 * MB, 40 * MB, 500 * MB), Part(2000 * MB, 90 * MB)),
        "nf4": (Part(3000 * MB, 40 * MB),),
    },
    clips=Part(2000 * MB, 900 * MB, 100 * MB),
    decodes={(0, 0): Part(2000 * MB, 4000 * MB), (512, 64): Part(2000 * MB, 1000 * MB)},
    beside=2000 * MB,
    largest_tensor=40 * MB,
)
RATES = Rates(bf16=400, fp16=400, fp32=50, memory=1000, bus=20, disk=3, int8=800)
NF4 = MemoryPlan(base_precision="nf4", double_quant=True)


def again(count: int, **changes: object) -> MemoryPlan:
    return dataclasses.replace(MemoryPlan(tuple(range(count))), **changes)


def swapped(count: int, **changes: object) -> StreamPlan:
    return dataclasses.replace(StreamPlan(spread(count, BLOCKS)), **changes)


def bytes_of(memory: MemoryPlan, optimizer: str = "adamw", costs: Costs = COSTS) -> int:
    return step_phase(costs, memory, optimizer).device_bytes


def test_a_steps_peak_with_everything_kept():
    """The last block's backward, with all of the earlier ones kept and no gradient but its own."""
    found = step_phase(COSTS, MemoryPlan(), "adamw")
    assert found.parts == {
        "weights": (50 + 8 * 104) * MB,
        "adapter": 16 * MB,
        "optimizer state": 2 * 16 * MB + 8 * 4,
        "conditioning": 20 * MB,
        "kept activations": (80 + 6 * 90) * MB,
        "one block's work": 140 * MB,
        "workspace": CUBLAS_BYTES,
    }
    assert found.device_bytes == sum(found.parts.values())
    assert found.host_bytes == HOST_BASELINE + HOST_CONTEXT + 90 * MB


def test_gradients_wait_through_every_micro_batch_but_the_first():
    twice = dataclasses.replace(COSTS, accumulate=2)
    assert bytes_of(MemoryPlan(), costs=twice) - bytes_of(MemoryPlan()) == 8 * 2 * MB


def test_the_update_can_be_the_worst_moment():
    small = Pass(0, MB, MB)
    light = dataclasses.replace(WORK, kept_first=small, kept=small, given=2 * MB, head=2 * MB, tail=0, gradients=2 * MB)
    costs = dataclasses.replace(COSTS, works={"bf16": light})
    before, parts = standing(costs, MemoryPlan(), "adamw"), step_phase(costs, MemoryPlan(), "adamw").parts
    # All gradients, and a denominator for all tensors at once; what the forward was given is gone.
    assert sum(parts.values()) == sum(before.values()) + (16 + 16) * MB + CUBLAS_BYTES
    assert bytes_of(MemoryPlan(), "adamw8bit", costs) < bytes_of(MemoryPlan(), "adamw", costs) - 16 * MB


def test_every_block_more_that_is_recomputed_takes_less_and_longer():
    plans = [again(count) for count in range(BLOCKS + 1)]
    sizes, seconds = [bytes_of(plan) for plan in plans], [step_seconds(COSTS, plan, "adamw", RATES) for plan in plans]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == sizes[0] - (70 + 6 * 80) * MB
    assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)


def test_streamed_blocks_leave_slots_and_wait_on_the_host():
    resident, all_away = MemoryPlan(), MemoryPlan(stream=StreamPlan(groups(BLOCKS, 1)))
    parts = step_phase(COSTS, all_away, "adamw").parts
    assert parts["weights"] == (50 + 8) * MB and parts["streamed slots"] == 2 * 100 * MB
    assert waiting(COSTS, all_away, "adamw") - waiting(COSTS, resident, "adamw") == BLOCKS * (100 * MB + PAGE)
    layers = MemoryPlan(stream=StreamPlan(groups(BLOCKS, 1), "leaf"))
    assert standing(COSTS, layers, "adamw")["streamed slots"] == 2 * 40 * MB
    at_once = MemoryPlan(stream=StreamPlan(groups(BLOCKS, 1), overlapped=False))
    assert standing(COSTS, at_once, "adamw")["streamed slots"] == 100 * MB
    in_twos = MemoryPlan(stream=StreamPlan(groups(BLOCKS, 2)))
    assert standing(COSTS, in_twos, "adamw")["streamed slots"] == 4 * 100 * MB
    some = MemoryPlan(stream=swapped(2))  # the six that stay have B behind their weights, as ever
    assert standing(COSTS, some, "adamw")["weights"] == (50 + 8 + 6 * 103) * MB


def test_weights_on_a_disk_take_stages_of_the_host_and_nothing_more():
    there = MemoryPlan(stream=StreamPlan(groups(BLOCKS, 1), disk="/somewhere"))
    assert waiting(COSTS, there, "adamw") == (90 - 8 * 10) * MB + 2 * (110 * MB + PAGE)


def test_streams_hide_copies_behind_the_computation():
    plans = {
        name: MemoryPlan(stream=swapped(4, **changes))
        for name, changes in {
            "hidden": {}, "one after the other": {"overlapped": False}, "from a disk": {"disk": "/somewhere"},
        }.items()
    }  # fmt: skip
    seconds = {name: step_seconds(COSTS, plan, "adamw", RATES) for name, plan in plans.items()}
    resident = step_seconds(COSTS, MemoryPlan(), "adamw", RATES)
    unit = 100 * MB / 20e9
    assert seconds["hidden"] == pytest.approx(resident + 2 * unit)
    assert seconds["one after the other"] == pytest.approx(resident + 2 * 4 * unit)
    assert seconds["from a disk"] > seconds["hidden"]
    slow = dataclasses.replace(RATES, bus=0.5)
    bound = step_seconds(COSTS, plans["hidden"], "adamw", slow)
    assert bound >= 2 * 4 * 100 * MB / 0.5e9  # nothing hides more than takes


def test_activations_on_the_host_leave_one_block_in_transit():
    kept, away = MemoryPlan(), MemoryPlan(offload_activations=True)
    # In the third block's backward: what of two is too small to travel, the one in transit, and five blocks' gradients.
    parts = step_phase(COSTS, away, "adamw").parts
    assert (parts["kept activations"], parts["gradients"]) == ((2 + 89) * MB, 5 * 2 * MB)
    assert bytes_of(away) < bytes_of(kept)
    sent = step_phase(COSTS, away, "adamw").host_bytes - step_phase(COSTS, kept, "adamw").host_bytes
    assert sent == (79 + 6 * 89) * MB  # the last block's stay
    assert step_seconds(COSTS, away, "adamw", RATES) >= step_seconds(COSTS, kept, "adamw", RATES)


def test_quantised_weights_cost_their_being_made_whole_unless_products_are_narrow():
    plain, whole = (step_seconds(COSTS, memory, "adamw", RATES) for memory in (MemoryPlan(), NF4))
    assert whole - plain == pytest.approx(2 * BLOCKS * 2e9 / 1000e9)
    narrow = dataclasses.replace(QUANTISED, effort=dataclasses.replace(QUANTISED.effort, narrow="int8"))
    costs = dataclasses.replace(COSTS, works={"int8-w8a8": narrow})
    memory = MemoryPlan(base_precision="int8-w8a8")
    assert step_seconds(costs, memory, "adamw", RATES) < plain
    # A card without such units makes them whole.
    assert step_seconds(costs, memory, "adamw", dataclasses.replace(RATES, int8=0)) == pytest.approx(whole)


def test_paged_moments_give_way_to_the_host():
    plain, paged = (step_phase(COSTS, MemoryPlan(), name) for name in ("adamw8bit", "paged_adamw8bit"))
    assert plain.device_bytes - paged.device_bytes == paged.host_bytes - plain.host_bytes == 8 * 2 * 500_000
    assert step_seconds(COSTS, MemoryPlan(), "paged_adamw8bit", RATES) > step_seconds(
        COSTS, MemoryPlan(), "adamw8bit", RATES
    )


def test_phases_of_a_run():
    found = {phase.name: phase for phase in phases(COSTS, MemoryPlan(), "adamw")}
    assert list(found) == ["captions", "clips", "load", "step", "sample", "decode", "save"]
    assert all(phase.device_bytes == sum(phase.parts.values()) for phase in found.values())
    assert found["captions"].parts == {"weights": 9000 * MB, "work": 40 * MB}
    held = sum(standing(COSTS, MemoryPlan(), "adamw").values())
    # The idle modality is needed for a sample, and leaves the host for it.
    assert found["sample"].device_bytes == held + (90 + 2000 + 70) * MB
    assert found["sample"].host_bytes == HOST_BASELINE + HOST_CONTEXT
    assert found["decode"].device_bytes == held + (90 + 2000 + 4000) * MB
    assert found["save"].device_bytes == held
    quick = dataclasses.replace(NF4, decode_tile=512, decode_frames=64, text_encoder_precision="nf4")
    frugal = {phase.name: phase for phase in phases(COSTS, quick, "adamw")}
    assert found["decode"].parts["decoding"] - frugal["decode"].parts["decoding"] == 3000 * MB
    assert frugal["captions"].parts["weights"] == 3000 * MB
    assert frugal["load"].parts["quantising"] == 300 * MB
    on_host = {phase.name: phase for phase in phases(COSTS, dataclasses.replace(quick, quantise_on="host"), "adamw")}
    assert "quantising" not in on_host["load"].parts
    assert on_host["load"].host_bytes - frugal["load"].host_bytes == 300 * MB


def test_a_transformer_that_is_set_aside_makes_room_for_the_decoder():
    aside = dataclasses.replace(COSTS, aside=True, beside=0)
    decode = {phase.name: phase for phase in phases(aside, MemoryPlan(), "adamw")}["decode"]
    assert decode.parts.keys() == {"optimizer state", "VAE", "decoding"}
    assert decode.host_bytes > HOST_BASELINE + HOST_CONTEXT + 800 * MB


def test_streamed_weights_travel_whole_while_a_sample_is_made_and_clear_the_way_for_the_decoder():
    memory = MemoryPlan(stream=StreamPlan(groups(BLOCKS, 1)))
    found = {phase.name: phase for phase in phases(COSTS, memory, "adamw")}
    assert found["sample"].parts["streamed slots"] == 2 * 110 * MB
    assert found["sample"].parts["weights"] == (50 + 8 + 90 - 8 * 10) * MB
    assert "streamed slots" not in found["decode"].parts


def test_on_a_cpu_device_and_host_are_one_memory():
    found = step_phase(dataclasses.replace(COSTS, device="cpu"), MemoryPlan(), "adamw")
    assert found.host_bytes == HOST_BASELINE + 90 * MB + found.device_bytes
    assert "workspace" not in found.parts


def test_a_choice_is_judged_in_microseconds():
    """48 blocks and 2000 tensors, as of the largest model; the bound is ten times what it takes on an idle core."""
    large = dataclasses.replace(COSTS, blocks=48, tensors=(500_000,) * 2304)
    plans = [MemoryPlan(every_nth(every, 48)) for every in (0, 1, 2, 3)] * 50
    large.moments, large.adapter  # noqa: B018  computed once for all choices
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for plan in plans:
            step_phase(large, plan, "adamw")
            step_seconds(large, plan, "adamw", RATES)
        best = min(best, (time.perf_counter() - began) / len(plans))
    assert best < 500e-6


def test_names_of_base_precisions():
    assert [precision_key(MemoryPlan(base_precision=name)) for name in ("bf16", "int8", "nf4")] == [
        "bf16",
        "int8",
        "nf4",
    ]
    assert precision_key(NF4) == "nf4-double"
    assert precision_key(dataclasses.replace(NF4, base_precision="int8")) == "int8"


def test_an_estimate_beside_a_measurement():
    planned = PhasePlan("step", 6 * 10**9, 10**9, {"weights": 4 * 10**9, "kept activations": 2 * 10**9})
    assert compare(planned, {"weights": 4 * 10**9, "kept activations": 3 * 10**9, "all": 7 * 10**9}) == [
        "step: all: 6.00 GB planned, 7.00 GB measured (+17%)",
        "kept activations: 2.00 GB planned, 3.00 GB measured (+50%)",
        "weights: 4.00 GB planned, 4.00 GB measured (+0%)",
    ]
    assert compare(planned, {"all": 6 * 10**9, "other programs": 10**9})[1:] == [
        "other programs: 0.00 GB planned, 1.00 GB measured",
        "weights: 4.00 GB planned",
        "kept activations: 2.00 GB planned",
    ]


def test_costs_needs_no_torch():
    code = "import sys, json, ltxforge.memory.costs; print(json.dumps('torch' in sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) is False
