"""How the planner decides a run's memory: wishes kept, words for what cannot be had, refusals whose remedies hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ltxforge.assumed import machine
from ltxforge.cards import GIB
from ltxforge.dataset.scan import Clip
from ltxforge.errors import PlanError
from ltxforge.fit.remedies import axes_of
from ltxforge.hardware import Hardware
from ltxforge.memory.costs import BlockWork, Costs, Effort, Part, Pass, Weights
from ltxforge.plan import ComponentPlan, ModelPlan, StreamPlan
from ltxforge.planner import Facts, make_plan
from ltxforge.recipe.parse import parse
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS, TINY

MIB = 2**20
CPU = Hardware(
    "cpu", "a CPU", (0, 0), 0, False, 2, {"torch": "2.13.0"}, (), frozenset(), host_bytes=32 * GIB,
)  # fmt: skip
GPU = Hardware(
    "cuda", "NVIDIA GeForce RTX 4070", (8, 9), 12 * GIB, True, 8, {"torch": "2.13.0"}, (), frozenset({"bitsandbytes"}),
    host_bytes=64 * GIB,
)  # fmt: skip
RECIPE = """
[model]
base = "Lightricks/LTX-Video-0.9.5"
[run]
steps = 1000
[[dataset]]
path = "clips"
frames = 121
[[validation.prompt]]
name = "a"
prompt = "b"
"""


def costs_of(plan, spec, asked) -> Costs:
    """Costs that follow tokens, batch, rank and precision as real ones do: of 2B, about."""
    bucket = max(plan.data.buckets, key=lambda bucket: bucket.tokens)
    size = plan.training.batch_size * bucket.tokens / 6144
    linear, rank = 134 * MIB, plan.lora.rank
    gradients = rank * MIB // 30

    def each(stays: float) -> Pass:
        return Pass(round(stays * size), round((stays + 250 * MIB) * size), round(700 * MIB * size) + gradients)

    works = {}
    for name, share, whole in (("bf16", 1, 0.0), ("int8", 0.5, 3.0), ("nf4", 0.28, 2.6), ("nf4-double", 0.26, 2.5)):
        works[name] = BlockWork(
            each(435 * MIB), each(435 * MIB), each(25 * MIB), each(25 * MIB), given=round(36 * MIB * size),
            head=round(180 * MIB * size), tail=round(50 * MIB * size), gradients=gradients, gradients_outside=0,
            weights=Weights(round(linear * share), round(linear * share / 4), MIB, 80 * MIB),
            effort=Effort(
                1.5e12 * size, 1e10 * rank * size, 3e11 * size**2, 1e9 * size, 2e9 * size, whole * linear / 2,
            ),
            sampling=round(500 * MIB),
        )  # fmt: skip
    item = 4 if plan.device.kind == "cpu" else 2
    encoder = {name: (Part(round(4.7 * GIB * item * share), 100 * MIB, 500 * MIB),)
               for name, share in (("bf16", 1), ("int8", 0.55), ("nf4", 0.3))}  # fmt: skip
    pixels = plan.validation.prompts[0].shape if plan.validation.prompts else ClipShape(32, 32, 1)
    whole = round(4 * GIB * pixels.width * pixels.height * pixels.frames / (768 * 512 * 121))
    tile = plan.memory.decode_tile or 512, plan.memory.decode_frames or 64
    decodes = {(0, 0): Part(GIB, whole), tile: Part(GIB, whole // 6)}
    return Costs(
        plan.device.kind, plan.device.precision, spec.blocks, works, (rank * 2048,) * 448,
        plan.training.accumulate, encoder, Part(GIB, GIB), None, decodes, largest_tensor=32 * MIB,
    )  # fmt: skip


def plan_for(text: str = RECIPE, hardware=GPU, overrides=(), spec=SPECS["0.9.5"], costs=costs_of, **changes):
    parsed = parse(text, "mine.toml", list(overrides))
    part = ComponentPlan(source="x", kind="builtin", digest="d", location="x")
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    model = changes.pop("model", None) or ModelPlan("x", spec.version, spec.rope, dict.fromkeys(names, part))
    clips = [
        (
            dataset,
            [Clip(Path("/a.mp4"), "a.mp4", "digest", "a", starts=(0.0,),
                  shape=ClipShape(*map(int, dataset.resolution.split("x")), dataset.frames))],
        )
        for dataset in parsed.recipe.dataset
    ]  # fmt: skip
    facts = Facts(
        "mine", "/runs/mine", "/cache", hardware, model, spec, clips, said=parsed.said, overridden=parsed.overridden,
        costs_of=costs, **changes,
    )  # fmt: skip
    return make_plan(parsed.recipe, facts)


def card(gib: float, host: float = 64) -> Hardware:
    return dataclasses.replace(GPU, memory_bytes=round(gib * GIB), host_bytes=round(host * GIB))


# --- wishes ----------------------------------------------------------------------------------------------------------


def memory(text: str, hardware=GPU, **changes):
    return plan_for(f"{RECIPE}[memory]\n{text}\n", hardware, **changes).memory


def test_what_a_recipe_says_is_what_is_planned():
    said = memory(
        'base_precision = "nf4"\ndouble_quant = false\nquantise_on = "host"\ntext_encoder_precision = "int8"\n'
        'checkpointing = 2\noffload_activations = true\nblock_swap = 4\nuse_stream = false\noffload_to_disk = "/fast"\n'
        'decode = "tiles"\ndecode_tile = 256\ndecode_frames = 32\ndry_run = false',
        card(80),
    )
    assert said.stream == StreamPlan(((6,), (13,), (20,), (27,)), "block", False, "/fast")
    assert (said.base_precision, said.double_quant, said.quantise_on) == ("nf4", False, "host")
    assert said.checkpointed == tuple(range(0, 28, 2)) and said.offload_activations and not said.dry_run
    assert (said.text_encoder_precision, said.decode_tile, said.decode_frames) == ("int8", 256, 32)
    assert memory('base_precision = "nf4"', card(80)).double_quant, "is the default of nf4"
    groups = memory('group_offload = "block_level"\nblocks_per_group = 12', card(80)).stream
    assert [len(unit) for unit in groups.units] == [12, 12, 4] and groups.overlapped
    leaves = memory('group_offload = "leaf_level"', card(80)).stream
    assert leaves.level == "leaf" and len(leaves.blocks) == 28


def test_without_words_the_plain_way_holds():
    plain = memory("", card(80))
    assert plain.base_precision == "bf16" and plain.stream is None and plain.dry_run
    assert plain.checkpointed == tuple(range(28)) and not plain.decode_tile and not plain.double_quant
    assert memory("block_swap = 0", card(80)).stream is None
    on_cpu = plan_for(RECIPE.replace("Lightricks/LTX-Video-0.9.5", "tiny/ltx-video"), CPU, spec=TINY["tiny/ltx-video"])
    assert on_cpu.memory.checkpointed == () and not on_cpu.memory.dry_run and not on_cpu.estimates.phases


def test_streams_without_cuda_are_copied_in_turn_and_that_is_said():
    plan = plan_for(f"{RECIPE}[memory]\nblock_swap = 4\nuse_stream = true\n", CPU, costs=None)
    assert not plan.memory.stream.overlapped
    assert any("use_stream" in note and "CUDA" in note for note in plan.notes)
    assert not any("use_stream" in note for note in plan_for(f"{RECIPE}[memory]\nblock_swap = 4\n", card(80)).notes)


def test_an_activation_budget_keeps_as_many_blocks_as_it_holds_far_apart():
    held = memory('activation_budget = "2GB"', card(80))
    kept = sorted(set(range(28)) - set(held.checkpointed))
    assert len(kept) == 2 * GIB // (435 * MIB) and kept == [6, 13, 20, 27]
    assert memory('activation_budget = "64GB"', card(80)).checkpointed == ()
    assert memory('activation_budget = "100MB"', card(80)).checkpointed == tuple(range(28))


def test_more_blocks_than_the_weights_have_are_refused():
    text = RECIPE.replace("Lightricks/LTX-Video-0.9.5", "some/folder") + "[memory]\nblock_swap = 29\n"
    with pytest.raises(PlanError, match=r"block_swap = 29, but 0\.9\.5 has 28 blocks"):
        plan_for(text)


def test_what_cannot_go_together_is_refused_with_the_table_s_reason():
    without = dataclasses.replace(card(80), compile_lacks="a C++ compiler")
    with pytest.raises(PlanError, match=r"training\.compile cannot run here: a C\+\+ compiler"):
        plan_for(f"{RECIPE}[training]\ncompile = true\n", without)


def test_weights_that_come_quantised_stay_so_unless_the_recipe_says_otherwise():
    part = ComponentPlan(source="x", kind="file", digest="d", location="x")
    stored = dataclasses.replace(part, stored_format="nf4")
    model = ModelPlan("x", "0.9.5", "causal", {"transformer": stored, "vae": part, "text_encoder": part})
    assert memory("", card(80), model=model).base_precision == "nf4"
    assert plan_for(RECIPE, card(80), model=model).origins["memory.base_precision"] == "weights"
    assert memory('base_precision = "bf16"', card(80), model=model).base_precision == "bf16"
    assert memory('fit = "auto"', card(80), model=model).base_precision == "nf4"


def test_a_run_that_goes_on_keeps_its_precision_and_its_optimiser_and_plans_the_rest_anew():
    text = f'{RECIPE}[memory]\nfit = "auto"\n'
    small = plan_for(text, card(4.1, 10))
    assert (small.memory.base_precision, small.optimizer.name) == ("int8", "adamw8bit") and small.memory.stream
    large = plan_for(text, card(80), previous=small)
    assert large.memory.base_precision == "int8" and large.memory.stream is None
    assert large.memory.text_encoder_precision == small.memory.text_encoder_precision != "bf16", "captions keep bits"
    assert large.optimizer.name == small.optimizer.name and large.identity_digest() == small.identity_digest()
    kept = ("memory.base_precision", "memory.text_encoder_precision", "optimizer.name")
    assert {large.origins[key] for key in kept} == {"this run"} and large.origins["memory.double_quant"] == "default"
    said = plan_for(f'{text}base_precision = "int8"\n', card(80), previous=small)
    assert [said.origins[key] for key in kept] == ["recipe", "this run", "this run"]
    fresh = plan_for(text, card(80))
    assert (fresh.memory.base_precision, fresh.optimizer.name) == ("bf16", "adamw")


# --- fit -------------------------------------------------------------------------------------------------------------


def test_fit_says_what_binds_what_it_costs_and_what_would_be_faster():
    plan = plan_for(f'{RECIPE}[memory]\nfit = "6GB"\n', card(24, 10))
    first, chosen, cost, faster = plan.estimates.choices
    assert re.fullmatch(
        r"everything resident does not fit: step would take .* GB on the device, .* GB more than a run"
        r" may have, 5\.3 GB of 6\.0 GB, after context and desktop",
        first,
    )
    assert chosen.startswith("chosen: ") and "RTX 4070" in cost and "x of the time" in cost
    assert re.search(r"with .* GB more on the device: .*, 1\.\d+x faster", faster)
    assert plan.memory.budget == (6 * GIB, 10 * GIB) and plan.memory.fit == "6GB"
    assert [phase.name for phase in plan.estimates.phases][-1] == "save"
    assert plan.origins["memory.base_precision"] == "fit" and plan.origins["memory.fit"] == "recipe"


def test_what_is_told_of_a_cpu_is_what_its_run_may_have():
    allowed = plan_for(f'{RECIPE}[memory]\nfit = "24GB"\n', CPU).memory
    assert allowed.budget == (0, 24 * GIB) and allowed.blocks == 28
    assert plan_for(f'{RECIPE}[memory]\nfit = "auto"\n', CPU).memory.budget == (0, 32 * GIB)
    assert plan_for(f'{RECIPE}[memory]\nfit = "48GB"\n', CPU).memory.budget == (0, 32 * GIB)
    with pytest.raises(PlanError, match="of which a run may have 1.0 GB"):
        plan_for(f'{RECIPE}[memory]\nfit = "1GB"\n', CPU)


def test_fit_keeps_what_is_said_and_never_takes_more_than_the_card_has():
    text = f'{RECIPE}[memory]\nfit = "24GB"\nblock_swap = 3\nbase_precision = "int8"\n'
    plan = plan_for(text, card(12))
    assert len(plan.memory.stream.blocks) == 3 and plan.memory.base_precision == "int8"
    assert plan.origins["memory.block_swap"] == "recipe" and plan.memory.budget[0] == 12 * GIB
    assert any('memory.fit = "24GB", but this device has 12.0 GB' in note for note in plan.notes)
    named = plan_for(f'{RECIPE}[memory]\nfit = "5GB"\n[optimizer]\nname = "adamw"\n', card(12))
    assert named.optimizer.name == "adamw" and named.origins["optimizer.name"] == "recipe"


def test_the_kernels_are_those_of_the_base_that_was_chosen():
    ops = {choice.op for choice in plan_for(f'{RECIPE}[memory]\nfit = "4.2GB"\n', card(12, 10)).kernels.choices}
    assert "int8" in ops and "nf4" not in ops
    assert not {"nf4", "int8"} & {choice.op for choice in plan_for(RECIPE, card(80)).kernels.choices}


def test_on_a_cpu_the_host_s_memory_counts():
    text = f'{RECIPE}[memory]\nfit = "auto"\n'
    plan = plan_for(text, CPU)
    assert plan.memory.stream is None and not plan.memory.offload_activations
    assert all(phase.host_bytes <= 30 * GIB for phase in plan.estimates.phases)
    with pytest.raises(
        PlanError, match=r"of which a run may have 3\.0 GB of 5\.0 GB, after 2\.0 GB kept for the system"
    ):
        plan_for(text, dataclasses.replace(CPU, host_bytes=5 * GIB))


# --- refusals --------------------------------------------------------------------------------------------------------

LEAN = '[memory]\ntext_encoder_precision = "nf4"\ndecode = "tiles"\n'
TOO_LARGE = [
    (RECIPE, card(9.5)),  # T5, and the decoder
    (RECIPE + '[memory]\ntext_encoder_precision = "nf4"\n', card(7)),
    (RECIPE + '[memory]\ncheckpointing = false\ntext_encoder_precision = "nf4"\n', card(12)),
    (RECIPE + '[memory]\nactivation_budget = "20GB"\ntext_encoder_precision = "nf4"\n', card(12)),
    (RECIPE + '[memory]\ntext_encoder_precision = "nf4"\ndecode = "tiles"\n[training]\nbatch_size = 6\n', card(8)),
    (RECIPE + LEAN + 'block_swap = 28\n[lora]\nrank = 1024\n', card(9)),
    (RECIPE + '[memory]\nfit = "auto"\nbase_precision = "bf16"\n[training]\nbatch_size = 4\n', card(4.2)),
    (RECIPE + '[memory]\ntext_encoder_precision = "nf4"\nbase_precision = "nf4"\n', card(4.5)),
    (RECIPE, dataclasses.replace(CPU, host_bytes=14 * GIB)),
    (RECIPE + '[[dataset]]\npath = "more"\nresolution = "1536x1024"\n' + LEAN, card(10)),
]  # fmt: skip


def snippets(error: PlanError) -> list[list[str]]:
    """The `--set` arguments of each remedy that a refusal names."""
    lines = [line for line in str(error).splitlines() if "--set" in line]
    return [re.findall(r"--set (\S+)", line) for line in lines]


@pytest.mark.parametrize(("text", "hardware"), TOO_LARGE)
def test_what_cannot_fit_is_refused_with_two_changes_that_make_it_fit(text, hardware):
    with pytest.raises(PlanError, match="this does not fit: ") as caught:
        plan_for(text, hardware)
    found = snippets(caught.value)
    fitted = ["memory.fit=auto"]
    assert len([each for each in found if each != fitted]) == 2 and found[-2] != found[-1]
    assert fitted not in found[1:], "it comes first"
    for overrides in found:
        plan = plan_for(text, hardware, overrides)
        assert plan.estimates.phases, "it is planned, and was judged"


def test_a_refusal_names_the_phase_its_parts_and_the_time_that_a_change_costs():
    with pytest.raises(PlanError) as caught:
        plan_for(TOO_LARGE[2][0], TOO_LARGE[2][1])
    told = str(caught.value)
    assert re.search(
        r"step would take [\d.]+ GB on the device, of which a run may have 11\.3 GB of 12\.0 GB, after context and"
        r" desktop: kept activations",
        told,
    )
    assert "--set memory.checkpointing=true" in told or "--set memory.offload_activations=true" in told
    assert re.search(r"a step takes about \d\.\d\dx of its time", told)


def test_a_run_that_goes_on_is_offered_nothing_that_would_make_it_another():
    first = plan_for(RECIPE, card(24))
    with pytest.raises(PlanError) as caught:
        plan_for(RECIPE, card(7), previous=first)
    keys = {name.partition("=")[0] for each in snippets(caught.value) for name in each}
    assert keys and keys <= {
        "memory.fit", "memory.decode_tile", "memory.decode_frames",
        "memory.text_encoder_precision", "memory.decode", "memory.block_swap", "memory.checkpointing",
        "memory.offload_activations", "memory.offload_to_disk",
    }  # fmt: skip


def test_fit_is_named_first_where_it_fits_and_nobody_asked_for_it():
    with pytest.raises(PlanError) as caught:
        plan_for(*TOO_LARGE[0])
    assert snippets(caught.value)[0] == ["memory.fit=auto"]
    with pytest.raises(PlanError) as caught:
        plan_for(*TOO_LARGE[6])
    assert "memory.fit=auto" not in str(caught.value)


def test_a_refusal_names_the_card_that_is_assumed():
    with pytest.raises(PlanError, match="this does not fit a card of 9 GB, like RTX 4060: "):
        plan_for(RECIPE, machine("9GB", "64GB"))


def crowded_by(part: str, whole: int, tiled):
    """Costs whose samples take so much: in a pass of the transformer, or while they are decoded."""

    def priced(plan, spec, asked) -> Costs:
        costs = costs_of(plan, spec, asked)
        if not (plan.validation.every or plan.validation.at_start):
            return dataclasses.replace(costs, decodes={})
        shape = plan.validation.prompts[0].shape
        share = shape.width * shape.height * shape.frames / (768 * 512 * 121)
        works = {name: dataclasses.replace(work, sampling=round(whole * share)) for name, work in costs.works.items()}
        tiles = {(0, 0), *asked.tiles}
        decodes = {tile: Part(GIB, round(whole * share * tiled(*tile) if tile[0] else whole * share)) for tile in tiles}
        return dataclasses.replace(costs, **{"sample": {"works": works}, "decode": {"decodes": decodes}}[part])

    return priced


@pytest.mark.parametrize(
    ("part", "tiled", "expected"),
    [
        ("decode", lambda side, frames: 0.1, {"memory.decode"}),
        ("decode", lambda side, frames: side * frames / 2**15, {"memory.decode_tile"}),
        ("decode", lambda side, frames: 1.0, {"validation.resolution", "validation.frames"}),
        ("sample", lambda side, frames: 1.0, {"validation.resolution", "validation.frames"}),
    ],
)
def test_samples_that_take_too_much_are_offered_tiles_or_smaller_ones(part, tiled, expected):
    costs = crowded_by(part, 30 * GIB, tiled)
    with pytest.raises(PlanError, match=f"this does not fit: {part} ") as caught:
        plan_for(RECIPE, card(20), costs=costs)
    found = snippets(caught.value)
    keys = {key.partition("=")[0] for each in found for key in each}
    assert expected <= keys
    for overrides in found:
        assert plan_for(RECIPE, card(20), overrides, costs=costs).estimates.phases


def test_a_model_with_sound_is_offered_frugal_samples():
    """Its picture is decoded in tiles then, with the transformer set aside."""
    recipe = parse(RECIPE.replace("Lightricks/LTX-Video-0.9.5", "Lightricks/LTX-2"), "mine.toml", []).recipe
    plan = plan_for(RECIPE, card(80))
    options = {"on_gpu": True, "packages": (), "folder": "x", "goes_on": False}
    crowded = axes_of(recipe, plan, SPECS["2.0-dev"], crowded=["decode"], **options)
    frugal = (("validation.frugal", True),)
    assert frugal in [rung.sets for axis in crowded for rung in axis]
    assert frugal not in [rung.sets for axis in axes_of(recipe, plan, SPECS["2.0-dev"], **options) for rung in axis]
    silent = axes_of(recipe, plan, SPECS["0.9.5"], crowded=["decode"], **options)
    assert frugal not in [rung.sets for axis in silent for rung in axis]


def test_samples_of_any_size_that_take_too_much_are_left_out():
    costs = crowded_by("sample", 3000 * GIB, lambda side, frames: 1.0)
    with pytest.raises(PlanError) as caught:
        plan_for(RECIPE, card(20), costs=costs)
    assert ["validation.every=0", "validation.at_start=false"] in snippets(caught.value)
    plan = plan_for(RECIPE, card(20), ["validation.every=0", "validation.at_start=false"], costs=costs)
    assert {"sample", "decode"}.isdisjoint(phase.name for phase in plan.estimates.phases)


def test_where_nothing_helps_that_is_said():
    with pytest.raises(PlanError, match="It needs a larger machine"):
        plan_for(RECIPE, card(1.2, 4))


def test_what_fits_by_a_hair_is_planned_with_a_word():
    hard = plan_for(RECIPE + '[memory]\ntext_encoder_precision = "nf4"\ndecode = "tiles"\n', card(6.6))
    assert any(note.startswith("memory is tight") for note in hard.notes)
    assert not any("tight" in note for note in plan_for(RECIPE, card(24)).notes)


def test_nothing_is_refused_for_its_size_where_nobody_knows_it():
    assert plan_for(RECIPE, card(1), costs=None).memory.checkpointed
