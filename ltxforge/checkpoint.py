"""Checkpoints: save whole or not at all, restore the newest that verifies, keep the last few. No pickle.

A checkpoint is a folder `checkpoints/step-000100` with the adapter as trained (float32), the optimiser's moments, the
exported LoRA file, and a manifest with every file's digest. Steps are read from the manifest, never from times.
Nothing random is saved because nothing random is consumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ltxforge.durable import retire, staged_folder, sweep_leftovers, verify_folder
from ltxforge.errors import RunError
from ltxforge.tensor_files import save_tensors

ADAPTER, OPTIMIZER, LORA = "adapter.safetensors", "optimizer.safetensors", "lora.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from. `refused` names newer checkpoints that were damaged, with the reason."""

    step: int
    path: Path
    facts: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    refused: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_directory: Path, keep: int) -> None:
        assert keep >= 2, "one checkpoint alone cannot survive its own damage"
        self.directory, self._keep = run_directory / "checkpoints", keep
        self._damaged: set[int] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step stands."""
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending, whether or not it verifies."""
        if not self.directory.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{6,})", path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        step: int,
        adapter: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        export: Callable[[Path], object],
        facts: dict[str, Any],
    ) -> Path:
        """Write the checkpoint of `step` durably, then retire old ones. A step that is saved already stays as it is.

        Args:
            export: writes the LoRA file to the path it is given.
            facts: what a restore must know: the plan's identity, the attempt, the version.
        """
        final = self.path(step)
        if final.exists():
            if not verify_folder(final)[1]:
                return final
            retire(final)
        with staged_folder(final, {**facts, "step": step}) as folder:
            trained = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
            save_tensors(folder / ADAPTER, trained)
            save_tensors(folder / OPTIMIZER, {name: _own(tensor) for name, tensor in optimizer.items()})
            export(folder / LORA)
        self._damaged.discard(step)
        self._retire_old(step)
        return final

    def _retire_old(self, step: int) -> None:
        """Leave the newest few up to `step` that can be restored. Later ones, all damaged, wait to be overtaken."""
        passed = [earlier for earlier in self.steps() if earlier <= step]
        kept = [earlier for earlier in passed if earlier not in self._damaged][-self._keep :]
        for old in passed:
            if old not in kept:
                retire(self.path(old))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there never was one.

        Raises:
            RunError: there are checkpoints and none can be trusted. Training never starts over by itself.
        """
        if not self.directory.is_dir():
            return None
        sweep_leftovers(self.directory)
        refused: list[str] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            facts, reason = verify_folder(path)
            if not reason and facts.get("step") != step:
                reason = f"its manifest is of step {facts.get('step')}"
            if not reason:
                return Checkpoint(
                    step, path, facts, load_file(path / ADAPTER), load_file(path / OPTIMIZER), tuple(refused)
                )
            refused.append(f"{path.name}: {reason}")
            self._damaged.add(step)
        if refused:
            raise RunError(
                "no checkpoint can be trusted:\n    " + "\n    ".join(refused),
                where=str(self.directory),
                remedy="Put an intact copy back, or move this run directory away to start over, or give the run another"
                " directory with --out.",
            )
        return None


def _own(tensor: Tensor) -> Tensor:
    """A copy on the host that shares memory with nothing, as safetensors asks."""
    return tensor.detach().cpu().clone().contiguous()
