"""The choice in words: parts add up, all of a budget is named, nothing is offered that nobody asked for."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ltxforge.cards import GIB
from ltxforge.fit.search import Way, budget_of
from ltxforge.fit.words import describe, next_faster, too_large
from ltxforge.memory.costs import HOST_BASELINE, HOST_CONTEXT
from ltxforge.plan import MemoryPlan, PhasePlan

PHASE = PhasePlan(
    "step", 13 * GIB, 20 * GIB, {"weights": 7 * GIB, "kept activations": 3 * GIB, "gradients": 2 * GIB,
                                 "adapter": GIB, "workspace": 1000}
)  # fmt: skip


def told_sizes(text: str) -> list[float]:
    """The parts' sizes in GB."""
    _, _, parts = text.rpartition(": ")
    found = re.findall(r"([\d.]+) (GB|MB)", parts)
    return [float(size) / (1 if unit == "GB" else 1024) for size, unit in found]


@pytest.mark.parametrize(
    ("device", "host", "shared", "whole", "said"),
    [
        (12, 64, False, 13, "on the device, of which a run may have 11.3 GB of 12.0 GB, after context and desktop"),
        (80, 12, False, 20, "6.0 GB of 12.0 GB, as a step may fill it with what is pinned: "),
        (0, 16, True, 20, "14.0 GB of 16.0 GB, after 2.0 GB kept for the system"),
        (8, 64, True, 20, "of which a run may have 8.0 GB: "),
    ],
)
def test_parts_add_up_and_the_budget_is_told_in_full(device, host, shared, whole, said):
    budget = budget_of(device * GIB, host * GIB, shared=shared)
    text = too_large(budget, PHASE)
    taken = float(re.search(r"would take ([\d.]+) GB", text)[1])
    assert said in text and taken >= whole and " 0 MB" not in text
    assert sum(told_sizes(text)) == pytest.approx(taken, abs=0.3)


def test_the_host_s_libraries_are_a_part():
    alone = too_large(budget_of(0, 16 * GIB, shared=True), PHASE)
    beside = too_large(budget_of(80 * GIB, 12 * GIB, shared=False), PHASE)
    baselines = HOST_BASELINE / GIB, (HOST_BASELINE + HOST_CONTEXT) / GIB
    assert [f"{size:.1f}" for size in baselines] == ["0.5", "1.7"]
    assert "Python, torch and their libraries 560 MB" in alone
    assert "Python, torch and their libraries 1.7 GB" in beside and "what waits there" in beside


def test_an_unquantised_base_is_called_so_in_both_places():
    nf4, whole = (
        Way(MemoryPlan(base_precision=base), "adamw", seconds) for base, seconds in (("nf4", 1.1), ("bf16", 1))
    )
    text = next_faster(nf4, whole, 3 * GIB, 1000, 28, "fp32")
    assert text == (
        "with 3.0 GB more on the device: base not quantised, fp32, 1.10x faster (the first step of about 1.1x)"
    )
    assert describe(whole, 28, "fp32").startswith("base not quantised, fp32, ")
    assert "step of" not in next_faster(dataclasses.replace(nf4, seconds=2), whole, GIB, 0, 28)
