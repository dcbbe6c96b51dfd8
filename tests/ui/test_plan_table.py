"""The plan's table: every number of the plan is in it, with its origin, at any width and without colour."""

import dataclasses
import io

import pytest
from rich.console import Console

from ltxforge.plan import (
    CheckpointPlan,
    ConditioningPlan,
    Estimates,
    FlowPlan,
    LoraPlan,
    MemoryPlan,
    OptimizerPlan,
    PromptPlan,
    TrainingPlan,
    ValidationPlan,
)
from ltxforge.shapes import ClipShape
from ltxforge.ui.plan_table import plan_table


def shown(plan, quantiles=None, width=100):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(plan_table(plan, quantiles))
    return stream.getvalue()


PROMPTS = (
    PromptPlan("fox", "A fox.", "blurry", "", ClipShape(768, 512, 121), 24.0, 37, 3.5, 4711),
    PromptPlan("cat", "A cat.", "", "/pictures/first [red]frame.png", ClipShape(512, 512, 97), 25.0, 37, 1.0, 43),
)
OPTIMIZER = OptimizerPlan("adamw-8bit", 1.7e-4, (0.83, 0.987), 3e-9, 0.013, "polynomial", 71, 4007, 0.1, 2.3)
# Each group of changes, and the texts that must then be read; numbers chosen so that none appears by chance.
SHOWN = [
    ({"seed": 98765, "steps": 4321, "steps_per_epoch": 43.21}, ["98765", "4,321", "43.21", "100 epochs"]),
    (
        {"optimizer": OPTIMIZER},
        ["adamw-8bit", "1.7e-4", "0.83, 0.987", "3e-9", "0.013", "polynomial", "71 steps", "4,007", "1.7e-5", "2.3"],
    ),
    ({"training": TrainingPlan(7, 11, None, 0.37)}, ["7", "11 (up to 77 samples a step)", "clip value", "0.37"]),
    ({"training": TrainingPlan(1, 1, None, None)}, ["clip norm", "off", "1 (up to 1 sample a step)"]),
    ({"lora": LoraPlan(16, 24.0, 0.05, True, ("to_q", "re:ff.*"), "fp16")},
     ["scale 6", "rsLoRA", "0.05", "re:ff.*", "fp16"]),
    ({"flow": FlowPlan("logit-normal", 3.1, False, 0.07)}, ["logit-normal", "3.1 (mu = ln 3.1)", "7 %"]),
    ({"conditioning": ConditioningPlan(0.31, 0.17, 219)}, ["31 %", "17 %", "219 tokens"]),
    ({"memory": MemoryPlan(3)}, ["every 3 blocks"]),
    ({"checkpoint": CheckpointPlan(123, 5)}, ["every 123 steps, the newest 5 stay"]),
    ({"validation": ValidationPlan(77, True, PROMPTS)}, ["every 77 steps, and before the first step", "fox", "4711",
                                                         "768x512x121", "37", "3.5", "first [red]frame.png", "24"]),
    ({"validation": ValidationPlan(77, True, ())}, ["no validation prompts"]),
    ({"estimates": Estimates(123_000_000, 45_000_000, 6_700_000, 8_900_000_000)},
     ["123 MB", "45.0 MB each, 90.0 MB in all", "6.7 MB", "8.9 GB"]),
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


# Fields that the table does not name one by one, and why.
ELSEWHERE = {
    "format": "of the file, not of the run",
    "origins": "are the last column",
    "data.samples": "are counted; the verdicts list the clips",
}


def test_no_field_was_added_without_a_place_in_the_table(plan_maker):
    """Changes each leaf of the plan in turn; the text must change with it."""
    plan = plan_maker(
        validation=ValidationPlan(77, True, PROMPTS),
        optimizer=OPTIMIZER,
        flow=FlowPlan("logit-normal", 3.1, False, 0.07),
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
