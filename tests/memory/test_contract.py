"""The contract of all memory strategies: alone and together they give the plain run's loss and gradients, bit for bit.

Which parts may change what is compared with: a quantised base is another base, a compiled block other code, so the rest
is held to that alone, and that within its bound to the plain run. Each case makes two passes through the whole step, as
what is streamed learns from the first one. With simulated streams a copy comes as late as it may (`simulated.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from one_block import make_batch, plan_for
from torch import Tensor

from ltxforge import session, trainer
from ltxforge.events import ignore
from ltxforge.lora.inject import adapter_parameters
from ltxforge.memory.combinations import ILLEGAL, refusal, remarks
from ltxforge.memory.simulated import SimulatedStreams
from ltxforge.memory.strategy import Strategy
from ltxforge.memory.units import groups, spread
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import MemoryPlan, Plan, StreamPlan
from ltxforge.quant.formats import FORMATS
from ltxforge.session import adapt
from ltxforge.specs import TINY

CPU, STEPS, BLOCKS = torch.device("cpu"), (5, 6), 3
VIDEO, JOINT = "tiny/ltx-video", "tiny/ltx2.3"
FAMILIES = (VIDEO, JOINT)
ALL, SINGLES = tuple(range(BLOCKS)), groups(BLOCKS, 1)
DISK = "the test's own folder"


@dataclass(frozen=True)
class Part:
    """One strategy: what it sets in the memory plan, and what else a run of it needs. `axis` has one part at a time."""

    axis: str
    name: str
    memory: dict[str, Any] = field(default_factory=dict, hash=False)
    simulated: bool = False
    backend: str = ""


PARTS = (
    *(Part("base", name, {"base_precision": name}) for name in ("fp8", "int8", "int8-w8a8", "nf4")),
    Part("base", "nf4 double", {"base_precision": "nf4", "double_quant": True}),
    Part("again", "checkpoint all", {"checkpointed": ALL}),
    Part("again", "checkpoint every 2", {"checkpointed": (0, 2)}),
    Part("again", "checkpoint some", {"checkpointed": (1,)}),
    Part("stream", "swap", {"stream": StreamPlan(spread(2, BLOCKS), overlapped=False)}),
    Part("stream", "block_level", {"stream": StreamPlan(SINGLES, overlapped=False)}),
    Part("stream", "block_level with streams", {"stream": StreamPlan(SINGLES)}, simulated=True),
    Part("stream", "block_level by 2", {"stream": StreamPlan(groups(BLOCKS, 2), overlapped=False)}),
    Part("stream", "leaf_level", {"stream": StreamPlan(SINGLES, "leaf", overlapped=False)}),
    Part("stream", "leaf_level with streams", {"stream": StreamPlan(SINGLES, "leaf")}, simulated=True),
    Part("stream", "block_level to disk with streams", {"stream": StreamPlan(SINGLES, disk=DISK)}, simulated=True),
    Part("stream", "leaf_level to disk", {"stream": StreamPlan(SINGLES, "leaf", overlapped=False, disk=DISK)}),
    Part("activations", "activations on the host", {"offload_activations": True}, simulated=True),
    Part("activations", "activations on the host, in turn", {"offload_activations": True}),
    Part("compile", "compile eager", backend="eager"),
    Part("compile", "compile aot_eager", backend="aot_eager"),
)
CHANGES_BITS = ("base", "compile")


@dataclass(frozen=True)
class Result:
    """Losses of the samples and the gradient of every LoRA weight, after each of the steps."""

    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]


def illegal(parts: tuple[Part, ...]) -> str:
    return refusal(memory_of(parts), any(part.backend for part in parts), BLOCKS)


def memory_of(parts: tuple[Part, ...], disk: str = "a folder") -> MemoryPlan:
    memory = MemoryPlan(**{name: value for part in parts for name, value in part.memory.items()})
    if memory.stream is not None and memory.stream.disk:
        memory = dataclasses.replace(memory, stream=dataclasses.replace(memory.stream, disk=disk))
    return memory


def combinations(count: int) -> Iterator[tuple[Part, ...]]:
    """All legal ones of so many parts, each of another axis."""
    for parts in itertools.combinations(PARTS, count):
        if len({part.axis for part in parts}) == count and not illegal(parts):
            yield parts


def named(parts: tuple[Part, ...]) -> str:
    return " + ".join(part.name for part in parts) or "plain"


def make_model(base: str, dtype: torch.dtype) -> VideoModel:
    spec = TINY[base]
    spec = dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": BLOCKS})
    if spec.has_audio:
        return LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, dtype, modalities="both")
    return LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, dtype)


def planned(base: str, parts: tuple[Part, ...], maker: Any, disk: str) -> Plan:
    plan = plan_for(base, maker, dropout=0.2)
    return dataclasses.replace(
        plan,
        memory=memory_of(parts, disk),
        training=dataclasses.replace(plan.training, compile=any(part.backend for part in parts)),
    )


def result_of(base: str, parts: tuple[Part, ...], dtype: torch.dtype, maker: Any, disk: str = "") -> Result:
    """Both steps of a model that is loaded, adapted and called as a run's is."""
    plan, model = planned(base, parts, maker, disk), make_model(base, dtype)
    (backend,) = [part.backend for part in parts if part.backend] or ["eager"]
    transfers = SimulatedStreams() if any(part.simulated for part in parts) else None
    strategy = Strategy(plan, CPU, transfers=transfers, backend=backend, least_bytes=1)
    try:
        adapt(plan, model, ignore, strategy)
        draw = torch.Generator().manual_seed(3)
        parameters = adapter_parameters(model.transformer)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        model.transformer.train()
        found, made = Result([], []), []
        for step in STEPS:
            losses = trainer.forward(plan, model, make_batch(base), step, 0)
            by_sample = torch.cat([each.by_sample for _, each in losses.items()])
            by_sample.sum().backward()
            found.losses.append(by_sample.detach())
            found.gradients.append({name: each.grad for name, each in parameters.items()})
            for parameter in parameters.values():
                parameter.grad = None
            made.append(strategy.offload.buffers.made if strategy.offload else 0)
        require_it_happened(strategy, made)
        return found
    finally:
        strategy.close()


