"""A block compiled as a whole: one graph for all blocks and strategies, as many as there are forms, none broken."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ltxforge_kernels.choice import EAGER, Kernels, everything
from one_block import make_batch, plan_for
from torch import Tensor

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.events import ignore
from ltxforge.lora.inject import adapter_parameters
from ltxforge.memory import compiled
from ltxforge.memory import strategy as strategies
from ltxforge.memory.compiled import SPARE_GRAPHS
from ltxforge.memory.graphs import block_graphs
from ltxforge.memory.strategy import Strategy
from ltxforge.memory.units import groups
from ltxforge.modalities import Streams
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.optim import Optimizer
from ltxforge.plan import BucketPlan, MemoryPlan, Plan, StreamPlan, TrainingPlan
from ltxforge.quant.guard import use_weight_only
from ltxforge.session import adapt
from ltxforge.shapes import ClipShape
from ltxforge.specs import TINY

CPU, VIDEO, JOINT = torch.device("cpu"), "tiny/ltx-video", "tiny/ltx2.3"
Made = tuple[list[Tensor], dict[str, Tensor]]


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Each test begins without graphs, and leaves none, nor its limits."""
    torch._dynamo.reset()
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch._dynamo.reset()


def backward(loss: Tensor) -> None:
    """In a thread of its own, as on a GPU: blocks are computed again there, and find what was compiled."""
    faults: list[BaseException] = []

    def call() -> None:
        try:
            loss.backward()
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]


def steps(
    base: str, plan: Plan, backend: Any, batches: list[Batch], blocks: int = 3, dtype: torch.dtype = torch.float32
) -> Made:
    """A step of each batch, the adapter updated after it; the losses, and the last step's gradients."""
    spec = dataclasses.replace(
        TINY[base], transformer_config={**TINY[base].transformer_config, "num_layers": blocks}
    )  # fmt: skip
    model = (
        LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, dtype)
        if spec.has_audio
        else LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, dtype)
    )
    strategy = Strategy(plan, CPU, backend=backend, least_bytes=1)
    adapt(plan, model, ignore, strategy)
    model.transformer.train()
    parameters = adapter_parameters(model.transformer)
    optimizer, found = Optimizer(plan.optimizer, parameters), []
    for number, batch in enumerate(batches):
        losses = trainer.forward(plan, model, batch, 5, 0)
        by_sample = torch.cat([each.by_sample for _, each in losses.items()])
        backward(by_sample.sum())
        found.append(by_sample.detach())
        if number + 1 < len(batches):
            optimizer.step(0.05)
    strategy.close()
    return found, {name: parameter.grad for name, parameter in parameters.items()}


def compiling(base: str, maker: Any, memory: MemoryPlan = MemoryPlan(), kernels: Kernels = EAGER) -> Plan:  # noqa: B008
    plan = plan_for(base, maker, dropout=0.1)
    training = dataclasses.replace(plan.training, compile=True)
    return dataclasses.replace(plan, training=training, memory=memory, kernels=kernels)


ALL = (0, 1, 2, 3, 4)
MEMORIES = {
    "plain": MemoryPlan(),
    "some again, all streamed": MemoryPlan(checkpointed=(1, 3), stream=StreamPlan(groups(5, 1), overlapped=False)),
    "some streamed, again, activations away": MemoryPlan(
        checkpointed=ALL, stream=StreamPlan(((1,), (3,)), overlapped=False), offload_activations=True
    ),
    "nf4, some streamed": MemoryPlan(
        base_precision="nf4", checkpointed=(0, 1), stream=StreamPlan(((1,), (3,)), overlapped=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "memory"),
    [
        *((VIDEO, name) for name in MEMORIES),
        *(pytest.param(JOINT, name, marks=pytest.mark.sweep) for name in MEMORIES),
    ],
)
def test_all_blocks_of_all_steps_are_one_graph(base, memory, plan_maker):
    """Whether its weights are resident or in a slot, and whether it is computed for the first or the second time."""
    backend = Counting()
    steps(base, compiling(base, plan_maker, MEMORIES[memory]), backend, [make_batch(base)] * 3, blocks=5)
    assert backend.graphs == 1


def test_each_shape_is_a_graph_and_more_than_dynamo_allows_by_itself_are_compiled(plan_maker):
    """The ninth would be eager in silence, or an error, by Dynamo's default; none is made twice."""
    batch = make_batch(VIDEO)
    plan = compiling(VIDEO, plan_maker)
    channels = batch.latents.video.shape[1]
    batches = []
    for frames in range(2, 11):
        shape = dataclasses.replace(batch.shape, frames=frames)
        latents = torch.randn(2, channels, frames, shape.height, shape.width)
        clean = torch.zeros(2, shape.tokens, dtype=torch.bool)
        batches.append(dataclasses.replace(batch, latents=Streams(latents), clean=clean, shape=shape))
    backend = Counting()
    steps(VIDEO, plan, backend, [*batches, *batches], blocks=1)
    assert backend.graphs == len(batches) == 9
    assert torch._dynamo.config.recompile_limit == block_graphs(plan) + SPARE_GRAPHS


def test_blocks_of_a_quantised_base_may_each_be_of_another_kind(plan_maker, monkeypatch):
    """Which layers keep their activations whole is measured, and may differ from block to block."""
    monkeypatch.setattr(compiled, "SPARE_GRAPHS", 0)
    monkeypatch.setattr(strategies, "block_graphs", lambda _plan: 1)
    torch._dynamo.config.recompile_limit = 1
    plan, counted = compiling(VIDEO, plan_maker, MemoryPlan(base_precision="int8-w8a8")), Counting()
    spec = TINY[VIDEO]
    model, strategy = (
        LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, torch.float32),
        Strategy(plan, CPU, backend=counted),
    )
    adapt(plan, model, ignore, strategy)
    use_weight_only(model.transformer, {"transformer_blocks.1.ff.net.2", "transformer_blocks.2.attn1.to_q"})
    trainer.forward(plan, model, make_batch(VIDEO), 5, 0)
    assert counted.graphs == 3
    strategy.close()


