"""The deciding: defaults with their origins, what depends on what, and refusals with reasons."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from ltxforge_kernels.choice import EAGER, OPS

from ltxforge.dataset.scan import Clip
from ltxforge.errors import PlanError
from ltxforge.hardware import Hardware
from ltxforge.memory.graphs import block_graphs
from ltxforge.models.audio_features import MelSettings, latent_length
from ltxforge.plan import AudioPlan, ComponentPlan, ModelPlan, Plan, every_nth, from_json, to_json
from ltxforge.planner import Facts, make_plan
from ltxforge.recipe.parse import parse
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS, TINY
from ltxforge.validation.prompts import PromptEntry

CPU = Hardware("cpu", "a CPU", (0, 0), 0, False, 2, {"torch": "2.13.0"}, ("no GPU",), frozenset())
GPU = Hardware("cuda", "a GPU", (9, 0), 80 * 2**30, True, 8, {"torch": "2.13.0"}, (), frozenset())
MINIMAL = """
[model]
base = "tiny/ltx-video"
[run]
steps = 1000
[[dataset]]
path = "data/cats"
resolution = "64x64"
frames = 9
"""


SQUARE = ClipShape(64, 64, 9)


def clips(count: int = 6, windows: int = 1, shape: ClipShape = SQUARE) -> list[Clip]:
    starts = tuple(float(n) for n in range(windows))
    return [
        Clip(Path(f"/data/cats/{n}.mp4"), f"{n}.mp4", f"digest{n}", f"caption {n}", shape=shape, starts=starts)
        for n in range(count)
    ]


def plan_for(text: str = MINIMAL, *, found=None, hardware=CPU, spec=TINY["tiny/ltx-video"], **changes):
    parsed = parse(text, "mine.toml")
    part = ComponentPlan(source="x", kind="builtin", digest="d", location="x")
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    names += ("audio_vae", "vocoder", "connectors") if spec.has_audio else ()
    found = clips() if found is None else found
    enabled = [dataset for dataset in parsed.recipe.dataset if dataset.enabled]
    model = changes.pop("model", None) or ModelPlan("x", spec.version, spec.rope, dict.fromkeys(names, part))
    facts = Facts(
        "mine", "/runs/mine", "/cache", hardware, model, spec,
        [(dataset, found) for dataset in enabled], said=parsed.said, **changes,
    )  # fmt: skip
    return make_plan(parsed.recipe, facts)


def test_the_defaults_are_the_documented_ones():
    plan = plan_for()
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.dropout) == (32, 32.0, 0.0)
    assert (plan.optimizer.name, plan.optimizer.learning_rate, plan.optimizer.weight_decay) == ("adamw", 1e-4, 0.0)
    assert plan.optimizer.betas == (0.9, 0.999)
    assert (plan.training.clip_norm, plan.training.clip_value) == (1.0, None)
    assert (plan.flow.sigma, plan.flow.shift, plan.flow.uniform_fraction) == ("stretched-logit-normal", None, 0.1)
    assert plan.optimizer.schedule == "constant" and plan.checkpoint.every == 250
    assert plan.seed == 42 and plan.resume == "latest"


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 50), (5000, 100), (40, 2), (10, 0)])
def test_warm_up_is_five_percent_and_at_most_a_hundred(steps, warmup):
    assert plan_for(MINIMAL.replace("1000", str(steps))).optimizer.warmup_steps == warmup


@pytest.mark.parametrize(
    ("hardware", "precision", "checkpointing", "exactness"),
    [(CPU, "fp32", 0, "exact"), (GPU, "bf16", 1, "statistical")],
)
def test_the_device_decides_what_the_recipe_leaves_open(hardware, precision, checkpointing, exactness):
    plan = plan_for(hardware=hardware)
    assert (plan.device.precision, plan.memory.checkpointed) == (precision, every_nth(checkpointing, 4))
    assert plan.device.exactness == exactness and plan.device.exactness_reason
    assert plan.origins["training.precision"] == "device"
    said = plan_for(MINIMAL + '[training]\nprecision = "fp32"\n[memory]\ncheckpointing = 3\n', hardware=hardware)
    assert (said.device.precision, said.memory.checkpointed) == ("fp32", (0, 3))
    assert said.origins["training.precision"] == "recipe"


def test_epochs_count_batches_of_each_bucket():
    text = MINIMAL.replace("steps = 1000", "epochs = 3") + "[training]\nbatch_size = 4\naccumulate = 2\n"
    found = [*clips(6), *clips(5, shape=ClipShape(96, 32, 9))]
    plan = plan_for(text, found=found)
    per_epoch = math.ceil(6 / 4) + math.ceil(5 / 4)
    assert plan.data.batches_per_epoch(4) == per_epoch
    assert plan.steps_per_epoch == per_epoch / 2 and plan.steps == math.ceil(3 * per_epoch / 2)


def test_samples_are_ordered_by_content_and_not_by_folder():
    straight, reversed_ = plan_for(found=clips(6, 2)), plan_for(found=list(reversed(clips(6, 2))))
    assert straight.data == reversed_.data
    renamed = [dataclasses.replace(c, path=Path(f"/else/{n}.mp4")) for n, c in enumerate(reversed(clips(6, 2)))]
    assert plan_for(found=renamed).identity_digest() == straight.identity_digest()


def test_only_good_clips_become_samples():
    found = clips(3)
    found[1] = dataclasses.replace(found[1], verdict="dropped", reason="too short", starts=())
    assert [sample.clip for sample in plan_for(found=found).data.samples] == ["digest0", "digest2"]
    with pytest.raises(PlanError, match="no usable clip"):
        plan_for(found=[dataclasses.replace(clip, verdict="rejected", reason="broken") for clip in clips(2)])


COSINE = MINIMAL + '[optimizer]\nschedule = "cosine"\nend_fraction = 0.1\n'


def test_raising_steps_keeps_the_first_plan_s_schedule():
    first = plan_for(COSINE)
    second = plan_for(COSINE.replace("1000", "2000"), previous=first)
    assert second.optimizer == first.optimizer and second.steps == 2000
    assert second.identity_digest() == first.identity_digest()
    assert any("schedule ends at step 1000 and the run at step 2000" in note for note in second.notes)
    assert plan_for(COSINE.replace("1000", "2000")).optimizer.decay_steps == 2000
    shorter = plan_for(COSINE.replace("1000", "400"), previous=first)
    assert any("the run at step 400, with learning rate" in note for note in shorter.notes)


def test_steps_at_rate_0_are_refused_and_the_schedule_can_be_stretched():
    to_zero = COSINE.replace("end_fraction = 0.1\n", "")
    first = plan_for(to_zero)
    longer = to_zero.replace("1000", "2000")
    with pytest.raises(PlanError, match=r"learning rate 0 at step 1000.*\n.*decay_steps = 2000"):
        plan_for(longer, previous=first)
    stretched = plan_for(longer + "decay_steps = 2000\n", previous=first)
    assert stretched.identity_digest() == first.identity_digest()
    assert stretched.learning_rate_at(1500) > 0


def test_warm_up_longer_than_epochs_allow_is_refused():
    text = MINIMAL.replace("steps = 1000", "epochs = 1") + "[optimizer]\nwarmup_steps = 6\n"
    with pytest.raises(PlanError, match="never leave warm-up"):
        plan_for(text)


def test_small_buckets_name_the_repeats_that_fill_them():
    plan = plan_for(MINIMAL + "[training]\nbatch_size = 4\n", found=clips(3))
    assert any("repeats = 2 would fill" in note for note in plan.notes)


def test_validation_follows_the_first_dataset_and_the_version():
    plan = plan_for(MINIMAL + '[[validation.prompt]]\nname = "a"\nprompt = "b"\n')
    prompt, sampling = plan.validation.prompts[0], TINY["tiny/ltx-video"].sampling
    assert prompt.shape == ClipShape(64, 64, 9) and prompt.fps == 25.0
    assert (prompt.steps, prompt.guidance) == (sampling.steps, sampling.guidance)
    assert plan.validation.every == plan.checkpoint.every and plan.validates_at(0)


def test_library_prompts_come_after_the_recipe_s_and_may_not_share_names():
    text = MINIMAL + '[[validation.prompt]]\nname = "a"\nprompt = "b"\n'
    plan = plan_for(text, library=[PromptEntry("c", "d", "e", None, 7)])
    assert [(p.name, p.negative_prompt, p.seed) for p in plan.validation.prompts][1] == ("c", "e", 7)
    with pytest.raises(PlanError, match="share a name: a"):
        plan_for(text, library=[PromptEntry("a", "d", None, None, None)])


def test_distilled_weights_get_their_own_sampling_and_a_word_about_guidance():
    spec, text = SPECS["0.9.7-distilled"], MINIMAL + '[[validation.prompt]]\nname = "a"\nprompt = "b"\n'
    plan = plan_for(text, spec=spec, hardware=GPU)
    assert plan.validation.prompts[0].guidance == 1.0 and plan.validation.prompts[0].steps == spec.sampling.steps
    warned = plan_for(text + "[validation]\nguidance = 3.0\n", spec=spec, hardware=GPU)
    assert any("guidance 1" in note for note in warned.notes)


def test_another_machine_is_no_other_run_but_no_longer_exact():
    first = plan_for()
    elsewhere = dataclasses.replace(GPU, versions={"torch": "2.14.0"})
    second = plan_for(hardware=elsewhere, previous=first)
    assert second.identity_digest() == first.identity_digest(), "precision stays unless the recipe says another"
    assert second.device.exactness == "statistical"
    assert "device was cpu" in second.device.exactness_reason
    assert "torch was 2.13.0, now 2.14.0" in second.device.exactness_reason
    again = plan_for(hardware=elsewhere, previous=second)
    assert again.device.exactness_reason == second.device.exactness_reason, "once inexact, it stays so"
    assert plan_for(previous=first).device.exactness == "exact"


def test_another_precision_of_the_text_encoder_is_told_before_anything_is_encoded():
    def kept(name: str) -> str:
        return f'{MINIMAL}[memory]\ntext_encoder_precision = "{name}"\n'

    first = plan_for(kept("nf4"))
    assert plan_for(kept("nf4"), previous=first).device.exactness == "exact"
    assert plan_for(previous=first).device.exactness == "exact", "left out, it stays as it was"
    other = plan_for(kept("int8"), previous=first)
    assert other.identity_digest() == first.identity_digest() and other.device.exactness == "statistical"
    told = "changed since this run began: memory.text_encoder_precision was nf4, now int8: captions are encoded anew"
    assert other.device.exactness_reason == told
    assert plan_for(kept("int8"), previous=other).device.exactness_reason == told


TRITON = dataclasses.replace(GPU, triton="3.7.1", versions={"torch": "2.13.0", "triton": "3.7.1"})


def kernels_of(plan):
    return {choice.op: choice.implementation for choice in plan.kernels.choices}


def test_kernels_are_chosen_from_the_device():
    on_cpu, on_gpu = plan_for(), plan_for(hardware=TRITON)
    assert set(kernels_of(on_cpu)) == set(kernels_of(on_gpu)) == set(OPS)
    assert set(kernels_of(on_cpu).values()) == {"eager"} and set(kernels_of(on_gpu).values()) == {"triton"}
    assert on_gpu.kernels.choices[0].reason == "Triton 3.7.1 on sm_90"
    assert on_cpu.identity_digest() == plan_for(MINIMAL + '[kernels]\nall = "compile"\n').identity_digest()
    assert on_cpu.origins["kernels.gelu"] == "device"
    assert from_json(Plan, to_json(on_gpu)).kernels == on_gpu.kernels


def test_the_recipe_s_word_on_kernels_holds_and_is_named():
    plan = plan_for(MINIMAL + '[kernels]\nall = "eager"\ngelu = "triton"\n', hardware=TRITON)
    assert kernels_of(plan) == {**dict.fromkeys(OPS, "eager"), "gelu": "triton"}
    assert (plan.origins["kernels.gelu"], plan.origins["kernels.lora_linear"]) == ("recipe", "recipe")
    with pytest.raises(
        PlanError, match=r"what \[kernels\] asks for cannot run here: triton for gelu: our kernels need"
    ):
        plan_for(MINIMAL + '[kernels]\ngelu = "triton"\n')


def test_a_run_keeps_its_kernels_and_says_when_it_cannot():
    first = plan_for(hardware=TRITON)
    assert plan_for(hardware=TRITON, previous=first).kernels == first.kernels
    without = plan_for(hardware=dataclasses.replace(GPU, versions=TRITON.versions), previous=first)
    assert set(kernels_of(without).values()) == {"eager"}
    told = f"changed since this run began: {', '.join(OPS)}: eager instead of triton"
    assert without.device.exactness_reason == told
    assert without.identity_digest() == first.identity_digest()
    back = plan_for(hardware=TRITON, previous=without)
    assert back.kernels.choices[0].reason == "this run began with it" and back.device.exactness_reason == told


def test_triton_s_version_counts_where_triton_compiles():
    other = dataclasses.replace(TRITON, triton="3.8.0", versions={**TRITON.versions, "triton": "3.8.0"})
    told = plan_for(hardware=other, previous=plan_for(hardware=TRITON)).device.exactness_reason
    assert told == "changed since this run began: triton was 3.7.1, now 3.8.0"
    eager = MINIMAL + '[kernels]\nall = "eager"\n'
    assert (
        "triton"
        not in plan_for(eager, hardware=other, previous=plan_for(eager, hardware=TRITON)).device.exactness_reason
    )


def test_other_kernels_on_a_cpu_end_its_exactness():
    first = plan_for()
    asked = plan_for(MINIMAL + '[kernels]\ngelu = "compile"\n', previous=first)
    assert (asked.device.exactness, asked.device.exactness_reason) == (
        "statistical",
        "changed since this run began: gelu: compile instead of eager",
    )
    compiled = plan_for(MINIMAL + '[kernels]\ngelu = "compile"\n')
    assert compiled.device.exactness == "statistical" and "torch.compile" in compiled.device.exactness_reason
    again = plan_for(MINIMAL, previous=compiled)
    assert kernels_of(again)["gelu"] == "compile" and again.device == compiled.device
    assert plan_for(MINIMAL + '[kernels]\nall = "eager"\n', previous=first).device.exactness == "exact"


def test_a_compiled_block_ends_a_cpu_s_exactness_and_is_counted():
    compiling = MINIMAL + "[training]\ncompile = true\n"
    first, compiled = plan_for(), plan_for(compiling)
    assert compiled.device.exactness == "statistical" and "torch.compile" in compiled.device.exactness_reason
    assert first.identity_digest() == compiled.identity_digest()
    told = "changed since this run began: blocks are compiled now"
    assert plan_for(compiling, previous=first).device.exactness_reason == told
    told = "changed since this run began: blocks are no longer compiled"
    assert plan_for(MINIMAL, previous=compiled).device.exactness_reason == told
    (note,) = [note for note in compiled.notes if "torch.compile" in note]
    assert note.startswith(f"torch.compile makes {block_graphs(compiled)} program")
    assert not [note for note in first.notes if "torch.compile" in note]


def test_an_earlier_release_s_run_stays_eager():
    first = dataclasses.replace(plan_for(hardware=TRITON), kernels=EAGER)
    second = plan_for(hardware=TRITON, previous=first)
    assert (
        set(kernels_of(second).values()) == {"eager"}
        and second.device.exactness_reason == first.device.exactness_reason
    )


def test_8bit_adamw_without_its_package_is_refused_before_anything_loads():
    text = MINIMAL + '[optimizer]\nname = "adamw8bit"\n'
    assert plan_for(text, hardware=dataclasses.replace(CPU, packages=frozenset({"bitsandbytes"}))).optimizer
    with pytest.raises(PlanError, match="bitsandbytes"):
        plan_for(text)


BITSANDBYTES = frozenset({"bitsandbytes"})


@pytest.mark.parametrize(
    ("name", "said", "betas", "epsilon"),
    [
        ("adamw8bit", "", (0.9, 0.999), 1e-8),
        ("lion8bit", "", (0.9, 0.99), 0),
        ("paged_lion8bit", "betas = [0.95, 0.98]", (0.95, 0.98), 0),
        ("ademamix8bit", "epsilon = 1e-6", (0.9, 0.999), 1e-6),
    ],
)
def test_an_optimiser_s_own_defaults(name, said, betas, epsilon):
    text = f'{MINIMAL}[optimizer]\nname = "{name}"\n{said}\n'
    plan = plan_for(text, hardware=dataclasses.replace(CPU, packages=BITSANDBYTES))
    assert (plan.optimizer.betas, plan.optimizer.epsilon) == (betas, epsilon)


def test_a_paged_optimiser_says_where_it_pages_nothing():
    """On a CPU, and on a GPU where every tensor is small: rank 32 of this model's 64 columns."""
    text = MINIMAL + '[optimizer]\nname = "paged_adamw8bit"\n'
    (on_cpu,) = (
        n for n in plan_for(text, hardware=dataclasses.replace(CPU, packages=BITSANDBYTES)).notes if "pag" in n
    )
    assert "here it is adamw8bit" in on_cpu
    gpu = dataclasses.replace(GPU, packages=BITSANDBYTES)
    (small,) = (note for note in plan_for(text, hardware=gpu).notes if "paged" in note)
    assert "nothing moves to the host" in small
    large = plan_for(text + "[lora]\nrank = 1024\ntargets = ['proj_in', 'all']\n", hardware=gpu)
    assert not [note for note in large.notes if "paged" in note]


