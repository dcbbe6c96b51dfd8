"""The suite `kernels`: one op at one shape, our implementations against each other and against named peers.

Decides the order: the gate first, and a red one is the result; then everything is timed together. Which inputs, calls
and peers an op has stands in `ops/`. Without a GPU the cases that are made for one are not measured, and the compiler's
own figures for them are told instead.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ltxforge_kernels.choice import arch_name
from torch import Tensor
from torch._functorch import config as functorch_config

from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.benchmarks.ceilings import measure_ceilings
from ltxforge.benchmarks.gate import gates_of, told, upstream_of
from ltxforge.benchmarks.ops.table import SUBJECTS
from ltxforge.benchmarks.resources import resources_of
from ltxforge.benchmarks.subject import (
    Contender,
    DeviceFiller,
    Inputs,
    PeerMissing,
    Subject,
    asked,
    bytes_of,
    together,
)
from ltxforge.benchmarks.timing import head_start, sets_needed, time_against_each_other, timing, with_details
from ltxforge.errors import BenchmarkError, Stopped
from ltxforge.hardware import Hardware, is_out_of_memory, synchronize, torch_device
from ltxforge.models.parts import release_memory
from ltxforge.signals import StopRequest
from ltxforge.suites.case import Gate, Outcome, Timing
from ltxforge.suites.kernels import KernelCase, KernelResult

HOW = {
    "times": "seconds of one call on the device's own clock, enqueued while the device does other work: median, and"
    " what a fifth of the calls stayed below (p20) and above (p80); contenders take turns, inputs rotate through sets"
    " that together exceed the L2 cache, which is cleared before each call; is_late: in some round the device waited"
    " for the host, whose time is then in it, too",
    "host": "seconds that the host takes to enqueue one call: what a step is bound by where it is larger",
    "graph": "seconds of one call inside a CUDA graph over all sets: without the launches' time on the host",
    "ratios": "median of the peer / median of `ours`: above 1 ours is faster",
    "gates": "relative error in the Frobenius norm against float64 on data that is not timed; checked first",
    "shares": "ours against the ceilings above: bytes_moved or flops / the median / the ceiling",
    "bytes_moved": "operands read once and results written once: the least that the op's definition allows",
    "forward": "under autograd, as in training: what the backward pass needs is kept",
}


def begin(cases: Sequence[KernelCase], hardware: Hardware, tell: Told, stop: StopRequest) -> Bench:
    """Ready to measure ops; measures the ceilings, or compiles for a GPU that is not here."""
    device = torch_device(hardware.kind)
    here = [case for case in cases if _skipped(case, hardware) is None]
    # A backward pass is timed many times over one forward: nothing may be reused in place.
    functorch_config.donated_buffer = False
    facts: dict[str, Any] = {"ceilings": {}}
    if here:
        tell("measuring this machine's ceilings")
        facts["ceilings"] = measure_ceilings(device)
    if hardware.kind == "cpu" and len(here) < len(cases):
        facts["resources"] = resources_of({case.op for case in cases if case.device == "gpu"}, tell)
    session = _Session(hardware, device, facts["ceilings"], tell, stop)
    return Bench(session.measure, HOW, facts)


def _skipped(case: KernelCase, hardware: Hardware) -> str | None:
    """Why a case is not measured on this machine, or None."""
    is_gpu = hardware.kind in ("cuda", "rocm")
    if case.device == "gpu" and not is_gpu:
        return "needs a GPU, and this machine has none"
    if case.device == "cpu" and is_gpu:
        return "is of a size for CPUs, which says nothing about a GPU"
    return None


@dataclass(frozen=True)
class _Session:
    """What all cases of one call share."""

    hardware: Hardware
    device: torch.device
    ceilings: Mapping[str, float]
    tell: Told
    stop: StopRequest

    def measure(self, case: KernelCase) -> KernelResult:
        """The gate, then the times; whatever goes wrong with one case is its result."""
        if reason := _skipped(case, self.hardware):
            return self._result(case, "skipped", reason)
        self._require_device(case)
        try:
            return self._measured(case)
        except Stopped:
            raise
        except Exception as error:  # compilers and drivers have no common base, and one op must not end the suite
            outcome = "out of memory" if is_out_of_memory(error) else "failed"
            return self._result(case, outcome, _first_line(error))
        finally:
            gc.collect()
            torch._dynamo.reset()
            if not self._is_lost():
                release_memory(self.device)

    def _measured(self, case: KernelCase) -> KernelResult:
        self.tell(f"{case.name}: {case.op}, {case.timed}")
        subject = SUBJECTS[case.op](case, self.device)
        implementations = [name for name in case.implementations if name != "triton" or self.device.type == "cuda"]
        gates, check_peer = gates_of(subject, implementations, self.device, case.timed != "forward")
        if red := [gate for gate in gates if not gate.passed]:
            return self._result(case, "gate failed", "; ".join(map(told, red)), gates=tuple(gates))
        peers, unavailable = _peers(subject, case, check_peer)
        sets = self._sets(subject)
        calls: dict[str, list[Call]] = {}
        for name, contender in {**{name: subject.ours(name) for name in implementations}, **peers}.items():
            try:
                calls[name] = _ready(case.timed, contender, sets, subject.leaves)
            except Exception as error:  # a peer's trouble is not ours
                if name not in peers:
                    raise
                unavailable[name] = _first_line(error)
        return self._summary(case, subject, implementations, self._times(case, calls), tuple(gates), unavailable)

    def _sets(self, subject: Subject) -> list[tuple[Inputs, tuple[Tensor, ...]]]:
        """Sets of inputs for everyone to rotate through, and the gradients that arrive at their outputs."""
        first = subject.inputs(DeviceFiller(self.device, 1))
        count = sets_needed(bytes_of(first), self.device)
        sets = [first, *(subject.inputs(DeviceFiller(self.device, seed)) for seed in range(2, count + 1))]
        return [(each, upstream_of(subject, each, seed) if subject.leaves else ()) for seed, each in enumerate(sets)]

    def _times(self, case: KernelCase, calls: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        """Contender → its times, all taken together."""
        ahead = head_start(self.device)
        seconds = time_against_each_other(calls, case.rounds, self.device, lambda: self.stop.requested, ahead)
        if self.stop.requested:
            raise Stopped(self.stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")
        graph = case.timed != "backward"  # a graph cannot begin between a forward pass and its backward pass
        late = ahead.late if ahead else set()
        times = {name: dataclasses.replace(timing(seconds[name]), is_late=name in late) for name in calls}
        del ahead
        return {name: with_details(times[name], calls[name], self.device, graph=graph) for name in calls}

    def _summary(
        self,
        case: KernelCase,
        subject: Subject,
        implementations: Sequence[str],
        times: dict[str, Timing],
        gates: tuple[Gate, ...],
        unavailable: dict[str, str],
    ) -> KernelResult:
        """What follows from the times."""
        medians = {name: each.median for name, each in times.items()}
        ours, work = implementations[0], subject.work
        amount = work.bytes_moved if work.ceiling == "copy bandwidth" else work.flops
        ceiling = self.ceilings.get(work.ceiling)
        return self._result(
            case,
            "measured",
            ratios={name: median / medians[ours] for name, median in medians.items() if name != ours},
            ours=ours,
            medians=medians,
            times=times,
            gates=gates,
            unavailable=unavailable,
            bytes_moved=work.bytes_moved,
            flops=work.flops or None,
            shares={work.ceiling: amount / medians[ours] / ceiling} if ceiling and amount else {},
        )

    def _result(self, case: KernelCase, outcome: Outcome, reason: str = "", **found: Any) -> KernelResult:
        return KernelResult(
            case.name,
            outcome,
            case.settings(),
            reason=reason,
            op=case.op,
            arch=arch_name(self.hardware.machine),
            dtype=case.dtype,
            tokens=case.rows,
            width=case.width,
            **found,
        )

    def _require_device(self, case: KernelCase) -> None:
        """A kernel that reads beside its memory leaves a GPU that answers nothing more in this process."""
        if self._is_lost():
            raise BenchmarkError(
                f"the GPU cannot be used any more in this process, after a fault before {case.name}",
                remedy="What was measured is written; call again with --resume, which tries what failed last.",
            )

    def _is_lost(self) -> bool:
        try:
            torch.zeros(1, device=self.device)
            synchronize(self.device)
        except torch.OutOfMemoryError:
            return False
        except RuntimeError:
            return True
        return False


def _peers(
    subject: Subject, case: KernelCase, check: Callable[[str, Contender], Gate]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers that can run here and compute the same thing; and why the others are left out."""
    found, unavailable = {}, {}
    for name in case.peers:
        try:
            contender = subject.peers[name]()
            if case.timed != "forward" and not contender.has_backward:
                raise PeerMissing("it has no backward pass")
            gate = check(name, contender)
        except PeerMissing as error:
            unavailable[name] = str(error)
            continue
        except Exception as error:  # a peer's trouble is not ours
            unavailable[name] = _first_line(error)
            continue
        if gate.passed:
            found[name] = contender
        else:
            unavailable[name] = f"computes something else: {told(gate)}"
    return found, unavailable


