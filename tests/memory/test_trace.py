"""Traced memory against an instrument of its own: the allocations that torch's profiler sees while a real step runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ltxforge_kernels.choice import EAGER, Kernels, everything
from torch.profiler import ProfilerActivity, profile

from ltxforge.dataset.batches import Batch
from ltxforge.events import ignore
from ltxforge.lora.layers import linear_layers
from ltxforge.lora.targets import match
from ltxforge.memory import trace
from ltxforge.memory.costs import Costs, Weights, precision_key, standing, step_phase
from ltxforge.memory.strategy import Strategy
from ltxforge.memory.trace import DTYPES, TRACED_BLOCKS, block_work
from ltxforge.memory.units import groups, spread
from ltxforge.modalities import Streams, has
from ltxforge.models.random_weights import random_model, random_prompt
from ltxforge.plan import (
    AudioPlan,
    BucketPlan,
    CachePlan,
    CheckpointPlan,
    ConditioningPlan,
    DataPlan,
    DevicePlan,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    StreamPlan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.quant.formats import quantisable, stored_bytes
from ltxforge.session import make_trainable
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS, TINY, ModelSpec
from ltxforge.trainer import accumulate, clip_gradients

CPU = torch.device("cpu")
SMALL, REAL = ClipShape(384, 256, 65), ClipShape(768, 512, 121)  # 864 and 6144 tokens
RANK = 8


def plan_for(
    spec: ModelSpec,
    shape: ClipShape,
    *,
    precision: str = "bf16",
    kind: str = "cpu",
    modalities: str = "",
    rank: int = RANK,
    kernels: Kernels = EAGER,
    batch: int = 1,
    accumulated: int = 1,
    first_frame: float = 0.0,
    tokens: int = 128,
    optimizer: str = "adamw",
    memory: MemoryPlan | None = None,
    targets: tuple[str, ...] = ("attention",),
) -> Plan:
    modalities = modalities or ("both" if spec.has_audio else "video")
    length = round(25 * shape.frames / 24) if has(modalities, "audio") else 0
    bucket = BucketPlan(shape, 24.0, shape.latent().tokens if has(modalities, "video") else 0, 4, length)
    return Plan(
        name="traced", seed=0, steps=4, steps_per_epoch=1.0, model=ModelPlan("none", spec.version, spec.rope, {}),
        device=DevicePlan(precision, precision, kind, "PyTorch SDPA", "statistical", "a test"),
        data=DataPlan((), (bucket,)), cache=CachePlan(""),
        flow=FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=ConditioningPlan(first_frame, 0.0, tokens),
        lora=LoraPlan(rank, float(rank), 0.0, False, targets, modalities=modalities),
        optimizer=OptimizerPlan(optimizer, 1e-4, (0.9, 0.999), 1e-8, 0.0, "constant", 0, 4, 0.0, 2.0),
        training=TrainingPlan(batch, accumulated, 1.0, None, modalities), memory=memory or MemoryPlan(),
        checkpoint=CheckpointPlan(4, 2), validation=ValidationPlan(0, False), directory="", kernels=kernels,
        audio=AudioPlan("shared", 1.0) if has(modalities, "audio") else None,
    )  # fmt: skip


class Same:
    """The same made-up micro-batch at every step."""

    def __init__(self, plan: Plan, spec: ModelSpec) -> None:
        (bucket,), size, trained = plan.data.buckets, plan.training.batch_size, plan.training.modalities
        shape = bucket.shape.latent()
        clean = torch.zeros(size, shape.tokens, dtype=torch.bool)
        if plan.conditioning.first_frame:
            clean[0, : shape.height * shape.width] = True
        video = audio = None
        if has(trained, "video"):
            video = torch.randn(size, spec.latent_channels, shape.frames, shape.height, shape.width)
        if has(trained, "audio"):
            audio = torch.randn(size, bucket.audio_tokens, spec.transformer_config["audio_in_channels"])
        prompt = random_prompt(spec, plan.conditioning.prompt_tokens, trained, DTYPES[plan.device.precision])
        present = None if audio is None else torch.ones(size, dtype=torch.bool)
        self.batch = Batch(Streams(video, audio), present, [prompt] * size, clean, shape, bucket.fps, (), 0)
        count = size * plan.training.accumulate
        self.count = Streams(None if video is None else count, None if audio is None else count)

    def load(self, _step: int, _micro: int) -> Batch:
        return self.batch

    def count_at(self, _step: int) -> Streams[int]:
        return self.count

    def epoch_at(self, _step: int) -> float:
        return 0.0


def measured(plan: Plan, spec: ModelSpec, least_bytes: int) -> tuple[int, int]:
    """Bytes that weights, adapter, moments and slots take between two steps, and the peak of a step above them."""
    model = random_model(spec, CPU, DTYPES[plan.device.precision], plan.training.modalities)
    strategy = Strategy(plan, CPU, least_bytes=least_bytes)
    optimizer = make_trainable(plan, model, ignore, strategy)
    data, stop = Same(plan, spec), StopRequest()

    def step(number: int) -> None:
        assert accumulate(plan, model, data, number, stop) is not None
        clip_gradients(optimizer.parameters.values(), plan.training)
        optimizer.step(1e-4)

    step(1)
    model._ropes.clear()  # so that they are made, and counted, in the step that is watched
    transformer = model.transformer
    idle = {id(parameter) for module in model.unused_modules() for parameter in module.parameters()}
    lasting = [*transformer.parameters(), *transformer.buffers(), *optimizer.state().values()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in lasting if id(tensor) not in idle
    }
    between = sum(storage.nbytes() for storage in storages.values())
    between += strategy.streamer.slot_bytes if strategy.streamer else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step(2)
    strategy.close()
    return between, peak_of(watched)


def peak_of(watched: profile) -> int:
    """The most bytes that were allocated and not yet freed, above those at the beginning."""
    events = watched.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


def costs_of_step(plan: Plan, spec: ModelSpec) -> Costs:
    memory = plan.memory
    work = block_work(plan, spec, plan.data.buckets[0], memory.base_precision, memory.double_quant)
    layers = match(plan.lora.targets, spec, plan.lora.modalities, plan.training.modalities).layers.values()
    tensors = tuple(plan.lora.rank * side for size in layers for side in size)
    return Costs(
        "cpu", plan.device.precision, spec.blocks, {precision_key(memory): work}, tensors, plan.training.accumulate
    )


def streamed(units: tuple[tuple[int, ...], ...], level: str = "block") -> StreamPlan:
    return StreamPlan(units, level, overlapped=False)


KEPT, AGAIN, SOME = MemoryPlan(), MemoryPlan((0, 1, 2, 3)), MemoryPlan((1, 3))
VIDEO, BOTH, LATER = "tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3"
CASES: dict[str, tuple[str, MemoryPlan, dict[str, Any]]] = {
    "2B kept, float32": (VIDEO, KEPT, {"precision": "fp32"}),
    "2B kept": (VIDEO, KEPT, {}),
    "2B recomputed": (VIDEO, AGAIN, {}),
    "2B recomputed, two samples, 8-bit moments": (VIDEO, AGAIN, {"batch": 2, "optimizer": "adamw8bit"}),
    "2B some recomputed, first frame clean": (VIDEO, SOME, {"first_frame": 1.0}),
    "2B kept, two micro-batches": (VIDEO, KEPT, {"accumulated": 2, "rank": 64}),
    "2B nf4 recomputed, all streamed": (
        VIDEO, dataclasses.replace(AGAIN, base_precision="nf4", double_quant=True, stream=streamed(groups(4, 1))), {},
    ),
    "2B fp8 kept, every linear layer": (VIDEO, dataclasses.replace(KEPT, base_precision="fp8"), {"targets": ("all",)}),
    "2B kept, on the host": (VIDEO, dataclasses.replace(KEPT, offload_activations=True), {}),
    "2B recomputed, on the host": (VIDEO, dataclasses.replace(AGAIN, offload_activations=True), {}),
    "19B recomputed, float32": (BOTH, AGAIN, {"precision": "fp32"}),
    "19B kept, int8, half streamed": (
        BOTH, dataclasses.replace(KEPT, base_precision="int8", stream=streamed(spread(2, 4))), {},
    ),
    "19B some recomputed, first frame clean": (BOTH, SOME, {"first_frame": 1.0, "batch": 2}),
    "19B picture alone, layer by layer": (
        BOTH, dataclasses.replace(AGAIN, stream=streamed(groups(4, 1), "leaf")), {"modalities": "video"},
    ),
    "22B kept, int8-w8a8": (LATER, dataclasses.replace(KEPT, base_precision="int8-w8a8"), {}),
    "22B sound alone": (LATER, KEPT, {"modalities": "audio", "batch": 8}),
}  # fmt: skip
FAST = ("2B kept, on", "2B some", "2B recomputed, two", "2B nf4", "19B some")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name.startswith(FAST) else pytest.mark.sweep) for name in CASES]
)
def test_a_real_step_takes_what_was_estimated(case, monkeypatch):
    name, memory, options = CASES[case]
    spec, least = TINY[name], 2**14  # so that activations of a tiny model are large enough to travel
    monkeypatch.setattr(trace, "LEAST_BYTES", least)
    plan = plan_for(spec, SMALL, memory=memory, **options)
    between, peak = measured(plan, spec, least)
    costs = costs_of_step(plan, spec)
    estimated = step_phase(costs, memory, plan.optimizer.name)
    lasting = sum(standing(costs, memory, plan.optimizer.name).values())
    assert estimated.device_bytes == pytest.approx(between + peak, rel=0.05)
    assert lasting == pytest.approx(between, rel=0.05)
    assert estimated.device_bytes - lasting == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("version", "numbers", "adapter", "products", "attention", "checkpoint", "peaks"),
    [
        ("0.9.5", 1.923, 29.4, 20.6, 8.8, 25.2, (0.53, 0.8)),
        ("2.0-dev", 18.88, 213.9, 165.5, 35.3, 50.8, (1.82, 2.4)),
    ],
)
def test_sizes_and_work_of_real_models(version, numbers, adapter, products, attention, checkpoint, peaks):
    """kernels.md 1.1, 1.2 and 6, at 6144 tokens: 10^9 parameters, 10^6 of the LoRA, TFLOPs of a forward as torch's own
    counter has them, MB of a checkpoint, GB of the peak inside an eager block, there with PEFT's own branch.
    """
    spec = SPECS[version]
    tokens = 1024 if spec.has_audio else 128
    plan = plan_for(spec, REAL, kind="cuda", rank=32, tokens=tokens)
    work = block_work(plan, spec, plan.data.buckets[0])
    whole = work.weights.outside + spec.blocks * (work.weights.linear + work.weights.block)
    assert whole == pytest.approx(2e9 * numbers, rel=0.005)
    assert work.gradients * spec.blocks + work.gradients_outside == pytest.approx(4e6 * adapter, rel=0.005)
    assert work.again.stays == pytest.approx(1e6 * checkpoint, rel=0.01)
    assert 1e9 * peaks[0] < work.again.backward < 1e9 * peaks[1]
    assert 1e9 * peaks[0] < work.kept.backward < 1e9 * peaks[1]
    assert spec.blocks * work.effort.linear == pytest.approx(1e12 * products, rel=0.02)
    assert spec.blocks * work.effort.attention == pytest.approx(1e12 * attention, rel=0.02)


def test_our_kernels_keep_less_than_eager():
    spec = SPECS["0.9.7-dev"]
    eager, ours = (
        block_work(plan, spec, plan.data.buckets[0])
        for plan in (
            plan_for(spec, REAL, kind="cuda", rank=32, kernels=everything(name)) for name in ("eager", "triton")
        )
    )
    assert ours.kept.stays < 0.95 * eager.kept.stays
    assert ours.again.backward < 0.95 * eager.again.backward
    assert ours.effort.traffic < 0.3 * eager.effort.traffic
    assert (ours.effort.linear, ours.effort.attention) == (eager.effort.linear, eager.effort.attention)
    # [W | B] in one matrix: 64 columns more behind each of 8 layers with an adapter.
    assert ours.weights.behind == 8 * 4096 * 64 * 2 and eager.weights.behind == 0


@pytest.mark.parametrize(("base", "double"), [("fp8", False), ("nf4", True)])
def test_quantised_weights_weigh_what_their_format_says(base, double):
    spec = SPECS["0.9.7-dev"]
    plan = plan_for(spec, SMALL, kind="cuda")
    weights = block_work(plan, spec, plan.data.buckets[0], base, double).weights
    inside = {name: size for name, size in quantisable(linear_layers(spec), base).items() if ".0." in name[:21]}
    assert weights.linear == sum(stored_bytes(base, outer, inner, double) for inner, outer in inside.values())
    assert weights.largest == pytest.approx(stored_bytes(base, 16384, 4096, double), rel=0.001)


def test_what_counts_as_streamed_is_what_is_parked():
    """Of 2.3's layers those that gate heads are too narrow to travel."""
    spec, memory = TINY["tiny/ltx2.3"], MemoryPlan(stream=streamed(groups(4, 1)))
    plan = plan_for(spec, SMALL, memory=memory)
    model, strategy = random_model(spec, CPU, torch.bfloat16, "both"), Strategy(plan, CPU)
    make_trainable(plan, model, ignore, strategy)
    gates = model.transformer.transformer_blocks[0].attn1.to_gate_logits.weight
    assert gates is not None and min(gates.shape) < 64
    assert strategy.streamer is not None
    parked = sum(piece.described.nbytes for unit in strategy.streamer.units for piece in unit.pieces)
    assert spec.blocks * block_work(plan, spec, plan.data.buckets[0]).weights.linear == parked


def test_a_modality_that_is_not_trained_lies_idle():
    spec = TINY[BOTH]
    alone, joint = (
        block_work(plan, spec, plan.data.buckets[0]).weights
        for plan in (plan_for(spec, SMALL, kind="cuda", modalities=each) for each in ("video", "both"))
    )

    def whole(weights: Weights) -> int:
        return weights.outside + weights.idle + spec.blocks * (weights.linear + weights.block)

    assert joint.idle == 0 and alone.idle > 0.2 * whole(alone)
    assert whole(alone) == whole(joint)


def test_an_adapter_of_some_blocks_is_traced_as_if_all_had_it():
    spec = SPECS["0.9.5"]
    plan = plan_for(spec, SMALL, kind="cuda", targets=(r"re:transformer_blocks\.(5|6)\.attn1\.to_q",))
    layers = trace.traced_match(plan, spec).layers
    assert set(layers) == {f"transformer_blocks.{n}.attn1.to_q" for n in range(TRACED_BLOCKS)}
