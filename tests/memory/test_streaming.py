"""Streamed models against the same models with everything resident: not one bit of a loss or gradient may differ.

Streams are simulated: a copy comes as late as it may, and a slot that is given up is NaN at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ltxforge_kernels.choice import EAGER
from one_block import make_batch, plan_for
from torch import Tensor, nn

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.errors import PlanError
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.memory.recompute import recomputed
from ltxforge.memory.ring import Ring, Slot
from ltxforge.memory.simulated import SimulatedStreams
from ltxforge.memory.streaming import Handle, Streamer
from ltxforge.memory.transfers import Plain, Transfers
from ltxforge.memory.units import groups, host_bytes, slot_bytes, spread
from ltxforge.modalities import Streams
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2 import unused_modules
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.optim import Optimizer
from ltxforge.plan import Plan, StreamPlan
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.specs import TINY

CPU = torch.device("cpu")
VIDEO, JOINT = "tiny/ltx-video", "tiny/ltx2.3"
BASES = [VIDEO, JOINT]
BLOCKS = 4
SWAP = StreamPlan(spread(3, BLOCKS))
LEAF = StreamPlan(groups(BLOCKS, 1), level="leaf")
Gradients = dict[str, Tensor]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def quantise(transformer: nn.Module, format: str) -> None:
    """Each large linear layer of the blocks as `QuantisedLinear`."""
    for block in transformer.transformer_blocks:
        for name, linear in linears(block).items():
            if min(linear.weight.shape) >= 64:
                made = QuantisedLinear.quantise(linear.weight.detach(), linear.bias, format, format == "nf4")
                block.set_submodule(name, made)


def park(transformer: nn.Module, streamer: Streamer, numbers: frozenset[int]) -> None:
    """What loading does: the blocks' large weights go to the streamer and leave nothing behind."""
    for number in sorted(numbers):
        for name, module in transformer.transformer_blocks[number].named_modules():
            if isinstance(module, QuantisedLinear):
                for part, tensor in module.park().items():
                    streamer.park(number, f"{name}.{part}", tensor)
            elif isinstance(module, nn.Linear):
                streamer.park(number, f"{name}.weight", module.weight.detach().clone())
                module._parameters["weight"] = None


@dataclass
class Streamed:
    """A tiny model with a LoRA on each linear of its blocks; every block is computed again in the backward pass."""

    base: str
    plan: Plan
    stream: StreamPlan | None = None
    transfers: Transfers | None = None
    dtype: torch.dtype = torch.float32
    format: str = "bf16"
    kind: Callable[..., Streamer] = Streamer
    streamer: Streamer | None = None
    model: VideoModel = field(init=False)

    def __post_init__(self) -> None:
        spec, modalities = TINY[self.base], self.plan.training.modalities
        if spec.has_audio:
            made = LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, self.dtype, modalities=modalities)
        else:
            made = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, self.dtype)
        self.model = made
        made.load_transformer()
        if self.format != "bf16":
            quantise(made.transformer, self.format)
        if self.stream is not None:
            self.streamer = self.kind(self.stream, CPU, self.transfers or SimulatedStreams())
            park(made.transformer, self.streamer, self.stream.blocks)
        matched = match(("all",), spec, modalities, modalities)
        matched = dataclasses.replace(matched, layers={n: s for n, s in matched.layers.items() if "_blocks" in n})
        inject(made.transformer, self.plan.lora, matched, self.plan.seed, EAGER, CPU)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapter_parameters(made.transformer).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        if self.streamer is not None:
            unused = unused_modules(made.transformer, modalities) if spec.has_audio else []
            self.streamer.attach(made.transformer, unused)
        made.transformer.train()
        made.run_block = self._run_block

    def _run_block(self, number: int, forward: Callable, block: nn.Module, hidden: Any, *shared: Any) -> Any:
        call = partial(forward, block, hidden, *shared)
        if self.streamer is None:
            return recomputed(call, CPU)
        return recomputed(partial(self.streamer.run, number, call), CPU, self.streamer.pack, self.streamer.unpack)

    def forward(self, step: int = 5, micro: int = 0) -> Tensor:
        losses = trainer.forward(self.plan, self.model, batch_of(self.base, self.plan), step, micro)
        return torch.cat([each.by_sample for _, each in losses.items()])

    def step(self, step: int = 5) -> tuple[Tensor, Gradients]:
        """Losses and gradients of two micro-batches."""
        parameters = adapter_parameters(self.model.transformer)
        for parameter in parameters.values():
            parameter.grad = None
        losses = []
        for micro in (0, 1):
            torch.manual_seed(100 * step + micro)
            loss = self.forward(step, micro)
            loss.sum().backward()
            losses.append(loss.detach())
        if self.streamer is not None and self.kind is Streamer:
            assert self.streamer.moved.left == 0, "somebody has kept a slot"
        return torch.cat(losses), {name: parameter.grad for name, parameter in parameters.items()}