def require_it_happened(strategy: Strategy, made: list[int]) -> None:
    """What was planned to wait elsewhere did, and the second step found the buffers of the first one."""
    if strategy.streamer is not None:
        assert strategy.streamer.moved.units > len(strategy.streamer.units) + 1, "none came again"
    if strategy.offload is not None:
        assert made[0] == made[1] >= BLOCKS - 1, "host buffers by step"


@pytest.fixture(autouse=True)
def _nobody_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny case's time would be the collector's."""
    monkeypatch.setattr(session, "release_memory", lambda _device: None)


@pytest.fixture(scope="module")
def truth(plan_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a case is held to: the plain run, or what of it alone changes bits. Each is computed once."""
    folder = tmp_path_factory.mktemp("truth")

    @cache
    def of(base: str, parts: tuple[Part, ...], dtype: torch.dtype) -> Result:
        return result_of(base, parts, dtype, lambda *given, **changes: plan_in(folder, *given, **changes))

    return of


def require_same(found: Result, truth: Result) -> None:
    for step in range(len(STEPS)):
        assert torch.isfinite(truth.losses[step]).all() and torch.equal(found.losses[step], truth.losses[step])
        assert found.gradients[step].keys() == truth.gradients[step].keys()
        for name, gradient in truth.gradients[step].items():
            assert gradient is not None and torch.equal(found.gradients[step][name], gradient), (step, name)


def require_contract(base: str, parts: tuple[Part, ...], dtype: torch.dtype, truth: Any, maker: Any, disk: str) -> None:
    alone = tuple(part for part in parts if part.axis in CHANGES_BITS)
    assert alone != parts, "this would be held to itself"
    require_same(result_of(base, parts, dtype, maker, disk), truth(base, alone, dtype))


