"""Too little memory, told so that something can be done: what was planned beside what was found, and what would fit.

Decides the wording. What would fit is for `ways_out.py` to find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ltxforge.errors import DeviceFullError
from ltxforge.hardware import is_out_of_memory, peak_bytes
from ltxforge.memory.costs import compare
from ltxforge.plan import PhasePlan, Plan

Changes = Callable[[PhasePlan, int], Sequence[str]]
"""A phase with its estimate, and the peak that was measured → changes that would fit, a line each."""
SAVED = "What was saved before is whole."
GENERAL = (
    "memory.checkpointing = true may be set at any time; in a new run, lower resolution, frames, batch_size or rank, or"
    " leaving validation out, help too; so does memory.fit, which chooses"
)


@contextlib.contextmanager
def device_full_told(
    plan: Plan, device: torch.device, *phases: str, changes: Changes = lambda _phase, _peak: ()
) -> Iterator[None]:  # fmt: skip
    """Want of memory becomes a DeviceFullError that compares the plan's estimate with the peak.

    Args:
        phases: what goes on, as in `Estimates.phases`: "captions", "clips", "load", "step", …; of several the one
            that is planned to take most is compared.
        changes: told when it happens; the cheapest that would fit, by the phase's estimate and the peak.
    """
    planned = [phase for name in phases if (phase := phase_of(plan, name))]
    most = max(planned, key=lambda phase: phase.device_bytes, default=PhasePlan(phases[0], 0, 0))
    try:
        yield
    except DeviceFullError as error:  # which compares more closely than is possible here
        raise _with_changes(error, changes(most, peak_bytes(device))) from error.__cause__
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_bytes(device)
        told = device_full(plan, most, error, {"all": peak})
        raise _with_changes(told, changes(most, peak)) from error


def device_full(plan: Plan, phase: PhasePlan, error: BaseException, measured: Mapping[str, int]) -> DeviceFullError:
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
    return DeviceFullError("\n".join(lines), remedy=f"{SAVED} {GENERAL}.")


def _with_changes(error: DeviceFullError, changes: Sequence[str]) -> DeviceFullError:
    if not changes:
        return error
    listed = "".join(f"\n    {change}" for change in changes)
    return DeviceFullError(
        error.what, where=error.where, remedy=f"{SAVED} What would fit, by what was measured:{listed}"
    )


def phase_of(plan: Plan, name: str) -> PhasePlan | None:
    """The plan's estimate of a phase, if it has one."""
    return next((phase for phase in plan.estimates.phases if phase.name == name), None)
