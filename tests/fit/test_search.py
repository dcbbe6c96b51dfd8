"""The choice of [memory] fit: equal to going through every way, never slower with more memory, told truly."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time

import pytest

from ltxforge.cards import GIB
from ltxforge.fit.search import (
    BASE_PRECISIONS,
    HAIR,
    OPTIMIZERS,
    TEXT_ENCODERS,
    WORTH_TELLING,
    Asked,
    Budget,
    Search,
    Way,
    budget_of,
    recomputed_blocks,
)
from ltxforge.memory.costs import (
    BlockWork,
    Costs,
    Effort,
    Part,
    Pass,
    Rates,
    Weights,
    phases,
    step_phase,
    step_seconds,
)  # fmt: skip
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan

MIB = 2**20
OPEN = Asked(
    MemoryPlan(), BASE_PRECISIONS, OPTIMIZERS, TEXT_ENCODERS, streams=True, disks=("", "offload"), recomputes=True,
    offloads=(False, True), tiles=((0, 0), (512, 64)),
)  # fmt: skip
RATES = Rates(bf16=165, fp16=165, fp32=82, memory=1008, bus=24, int8=660, fp8=330)


def made_up(draw: random.Random, blocks: int) -> Costs:
    """Costs of no real model, in the proportions that real ones have."""
    linear = draw.uniform(50, 400) * MIB
    saved = draw.uniform(0.2, 4) * linear
    given = draw.uniform(0.01, 0.2) * saved
    inner = draw.uniform(0.02, 0.5) * saved
    gradients = round(draw.uniform(0.01, 0.1) * linear)
    flops = draw.uniform(0.5, 12) * 1e12

    def block_pass(stays: float, first: bool) -> Pass:
        stays = stays * (0.7 if first else 1)
        return Pass(round(stays), round(stays + inner), round(saved + 2 * inner + gradients))

    works = {}
    for name, share, whole in (("bf16", 1, 0.0), ("int8", 0.5, 3), ("nf4", 0.28, 2.6), ("nf4-double", 0.26, 2.5)):
        weights = Weights(
            round(linear * share), round(linear * share / 6), round(linear / 200), round(linear / 10),
            behind=round(linear / 60) if name == "bf16" else 0,
        )  # fmt: skip
        effort = Effort(flops, flops / 50, flops / 4, saved * 3, saved * 5, whole * linear / 2)
        works[name] = BlockWork(
            block_pass(saved, True), block_pass(saved, False), block_pass(given, True), block_pass(given, False),
            given=round(given), head=round(given * 2), tail=round(given * 3), gradients=gradients, gradients_outside=0,
            weights=weights, effort=effort, sampling=round(saved * 0.8),
        )  # fmt: skip
    encoder = draw.uniform(1, 20) * linear
    captions = {
        name: (Part(round(encoder * share), round(encoder / 30), round(encoder / 20)),)
        for name, share in zip(TEXT_ENCODERS, (1, 0.55, 0.3), strict=True)
    }
    decoder, whole = round(draw.uniform(1, 6) * linear), draw.uniform(0, 20) * linear
    return Costs(
        device="cuda", dtype="bf16", blocks=blocks, works=works, tensors=(round(linear / 50),) * blocks,
        accumulate=draw.choice((1, 3)), captions=captions, clips=Part(decoder, round(linear)),
        decodes={(0, 0): Part(decoder, round(whole)), (512, 64): Part(decoder, round(whole / 8))},
        aside=draw.random() < 0.5, largest_tensor=round(linear / 4),
    )  # fmt: skip


def budgets(draw: random.Random, costs: Costs) -> Budget:
    """From far too little to more than enough, of both memories."""
    whole = phases(costs, MemoryPlan(text_encoder_precision="bf16"), "adamw")
    device = max(phase.device_bytes for phase in whole)
    host = max(phase.host_bytes for phase in whole) + costs.blocks * costs.works["bf16"].weights.linear
    return Budget(round(device * draw.uniform(0.1, 1.1)), round(host * draw.choice((0.3, 0.6, 2.0))))


def every_way(search: Search):
    """Every legal way, one by one, with nothing left out."""
    costs, asked = search.costs, search.asked
    everything = itertools.product(
        asked.base_precisions, asked.optimizers, asked.disks, asked.offloads, range(costs.blocks + 1),
        range(costs.blocks + 1), asked.tiles, asked.text_encoders,
    )  # fmt: skip
    for base, optimizer, disk, offload, streamed, again, (tile, frames), encoder in everything:
        if disk and (offload or not streamed):
            continue
        memory = dataclasses.replace(
            search.memory(base, disk, offload, streamed, again),
            decode_tile=tile, decode_frames=frames, text_encoder_precision=encoder,
        )  # fmt: skip
        yield Way(memory, optimizer, step_seconds(costs, memory, optimizer, search.rates))


def by_brute_force(search: Search) -> Way | None:
    """The objective as it is stated, over all ways that fit."""
    asked = search.asked
    fitting = [way for way in every_way(search) if search.fits(way)]
    if not fitting:
        return None
    bound = min(way.seconds for way in fitting) * (1 + HAIR)

    def rank(way: Way):
        memory = way.memory
        return (
            asked.base_precisions.index(memory.base_precision), asked.optimizers.index(way.optimizer),
            way.moved_parts, way.seconds, asked.text_encoders.index(memory.text_encoder_precision),
            asked.tiles.index((memory.decode_tile, memory.decode_frames)),
        )  # fmt: skip

    return min((way for way in fitting if way.seconds <= bound), key=rank)


@pytest.mark.parametrize("seed", range(24))
def test_the_choice_equals_going_through_every_way(seed):
    draw = random.Random(seed)
    costs = made_up(draw, draw.choice((2, 3, 4)))
    search = Search(costs, OPEN, budgets(draw, costs), RATES)
    assert search.best() == by_brute_force(search)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100, 400))
def test_the_choice_equals_going_through_every_way_at_length(seed):
    test_the_choice_equals_going_through_every_way(seed)


def test_some_budgets_hold_everything_some_nothing_and_most_something():
    """The cases above are no trivial ones."""
    kinds = set()
    for seed in range(60):
        draw = random.Random(seed)
        costs = made_up(draw, draw.choice((2, 3, 4, 6)))
        way = Search(costs, OPEN, budgets(draw, costs), RATES).best()
        kinds.add("nothing" if way is None else way.memory.base_precision)
        if way is not None:
            kinds |= {way.optimizer, f"streamed: {way.streamed > 0}", f"offload: {way.memory.offload_activations}",
                      f"tile: {way.memory.decode_tile}", f"disk: {bool(way.streamed and way.memory.stream.disk)}",
                      f"encoder: {way.memory.text_encoder_precision}"}  # fmt: skip
    assert kinds >= {
        "nothing", "bf16", "int8", "nf4", "adamw", "adamw8bit", "streamed: True", "streamed: False", "tile: 0",
        "tile: 512", "encoder: bf16", "encoder: nf4",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_more_memory_never_gives_a_slower_plan(seed):
    draw = random.Random(seed)
    costs = made_up(draw, 12)
    seconds = []
    for step in range(1, 13):
        way = Search(costs, OPEN, Budget(step * 800 * MIB, 10**12), RATES).best()
        if way is not None:
            seconds.append(way.seconds)
    assert len(seconds) > 3
    assert all(later <= earlier * (1 + HAIR) for earlier, later in itertools.pairwise(seconds))
    hosts = [Search(costs, OPEN, Budget(2_000 * MIB, n * 900 * MIB), RATES).best() for n in range(2, 14)]
    seconds = [way.seconds for way in hosts if way]
    assert all(later <= earlier * (1 + HAIR) for earlier, later in itertools.pairwise(seconds))


@pytest.mark.parametrize("seed", range(12))
def test_what_the_search_takes_for_granted_holds(seed):
    """More kept blocks need more of both memories and less time; more streamed ones less of the device."""
    draw = random.Random(seed)
    costs = made_up(draw, 9)
    search = Search(costs, OPEN, Budget(10**15, 10**15), RATES)
    for base, offload in itertools.product(BASE_PRECISIONS, (False, True)):
        steps = {
            (streamed, again): (
                step_phase(costs, memory, "adamw"), step_seconds(costs, memory, "adamw", RATES),
            )
            for streamed in range(10)
            for again in range(10)
            for memory in [search.memory(base, "", offload, streamed, again)]
        }  # fmt: skip
        for (streamed, again), (step, seconds) in steps.items():
            if again:
                less, quicker = steps[streamed, again - 1]
                assert step.device_bytes <= less.device_bytes and step.host_bytes <= less.host_bytes
                assert seconds >= quicker or offload
            if streamed:
                before, quicker = steps[streamed - 1, again]
                assert step.device_bytes <= before.device_bytes and step.host_bytes >= before.host_bytes
                assert seconds >= quicker


@pytest.mark.parametrize("seed", range(8))
def test_the_next_faster_way_is_faster_no_worse_and_fits_with_what_it_needs(seed):
    draw = random.Random(seed)
    costs = made_up(draw, 6)
    search = Search(costs, OPEN, budgets(draw, costs), RATES)
    way = search.best()
    if way is None:
        return
    faster = search.next_faster(way)
    least = search.resident().seconds
    if faster is None:
        assert way.seconds <= least * (1 + HAIR)
        return
    other, device, host = faster
    bound = max(way.seconds / (1 + WORTH_TELLING), least)
    assert other.seconds <= bound
    assert all(now <= before for now, before in zip(quality(other), quality(way), strict=True))
    more = Budget(search.budget.device + device, search.budget.host + host)
    assert Search(costs, OPEN, more, RATES).fits(other)
    assert device or host, "else it would have been chosen"
    less = Budget(more.device - (device > 0) * MIB, more.host - (device == 0) * MIB)
    if not host:
        again = Search(costs, OPEN, less, RATES).best()
        worse = any(now > before for now, before in zip(quality(again), quality(way), strict=True))
        assert worse or again.seconds > bound / (1 + HAIR)


@pytest.mark.parametrize("seed", range(8))
def test_no_disk_is_offered_that_nobody_asked_for(seed):
    draw = random.Random(seed)
    costs = made_up(draw, 6)
    search = Search(costs, dataclasses.replace(OPEN, disks=("", "/disk")), budgets(draw, costs), RATES)
    way = search.best()
    if way is None or way.memory.stream:
        return
    offered = [other.memory.stream for _, other in search._ways_within(way, math.inf)]
    assert any(offered) and not any(stream.disk for stream in offered if stream)


def quality(way: Way):
    """Quality, the best first."""
    return OPEN.base_precisions.index(way.memory.base_precision), OPEN.optimizers.index(way.optimizer)


def test_what_is_said_stays_said():
    draw = random.Random(3)
    costs = made_up(draw, 4)
    said = MemoryPlan((0, 2), "int8", False, stream=StreamPlan(((1,), (3,)), "block", False), decode_tile=512,
                      decode_frames=64, text_encoder_precision="int8")  # fmt: skip
    asked = Asked(said, ("int8",), ("paged_lion8bit",), ("int8",), tiles=((512, 64),))
    way = Search(costs, asked, Budget(10**12, 10**12), RATES).best()
    assert (way.memory, way.optimizer) == (said, "paged_lion8bit")
    assert Search(costs, asked, Budget(10**8, 10**12), RATES).best() is None


@pytest.mark.parametrize("blocks", [1, 4, 28, 48])
def test_kept_blocks_are_spread_and_grow_without_gaps(blocks):
    for count in range(blocks + 1):
        again = recomputed_blocks(count, blocks)
        kept = sorted(set(range(blocks)) - set(again))
        assert len(again) == count
        if kept:
            assert kept[-1] == blocks - 1
            gaps = [later - earlier for earlier, later in itertools.pairwise([-1, *kept])]
            assert max(gaps) - min(gaps) <= 1


def test_margins_are_taken_off():
    budget = budget_of(12 * GIB, 64 * GIB, shared=False)
    assert 11.2 * GIB < budget.device < 11.4 * GIB and budget.host == 62 * GIB
    phase = PhasePlan("step", 10 * GIB, 0, {"weights": 6 * GIB, "one block's work": 4 * GIB})
    assert budget.on_device(phase) == round(10 * GIB + 0.02 * 6 * GIB + 0.15 * 4 * GIB) < 11 * GIB
    assert budget.hard.on_device(phase) == 10 * GIB
    shared = budget_of(0, 64 * GIB, shared=True)
    assert shared.device is None and shared.host == 62 * GIB
    assert budget_of(8 * GIB, 64 * GIB, shared=True).host == 8 * GIB


def test_a_search_is_quick(record_property):
    costs = made_up(random.Random(1), 48)
    began = time.perf_counter()
    search = Search(costs, OPEN, Budget(6 * GIB, 64 * GIB), RATES)
    way = search.best()
    chosen = time.perf_counter() - began
    search.next_faster(way)
    record_property("count", f"fit: {chosen:.2f} s for a choice, {time.perf_counter() - began:.2f} s with the next one")
    assert chosen < 5