def test_an_update_reaches_the_next_compiled_forward(plan_maker):
    """On our kernel in bf16, where B has a copy behind W that a compiled block does not renew by itself."""
    ours = Kernels(tuple(each for each in everything("triton").choices if each.op == "lora_linear"))
    plan = compiling(VIDEO, plan_maker, MemoryPlan(checkpointed=(0,)), ours)
    plan = dataclasses.replace(plan, optimizer=dataclasses.replace(plan.optimizer, schedule="constant"))
    eager = dataclasses.replace(plan, training=dataclasses.replace(plan.training, compile=False))
    batches = [make_batch(VIDEO)] * 2
    found, truth = (steps(VIDEO, each, "eager", batches, 1, torch.bfloat16) for each in (plan, eager))
    assert not torch.equal(truth[0][0], truth[0][1]), "nothing moved, so nothing is shown"
    for one, other in zip(found[0], truth[0], strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(found[1][name], gradient) for name, gradient in truth[1].items())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_ops_that_are_compiled_by_themselves_are_part_of_the_graph(plan_maker):
    backend = Counting()
    steps(VIDEO, compiling(VIDEO, plan_maker, kernels=everything("compile")), backend, [make_batch(VIDEO)], 1)
    assert backend.graphs == 1


@pytest.mark.sweep
@pytest.mark.parametrize("base", [VIDEO, JOINT])
@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_inductor(precision, base, plan_maker):
    """Its code, with blocks computed again and streamed, against eager: other sums, the same step."""
    memory = MemoryPlan(
        base_precision=precision, double_quant=precision == "nf4", checkpointed=(0,),
        stream=StreamPlan(((1,),), overlapped=False), offload_activations=True,
    )  # fmt: skip
    plan = compiling(base, plan_maker, memory)
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.0))  # Inductor draws other numbers
    eager = dataclasses.replace(plan, training=dataclasses.replace(plan.training, compile=False))
    batches = [make_batch(base)] * 2
    found, truth = (steps(base, each, "inductor", batches, 2) for each in (plan, eager))
    for one, other in zip(found[0], truth[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    # All together, after an update by AdamW, which makes the smallest differences of single layers large.
    one, other = (torch.cat([each[1][name].flatten() for name in truth[1]]) for each in (found, truth))
    assert (one - other).norm() <= 1e-2 * other.norm()


def bucket(samples: int, with_sound: int = 0, frames: int = 17) -> BucketPlan:
    return BucketPlan(ClipShape(64, 64, frames), 24.0, 12, samples, 5, with_sound)


@pytest.mark.parametrize(
    ("modalities", "first_frame", "buckets", "graphs"),
    [
        ("video", 0.0, [bucket(4)], 1),
        ("video", 0.5, [bucket(4)], 2),  # with and without a clean first frame
        ("video", 0.5, [bucket(4, frames=1)], 1),  # a picture is never conditioned on itself
        ("video", 0.5, [bucket(5)], 4),  # the last batch of an epoch is smaller
        ("video", 0.5, [bucket(1)], 2),  # and may be the only one
        ("video", 0.0, [bucket(4), bucket(5, frames=9)], 3),
        ("both", 0.0, [bucket(4, 4)], 1),
        ("both", 0.5, [bucket(4, 2)], 4),  # micro-batches with sound, and of mute clips alone
        ("both", 0.5, [bucket(4, 0)], 2),
        ("audio", 0.5, [bucket(4, 4)], 1),
    ],
)
def test_how_many_graphs_a_run_needs(modalities, first_frame, buckets, graphs, tiny_plan):
    plan = dataclasses.replace(
        tiny_plan,
        data=dataclasses.replace(tiny_plan.data, buckets=tuple(buckets)),
        conditioning=dataclasses.replace(tiny_plan.conditioning, first_frame=first_frame),
        training=TrainingPlan(2, 1, 1.0, None, modalities, compile=True),
    )
    assert block_graphs(plan) == graphs


def test_it_is_counted_without_torch():
    """The planner tells it before anything is imported that takes seconds."""
    names = ("graphs", "combinations")
    for name in names:
        text = Path(f"ltxforge/memory/{name}.py").read_text(encoding="utf-8")
        assert "import torch" not in text and "from torch" not in text