@pytest.mark.parametrize(
    ("name", "base", "told"), [("lion8bit", "nf4", 1), ("lion8bit", "int8", 0), ("adamw8bit", "nf4", 0)]
)
def test_lion_over_nf4_is_warned_of(name, base, told):
    text = f'{MINIMAL}[optimizer]\nname = "{name}"\n[memory]\nbase_precision = "{base}"\n'
    plan = plan_for(text, hardware=dataclasses.replace(CPU, packages=BITSANDBYTES))
    assert sum("collapses" in note for note in plan.notes) == told


def test_dropout_with_recomputation_is_not_possible_on_apple_gpus():
    apple = dataclasses.replace(GPU, kind="mps", capability=(0, 0))
    text = MINIMAL + "[lora]\ndropout = 0.1\n"
    assert plan_for(text, hardware=apple).memory.checkpointed == ()
    assert plan_for(hardware=apple).memory.checkpointed == (0, 1, 2, 3)
    with pytest.raises(PlanError, match="wrong gradients on Apple"):
        plan_for(text + "[memory]\ncheckpointing = true\n", hardware=apple)


def test_parts_in_one_file_are_downloaded_once():
    file = ComponentPlan(source="o/n", kind="hub", inside="all.safetensors", repository="o/n", revision="c", bytes=10)
    text = dataclasses.replace(file, inside="text_encoder", bytes=5)
    spec = SPECS["0.9.5"]
    model = ModelPlan("o/n", spec.version, spec.rope, {"transformer": file, "vae": file, "text_encoder": text})
    assert plan_for(model=model).estimates.download_bytes == 15