def batch_of(base: str, plan: Plan) -> Batch:
    batch = make_batch(base)
    if plan.training.modalities == "video" and TINY[base].has_audio:
        return dataclasses.replace(batch, latents=Streams(batch.latents.video), present=None)
    return batch


def assert_same(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    assert found[0].isfinite().all() and torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert torch.equal(found[1][name], gradient), name


@pytest.fixture(scope="module")
def resident(plan_in, tmp_path_factory) -> Callable[..., tuple[Tensor, Gradients]]:
    """The step with everything resident; each made once."""
    made: dict[Any, Any] = {}

    def step(base: str, dropout: float = 0.0, **settings: Any) -> tuple[Tensor, Gradients]:
        key = base, dropout, *settings.items()
        if key not in made:
            plan = plan_for(base, partial(plan_in, tmp_path_factory.mktemp("plan")), dropout)
            made[key] = Streamed(base, plan, **settings).step()
        return made[key]

    return step


PLANS = {
    **{f"swap {count}": StreamPlan(spread(count, BLOCKS)) for count in range(1, BLOCKS + 1)},
    **{f"groups of {size}": StreamPlan(groups(BLOCKS, size)) for size in (1, 2, 3, 4)},
    "leaf": LEAF,
}


@pytest.mark.parametrize(
    ("base", "stream"),
    [
        *(pytest.param(VIDEO, stream, id=f"video {name}") for name, stream in PLANS.items()),
        *(pytest.param(JOINT, PLANS[name], id=f"joint {name}") for name in ("swap 2", "groups of 3", "leaf")),
    ],
)
def test_no_bit_differs_however_blocks_are_grouped(base, stream, plan_maker, resident):
    streamed = Streamed(base, plan_for(base, plan_maker), stream)
    assert_same(streamed.step(), resident(base))
    assert_same(streamed.step(), resident(base))  # the second step brings ahead what the first one learned


@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
@pytest.mark.parametrize("base", BASES)
def test_dropout_draws_the_same(base, stream, plan_maker, resident):
    streamed = Streamed(base, plan_for(base, plan_maker, 0.3), stream)
    assert_same(streamed.step(), resident(base, 0.3))


@pytest.mark.parametrize("format", ["bf16", "nf4", "int8", "int8-w8a8", "fp8"])
@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_the_bytes_on_the_wire_are_those_that_were_parked(stream, format, plan_maker, resident):
    settings = {"dtype": torch.bfloat16, "format": format}
    streamed = Streamed(VIDEO, plan_for(VIDEO, plan_maker), stream, **settings)
    parked = sum(piece.described.nbytes for unit in streamed.streamer.units for piece in unit.pieces)
    whole = sum(
        linear.weight.numel()
        for number in stream.blocks
        for linear in linears(tiny.tiny_transformer(TINY[VIDEO]).transformer_blocks[number]).values()
    )
    assert parked / whole == pytest.approx({"bf16": 2, "nf4": 0.516}.get(format, 1), rel=0.05)
    for _ in range(2):
        assert_same(streamed.step(), resident(VIDEO, **settings))


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_no_bit_differs_from_a_disk(stream, overlapped, plan_maker, tmp_path, resident):
    stream = dataclasses.replace(stream, disk=str(tmp_path), overlapped=overlapped)
    streamed = Streamed(JOINT, plan_for(JOINT, plan_maker), stream, None if overlapped else Plain())
    for _ in range(2):
        assert_same(streamed.step(), resident(JOINT))
    lengths = [unit.length for unit in streamed.streamer.units]
    assert streamed.streamer.host_bytes <= host_bytes(stream, lengths) <= 2 * (max(lengths) + 4096)
    assert not list(tmp_path.iterdir()), "the file has no name"
    streamed.streamer.close()


@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_without_a_stream(stream, plan_maker, resident):
    stream = dataclasses.replace(stream, overlapped=False)
    streamed = Streamed(VIDEO, plan_for(VIDEO, plan_maker), stream, Plain())
    for _ in range(2):
        assert_same(streamed.step(), resident(VIDEO))
    assert streamed.streamer.slot_bytes == max(unit.length for unit in streamed.streamer.units)


def test_training_and_sampling_take_turns(plan_maker, resident):
    """Updates, and samples by diffusers' own forward in between, leave the bits of a resident run."""
    plan = plan_for(VIDEO, plan_maker)
    runs = []
    for stream in (None, SWAP, LEAF):
        run, found = Streamed(VIDEO, plan, stream), []
        updates = Optimizer(plan.optimizer, adapter_parameters(run.model.transformer))
        for step in (1, 2, 3):
            found.append(run.step(step)[0])
            updates.step(0.05)
            found.append(stock_forward(run))
        runs.append(found)
    for streamed in runs[1:]:
        assert all(map(torch.equal, runs[0], streamed))
    assert not torch.equal(runs[0][0], runs[0][2]), "nothing moved, so nothing is shown"


@torch.no_grad()
def stock_forward(run: Streamed) -> Tensor:
    """diffusers' own forward, as a pipeline calls it."""
    spec, draw = TINY[run.base], torch.Generator().manual_seed(7)
    config = spec.transformer_config
    if not spec.has_audio:
        return run.model.transformer(
            torch.randn(1, 8, config["in_channels"], generator=draw),
            torch.randn(1, 5, config["caption_channels"], generator=draw),
            torch.tensor([400.0]), torch.ones(1, 5), num_frames=2, height=2, width=2, return_dict=False,
        )[0]  # fmt: skip
    width = config["caption_channels"] if config["use_prompt_embeddings"] else None
    video, audio = run.model.transformer(
        torch.randn(1, 8, config["in_channels"], generator=draw),
        torch.randn(1, 5, config["audio_in_channels"], generator=draw),
        torch.randn(1, 6, width or config["cross_attention_dim"], generator=draw),
        torch.randn(1, 6, width or config["audio_cross_attention_dim"], generator=draw),
        torch.tensor([400.0]), sigma=torch.tensor([0.4]), num_frames=2, height=2, width=2, audio_num_frames=5,
        return_dict=False,
    )  # fmt: skip
    return torch.cat([video.flatten(), audio.flatten()])


@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_one_modality_copies_its_own_weights_and_samples_both(stream, plan_maker):
    plan = plan_for(JOINT, plan_maker)
    training = dataclasses.replace(plan.training, modalities="video")
    plan = dataclasses.replace(
        plan, training=training, audio=None, lora=dataclasses.replace(plan.lora, modalities="video")
    )
    still, run = Streamed(JOINT, plan), Streamed(JOINT, plan, stream)
    streamer = run.streamer
    assert_same(run.step(), still.step())
    used = streamer.slot_bytes
    if stream is LEAF:
        idle = {id(each) for module in unused_modules(run.model.transformer, "video") for each in module.modules()}
        asked = {id(streamer.units[unit].pieces[0].place.module) for unit in streamer._ring._follows.values()}
        assert asked and not asked & idle
    still.model._leave_unused(CPU)
    assert torch.equal(stock_forward(run), stock_forward(still))
    if stream is SWAP:
        assert streamer.slot_bytes == 2 * max(unit.length for unit in streamer.units)
        assert used == 2 * max(unit.used for unit in streamer.units) < 0.8 * streamer.slot_bytes
    assert_same(run.step(), still.step())


def counted(run: Streamed, call: Callable[[], Any]) -> tuple[int, ...]:
    """Units copied, bytes copied and units waited for."""
    moved = run.streamer.moved
    before = dataclasses.astuple(moved)
    call()
    return tuple(now - then for now, then in zip(dataclasses.astuple(moved), before, strict=True))[:3]


@pytest.mark.parametrize("count", [3, 4])
def test_each_unit_is_copied_once_in_a_pass_and_ahead_of_its_use(count, plan_maker):
    """What both ends of a pass leave in the slots is not copied again: of n units, n − 2 are, in each pass."""
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), StreamPlan(spread(count, BLOCKS)))
    run.step()
    units = [unit.length for unit in run.streamer.units]
    assert run.streamer.bytes_per_pass == sum(units)
    kept: list[Tensor] = []
    assert counted(run, lambda: kept.append(run.forward())) == (count - 2, sum(units[:-2]), 0)
    assert counted(run, lambda: kept.pop().sum().backward()) == (count - 2, sum(units[:-2]), 0)
    assert run.streamer.slot_bytes == slot_bytes(run.stream, units) == 2 * max(units)


