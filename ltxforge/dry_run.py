"""Before the first step: one micro-batch of the largest size, forward and backward, as the run will compute it.

What does not fit fails now and not in an hour, and what was measured stands beside what was planned. Changes no bit of
the run: no update is made, gradients are dropped, and torch's generators are put back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ltxforge.dataset.batches import Batch
from ltxforge.device_full import device_full, phase_of
from ltxforge.events import DryRunDone, Emit
from ltxforge.hardware import allocated_bytes, is_out_of_memory, peak_bytes, reset_peak, synchronize
from ltxforge.lora.inject import adapter_parameters
from ltxforge.modalities import Streams
from ltxforge.models.interface import VideoModel
from ltxforge.models.parts import release_memory
from ltxforge.optim import Optimizer
from ltxforge.plan import PhasePlan, Plan
from ltxforge.trainer import backward, forward

PHASE = "step"
# Parts of the estimate that cannot be told apart by looking, under the one name that both get.
TOGETHER = {
    "weights": "weights", "streamed slots": "weights", "conditioning": "inputs and kept activations",
    "kept activations": "inputs and kept activations", "one block's work": "one block's work",
    "workspace": "one block's work",
}  # fmt: skip


class LargestFirst(Protocol):
    """The batches of a run (see dataset/batches.py)."""

    def largest(self) -> tuple[int, int]: ...
    def load(self, step: int, micro: int) -> Batch: ...
    def count_at(self, step: int) -> Streams[int]: ...


def dry_run(plan: Plan, model: VideoModel, data: LargestFirst, optimizer: Optimizer, emit: Emit) -> None:
    """Try the largest micro-batch of the run.

    Raises:
        DeviceFullError: it does not fit; the text compares plan and measurement part by part.
    """
    began = time.perf_counter()
    measured: dict[str, int] = {}
    step, micro = data.largest()
    batch = data.load(step, micro)
    try:
        with generators_kept(model.device):
            for _ in range(min(2, plan.training.accumulate)):  # later ones find the gradients of the first
                _pass(plan, model, batch, data.count_at(step), (step, micro), optimizer, measured)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        measured["all"] = peak_bytes(model.device)
        raise device_full(plan, _estimated(plan, measured), error, measured) from error
    finally:
        optimizer.clear_gradients()
        release_memory(model.device)
    estimated = _estimated(plan, measured)
    emit(
        DryRunDone(
            str(batch.samples[0].sample.shape), len(batch.prompts), time.perf_counter() - began,
            measured.pop("all", 0), estimated.device_bytes, measured, estimated.parts,
        )
    )  # fmt: skip


def _pass(
    plan: Plan, model: VideoModel, batch: Batch, counts: Streams[int], at: tuple[int, int], optimizer: Optimizer,
    measured: dict[str, int],
) -> None:  # fmt: skip
    """One micro-batch; what it took goes to `measured` as soon as it is known, by the estimate's names."""
    device = model.device
    reset_peak(device)
    before = allocated_bytes(device)
    parts = {
        "adapter": _bytes(adapter_parameters(model.transformer).values()),
        "optimizer state": _bytes(each for each in optimizer.state().values() if each.device.type == device.type),
    }
    gradients = _bytes(_gradients(model.transformer))
    measured |= {**parts, "weights": before - sum(parts.values()) - gradients}
    losses = forward(plan, model, batch, *at)
    measured["inputs and kept activations"] = allocated_bytes(device) - before
    backward(plan, losses, counts)
    synchronize(device)
    measured["gradients"] = _bytes(_gradients(model.transformer))
    if not peak_bytes(device):  # a device that counts nothing: nothing was measured
        measured.clear()
        return
    held = sum(size for name, size in measured.items() if name not in ("all", "one block's work"))
    measured["all"] = peak_bytes(device)
    measured["one block's work"] = max(0, measured["all"] - held)


def _estimated(plan: Plan, measured: Mapping[str, int]) -> PhasePlan:
    """The plan's estimate, its parts named as they can be measured; without moments that are made by the first update.

    Of no bytes where nothing was measured or planned.
    """
    planned = phase_of(plan, PHASE)
    if planned is None or not measured:
        return PhasePlan(PHASE, 0, 0)
    parts: dict[str, int] = {}
    for name, size in planned.parts.items():
        whole = TOGETHER.get(name, name)
        parts[whole] = parts.get(whole, 0) + size
    if not measured.get("optimizer state"):
        parts.pop("optimizer state", None)
    return replace(planned, parts=parts, device_bytes=sum(parts.values()))


def _gradients(module: nn.Module) -> Iterator[Tensor]:
    return (parameter.grad for parameter in module.parameters() if parameter.grad is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """torch's default generators, the host's and the device's, are afterwards what they were."""
    kind = device.type
    devices = [] if kind == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
        yield