def test_layers_that_a_program_cannot_read_are_noted():
    plan = plan_for(MINIMAL + '[lora]\ntargets = ["attention", "proj_in", "proj_out"]\n')
    noted = [note for note in plan.notes if "not read by diffusers" in note]
    assert len(noted) == 1 and "proj_in" in noted[0]


def test_estimates_follow_from_the_sizes():
    plan = plan_for()
    width = TINY["tiny/ltx-video"].width
    parameters = 32 * 2 * width * 8 * TINY["tiny/ltx-video"].blocks  # eight square projections per block
    assert plan.estimates.lora_bytes == parameters * 2
    steps = 4 * 16 * TINY["tiny/ltx-video"].blocks  # torch counts each tensor's
    assert plan.estimates.checkpoint_bytes == parameters * (4 + 8) + steps + parameters * 2
    latents = 6 * 2 * 2 * 2 * TINY["tiny/ltx-video"].latent_channels * 4
    assert plan.estimates.cache_bytes > latents


# --- sound and LTX-2 -------------------------------------------------------------------------------------------------

LTX2 = MINIMAL.replace("tiny/ltx-video", "tiny/ltx2")
SOUNDING = [
    dataclasses.replace(clip, sound=sound)
    for clip, sound in zip(clips(6), ("own", "side", "", "own", "", ""), strict=True)
]
PROMPT = '[[validation.prompt]]\nname = "a"\nprompt = "b"\n'