def test_sampling_goes_round(plan_maker):
    """The last unit of a denoising step is followed by the first one of the next."""
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), StreamPlan(groups(BLOCKS, 1)))
    for _ in range(2):
        stock_forward(run)
    assert counted(run, lambda: stock_forward(run))[::2] == (BLOCKS, 0)


def test_layers_that_travel_alone_are_brought_ahead_in_both_directions(plan_maker):
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), LEAF)
    run.step()
    kept: list[Tensor] = []
    count = len(run.streamer.units)
    copied, _, waited = counted(run, lambda: kept.append(run.forward()))
    assert count - 2 <= copied <= count and waited <= 1
    copied, _, waited = counted(run, lambda: kept.pop().sum().backward())
    assert waited <= 0.1 * count and copied <= 2 * count


def test_nothing_is_ever_copied_back(plan_maker):
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP)
    waiting = [buffer.bytes for buffer in run.streamer._store._buffers]
    before = [each.clone() for each in waiting]
    run.step()
    assert all(map(torch.equal, before, waiting))


@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_the_model_without_its_weights_moves_and_saves_as_ever(stream, plan_maker, resident):
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), stream)
    run.step()
    streamed = {f"transformer_blocks.{n}.{name}" for n in stream.blocks for name in linears_of_block(run, n)}
    assert streamed and not streamed & run.model.transformer.state_dict().keys()
    assert run.model.transformer.dtype == torch.float32 and run.model.transformer.device == CPU
    nn.Module.to(run.model.transformer, torch.float64).to(torch.float32)
    run.streamer.clear()
    assert run.streamer.slot_bytes == 0
    assert_same(run.step(), resident(VIDEO))


