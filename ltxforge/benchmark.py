"""The verb `bench`: measures suites, one case after the other, and keeps what it found.

Decides what a results file says and where it lies, and what makes the exit status an error. Before and after each case
the file is written anew, so that a machine that is taken away keeps what was measured and leaves behind what it was at.
What an earlier call measured stays in the file or is kept aside. How a case is measured: `benchmarks/`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ltxforge_kernels
import torch

from ltxforge.benchmarks.against import Baseline, compare, read_baseline
from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.benchmarks.ceilings import clocks
from ltxforge.benchmarks.finished import TRIES, Finished, keep_aside, read_finished
from ltxforge.benchmarks.resources import joined
from ltxforge.distributed import refuse_several_processes
from ltxforge.durable import faults_told, require_writable, write_file, write_json
from ltxforge.errors import BenchmarkError, PlanError, Stopped
from ltxforge.events import Note
from ltxforge.hardware import Hardware, detect
from ltxforge.signals import StopRequest
from ltxforge.suites.case import Case, Result
from ltxforge.suites.encode import EncodeResult
from ltxforge.suites.kernels import KernelResult
from ltxforge.suites.memory import MemoryResult
from ltxforge.suites.read import SOURCE_TREE, Suite
from ltxforge.suites.step import StepResult
from ltxforge.ui.dispatch import Dispatcher
from ltxforge.ui.ratio_chart import ratio_chart_svg
from ltxforge.ui.results_table import against_table, markdown, resources_table, results_table, several
from ltxforge.ui.screen import Screen

FORMAT = 2
PACKAGES = ("diffusers", "transformers", "peft", "triton", "bitsandbytes", "liger_kernel")
# They choose kernels or compile them for chips that are not here; they launch none.
NO_KERNELS = ("choice.py", "profiles.py", "production.py", "compile_only.py")
ENGINES = {kind: f"ltxforge.benchmarks.{kind}" for kind in ("kernels", "step", "encode", "memory")}
"""Kind of suite → the module that measures it, imported when it is asked for: ops need less than whole models."""
RESULTS: dict[str, type[Result]] = {
    "kernels": KernelResult,
    "step": StepResult,
    "encode": EncodeResult,
    "memory": MemoryResult,
}


@dataclass(frozen=True)
class Request:
    """What the command line said besides the suites.

    Attributes:
        named: the cases, all where empty.
        out: where results go: a file, or a folder for `<suite>.json`.
        against: an earlier results file of the same GPU.
        resume: whether cases that the results file already holds stay as they are.
        minutes: after how many no further case begins.
    """

    named: tuple[str, ...] = ()
    out: Path | None = None
    against: Path | None = None
    resume: bool = False
    minutes: float | None = None


def run(suites: Sequence[tuple[Suite, Path]], request: Request, screen: Screen) -> list[Path]:
    """Measure the suites and return where their results lie.

    Raises:
        PlanError: a case cannot be what it asks to be, or the baseline is another GPU's; before its suite is measured.
        BenchmarkError: a red gate, a loss that is not finite, a missed floor, or slower than the baseline; after
            everything is measured and written.
        Stopped: by a signal; what was measured is written.
    """
    refuse_several_processes(os.environ)
    if len(suites) > 1 and (request.against or (request.out and request.out.suffix == ".json")):
        raise PlanError("--against and --out FILE.json are about one suite", remedy="Name the suite to measure.")
    hardware = detect()
    deadline = None if request.minutes is None else time.monotonic() + 60 * request.minutes
    faults: list[str] = []
    with StopRequest() as stop, Dispatcher([screen]) as emit:
        for line in hardware.missing:
            emit(Note(line, "warning"))
        sessions = [_Session(suite, path, request, hardware, deadline) for suite, path in suites]
        targets = [session.target for session in sessions]
        for target in targets:
            with faults_told(target.parent):
                require_writable(target)
        for session in sessions:
            with faults_told(session.target.parent):
                faults += session.measure(lambda text: emit(Note(text)), stop, screen)
    if faults:
        remedy = f"Everything was measured and written: {', '.join(map(str, targets))}"
        raise BenchmarkError("\n  ".join(faults), remedy=remedy)
    return targets


class _Session:
    """One suite's measuring: what it will write, what an earlier call left, and what is to be compared."""

    def __init__(
        self, suite: Suite, path: Path, request: Request, hardware: Hardware, deadline: float | None
    ) -> None:  # fmt: skip
        self.suite, self.hardware, self.deadline = suite, hardware, deadline
        self.named = request.named
        self.target = results_file(path, request.out, hardware)
        head = about(suite, command(path, request.named), hardware)
        self.baseline: Baseline | None = read_baseline(request.against, head) if request.against else None
        self.earlier: Finished = read_finished(self.target, head)
        self.finished = _going_on(self.earlier, request)
        self.begun = dict(self.finished.begun)
        self.head: dict[str, Any] = {**self.finished.head, **head}
        if self.named and self.finished.entries:  # the file is still that call's, with some cases measured again
            self.head["command"] = self.finished.head["command"]

    def measure(self, told: Told, stop: StopRequest, screen: Screen) -> list[str]:
        """Measure every case that is not finished yet; gives what is wrong, one line each."""
        entries, todo = self.finished.kept(self.suite.case), self.finished.order(self.suite.case)
        if entries:
            told(f"measured before, and kept: {several(list(entries))}")
        if todo:
            bench = engine(self.suite.suite).begin(todo, self.hardware, told, stop)
            self._keep_aside(entries, told)
            self._add({"how": bench.how, **bench.facts})
        for number, case in enumerate(todo):
            if stop.requested:
                kept = f"what was measured is in {self.target}" if entries else "nothing was measured"
                raise Stopped(stop.signal_number, f"stopped before {case.name}; {kept}")
            if self.deadline is not None and time.monotonic() > self.deadline:
                left = several([case.name for case in todo[number:]])
                told(f"no time is left for {left}: call again with --resume")
                self._write(self._results(entries))
                break
            result = self._tried(case, bench, entries)
            if result.outcome != "skipped":  # the table tells these together
                told(f"{result.name}: {result.outcome}{f' ({result.reason})' if result.reason else ''}")
            entries[case.name] = json.loads(json.dumps({**result.entry(), "faults": self._faults(result)}))
            self._write(self._results(entries))
        return self._show(entries, told, screen)

    def _tried(self, case: Case, bench: Bench, entries: Mapping[str, dict[str, Any]]) -> Result:
        """The case's result. That it began stands in the file before, where a call that is cut off leaves it."""
        times = self.finished.times_begun(case)
        if times >= TRIES:
            self.begun.pop(case.name)
            why = f"began {times} times and came to no end within the limit, or its process died"
            return RESULTS[self.suite.suite](case.name, "not finished", case.settings(), why)
        self.begun[case.name] = {"times": times + 1, "case": case.settings()}
        write_json(self.target, self._results(entries))
        try:
            result = bench.measure(case)
        except Stopped as stopped:
            if stopped.signal_number == signal.SIGINT:  # by a person: says nothing about the case
                self.begun.pop(case.name)
                write_json(self.target, self._results(entries))
            raise
        self.begun.pop(case.name)
        return result

    def _keep_aside(self, entries: Mapping[str, Any], told: Told) -> None:
        """Before anything is written: a copy of an earlier file of which this call would lose something."""
        staying = {*entries, *self.named, *(self.finished.entries if self.named else ())}
        if self.earlier.differs or self.earlier.would_lose(staying):
            why = "; ".join(self.earlier.differs) or "this call measures its cases anew"
            told(f"the results before are kept in {keep_aside(self.target, self.earlier.head)}: {why}")

    def _add(self, facts: Mapping[str, Any]) -> None:
        """What a bench says besides its cases; what an earlier call found for others of them stays."""
        for name, value in facts.items():
            before = self.head.get(name)
            is_table = isinstance(value, dict) and isinstance(before, dict)
            self.head[name] = {**before, **value} if is_table else value
            if name == "resources" and before:
                self.head[name] = joined(before, value)

    def _results(self, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The results file: the head, which cases are left, and the entries in the suite's order.

        Where cases were named, what an earlier call measured of others is no less true, and keeps its place.
        """
        names = [case.name for case in self.suite.case]
        mine = {name: entries[name] for name in names if name in entries}
        found = {**self.finished.entries, **mine} if self.named else mine
        if self.named:
            places = list(self.earlier.entries)
            found = dict(sorted(found.items(), key=lambda item: _place(item[0], places)))
            names += [name for name in self.finished.head.get("left", ()) if name not in names]
        left = [name for name in names if name not in found]
        return {**self.head, "left": left, "begun": self.begun, "cases": list(found.values())}

    def _write(self, results: dict[str, Any]) -> None:
        """The results file, and the same as a table and a plot beside it."""
        write_json(self.target, results)
        write_file(self.target.with_suffix(".md"), markdown(results, results["cases"]))
        if chart := ratio_chart_svg(results, results["cases"]):
            write_file(self.target.with_suffix(".svg"), chart)

    def _show(self, found: Mapping[str, dict[str, Any]], told: Told, screen: Screen) -> list[str]:
        """Tables of this call's cases on the screen; gives what is wrong."""
        entries = [found[case.name] for case in self.suite.case if case.name in found]
        if not entries:
            return []
        if records := self.head.get("resources"):
            screen.show(resources_table(records))
        screen.show(results_table(self.suite.suite, entries))
        told(f"results: {self.target}")
        faults = [f"{entry['name']}: {fault}" for entry in entries for fault in entry["faults"]]
        return faults + (self._slower(entries, screen) if self.baseline else [])

    def _faults(self, result: Result) -> list[str]:
        """What is wrong with a result here: floors are about GPUs."""
        return result.faults() + (result.missed_floors() if self.hardware.kind in ("cuda", "rocm") else [])

    def _slower(self, entries: Sequence[dict[str, Any]], screen: Screen) -> list[str]:
        """Where the baseline was faster by more than the tolerance."""
        compared = compare(self.baseline, entries)
        screen.show(against_table(compared))
        return [each.told() for each in compared if each.is_slower]


def engine(kind: str) -> Any:
    """The module that measures a kind of suite, with its function `begin` (see `benchmarks/bench.py`).

    Raises:
        PlanError: it needs a package that is not installed.
    """
    try:
        return importlib.import_module(ENGINES[kind])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ltxforge", "ltxforge_kernels"):
            raise
        remedy = "Install it: ltxforge's own pyproject.toml names the version."
        raise PlanError(
            f"the suite {kind} needs the package {package}, which is not installed", remedy=remedy
        ) from None


def _going_on(earlier: Finished, request: Request) -> Finished:
    """What of an earlier call's results this one goes on from: with cases named, at least that of the others."""
    if request.resume:
        return earlier
    return earlier.without(request.named) if request.named else Finished()


def _place(name: str, places: Sequence[str]) -> int:
    return places.index(name) if name in places else len(places)


def results_file(suite: Path, out: Path | None, hardware: Hardware) -> Path:
    """What --out names, else `results/<device>/<suite>.json` beside the suite."""
    if out is not None:
        return out if out.suffix == ".json" else out / f"{suite.stem}.json"
    return suite.parent / "results" / device_name(hardware) / f"{suite.stem}.json"


def device_name(hardware: Hardware | None = None) -> str:
    """The device as a folder is called: "nvidia-h200", "cpu-x86-64"; of this machine unless told otherwise."""
    hardware = hardware or detect()
    device = hardware.name if hardware.kind != "cpu" else f"cpu-{hardware.name}"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def command(suite: Path, named: Sequence[str]) -> str:
    """The command line that measures the same again; where its results went changes nothing."""
    word = suite.stem if suite == SOURCE_TREE / "bench" / f"{suite.stem}.toml" else suite.as_posix()
    return shlex.join(["ltxforge", "bench", word, *(w for name in named for w in ("--case", name))])


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
        "clocks": clocks(),
        "kernels": kernels_digest(),
    }


def kernels_digest() -> str:
    """Of the sources that our kernels run by: what was measured with others says nothing about these."""
    folder = Path(ltxforge_kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.name not in NO_KERNELS):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