def ltx2_plan(more: str = "", *, spec=TINY["tiny/ltx2"], found=SOUNDING, **changes):
    return plan_for(LTX2 + more, spec=spec, found=found, **changes)


def test_a_model_with_sound_trains_both_unless_told():
    plan = ltx2_plan()
    assert (plan.training.modalities, plan.lora.modalities) == ("both", "both")
    assert plan.audio == AudioPlan("independent", 1.0) and plan.cache.text == "connectors"
    assert plan.origins["training.modalities"] == "weights"
    silent = plan_for()
    assert (silent.training.modalities, silent.lora.modalities, silent.audio) == ("video", "video", None)


def test_what_the_recipe_says_of_sound_is_planned():
    more = (
        '[audio]\nsigma = "shared"\nloss_weight = 0.5\n[lora]\nmodalities = "audio"\n[cache]\ntext_cache = "features"\n'
    )
    plan = ltx2_plan(more)
    assert plan.audio == AudioPlan("shared", 0.5)
    assert (plan.training.modalities, plan.lora.modalities, plan.cache.text) == ("both", "audio", "features")


CONTEXT = "[audio]\nloss_weight = 0\n"


def test_sound_without_weight_is_context_and_its_layers_stay_as_they_are():
    plan = ltx2_plan(CONTEXT)
    assert (plan.training.modalities, plan.lora.modalities, plan.audio) == (
        "both",
        "video",
        AudioPlan("independent", 0),
    )
    video = ltx2_plan('[lora]\nmodalities = "video"\n')
    assert plan.lora == video.lora and plan.estimates.lora_bytes == video.estimates.lora_bytes
    assert "audio.loss_weight = 0: sound is context only, nothing is learnt from it" in plan.notes
    assert "3 of 6 samples have a sound track; the others train without that context" in plan.notes
    assert not any("drifts" in note for note in plan.notes)
    assert not any("context" in note for note in (*video.notes, *ltx2_plan().notes))