def _ready(
    timed: str, contender: Contender, sets: Sequence[tuple[Inputs, tuple[Tensor, ...]]], leaves: Sequence[str]
) -> list[Call]:
    """What is timed of a contender over each set. Each is called once, so that nothing is made while it is timed."""
    calls = [Call(timed, contender, given, leaves, upstream) for given, upstream in sets]
    for call in calls:
        call()
    return calls


class Call:
    """What is timed of a contender over one set of inputs: a call without arguments."""

    def __init__(
        self, timed: str, contender: Contender, given: Inputs, leaves: Sequence[str], upstream: tuple[Tensor, ...]
    ) -> None:
        self._timed, self._contender, self._upstream = timed, contender, upstream
        given = asked(given, tuple(leaves))
        self._prepared = contender.prepare(given)
        own = contender.wanted
        self._wanted = list(own(self._prepared)) if own and leaves else [getattr(given, name) for name in leaves]
        self._outputs: tuple[Tensor, ...] | None = None

    def __call__(self) -> Any:
        """Outputs or gradients. Of a backward pass alone the forward pass is made once, by the first call."""
        if not self._wanted or not self._contender.has_backward:
            with torch.no_grad():
                return self._contender.call(self._prepared)
        if self._timed == "forward":
            return self._contender.call(self._prepared)
        outputs = self._outputs or together(self._contender.call(self._prepared))
        if self._timed == "backward":
            self._outputs = outputs
        upstream = self._upstream[: len(outputs)]
        # A peer may compute less: the base alone has no gradient of A and B.
        return torch.autograd.grad(
            outputs, self._wanted, upstream, retain_graph=self._timed == "backward", allow_unused=True
        )


def _first_line(error: Exception) -> str:
    """An error in one line; of one that only announces another, that one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {next((line for line in lines if not line.endswith(':')), '')}"
