"""Which formats a run computes in on which card, and by how much fp16's loss is scaled."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ltxforge import hardware
from ltxforge.kernel_choices import choose_kernels, used_ops
from ltxforge.plan import BucketPlan
from ltxforge.precision import loss_scale, precision_remarks, precisions
from ltxforge.recipe.parse import parse
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS

RECIPE = '[model]\nbase = "tiny/ltx-video"\n[run]\nsteps = 1\n[[dataset]]\npath = "x"\n'
CPU = dataclasses.replace(hardware.detect(), kind="cpu", has_bf16=False)


def card(*capability: int) -> hardware.Hardware:
    return hardware.assumed("a card", 10 * capability[0] + capability[1], 16 * 2**30, 32 * 2**30)


@pytest.mark.parametrize(
    ("machine", "said", "expected"),
    [
        (CPU, "", ("fp32", "fp32")),
        (card(8, 6), "", ("bf16", "bf16")),
        (card(7, 0), "", ("fp32", "fp32")),
        (card(7, 5), "", ("fp32", "fp32")),
        (card(7, 5), "fp16", ("fp16", "fp32")),
        (card(8, 6), "fp16", ("fp16", "bf16")),
    ],
)
def test_precisions_by_card_and_recipe(machine, said, expected):
    recipe = parse(RECIPE + (f'[training]\nprecision = "{said}"\n' if said else ""), "mine.toml").recipe
    assert precisions(recipe, machine, None) == expected


@pytest.mark.parametrize(
    ("machine", "precision", "said"),
    [
        (card(7, 5), "bf16", "by way of fp32, slowly"), (card(8, 6), "fp16", "bf16 has the range"),
        (card(7, 5), "fp16", ""), (card(8, 6), "bf16", ""), (CPU, "bf16", ""), (CPU, "fp16", ""),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_card_is_told(machine, precision, said):
    remarks = precision_remarks(precision, machine)
    assert said in "".join(remarks) and bool(remarks) == bool(said)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_without_bf16_units_our_kernels_are_off_with_the_reason(capability):
    kernels = choose_kernels(used_ops("video"), card(*capability).machine, "fp16", "fp32")
    assert {choice.implementation for choice in kernels.choices} == {"eager"}
    assert all(f"this is sm_{capability[0]}{capability[1]}" in choice.reason for choice in kernels.choices)


@pytest.mark.parametrize(
    ("version", "size", "samples", "modalities", "log2"),
    [
        ("0.9.5", ClipShape(768, 512, 121), 1, "video", 14),  # 6144 tokens of 128 numbers: 2^19.6, 6 below
        ("0.9.5", ClipShape(768, 512, 121), 8, "video", 17),
        ("2.0-dev", ClipShape(768, 512, 121), 1, "both", 14),
        ("2.0-dev", ClipShape(768, 512, 121), 1, "audio", 8),
        ("0.9.5", ClipShape(32, 32, 1), 1, "video", 1),
    ],
)
def test_the_scale_follows_from_how_many_numbers_a_loss_is_the_mean_of(version, size, samples, modalities, log2):
    spec = SPECS[version]
    bucket = BucketPlan(size, 25.0, size.latent().tokens, 1, round(size.frames / 25 * 25))
    assert loss_scale("fp16", [bucket], spec, modalities, samples) == 2.0**log2
    assert (
        loss_scale("bf16", [bucket], spec, modalities, samples) == 1 == loss_scale("fp32", [bucket], spec, "video", 1)
    )
    assert math.log2(loss_scale("fp16", [bucket], spec, modalities, samples)).is_integer()