@pytest.mark.parametrize(
    ("lora", "sounding"),
    [  # four blocks, each with four layers of self, text and video-to-audio attention
        ('[lora]\nmodalities = "both"\n', 4 * (4 + 4 + 4)),
        ('[lora]\ntargets = ["attention", "cross_modal"]\n', 4 * 4),
        ('[lora]\ntargets = ["attention", "re:audio_to_video"]\n', 0),
    ],
)
def test_layers_of_the_sound_that_only_the_video_moves_are_told(lora, sounding):
    (told,) = [note for note in ltx2_plan(CONTEXT + lora).notes if "drifts" in note] or [""]
    assert told.startswith(f"{sounding} of the LoRA's layers" if sounding else "")
    assert bool(told) == bool(sounding)


def test_a_rope_that_the_weights_do_not_read_is_told():
    local = LTX2.replace('"tiny/ltx2"', '"./weights"\nrope = "causal"')
    told = "this model counts time in one way only and reads none of: model.rope"
    assert told in plan_for(local, spec=TINY["tiny/ltx2"]).notes
    assert told not in plan_for(local).notes
    assert told not in plan_for(local.replace("causal", "auto"), spec=TINY["tiny/ltx2"]).notes


@pytest.mark.parametrize(
    ("base", "stg", "value", "origin"),
    [("tiny/ltx2", 1.0, 0, "weights"), ("tiny/ltx2", 0.0, 0, "recipe"), ("tiny/ltx2.3", 0.5, 0.5, "recipe")],
)
def test_who_decided_stg_is_told(base, stg, value, origin):
    plan = ltx2_plan(f"[validation]\nstg = {stg}\n{PROMPT}", spec=TINY[base])
    assert plan.validation.prompts[0].stg == value
    assert plan.origins["validation.stg"] == origin