EXACT = [parts for parts in combinations(1) if parts[0].axis not in CHANGES_BITS]
# What only changes bits has bounds of its own: there is nothing in it that could be exact.
PAIRS = [parts for parts in combinations(2) if {part.axis for part in parts} - set(CHANGES_BITS)]
TRIPLES = [parts for parts in combinations(3) if {part.axis for part in parts} - set(CHANGES_BITS)]


@pytest.mark.parametrize("parts", EXACT, ids=named)
@pytest.mark.parametrize("base", FAMILIES)
def test_alone(base, parts, truth, plan_maker, tmp_path):
    require_contract(base, parts, torch.float32, truth, plan_maker, str(tmp_path))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("base", FAMILIES)
def test_a_quantised_base_is_within_its_format_s_bound(base, name, truth):
    """Of the losses and of the direction of all gradients together."""
    plain, format = truth(base, (), torch.float32), FORMATS[name]
    for part in PARTS:
        if part.memory.get("base_precision") != name:
            continue
        found = truth(base, (part,), torch.float32)
        for step in range(len(STEPS)):
            apart = (found.losses[step] - plain.losses[step]).abs() / plain.losses[step]
            assert 0 < apart.max() <= format.loss_error, part
            one, other = (torch.cat([g.flatten() for g in each.gradients[step].values()]) for each in (plain, found))
            assert torch.nn.functional.cosine_similarity(one, other, 0) >= format.gradient_cosine, part


def compiled_cases() -> Iterator[Any]:
    """By themselves and over each format; graphs of LTX-2 take seconds, and so do other formats' of either."""
    quick = {(VIDEO, "", "eager"), (VIDEO, "", "aot_eager"), (JOINT, "", "eager")}
    quick |= {(VIDEO, "nf4 double", "aot_eager"), (VIDEO, "int8", "eager")}
    for base, backend in itertools.product(FAMILIES, (each for each in PARTS if each.backend)):
        for under in (None, *(each for each in PARTS if each.axis == "base")):
            parts = (under, backend) if under else (backend,)
            is_quick = (base, under.name if under else "", backend.backend) in quick
            marks = [] if is_quick else [pytest.mark.sweep]
            yield pytest.param(base, parts, id=f"{base}-{named(parts)}", marks=marks)


