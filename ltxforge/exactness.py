"""Whether an interrupted run gives the same bits as one that never was, and why or why not.

Pure; torch-free. What it may change at all is for `plan.differences` to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ltxforge_kernels.choice import Kernels

from ltxforge.kernel_choices import changed, compiles
from ltxforge.plan import Plan

if TYPE_CHECKING:
    from ltxforge.hardware import Hardware


def exactness_of(
    hardware: Hardware, previous: Plan | None, kernels: Kernels, compile: bool = False, text_encoder: str = "bf16"
) -> tuple[str, str]:  # fmt: skip
    """("exact" or "statistical", the reason) of a run with these kernels, which goes on from `previous` if given.

    `compile` says whether the transformer's block is compiled as a whole, `text_encoder` how its weights are kept.
    """
    if previous is not None and (changes := _changes(previous, hardware, kernels, compile, text_encoder)):
        return "statistical", f"changed since this run began: {'; '.join(changes)}"
    if previous is not None and previous.device.exactness == "statistical":
        return "statistical", previous.device.exactness_reason
    if hardware.kind != "cpu":
        return (
            "statistical",
            "PyTorch's fused attention adds gradients in a varying order on GPUs; draws and data order are exact",
        )
    if compile or any("compile" in choice.implementations for choice in kernels.choices):
        return "statistical", "torch.compile's code for a shape depends on the shapes that the process met before"
    return "exact", "every operation of PyTorch used here adds in a fixed order on the CPU"


def _changes(saved: Plan, hardware: Hardware, kernels: Kernels, compile: bool, text_encoder: str) -> list[str]:
    """What differs, in words, between the machines, versions and ops of two attempts: any of it may change bits."""
    before = {**saved.device.versions, "device": f"{saved.device.kind} {saved.device.name}".strip()}
    now = {**hardware.versions, "device": f"{hardware.kind} {hardware.name}".strip()}
    harmless = {"ltxforge", "python"}
    if not (compiles(saved.kernels) or compiles(kernels) or saved.training.compile or compile):
        harmless.add("triton")
    versions = [
        f"{name} was {before.get(name, 'unknown')}, now {now.get(name, 'unknown')}"
        for name in sorted((before.keys() | now.keys()) - harmless)
        if before.get(name) != now.get(name)
    ]
    blocks = {True: "blocks are compiled now", False: "blocks are no longer compiled"}
    told = [blocks[compile]] if compile != saved.training.compile else []
    if text_encoder != (was := saved.memory.text_encoder_precision):
        told.append(f"memory.text_encoder_precision was {was}, now {text_encoder}: captions are encoded anew")
    return versions + told + changed(saved.kernels, kernels)
