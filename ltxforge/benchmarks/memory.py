"""The suite `memory`: training under the caps of smaller cards, each contender in a fresh process.

Decides when a case is red: our steps do not fit under the cap, which is an error and no warning. A cap bounds what
PyTorch's allocator may reserve, as on a card of that size less what context and desktop take. Peers run under the same
cap, and that they do not fit is what is to be shown. Without a GPU nothing can be capped; small models then tell the
process's own peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.benchmarks.step import why_skipped
from ltxforge.benchmarks.synthetic import plan_of
from ltxforge.errors import Stopped
from ltxforge.hardware import Hardware
from ltxforge.lora.targets import match
from ltxforge.signals import StopRequest
from ltxforge.suites.memory import OURS, MemoryCase, MemoryResult

PROCESS = "ltxforge.benchmarks.memory_process"
HOW = {
    "cap_bytes": "torch.cuda.set_per_process_memory_fraction of a fresh process for each contender: the card's size"
    " less 0.7 GiB for context and desktop",
    "peak_bytes": "allocated and reserved by PyTorch on the device over building and all steps; resident: of the whole"
    " process on the host",
    "medians": "seconds of a step after warm-up",
    "ratios": "the peer's median / our median, where both fit",
}


def begin(cases: Sequence[MemoryCase], hardware: Hardware, told: Told, stop: StopRequest) -> Bench:
    """Ready to measure under caps.

    Raises:
        PlanError: a case's targets match nothing, or it asks for kernels that cannot run here.
    """
    if hardware.kind not in ("cuda", "rocm"):
        told("memory caps need a GPU: here small models tell what the whole process takes, and nothing is capped")
    for case in cases:
        match(case.targets, case.spec, case.trained, case.trained)
        plan_of(case, hardware)
    return Bench(lambda case: measure(case, hardware, told, stop), HOW)


def measure(case: MemoryCase, hardware: Hardware, told: Told, stop: StopRequest) -> MemoryResult:
    """Run ours and the peers under the case's cap. Over the cap is an outcome that ends `bench` with an error."""
    cap = case.cap_bytes if hardware.kind in ("cuda", "rocm") else None
    if reason := why_skipped(case, hardware):
        return MemoryResult(case.name, "skipped", case.settings(), reason)
    if cap is not None and cap > hardware.memory_bytes:
        reason = f"this GPU has less memory than a card of {case.cap_gb:g} GB leaves"
        return MemoryResult(case.name, "skipped", case.settings(), reason)
    answers: dict[str, dict[str, Any]] = {}
    for name in (OURS, *case.peers):
        told(f"{case.name}: {name}{'' if cap is None else f', at most {cap / 2**30:.1f} GiB'}")
        answers[name] = asked(case, name, cap, hardware)
        if stop.requested:
            raise Stopped(stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")
    return judged(case, cap, answers)


def asked(case: MemoryCase, name: str, cap: int | None, hardware: Hardware) -> dict[str, Any]:
    """The answer of a fresh process; one that ends without any has failed."""
    request = {"case": case.model_dump(mode="json"), "contender": name, "cap_bytes": cap, "kind": hardware.kind}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", PROCESS], input=json.dumps(request) + "\n",
        capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment, check=False,
    )  # fmt: skip
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"outcome": "failed", "reason": f"its process ended with {done.returncode}: {last}", "peak_bytes": {}}


def judged(case: MemoryCase, cap: int | None, answers: dict[str, dict[str, Any]]) -> MemoryResult:
    """What the answers mean: ours must fit, and what PyTorch reserved must lie under the cap."""
    ours = answers[OURS]
    outcome, reason = ours["outcome"], ours["reason"]
    reserved = ours["peak_bytes"].get("reserved", 0)
    if cap is not None and outcome == "out of memory":
        outcome, reason = "over the cap", f"does not fit into {cap / 1e9:.2f} GB: {reason}"
    elif cap is not None and reserved > cap:
        outcome, reason = "over the cap", f"PyTorch reserved {reserved / 1e9:.2f} GB of {cap / 1e9:.2f}"
    medians = {name: each["median"] for name, each in answers.items() if each["outcome"] == "measured"}
    return MemoryResult(
        name=case.name,
        outcome=outcome,
        case=case.settings(),
        reason=reason,
        ratios={name: each / medians[OURS] for name, each in medians.items() if OURS in medians and name != OURS},
        cap_bytes=cap,
        peak_bytes={name: each["peak_bytes"] for name, each in answers.items()},
        medians=medians,
        unavailable={
            name: f"{each['outcome']}: {each['reason']}"
            for name, each in answers.items()
            if name != OURS and each["outcome"] != "measured"
        },
    )
