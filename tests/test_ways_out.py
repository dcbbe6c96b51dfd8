"""When a planned run does not fit: the planner's own refusal for less memory names what would."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltxforge.assumed import Elsewhere, machine
from ltxforge.device_full import phase_of
from ltxforge.events import ignore
from ltxforge.facts import ask, places
from ltxforge.plan import PhasePlan
from ltxforge.planner import make_plan
from ltxforge.recipe.parse import load
from ltxforge.signals import StopRequest
from ltxforge.ways_out import ways_out

RECIPE = Path(__file__).resolve().parent.parent / "recipes/ltx-video-lora.toml"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.sweep  # the search for changes takes some seconds
@pytest.mark.usefixtures("alone")
def test_a_measured_excess_leads_to_changes_that_fit():
    """A step that takes three times its estimate on a 24 GB card: as if that had 8 GB."""
    parsed = load(RECIPE, ("validation=",))
    facts = ask(Elsewhere(places(parsed, None), machine("RTX 4090", None), 1), parsed, ignore, StopRequest())
    step = phase_of(make_plan(parsed.recipe, facts), "step")
    assert step is not None
    changes = ways_out(parsed.recipe, facts, step, 3 * step.device_bytes)
    assert 0 < len(changes) <= 3 and all(change.startswith("--set ") for change in changes)
    assert not any("fit=auto" in change for change in changes), "that would choose for all of the device"
    assert ways_out(parsed.recipe, facts, step, step.device_bytes) == (), "it fits as it is: nothing is known"
    assert ways_out(parsed.recipe, facts, PhasePlan("step", 0, 0), 10) == ()


@pytest.mark.usefixtures("alone")
def test_a_recipe_that_fits_itself_is_given_less():
    parsed = load(RECIPE, ("validation=", "memory.fit=24GB"))
    facts = ask(Elsewhere(places(parsed, None), machine("RTX 4090", None), 1), parsed, ignore, StopRequest())
    (change,) = ways_out(parsed.recipe, facts, PhasePlan("step", 10 * 2**30, 0), 12 * 2**30)
    assert change.startswith("--set memory.fit=20.0GB")
