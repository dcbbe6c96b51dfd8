"""One contender's steps in a process of their own, under a memory cap: what `benchmarks/memory.py` starts.

Reads one line of JSON (the case, the contender's name, the cap in bytes or null, the device's kind) and answers with
one line, the last on standard output. Too little memory is an answer, not an error.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch

from ltxforge.benchmarks.step import META, Contender, Ours, Peer, nf4_step, peaks
from ltxforge.benchmarks.step_peers import StockStep
from ltxforge.benchmarks.synthetic import plan_of, synthetic_batch
from ltxforge.errors import NonFiniteError
from ltxforge.hardware import (
    Hardware,
    detect,
    is_out_of_memory,
    reset_peak,
    reset_resident_peak,
    torch_device,
    torch_dtype,
)
from ltxforge.lora.targets import match
from ltxforge.models.random_weights import empty_transformer, random_model, randomly_filled
from ltxforge.plan import MemoryPlan
from ltxforge.signals import StopRequest
from ltxforge.suites.memory import OURS, RESIDENT, MemoryCase
from ltxforge.suites.step import NF4_PEER


def answer(case: MemoryCase, name: str, cap_bytes: int | None, hardware: Hardware) -> dict[str, Any]:
    """{"outcome", "reason", "median", "peak_bytes"} of the steps under the cap."""
    device = torch_device(hardware.kind)
    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(cap_bytes / hardware.memory_bytes)
    reset_peak(device)
    reset_resident_peak()
    try:
        made = contender(name, case, hardware)
        made.run(case.warmup_steps)
        median = statistics.median(made.run(case.steps))
        return {"outcome": "measured", "reason": "", "median": median, "peak_bytes": peaks(device)}
    except NonFiniteError as error:
        return {"outcome": "not finite", "reason": error.what, "peak_bytes": peaks(device)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        return {"outcome": "out of memory", "reason": reason, "peak_bytes": peaks(device)}


def contender(name: str, case: MemoryCase, hardware: Hardware) -> Contender:
    """Ours or a peer, alone on the device."""
    device, dtype, plan = torch_device(hardware.kind), torch_dtype(case.precision), plan_of(case, hardware)
    if name == OURS:
        return Ours(case, plan, device, StopRequest())
    if name == RESIDENT:
        return Ours(case, replace(plan, memory=resident(plan.memory)), device, StopRequest())
    batch = synthetic_batch(case, random_model(case.spec, META, dtype, case.trained))
    if name == NF4_PEER:
        return Peer(name, nf4_step(case, plan, device), batch)
    layers = match(case.targets, case.spec, case.trained, case.trained).layers
    transformer = randomly_filled(empty_transformer(case.spec), device, dtype).requires_grad_(False)
    return Peer(name, StockStep(transformer, case.spec, layers, plan, device), batch)


def resident(memory: MemoryPlan) -> MemoryPlan:
    """The same with all weights and activations on the device."""
    return replace(memory, stream=None, offload_activations=False)


def main() -> None:
    """Answer the one request."""
    request = json.loads(sys.stdin.readline())
    hardware = detect()
    if request["kind"] == "cpu":
        hardware = replace(hardware, kind="cpu", memory_bytes=0)
    case = MemoryCase.model_validate(request["case"])
    told = answer(case, request["contender"], request["cap_bytes"], hardware)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
