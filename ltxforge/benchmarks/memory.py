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
from ltxforge.benchmarks.step import META, why_skipped
from ltxforge.benchmarks.synthetic import bucket_of, plan_of
from ltxforge.errors import Stopped
from ltxforge.hardware import Hardware, torch_dtype
from ltxforge.lora.targets import match
from ltxforge.memory.costs import Costs, precision_key, step_phase
from ltxforge.memory.trace import block_work
from ltxforge.models.random_weights import random_model
from ltxforge.signals import StopRequest
from ltxforge.suites.case import Outcome
from ltxforge.suites.memory import OURS, RESIDENT, MemoryCase, MemoryResult

ESTIMATE_BOUND = 0.05
"""How far, relatively, the planner may be from what tensors take."""
PROCESS = "ltxforge.benchmarks.memory_process"
HOW = {
    "cap_bytes": "torch.cuda.set_per_process_memory_fraction of a fresh process for each contender: the card's size"
    " less 0.7 GiB for context and desktop",
    "peak_bytes": "allocated and reserved by PyTorch on the device over building and all steps; resident: of the whole"
    " process on the host",
    "medians": "seconds of a step after warm-up",
    "estimated_bytes": "what the planner says that a step of ours takes on the device, of tensors alone",
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
        bound = None if name == RESIDENT else cap
        told(f"{case.name}: {name}{'' if bound is None else f', at most {bound / 2**30:.1f} GiB'}")
        answers[name] = asked(case, name, bound, hardware)
        if stop.requested:
            raise Stopped(stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")
    return judged(case, cap, answers, estimate(case, hardware))


def estimate(case: MemoryCase, hardware: Hardware) -> int:
    """What the planner says that a step of ours takes on the device, in bytes of tensors."""
    plan, spec = plan_of(case, hardware), case.spec
    bucket = bucket_of(case, random_model(spec, META, torch_dtype(case.precision), case.trained))
    work = block_work(plan, spec, bucket, plan.memory.base_precision, plan.memory.double_quant)
    adapter = match(case.targets, spec, case.trained, case.trained).tensor_sizes(case.rank)
    costs = Costs(
        hardware.kind, case.precision, spec.blocks, {precision_key(plan.memory): work}, adapter, case.accumulate
    )
    return step_phase(costs, plan.memory, case.optimizer).device_bytes


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


def broken_promise(case: MemoryCase, taken: int, estimated: int | None) -> tuple[Outcome, str]:
    """("measured", "") where the tensors' peak is what was promised and estimated."""
    if case.most_gb is not None and taken > case.most_gb * 1e9:
        return "over the cap", f"tensors took {taken / 1e9:.2f} GB, and {case.most_gb:g} are promised"
    if estimated is not None and abs(estimated / taken - 1) > ESTIMATE_BOUND:
        return "gate failed", f"tensors took {taken / 1e9:.2f} GB, and the planner says {estimated / 1e9:.2f}"
    return "measured", ""


def judged(
    case: MemoryCase, cap: int | None, answers: dict[str, dict[str, Any]], estimated: int | None = None
) -> MemoryResult:
    """What the answers mean: ours must fit, what PyTorch reserved must lie under the cap, and what tensors took must be
    within what the case promises and near what the planner said. Only a GPU tells what tensors took.
    """
    ours = answers[OURS]
    outcome, reason = ours["outcome"], ours["reason"]
    reserved = ours["peak_bytes"].get("reserved", 0)
    if cap is not None and outcome == "out of memory":
        outcome, reason = "over the cap", f"does not fit into {cap / 1e9:.2f} GB: {reason}"
    elif cap is not None and reserved > cap:
        outcome, reason = "over the cap", f"PyTorch reserved {reserved / 1e9:.2f} GB of {cap / 1e9:.2f}"
    elif outcome == "measured" and cap is not None:
        outcome, reason = broken_promise(case, ours["peak_bytes"]["allocated"], estimated)
    medians = {name: each["median"] for name, each in answers.items() if each["outcome"] == "measured"}
    return MemoryResult(
        name=case.name,
        outcome=outcome,
        case=case.settings(),
        reason=reason,
        ratios={name: each / medians[OURS] for name, each in medians.items() if OURS in medians and name != OURS},
        cap_bytes=cap,
        estimated_bytes=estimated,
        peak_bytes={name: each["peak_bytes"] for name, each in answers.items()},
        medians=medians,
        unavailable={
            name: f"{each['outcome']}: {each['reason']}"
            for name, each in answers.items()
            if name != OURS and each["outcome"] != "measured"
        },
    )
