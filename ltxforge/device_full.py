"""Too little memory, told so that something can be done: what was planned beside what was found, and what would fit.

Decides the wording. Which changes are the cheapest the search knows (`fit.py`); here they come as sentences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from ltxforge.errors import DeviceFullError
from ltxforge.hardware import is_out_of_memory, peak_bytes
from ltxforge.memory.costs import compare
from ltxforge.plan import PhasePlan, Plan

GENERAL = (
    "memory.checkpointing = true may be set at any time; in a new run, lower resolution, frames, batch_size or rank, or"
    " leaving validation out, help too; so does memory.fit, which chooses"
)


@contextlib.contextmanager
def device_full_told(
    plan: Plan, device: torch.device, *phases: str, changes: Sequence[str] = ()
) -> Iterator[None]:  # fmt: skip
    """Want of memory becomes a DeviceFullError that compares the plan's estimate with the peak.

    Args:
        phases: what goes on, as in `Estimates.phases`: "captions", "clips", "load", "step", …; of several the one
            that is planned to take most is compared.
        changes: the cheapest that would fit, a sentence each.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        planned = [phase for name in phases if (phase := phase_of(plan, name))]
        most = max(planned, key=lambda phase: phase.device_bytes, default=PhasePlan(phases[0], 0, 0))
        raise device_full(plan, most, error, {"all": peak_bytes(device)}, changes) from error


def device_full(
    plan: Plan, phase: PhasePlan, error: BaseException, measured: Mapping[str, int], changes: Sequence[str] = ()
) -> DeviceFullError:
    """The error of a phase that found too little memory.

    Args:
        phase: with the plan's estimate, of no bytes where there is none.
        measured: as `costs.compare` takes it, as far as it was measured; "all" is the peak until it was too much.
    """
    where = "the host" if plan.device.kind == "cpu" else plan.device.name or "the device"
    reason = (str(error).splitlines() or [""])[0]
    lines = [f"{where} has too little memory for the phase {phase.name!r}: {reason}"]
    if phase.device_bytes and measured.get("all"):
        lines += [f"  {line}" for line in compare(phase, measured)]
    saved = "What was saved before is whole, and the same command goes on from it. "
    remedy = f"{saved}{'; or '.join(changes) if changes else GENERAL}."
    return DeviceFullError("\n".join(lines), remedy=remedy)


def phase_of(plan: Plan, name: str) -> PhasePlan | None:
    """The plan's estimate of a phase, if it has one."""
    return next((phase for phase in plan.estimates.phases if phase.name == name), None)
