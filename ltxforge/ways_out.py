"""What would fit, when a run that was planned to fit did not: the planner is asked again, with less memory.

How much less follows from the measurement: where a phase took a fifth more than its estimate, a fifth less is given to
the next plan. Decides no plan itself; the changes are those that a refusal names.
"""

from __future__ import annotations

from dataclasses import replace

from ltxforge.errors import PlanError
from ltxforge.plan import PhasePlan
from ltxforge.planner import Facts, make_plan
from ltxforge.recipe.schema import Recipe

LEAST_EXCESS = 1.05
"""The estimate is taken to be at least so far below the truth: what was asked for when it failed is in no peak."""


def ways_out(recipe: Recipe, facts: Facts, phase: PhasePlan, peak: int) -> tuple[str, ...]:
    """The cheapest changes, as they are typed; none where none are known.

    Args:
        phase: that found too little memory, with its estimate.
        peak: the most that its tensors took until then, 0 where the device does not count.
    """
    if not phase.device_bytes:
        return ()
    limit = int(facts.hardware.budget_bytes * phase.device_bytes / max(peak, LEAST_EXCESS * phase.device_bytes))
    fitted = f"--set memory.fit={limit / 2**30:.1f}GB"
    if recipe.memory.fit:
        return (f"{fitted}   (chooses anew, for less)",)
    smaller = replace(facts.hardware, memory_bytes=limit, free_bytes=min(facts.hardware.free_bytes, limit))
    try:
        make_plan(recipe, replace(facts, hardware=smaller))
    except PlanError as error:
        lines = (line.strip() for line in error.remedy.splitlines())
        # "auto" would choose for all of the device.
        return tuple(line.replace("--set memory.fit=auto", fitted) for line in lines if line.startswith("--set"))
    return ()