def test_epochs_that_were_said_decide_the_steps():
    epochs = MINIMAL.replace("steps = 1000", "epochs = 2")
    assert plan_for(epochs).origins["run.steps"] == plan_for().origins["run.steps"] == "recipe"
    assert plan_for(epochs, overridden=frozenset({"run.epochs"})).origins["run.steps"] == "--set"


def test_a_window_behind_the_sound_s_end_counts_as_one_without():
    ended = [dataclasses.replace(clip, sound="own", sound_seconds=1.5) for clip in clips(2, windows=3)]
    plan = ltx2_plan(found=ended)
    assert [(sample.start_seconds, sample.sound) for sample in plan.data.samples[:3]] == [
        (0.0, "own"), (1.0, "own"), (2.0, ""),
    ]  # fmt: skip
    assert plan.data.buckets[0].with_sound == 4


@pytest.mark.parametrize(
    ("modalities", "tokens", "audio_tokens", "with_sound"), [("both", 8, 9, 3), ("video", 8, 0, 0), ("audio", 0, 9, 3)]
)
def test_each_modality_has_its_tokens_and_only_where_it_is_trained(modalities, tokens, audio_tokens, with_sound):
    found = [clip for clip in SOUNDING if clip.sound] if modalities == "audio" else SOUNDING
    plan = ltx2_plan(f'[training]\nmodalities = "{modalities}"\n', found=found)
    (bucket,) = plan.data.buckets
    assert (bucket.tokens, bucket.audio_tokens, bucket.with_sound) == (tokens, audio_tokens, with_sound)
    assert (plan.audio is None) == (modalities == "video")
    assert {sample.sound for sample in plan.data.samples} <= ({""} if modalities == "video" else {"own", "side", ""})
    assert plan.lora.modalities == modalities


def test_repeats_count_with_sound_too():
    plan = plan_for(LTX2.replace("frames = 9", "frames = 9\nrepeats = 3"), spec=TINY["tiny/ltx2"], found=SOUNDING)
    assert (plan.data.buckets[0].samples, plan.data.buckets[0].with_sound) == (18, 9)