@pytest.mark.parametrize(("base", "parts"), list(compiled_cases()))
def test_compiled(base, parts, truth):
    """The same operations as of the same base without, in eager's order but for what the compiler takes apart."""
    plain, found = (truth(base, each, torch.float32) for each in (parts[:-1], parts))
    for step in range(len(STEPS)):
        torch.testing.assert_close(found.losses[step], plain.losses[step], rtol=1e-5, atol=0)
        for name, gradient in plain.gradients[step].items():
            assert (found.gradients[step][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def in_the_default_suite(base: str, parts: tuple[Part, ...]) -> bool:
    """All of LTX-Video's but what is compiled twice over, and of LTX-2, which takes three times as long, a cover."""
    names = {part.name for part in parts}
    if "compile eager" in names:
        return False
    if base == VIDEO:
        return True
    return bool(names & {"nf4 double", "activations on the host"}) and "compile aot_eager" not in names


def cases(found: list[tuple[Part, ...]]) -> list[Any]:
    """Each combination for each family, by those that share what they are held to."""
    every = [(base, parts) for base in FAMILIES for parts in found]
    return [
        pytest.param(
            *each,
            id=f"{each[0]}-{named(each[1])}",
            marks=[] if len(each[1]) == 2 and in_the_default_suite(*each) else [pytest.mark.sweep],
        )
        for each in every
    ]


@pytest.mark.parametrize(("base", "parts"), cases(PAIRS))
def test_pairs(base, parts, truth, plan_maker, tmp_path):
    require_contract(base, parts, torch.float32, truth, plan_maker, str(tmp_path))


@pytest.mark.parametrize(("base", "parts"), cases(TRIPLES))
def test_triples(base, parts, truth, plan_maker, tmp_path):
    require_contract(base, parts, torch.float32, truth, plan_maker, str(tmp_path))


def part(name: str) -> Part:
    return next(each for each in PARTS if each.name == name)


TOGETHER = [
    ("checkpoint some", "block_level with streams", "activations on the host", "nf4 double"),
    ("checkpoint every 2", "leaf_level with streams", "activations on the host", "int8-w8a8"),
    ("checkpoint every 2", "block_level to disk with streams", "activations on the host", "compile aot_eager"),
]


def together() -> Iterator[Any]:
    for base, names in itertools.product(FAMILIES, TOGETHER):
        is_slow = base == JOINT and names[-1].startswith("compile")
        yield pytest.param(base, names, id=f"{base}-{' + '.join(names)}", marks=[pytest.mark.sweep] if is_slow else [])


@pytest.mark.parametrize(("base", "names"), list(together()))
def test_together_in_bf16(base, names, truth, plan_maker, tmp_path):
    require_contract(base, tuple(map(part, names)), torch.bfloat16, truth, plan_maker, str(tmp_path))


STREAMED, LEAVES = StreamPlan(SINGLES), StreamPlan(SINGLES, "leaf")
REFUSED = {
    "compile, which cannot run here": (
        (MemoryPlan(), True, BLOCKS, "no C++ compiler"),
        "training.compile cannot run here: no C++ compiler",
    ),
    "compile with leaf_level": (
        (MemoryPlan(stream=LEAVES), True, BLOCKS),
        'training.compile makes one program of a whole block, and memory.group_offload = "leaf_level" brings each'
        ' layer\'s weights in the middle of it; "block_level" and memory.block_swap bring them before',
    ),
    "double quantisation of another format": (
        (MemoryPlan(base_precision="int8", double_quant=True), False, BLOCKS),
        'memory.double_quant quantises the scales of "nf4", and memory.base_precision is another format',
    ),
    "blocks that are not there": (
        (MemoryPlan(checkpointed=(0, BLOCKS)), False, BLOCKS),
        "memory names blocks that this model does not have",
    ),
    "a block in two groups": (
        (MemoryPlan(stream=StreamPlan(((0, 1), (1, 2)))), False, BLOCKS),
        "a block's weights come with one group, and memory names it in two",
    ),
    "a streamer without blocks": (
        (MemoryPlan(stream=StreamPlan(())), False, BLOCKS),
        "memory streams weights, and names no block whose weights that are",
    ),
}


def test_what_is_illegal_is_told_in_these_words():
    assert {name: refusal(*given) for name, (given, _) in REFUSED.items()} == {
        name: reason for name, (_, reason) in REFUSED.items()
    }
    assert list(REFUSED) == [each.name for each in ILLEGAL], "each line of the table has its words here"
    several = refusal(MemoryPlan(stream=LEAVES, double_quant=True), True, BLOCKS)
    assert several.count("; ") == 2 and "leaf_level" in several and "double_quant" in several


def test_of_these_parts_only_compile_with_leaf_level_is_illegal():
    refused = {
        frozenset(each.name.partition(" ")[0] for each in parts)
        for count in (1, 2, 3)
        for parts in itertools.combinations(PARTS, count)
        if len({each.axis for each in parts}) == count and illegal(parts)
    }
    assert {names for names in refused if len(names) == 2} == {frozenset({"leaf_level", "compile"})}
    assert all({"leaf_level", "compile"} <= names for names in refused)


def test_what_does_less_on_a_device_is_said():
    synchronous = "memory.use_stream: copies beside the computation need a CUDA GPU; here weights are copied in turn"
    nothing = " take as much here as others: device and host are one memory"
    assert remarks(MemoryPlan(stream=STREAMED, offload_activations=True), "cpu") == (
        synchronous, f"swapped or offloaded weights{nothing}", f"offloaded activations{nothing}",
    )  # fmt: skip
    assert remarks(MemoryPlan(stream=dataclasses.replace(STREAMED, disk="/weights")), "mps") == (synchronous,)
    for kind in ("cuda", "rocm"):
        assert remarks(MemoryPlan(stream=STREAMED, offload_activations=True), kind) == ()
