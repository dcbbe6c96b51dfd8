"""The verb `bench`: measures a suite's cases one after the other and keeps what it found.

Decides what a results file says and where it lies. After each case the file is written anew, so that a machine that is
taken away keeps what was measured. How a case is measured: `step_benchmark.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ltxforge.distributed import refuse_several_processes
from ltxforge.durable import faults_told, write_json
from ltxforge.errors import NonFiniteError
from ltxforge.events import Note
from ltxforge.hardware import Hardware, detect
from ltxforge.lora.targets import match
from ltxforge.signals import StopRequest
from ltxforge.step_benchmark import measure
from ltxforge.suites import StepResult, Suite
from ltxforge.ui.dispatch import Dispatcher
from ltxforge.ui.results_table import results_table
from ltxforge.ui.screen import Screen

FORMAT = 1
PACKAGES = ("diffusers", "transformers", "peft", "triton")
HOW = {
    "step_seconds": "whole steps of the trainer's own loop after warm-up, from one synchronisation with the device to"
    " the next; latents and prompts are synthetic and already in the host's memory, weights random",
    "phase_seconds": "medians; backward holds the loss, what checkpointing recomputes, and clipping",
    "peak_bytes": "allocated and reserved by PyTorch on the device while training, weights included; resident: of the"
    " whole process on the host",
    "model_flops": "per step: 2 for each multiply-add of every matrix product in forward and backward, attention"
    " included, without gradients of frozen weights and without what checkpointing recomputes",
    "tflops_per_second": "model_flops / the median step",
}


def run(suite: Suite, path: Path, named: Sequence[str], out: Path | None, screen: Screen) -> Path:
    """Measure the suite's cases and return where the results lie.

    Args:
        path, named, out: the suite's file, and what --case and --out said.

    Raises:
        PlanError: a case's targets match nothing; before anything is built.
        NonFiniteError: a case's loss was NaN or infinite; after all cases, everything being written.
    """
    refuse_several_processes(os.environ)
    for case in suite.case:
        match(case.targets, case.spec, case.trained, case.trained)
    hardware = detect()
    target = out or default_results(path, hardware)
    head = about(suite, command(path, named), hardware)
    results: list[StepResult] = []
    with StopRequest() as stop, faults_told(target.parent), Dispatcher([screen]) as emit:
        for line in hardware.missing:
            emit(Note(line, "warning"))
        for case in suite.case:
            results.append(measure(case, hardware, lambda text: emit(Note(text)), stop))
            emit(Note(_outcome(results[-1])))
            write_json(target, {**head, "cases": [to_json(result) for result in results]})
        screen.show(results_table(results))
        emit(Note(f"results: {target}"))
    _require_finite(results, target)
    return target


def _outcome(result: StepResult) -> str:
    return f"{result.name}: {result.outcome}{f' ({result.reason})' if result.reason else ''}"


def _require_finite(results: Sequence[StepResult], target: Path) -> None:
    if broken := [result.name for result in results if result.outcome == "not finite"]:
        raise NonFiniteError(
            f"the loss or gradient of {', '.join(broken)} was NaN or infinite: its seconds would mean nothing",
            where=str(target),
            remedy='Random weights should never give that; try precision = "fp32", and report it.',
        )


def default_results(suite: Path, hardware: Hardware) -> Path:
    """`results/<device>/<suite>.json` beside the suite."""
    device = hardware.name if hardware.kind != "cpu" else f"cpu-{hardware.name}"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return suite.parent / "results" / slug / f"{suite.stem}.json"


def command(suite: Path, named: Sequence[str]) -> str:
    """The command line that measures the same again; where its results went changes nothing."""
    return shlex.join(["ltxforge", "bench", suite.as_posix(), *(w for name in named for w in ("--case", name))])


def about(suite: Suite, told: str, hardware: Hardware) -> dict[str, Any]:
    """What a results file says besides its cases."""
    return {
        "format": FORMAT,
        "suite": suite.suite,
        "command": told,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {
            "kind": hardware.kind,
            "name": hardware.name,
            "capability": list(hardware.capability),
            "memory_bytes": hardware.memory_bytes,
        },
        "versions": {**hardware.versions, **_packages(), "cuda": torch.version.cuda or torch.version.hip or "none"},
        "how": HOW,
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def to_json(result: StepResult) -> dict[str, Any]:
    """One case's results, with what follows from them."""
    entry = dataclasses.asdict(result)
    if result.step_seconds:
        median = statistics.median(result.step_seconds)
        entry["step_seconds_min"], entry["step_seconds_max"] = min(result.step_seconds), max(result.step_seconds)
        entry["step_seconds_median"] = median
        entry["tflops_per_second"] = None if result.model_flops is None else result.model_flops / median / 1e12
    return entry