@pytest.mark.parametrize("spec", [spec for spec in (*SPECS.values(), *TINY.values()) if spec.has_audio])
def test_sound_is_as_long_as_the_model_and_the_pipeline_count_it(spec):
    settings = MelSettings.from_vae_config(spec.audio_vae_config)
    for frames, fps in itertools.product((1, 9, 49, 121, 257), (12.5, 23.976, 24.0, 25.0, 50.0)):
        text = LTX2.replace("frames = 9", f"frames = {frames}\nfps = {fps}")
        plan = plan_for(text, spec=spec, found=clips(1, shape=ClipShape(64, 64, frames)))
        assert plan.data.buckets[0].audio_tokens == latent_length(frames / fps, settings)
        assert abs(plan.data.buckets[0].audio_tokens - 25 * frames / fps) <= 1


def test_the_models_own_rate_is_the_default():
    assert ltx2_plan().data.samples[0].fps == 24.0 and plan_for().data.samples[0].fps == 25.0


def test_samples_without_sound_are_counted_and_used():
    plan = ltx2_plan()
    assert len(plan.data.samples) == 6
    assert "3 of 6 samples have a sound track; the others train video only" in plan.notes
    assert any("no sample has a sound track" in note for note in ltx2_plan(found=clips()).notes)
    all_sound = [dataclasses.replace(clip, sound="own") for clip in clips()]
    assert not any("sound track" in note for note in ltx2_plan(found=all_sound).notes)


def test_sound_alone_needs_some():
    audio = '[training]\nmodalities = "audio"\n'
    for found in (clips(), [dataclasses.replace(clip, verdict="dropped", starts=()) for clip in clips()]):
        with pytest.raises(PlanError, match="no usable clip has sound"):
            ltx2_plan(audio, found=found)


@pytest.mark.parametrize(("alone", "what"), [("video", "the video is computed alone"), ("audio", "the sound is")])
def test_one_modality_alone_is_said_to_differ_from_the_joint_model(alone, what):
    found = [clip for clip in SOUNDING if clip.sound]
    notes = ltx2_plan(f'[training]\nmodalities = "{alone}"\n', found=found).notes
    assert any(note.startswith(what) and "modalities isolated" in note and "joint model" in note for note in notes)
    assert not any("isolated" in note for note in (*ltx2_plan().notes, *plan_for().notes))


def test_weights_without_sound_refuse_it_and_name_what_they_do_not_read():
    local = MINIMAL.replace("tiny/ltx-video", "./weights")
    with pytest.raises(PlanError, match="makes no sound"):
        plan_for(local + '[training]\nmodalities = "both"\n')
    plan = plan_for(local + '[cache]\ntext_cache = "features"\n[validation]\nstg = 1.0\n' + PROMPT)
    assert "this model makes no sound and reads none of: cache.text_cache, validation.stg" in plan.notes
    assert plan.cache.text == "connectors" and plan.validation.prompts[0].stg == 0


def test_prompts_fill_up_with_registers():
    assert ltx2_plan().conditioning.prompt_tokens == 128
    assert ltx2_plan("[conditioning]\nprompt_tokens = 64\n").conditioning.prompt_tokens == 64
    local = LTX2.replace("tiny/ltx2", "./weights")
    with pytest.raises(PlanError, match=r"1000 is no multiple of the connectors' 128 registers\n.*896 or 1024"):
        plan_for(local + "[conditioning]\nprompt_tokens = 1000\n", spec=SPECS["2.3-dev"])
    with pytest.raises(PlanError, match=r"Nearest: 128\."):
        plan_for(local + "[conditioning]\nprompt_tokens = 100\n", spec=SPECS["2.5-dev"])


@pytest.mark.parametrize("version", [name for name, spec in SPECS.items() if spec.has_audio])
def test_samples_are_guided_as_the_version_recommends(version):
    sampling = SPECS[version].sampling
    prompt = ltx2_plan(PROMPT, spec=SPECS[version]).validation.prompts[0]
    assert (prompt.steps, prompt.guidance, prompt.audio_guidance) == (
        sampling.steps, sampling.guidance, sampling.audio_guidance
    )  # fmt: skip
    assert (prompt.stg, prompt.modality_guidance, prompt.rescale) == (
        sampling.stg, sampling.modality_guidance, sampling.rescale
    )  # fmt: skip
    assert prompt.stg_blocks == (sampling.stg_blocks if sampling.stg else ()) and not prompt.frugal