def linears_of_block(run: Streamed, number: int) -> set[str]:
    names = linears(tiny.tiny_transformer(TINY[run.base]).transformer_blocks[number])
    return {f"{name}.base_layer.weight" for name in names}


def test_blocks_in_any_order(plan_maker):
    """Forward over the blocks in an order of one's own, each twice, then backward."""
    found = []
    for stream in (None, SWAP, StreamPlan(groups(BLOCKS, 2))):
        run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), stream)
        blocks, draw = run.model.transformer.transformer_blocks, torch.Generator().manual_seed(5)
        hidden = torch.randn(1, 6, 128, generator=draw).requires_grad_()
        out = hidden
        for number in (2, 0, 3, 3, 1, 0, 2, 1):
            ff = partial(run._run_block, number, lambda block, x: block.ff(x), blocks[number])
            out = out + ff(out)
        out.square().sum().backward()
        found.append((out.detach(), hidden.grad))
    for streamed in found[1:]:
        assert torch.equal(streamed[0], found[0][0]) and torch.equal(streamed[1], found[0][1])


def test_a_failing_block_leaves_nothing_behind(plan_maker, resident):
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP)

    def fail() -> None:
        raise KeyError("out of memory, say")

    with pytest.raises(KeyError):
        run.streamer.run(1, fail)
    block = run.model.transformer.transformer_blocks[1]
    with pytest.raises(TypeError):
        block(None)
    assert block.ff.net[0].proj.base_layer.weight is None
    assert_same(run.step(), resident(VIDEO))


class NeverWaits(SimulatedStreams):
    """A fault: what is computed does not wait for its weights."""

    def wait(self, copied: Any) -> None:
        pass


class KeepsTensors(Streamer):
    """Saved tensors that lie in slots are kept as they are, as by someone whom `pack` does not reach."""

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor.detach()


class CarelessSlot(Slot):
    """A fault: it is overwritten, whoever has a tensor in it."""

    is_held = False


class GivesUpTheWrongSlot(Ring):
    """A fault: what is brought ahead takes the place of what is being computed with."""

    def _begin(self, unit: int, length: int) -> Slot:
        self._slots.sort(key=lambda slot: slot.unit == self._trail[2], reverse=True)
        return super()._begin(unit, length)


class StreamsWrongly(Streamer):
    def attach(self, transformer: nn.Module, unused: Any = ()) -> None:
        super().attach(transformer, unused)
        self._ring.__class__ = GivesUpTheWrongSlot


