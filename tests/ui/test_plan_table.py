"""The plan's table: every number of the plan is in it, with its origin, at any width and without colour."""

import dataclasses
import io
import re

import pytest
from ltxforge_kernels.choice import Choice, Kernels, TokenRange
from rich.console import Console

from ltxforge.plan import (
    AudioPlan,
    CachePlan,
    CheckpointPlan,
    ConditioningPlan,
    Estimates,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    OptimizerPlan,
    PhasePlan,
    PromptPlan,
    StreamPlan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.shapes import ClipShape
from ltxforge.ui.memory_table import checkpointed
from ltxforge.ui.plan_table import plan_table


def shown(plan, quantiles=None, width=100):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(plan_table(plan, quantiles))
    return stream.getvalue()


PROMPTS = (
    PromptPlan("fox", "A fox.", "blurry", "", ClipShape(768, 512, 121), 24.0, 37, 3.5, 4711),
    PromptPlan("cat", "A cat.", "", "/pictures/first [red]frame.png", ClipShape(512, 512, 97), 25.0, 37, 1.0, 43),
)
OPTIMIZER = OptimizerPlan("adamw8bit", 1.7e-4, (0.83, 0.987), 3e-9, 0.013, "polynomial", 71, 4007, 0.1, 2.3)
# Each group of changes, and the texts that must then be read; numbers chosen so that none appears by chance.
SHOWN = [
    ({"seed": 98765, "steps": 4321, "steps_per_epoch": 43.21}, ["98765", "4,321", "43.21", "100 epochs"]),
    (
        {"optimizer": OPTIMIZER},
        ["adamw8bit", "1.7e-4", "0.83, 0.987", "3e-9", "0.013", "polynomial", "71 steps", "4,007", "1.7e-5", "2.3"],
    ),
    ({"training": TrainingPlan(7, 11, None, 0.37)}, ["7", "11 (up to 77 samples a step)", "clip value", "0.37"]),
    ({"training": TrainingPlan(1, 1, None, None, compile=True)}, ["each block as a whole"]),
    ({"training": TrainingPlan(1, 1, None, None)}, ["no block", "clip norm", "off", "1 (up to 1 sample a step)"]),
    ({"lora": LoraPlan(16, 24.0, 0.05, True, ("to_q", "re:ff.*"), "fp16")},
     ["scale 6", "rsLoRA", "0.05", "re:ff.*", "fp16"]),
    ({"flow": FlowPlan("logit-normal", 3.1, False, 0.07)}, ["logit-normal", "3.1 (mu = ln 3.1)", "7 %"]),
    ({"conditioning": ConditioningPlan(0.31, 0.17, 219)}, ["31 %", "17 %", "219 tokens"]),
    ({"memory": MemoryPlan((0, 3, 6), blocks=9)},
     ["every 3 blocks", "not quantised, fp32", "all weights stay", "whole"]),
    ({"memory": MemoryPlan(tuple(range(5)), "nf4", True, "host", "int8", StreamPlan(((1,), (3,))), True, 384, 32, True,
                           "12GB", (12 * 2**30, 64 * 2**30), blocks=5),
      "estimates": Estimates(choices=("everything resident does not fit", "2.07x of the time"))},
     ["12GB (12.0 GB of device memory, 64.0 GB of host memory)", "nf4, its scales quantised too", "on the host",
      "every block", "2 blocks wait in host memory, copied one by one, beside", "int8",
      "wait in host memory for the backward pass", "tiles of 384 pixels and 32 frames", "before the first step",
      "everything resident does not fit", "2.07x of the time"]),
    ({"memory": MemoryPlan(stream=StreamPlan(((0, 1), (2, 3)), "block", False, "/fast [disk]"))},
     ["4 blocks wait in the folder /fast [disk], copied 2 at a time, in turn"]),
    ({"memory": MemoryPlan(stream=StreamPlan(((0,), (1,)), "leaf"))}, ["copied layer by layer"]),
    ({"checkpoint": CheckpointPlan(123, 5)}, ["every 123 steps, the newest 5 stay"]),
    ({"validation": ValidationPlan(77, True, PROMPTS)}, ["every 77 steps, and before the first step", "fox", "4711",
                                                         "768x512x121", "37", "3.5", "first [red]frame.png", "24"]),
    ({"validation": ValidationPlan(77, True, ())}, ["no validation prompts"]),
    ({"estimates": Estimates(123_000_000, 2_340_000, {}, 45_000_000, 6_700_000, 8_900_000_000)},
     ["123 MB", "at most 2.3 MB in the cache", "45.0 MB each, 90.0 MB in all", "6.7 MB", "8.9 GB"]),
    ({"training": TrainingPlan(1, 1, None, None, "audio")}, ["modalities", "audio alone"]),
    ({"lora": LoraPlan(16, 16.0, 0, False, ("to_q",), modalities="both")}, ["modalities", "video and audio, jointly"]),
    ({"name": "a [b]", "notes": ("look [bold]here[/bold]\x1b[2J",)}, ["a [b]", "look [bold]here[/bold]\\x1b[2J"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), SHOWN)
def test_every_number_is_in_the_table(plan_maker, changes, expected):
    text = shown(plan_maker(**changes))
    for told in expected:
        assert told in text


def test_model_device_data_and_quantiles(plan_maker):
    plan = plan_maker("tiny/ltx-video-0.9.8")
    text = shown(plan, {"96x64x17": [0.111, 0.222, 0.333, 0.444, 0.555]})
    for told in ("tiny/ltx-video-0.9.8", "0.9.8-2b-distilled", "max(0, 8j - 7)/fps", "exact: a test", "fp32 base",
                 "6 windows of 6 clips", "made-up", "64x64x9", "96x64x17", "0.111", "0.555", "10 %"):  # fmt: skip
        assert told in text
    named = dataclasses.replace(plan, validation=ValidationPlan(1, False, PROMPTS))
    assert "981.25" in " ".join(shown(named, width=200).split()), "the distilled timesteps are printed"


def test_each_row_names_who_decided_it(plan_maker):
    plan = plan_maker(origins={"optimizer.learning_rate": "recipe", "lora.rank": "default", "model.version": "weights"})
    rows = {
        line.split("  ")[1].strip(): line.split()[-1] for line in shown(plan).splitlines() if line.startswith("   ")
    }
    assert (rows["learning rate"], rows["rank"], rows["version"]) == ("recipe", "default", "weights")
    assert rows["precision"] != "recipe"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_any_width(plan_maker, width):
    plan = plan_maker(validation=ValidationPlan(77, True, PROMPTS), notes=("word " * 60,))
    lines = shown(plan, {"96x64x17": [0.1] * 5}, width).splitlines()
    assert max(map(len, lines)) <= width
    assert width < 80 or any("7 768x512x121" not in line and "4711" in line for line in lines)


LTX2_PROMPT = PromptPlan(
    "a", "A bell.", "noise", "", ClipShape(768, 512, 121), 24.0, 30, 3.25, 1, 7.25, 1.5, (28,), 2.75, 0.65
)
TEXT_BYTES = {"connectors": 15_728_640, "features": 184_320}


def ltx2(plan_maker, **changes):
    """A joint plan of LTX-2: two samples with sound of their own, one with a file beside it, three without."""
    usual = {"audio": AudioPlan("independent", 0.75), "training": TrainingPlan(2, 2, 1.0, None, "both"),
             "estimates": Estimates(1, 15_728_640, TEXT_BYTES),
             "validation": ValidationPlan(1, False, (LTX2_PROMPT,))}  # fmt: skip
    plan = plan_maker("tiny/ltx2", **usual | changes)
    components = {**plan.model.components, "audio_vae": plan.model.components["vae"]}
    sounds = ("own", "own", "digest", "", "", "")
    data = dataclasses.replace(
        plan.data,
        samples=tuple(dataclasses.replace(s, sound=sound) for s, sound in zip(plan.data.samples, sounds, strict=True)),
        buckets=tuple(dataclasses.replace(b, audio_tokens=126, with_sound=3, video_bytes=3_000_000, audio_bytes=64_000)
                      for b in plan.data.buckets),
    )  # fmt: skip
    return dataclasses.replace(plan, data=data, model=dataclasses.replace(plan.model, components=components))


def told(plan, width=120):
    return " ".join(shown(plan, width=width).split())


def test_a_joint_plan_tells_all_about_sound(plan_maker):
    text = told(ltx2(plan_maker))
    for expected in (
        "modalities video and audio, jointly", "sound 3 of 6 samples have a sound track, 1 from a file beside the clip",
        "sound's sigma independent: a draw of its own", "sound's weight 0.75 beside the video's 1",
        "bucket fps tokens of sound samples with sound a sample weighs", "126 4 3 3.1 MB",
        "LTX2Pipeline", "guidance 3.25 of the video", "7.25 of the sound", "STG 1.5 in block 28",
        "modality guidance 2.75", "rescale 0.65", "decoding whole", "shifted by the number of tokens",
    ):  # fmt: skip
        assert expected in text, expected
    assert "LTX2ImageToVideoPipeline" not in text


def test_sound_without_weight_is_said_to_be_context(plan_maker):
    plan = ltx2(plan_maker)
    text = told(dataclasses.replace(plan, audio=dataclasses.replace(plan.audio, loss_weight=0.0)))
    assert "sound's weight 0: context only" in text


@pytest.mark.parametrize(
    ("steps", "epochs"), [(53, "1 epoch "), (106, "2 epochs "), (27, "0.509 epochs "), (106_000, "2,000 epochs ")]
)
def test_one_epoch_is_one(plan_maker, steps, epochs):
    text = told(dataclasses.replace(plan_maker(), steps=steps, steps_per_epoch=53.0))
    assert f"steps {steps:,}, {epochs}" in text
    assert "1 step max" in told(dataclasses.replace(plan_maker(), steps_per_epoch=1.0))


@pytest.mark.parametrize(
    ("again", "blocks", "words"),
    [
        ((), 48, "off"),
        (tuple(range(48)), 48, "every block"),
        (tuple(range(47)), 48, "47 of 48 blocks"),
        (tuple(range(0, 48, 5)), 48, "every 5 blocks"),
        ((0, 3, 6), 48, "3 of 48 blocks"),
        ((0,), 48, "1 of 48 blocks"),
        ((0,), 1, "every block"),
        ((0, 1), 0, "2 blocks"),
    ],
)
def test_it_is_every_block_only_where_none_is_left_out(again, blocks, words):
    assert checkpointed(again, blocks) == words


def test_a_plan_without_phases_says_how_to_get_them(plan_maker):
    assert "ask for it here with memory.fit" in told(plan_maker())
    counted = told(plan_maker(estimates=Estimates(phases=PHASES)))
    assert "with memory.fit" not in counted and "GB here are 2^30 bytes" in counted


def test_what_a_caption_weighs_either_way_is_told(plan_maker):
    text = told(ltx2(plan_maker))
    assert "a caption 15.7 MB in the cache: what the connectors make of it" in text
    assert 'cache.text_cache = "features": about 184 kB in the cache' in text
    features = Estimates(1, 184_320, TEXT_BYTES)
    text = told(ltx2(plan_maker, cache=CachePlan("x", "mean", "features"), estimates=features))
    assert "a caption about 184 kB in the cache: what the connectors are fed" in text
    assert 'cache.text_cache = "connectors": 15.7 MB' in text


def test_samples_of_ltx2_by_image_frugal_and_unguided(plan_maker):
    prompt = dataclasses.replace(
        LTX2_PROMPT, image="a.png", frugal=True, guidance=1.0, audio_guidance=1.0, stg=0.0, stg_blocks=(),
        modality_guidance=1.0, rescale=0.0,
    )  # fmt: skip
    text = told(ltx2(plan_maker, validation=ValidationPlan(1, False, (prompt,))))
    for expected in ("pipeline LTX2ImageToVideoPipeline", "STG off", "modality guidance off", "rescale off", "frugal"):
        assert expected in text, expected
    text = told(ltx2(plan_maker, validation=ValidationPlan(1, False, (prompt, LTX2_PROMPT))))
    assert "LTX2Pipeline, LTX2ImageToVideoPipeline" in text and "1, 3.25 of the video" in text


def test_one_modality_alone_tells_only_what_it_has(plan_maker):
    audio = told(ltx2(plan_maker, training=TrainingPlan(2, 2, 1.0, None, "audio")))
    assert "audio alone" in audio and "sound's weight 0.75" in audio
    assert "beside the video's" not in audio and "sound's sigma" not in audio
    video = told(ltx2(plan_maker, audio=None, training=TrainingPlan(2, 2, 1.0, None, "video")))
    assert "video alone" in video and "of sound samples" not in video and "sound's" not in video


# Fields that the table does not name one by one, and why.
ELSEWHERE = {
    "format": "of the file, not of the run",
    "origins": "are the last column",
    "data.samples": "are counted; the verdicts list the clips",
    "estimates.text_bytes": "stand beside each other for LTX-2, see above; other models have one way",
    "kernels.choices": "are grouped, see below",
    "memory.blocks": "stand beside those that are computed again, where these are some",
    "estimates.phases": "stand in a table of their own, see below",
    "cache.text": "is read by LTX-2 alone, see above",
}


def test_no_field_was_added_without_a_place_in_the_table(plan_maker):
    """Changes each leaf of the plan in turn; the text must change with it."""
    plan = plan_maker(
        validation=ValidationPlan(77, True, PROMPTS),
        optimizer=OPTIMIZER,
        flow=FlowPlan("logit-normal", 3.1, False, 0.07),
        memory=MemoryPlan(base_precision="nf4", decode_tile=512, decode_frames=64),
    )
    usual = shown(plan, width=200)
    silent = {name for name, other in changed_leaves(plan) if shown(other, width=200) == usual}
    assert silent == set()


def changed_leaves(plan):
    for item in dataclasses.fields(plan):
        value = getattr(plan, item.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                name = f"{item.name}.{inner.name}"
                changed = other_value(getattr(value, inner.name))
                if name not in ELSEWHERE and changed is not None:
                    part = dataclasses.replace(value, **{inner.name: changed})
                    yield name, dataclasses.replace(plan, **{item.name: part})
        elif item.name not in ELSEWHERE:
            changed = other_value(value)
            if changed is not None:
                yield item.name, dataclasses.replace(plan, **{item.name: changed})


def other_value(value):
    """A value of the same kind that differs; None where there is no simple one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 40_000_000 if (isinstance(value, int) and value > 1000) or value == 0 else value * 2
    if isinstance(value, str):
        return value + "q"
    if isinstance(value, tuple) and value and isinstance(value[0], (str, float)):
        return (*value[:-1], other_value(value[-1]))
    if isinstance(value, tuple) and not value:
        return ("something new",)
    if isinstance(value, dict) and not value:
        return {"torch": "9.9"}
    return None


def test_how_each_op_is_computed_is_told_in_as_few_rows_as_there_are_answers(plan_maker):
    choices = [Choice(op, "triton", "Triton 4.5.6 on sm_90") for op in ("gelu", "lora_linear")]
    small = TokenRange(0, 1119, 8192, "compile", "h200/kernels.json")
    one = told(plan_maker(kernels=Kernels(tuple(choices)), origins={"kernels.gelu": "x", "kernels.lora_linear": "x"}))
    assert "kernels triton: Triton 4.5.6 on sm_90 x" in one
    choices[0] = Choice("gelu", "eager", "because", (small,))
    text = told(plan_maker(kernels=Kernels(tuple(choices))))
    assert "kernels eager for gelu: because triton for lora_linear: Triton 4.5.6 on sm_90 gelu: compile up to" in text


PHASES = (
    PhasePlan("captions", 9 * 2**30, 21 * 2**30, {"weights": 8 * 2**30, "work": 2**30}),
    PhasePlan("step", 6 * 2**30, 3 * 2**30, {"weights": 4 * 2**30, "kept activations": 2**30, "adapter": 2**28,
                                             "one block's work": 3 * 2**28}),
)  # fmt: skip


@pytest.mark.parametrize("width", range(60, 130, 7))
def test_a_number_is_not_parted_from_its_unit(plan_maker, width):
    plan = plan_maker(estimates=Estimates(phases=PHASES))
    cells = shown(dataclasses.replace(plan, device=dataclasses.replace(plan.device, kind="cuda")), width=width)
    assert not [text for text in cells.splitlines() if re.fullmatch(r" *(GB|MB)(,.*)?|.* \d+\.\d", text.rstrip())]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_phase_is_shown_against_what_there_is(plan_maker, width):
    plan = plan_maker(
        memory=MemoryPlan(budget=(12 * 2**30, 32 * 2**30)), estimates=Estimates(phases=PHASES), assumed=("weights",),
    )  # fmt: skip
    plan = dataclasses.replace(plan, device=dataclasses.replace(plan.device, kind="cuda"))
    text = shown(plan, width=width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        row = next(line for line in text.splitlines() if line.split()[:1] == ["captions"])
        assert "█" * 6 in row and "9.0 GB" in row and "21.0 GB" in row and "assumed" in row
        assert "device, of 12.0 GB" in text and "host, of 32.0 GB" in text
        told = " ".join(text.split())
        assert "weights 4.0 GB" in told and "adapter 256 MB" not in told and "adapter 0.2 GB" not in told
    on_cpu = shown(dataclasses.replace(plan, device=dataclasses.replace(plan.device, kind="cpu")), width=100)
    assert "device, of" not in on_cpu and "host, of 32.0 GB" in on_cpu