def test_guidance_can_be_said_and_switched_off():
    said = (
        "[validation]\nguidance = 2.0\naudio_guidance = 4.0\nstg = 0\nmodality_guidance = 1\nrescale = 0\n"
        "frugal = true\n"
    )
    prompt = ltx2_plan(said + PROMPT).validation.prompts[0]
    assert (prompt.guidance, prompt.audio_guidance, prompt.stg, prompt.stg_blocks) == (2.0, 4.0, 0, ())
    assert (prompt.modality_guidance, prompt.rescale, prompt.frugal) == (1, 0, True)


@pytest.mark.parametrize("said", ["guidance = 2.0", "audio_guidance = 2.0", "stg = 0.5", "modality_guidance = 2.0"])
def test_distilled_weights_have_a_word_about_every_guidance(said):
    spec = SPECS["2.3-distilled"]
    assert not any("distilled" in note for note in ltx2_plan(PROMPT, spec=spec).notes)
    plan = ltx2_plan(f"[validation]\n{said}\n{PROMPT}", spec=spec)
    assert any("distilled weights are made" in note for note in plan.notes)
    if said.startswith("stg"):
        assert plan.validation.prompts[0].stg_blocks == (28,), "the pipeline cannot skip attention in no block"


def test_the_adapter_is_measured_by_its_modalities():
    sizes = {
        (trained, lora): ltx2_plan(
            f'[training]\nmodalities = "{trained}"\n[lora]\nmodalities = "{lora}"\n',
            found=[clip for clip in SOUNDING if clip.sound],
        ).estimates.lora_bytes
        for trained, lora in [("both", "both"), ("both", "video"), ("both", "audio"), ("video", "video")]
    }
    assert sizes["both", "both"] > sizes["both", "video"] > sizes["both", "audio"]
    assert sizes["both", "video"] == sizes["video", "video"]
    with pytest.raises(PlanError, match="never computed"):
        ltx2_plan('[training]\nmodalities = "video"\n[lora]\ntargets = ["audio_to_video_attn.to_q"]\n')


def test_stg_is_left_out_where_no_attention_can_be_skipped():
    said = "[validation]\nstg = 1.0\n" + PROMPT
    old, new = (ltx2_plan(said, spec=SPECS[version]) for version in ("2.0-dev", "2.3-dev"))
    assert old.validation.prompts[0].stg == 0 and any("STG could skip" in note for note in old.notes)
    assert new.validation.prompts[0].stg == 1 and not any("STG could skip" in note for note in new.notes)


def test_samples_that_the_decoder_or_the_schedule_cannot_make_are_refused_before_work_starts():
    narrow = '[validation]\nresolution = "128x32"\n' + PROMPT
    with pytest.raises(PlanError, match="is 128x32x.* needs sides of 64 pixels or more"):
        ltx2_plan(narrow, spec=SPECS["2.0-dev"])
    ltx2_plan(narrow, spec=SPECS["2.3-dev"])
    one = "[validation]\nsteps = 1\n" + PROMPT
    with pytest.raises(PlanError, match="steps = 1: the schedule of 2.3-dev needs 2 or more"):
        ltx2_plan(one, spec=SPECS["2.3-dev"])
    ltx2_plan(one, spec=SPECS["2.3-distilled"])


def test_samples_without_sound_teach_nothing_to_a_lora_of_sound_and_the_plan_says_so():
    """SOUNDING holds clips with and without a track."""
    silent = [note for note in ltx2_plan('[lora]\nmodalities = "audio"\n').notes if "sound track" in note]
    assert silent and "the others train nothing" in silent[0]
    assert any("the others train video only" in note for note in ltx2_plan().notes)


def test_what_a_run_never_encodes_with_is_no_part_of_its_identity():
    def digests(modalities):
        parts = ltx2_plan(f'[training]\nmodalities = "{modalities}"\n').model.components
        return {name for name, part in parts.items() if part.digest}

    assert digests("both") - digests("video") == {"audio_vae"}
    assert digests("both") - digests("audio") == {"vae"}


def test_each_family_has_faults_of_its_own_to_keep_away_from():
    assert "sound" in ltx2_plan(PROMPT).validation.prompts[0].negative_prompt
    assert "sound" not in plan_for(MINIMAL + PROMPT).validation.prompts[0].negative_prompt
    said = '[validation]\nnegative_prompt = ""\n' + PROMPT
    assert ltx2_plan(said).validation.prompts[0].negative_prompt == ""


def test_ltx2_is_refused_on_a_device_without_float64():
    with pytest.raises(PlanError, match="Apple GPUs.*float64"):
        ltx2_plan(hardware=dataclasses.replace(CPU, kind="mps"))
    plan_for(hardware=dataclasses.replace(CPU, kind="mps"))
