"""What `[memory] fit` chooses for published models on usual cards, as a table that a person can judge.

fit.txt is the table. costs.json holds what was traced of the four models at 768x512 with 121 frames, rank 32 on the
attention, one sample: so that the choice is tested in a second. After a change of costs or of the search run
`LTXFORGE_REWRITE_GOLDEN=1 pytest tests/golden/test_fit_plans.py -m "sweep or not sweep"` and read the diff.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest

from ltxforge.assumed import Elsewhere, machine
from ltxforge.cards import GIB, typical_card
from ltxforge.events import ignore
from ltxforge.facts import ask, places
from ltxforge.fit.search import BASE_PRECISIONS, HAIR, Search, budget_of, rates_of
from ltxforge.fit.wishes import wishes_of
from ltxforge.fit.words import describe, gigabytes
from ltxforge.memory.costs import (
    BlockWork,
    Costs,
    Effort,
    Part,
    Pass,
    Weights,
    phases,
    step_phase,
    step_seconds,
)
from ltxforge.planner import make_plan
from ltxforge.recipe.parse import load, parse
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS

HERE = Path(__file__).parent
TABLE, COSTS = HERE / "fit.txt", HERE / "costs.json"
MODELS = {"2B": "0.9.5", "13B": "0.9.7-dev", "19B": "2.0-dev", "22B": "2.3-dev"}
CARDS = (8, 12, 16, 24, 48, 80)
HOSTS = {"2B": (32, 64), "13B": (64,), "19B": (64,), "22B": (64,)}
RECIPE = """
[model]
base = "{base}"
[run]
steps = 1000
[[dataset]]
path = "data/nothing"
[memory]
fit = "auto"
[[validation.prompt]]
name = "a"
prompt = "b"
"""


def traced(version: str) -> Costs:
    """What a run of this version takes, on any card."""
    parsed = parse(RECIPE.format(base=SPECS[version].hub), "fit.toml")
    world, found = Elsewhere(places(parsed, None), machine("80GB", "64GB"), 1), []
    with StopRequest() as stop:
        facts = ask(world, parsed, ignore, stop)

    def grab(plan, spec, asked):
        found.append(facts.costs_of(plan, spec, dataclasses.replace(asked, base_precisions=BASE_PRECISIONS)))
        return found[-1]

    make_plan(parsed.recipe, dataclasses.replace(facts, costs_of=grab))
    return found[0]


def written(costs: Costs) -> dict:
    data = dataclasses.asdict(costs)
    data["decodes"] = {f"{side}x{frames}": part for (side, frames), part in data["decodes"].items()}
    return json.loads(json.dumps(data))


def read(data: dict) -> Costs:
    def work(each: dict) -> BlockWork:
        passes = {name: Pass(**each[name]) for name in ("kept_first", "kept", "again_first", "again")}
        return BlockWork(**each | passes | {"weights": Weights(**each["weights"]), "effort": Effort(**each["effort"])})

    def part(each: dict | None) -> Part | None:
        return Part(**each) if each else None

    return Costs(**data | {
        "works": {name: work(each) for name, each in data["works"].items()},
        "tensors": tuple(data["tensors"]),
        "captions": {name: tuple(map(part, parts)) for name, parts in data["captions"].items()},
        "clips": part(data["clips"]), "sound": part(data["sound"]),
        "decodes": {tuple(map(int, name.split("x"))): part(each) for name, each in data["decodes"].items()},
    })  # fmt: skip


def search_for(name: str, costs: Costs, card: int, host: int) -> Search:
    version = MODELS[name]
    parsed = parse(RECIPE.format(base=SPECS[version].hub), "fit.toml")
    asked = wishes_of(parsed.recipe, machine(f"{card}GB", f"{host}GB"), SPECS[version], None, "cache")
    return Search(costs, asked, budget_of(card * GIB, host * GIB, shared=False), rates_of(typical_card(card * GIB)))


def row(name: str, costs: Costs, card: int, host: int) -> str:
    search = search_for(name, costs, card, host)
    way, head = search.best(), f"{name:<4} {card:>2} GB, host {host} GB  "
    if way is None:
        lean = search.leanest()
        worst = max(phases(costs, lean.memory, lean.optimizer), key=search.budget.excess)
        return f"{head}refused: {worst.name} needs {gigabytes(search.budget.excess(worst))} more"
    found = {phase.name: phase for phase in phases(costs, way.memory, way.optimizer)}
    step, worst = found["step"], max(found.values(), key=lambda phase: phase.device_bytes)
    whole = search.resident()
    sizes = f"step {gigabytes(step.device_bytes):>7}, {worst.name} {gigabytes(worst.device_bytes):>7}"
    return (
        f"{head}{way.seconds / whole.seconds:.2f}x  {sizes}, host {gigabytes(step.host_bytes):>7}   "
        f"{describe(way, costs.blocks)}"
    )


def table(known: dict[str, Costs]) -> str:
    rows = (row(name, known[name], card, host) for name in MODELS for host in HOSTS[name] for card in CARDS)
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def known() -> dict[str, Costs]:
    if os.environ.get("LTXFORGE_REWRITE_GOLDEN"):
        fresh = {name: written(traced(version)) for name, version in MODELS.items()}
        COSTS.write_text(json.dumps(fresh, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return {name: read(each) for name, each in json.loads(COSTS.read_text(encoding="utf-8")).items()}


def test_the_choices_are_these(known):
    found = table(known)
    if os.environ.get("LTXFORGE_REWRITE_GOLDEN"):
        TABLE.write_text(found, encoding="utf-8")
    assert found == TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
def test_on_one_card_more_memory_never_gives_a_slower_plan(known, name):
    seconds = []
    for card in CARDS[::2]:
        search = search_for(name, known[name], card, 64)
        way = dataclasses.replace(search, rates=rates_of(typical_card(24 * GIB))).best()
        seconds += [way.seconds] if way else []
    assert len(seconds) >= 2
    assert all(later <= earlier * (1 + HAIR) for earlier, later in itertools.pairwise(seconds))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_chosen_fits_and_no_phase_is_forgotten(known, name):
    for card in CARDS[1::3]:
        search = search_for(name, known[name], card, 64)
        if (way := search.best()) is None:
            continue
        assert search.fits(way)
        names = [phase.name for phase in phases(known[name], way.memory, way.optimizer)]
        sound = ["sound"] if name in ("19B", "22B") else []
        assert names == ["captions", "clips", *sound, "load", "step", "sample", "decode", "save"]


SHIPPED = [
    ("ltx-video-lora-lowest", "8GB", "16GB", 3.5, 11),
    pytest.param("ltx-video-lora-8gb", "8GB", "32GB", 6.7, 16, marks=pytest.mark.sweep),
    pytest.param("ltx2-lora-16gb", "16GB", "64GB", 14.5, 32, marks=pytest.mark.sweep),
    pytest.param("ltx2-lora-12gb", "12GB", "64GB", 10.7, 32, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("recipe", "gpu", "ram", "most_of_step", "most_of_host"), SHIPPED)
def test_a_shipped_recipe_fits_the_card_that_it_names(recipe, gpu, ram, most_of_step, most_of_host):
    """GB of a step on the device, and of any phase on the host: what the recipe promises."""
    parsed = load(HERE.parents[1] / "recipes" / f"{recipe}.toml")
    with StopRequest() as stop:
        facts = ask(Elsewhere(places(parsed, None), machine(gpu, ram), 4), parsed, ignore, stop)
    plan = make_plan(parsed.recipe, facts)
    found = {phase.name: phase for phase in plan.estimates.phases}
    assert found["step"].device_bytes <= most_of_step * GIB
    assert max(phase.host_bytes for phase in found.values()) <= most_of_host * GIB
    assert not any("tight" in note for note in plan.notes)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_the_costs_are_still_what_is_traced(known, name):
    assert written(known[name]) == written(traced(MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_what_the_search_takes_for_granted_holds_of_real_costs(known, name):
    """With each block more that is kept a step takes more and is faster, but for the last one, whose activations are
    used at once; with each that is streamed the device less.
    """
    costs, search = known[name], search_for(name, known[name], 24, 64)
    for base, offload in itertools.product(BASE_PRECISIONS, (False, True)):
        for streamed in range(0, costs.blocks + 1, 7):
            plans = [search.memory(base, "", offload, streamed, again) for again in range(costs.blocks + 1)]
            steps = [step_phase(costs, memory, "adamw") for memory in plans]
            seconds = [step_seconds(costs, memory, "adamw", search.rates) for memory in plans]
            for (kept, less), (quick, slow) in zip(itertools.pairwise(steps), itertools.pairwise(seconds), strict=True):
                assert offload or less.device_bytes <= kept.device_bytes or less is steps[-1]
                assert less.host_bytes <= kept.host_bytes
                assert offload or slow >= quick
        for again in range(0, costs.blocks + 1, 9):
            plans = [search.memory(base, "", offload, streamed, again) for streamed in range(costs.blocks + 1)]
            steps = [step_phase(costs, memory, "adamw") for memory in plans]
            for fewer, more in itertools.pairwise(steps):
                assert more.device_bytes <= fewer.device_bytes and more.host_bytes >= fewer.host_bytes
