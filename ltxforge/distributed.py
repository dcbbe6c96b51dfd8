"""Ranks: for now one process, and a plain refusal of more."""

from __future__ import annotations

from collections.abc import Mapping

from ltxforge.errors import PlanError


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise PlanError under torchrun with more than one process: each would train the same thing."""
    if environment.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise PlanError(
            f"this was started as one of {environment['WORLD_SIZE']} processes, and training on several GPUs is not in"
            " this release",
            remedy="Start it once, without torchrun; choose the GPU with CUDA_VISIBLE_DEVICES.",
        )