@pytest.mark.parametrize(
    "settings",
    [
        {"stream": SWAP, "transfers": NeverWaits},
        {"stream": LEAF, "kind": KeepsTensors},
        {"stream": SWAP, "kind": StreamsWrongly},
    ],
    ids=["does not wait", "keeps slots", "gives up the wrong slot"],
)
def test_faults_are_seen(settings, plan_maker, resident, monkeypatch):
    """The simulation can tell: each of these steps is wrong, and on a GPU might have been right by luck."""
    monkeypatch.setattr("ltxforge.memory.ring.Slot", CarelessSlot)
    given = {**settings, "transfers": settings.get("transfers", SimulatedStreams)()}
    given["kind"] = type("Faulty", (given.get("kind", Streamer),), {})
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), **given)
    results = [run.step(), run.step()]
    expected = resident(VIDEO)[1]
    assert any(not torch.equal(gradient, expected[name]) for _, g in results for name, gradient in g.items())


@pytest.mark.parametrize("stream", [SWAP, LEAF], ids=["block", "leaf"])
def test_a_slot_is_left_to_whoever_still_has_a_tensor_in_it(stream, plan_maker, resident):
    """It costs memory then, and no bit."""
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), stream, kind=KeepsTensors)
    for _ in range(2):
        assert_same(run.step(), resident(VIDEO))
    assert (run.streamer.moved.left > 0) == (stream is LEAF), "a block's slot lasts as long as its backward pass"


def test_a_weight_that_somebody_keeps_stays_what_it_is(plan_maker):
    """As a Function may that does not save it through autograd."""
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP)
    linear = run.model.transformer.transformer_blocks[1].ff.net[0].proj.base_layer
    kept: list[Tensor] = []
    run.streamer.run(1, lambda: kept.append(linear.weight))
    before = kept[0].clone()
    for number in (2, 3, 1, 2):
        run.streamer.run(number, lambda: None)
    assert torch.equal(kept[0], before) and run.streamer.moved.left == 1


def test_a_streamed_block_that_is_not_computed_again_is_right_all_the_same(plan_maker, resident):
    """Without handles each block's slot is left to autograd, until its backward pass."""
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP, kind=KeepsTensors)
    run.model.run_block = lambda number, forward, *given: run.streamer.run(number, partial(forward, *given))
    assert_same(run.step(), resident(VIDEO))
    assert run.streamer.moved.left > 0


def test_autograd_sees_a_slot_s_new_version(plan_maker, monkeypatch):
    """What was kept past `pack` and was overwritten raises, because slots are never written through `.data`."""
    monkeypatch.setattr("ltxforge.memory.ring.Slot", CarelessSlot)
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP)
    run.model.run_block = lambda number, forward, *given: run.streamer.run(number, partial(forward, *given))
    loss = run.forward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_handle_brings_back_any_view_of_a_slot(plan_maker):
    run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), SWAP, dtype=torch.bfloat16)
    linear = run.model.transformer.transformer_blocks[1].ff.net[0].proj.base_layer
    kept = []

    def look() -> None:
        views = (linear.weight, linear.weight.t(), linear.weight[3:7, 5::2], linear.weight.flatten()[10:])
        kept.extend((run.streamer.pack(view), view.clone()) for view in views)

    run.streamer.run(1, look)
    for number in (2, 3, 2):
        run.streamer.run(number, lambda: None)
    for packed, truth in kept:
        assert isinstance(packed, Handle)
        found = run.streamer.unpack(packed)
        assert torch.equal(found, truth) and found.dtype == truth.dtype
    outside = torch.ones(3, requires_grad=True)
    assert not run.streamer.pack(outside).requires_grad


def test_a_folder_that_is_not_there_is_said_before_anything_loads(tmp_path):
    with pytest.raises(PlanError, match="weights cannot be put here") as caught:
        Streamer(dataclasses.replace(SWAP, disk=str(tmp_path / "none" / "streamed")), CPU)
    assert "memory.offload_to_disk" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_streamer_that_is_closed_lets_go(plan_maker, tmp_path: Path):
    for disk in ("", str(tmp_path)):
        run = Streamed(VIDEO, plan_for(VIDEO, plan_maker), dataclasses.replace(SWAP, disk=disk))
        run.step()
        run.streamer.close()
        assert run.streamer.host_bytes == 0 and run.streamer.slot_bytes == 0
        assert not any(block._forward_pre_hooks for block in run.model.transformer.transformer_blocks)
