"""What a run directory holds, and whether a plan may go on in it.

    recipe.toml   the recipe as it was given          plan.json    every number of the run
    events.jsonl  what happened                       data.json    which samples, with their latents' digests
    checkpoints/  step-000250/ …                      samples/     step-000250/<prompt>.mp4 and .png
    lora.safetensors                                  loss.svg

Decides nothing about training. A directory with a run in it is continued or refused, never started over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxforge.checkpoint import Checkpoints
from ltxforge.durable import write_file, write_json
from ltxforge.errors import RunError
from ltxforge.plan import FORMAT, Plan, differences, from_json, to_json


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """The folder of validation samples."""
        return self.path / "samples"

    @property
    def lora(self) -> Path:
        """The LoRA file that other programs load."""
        return self.path / "lora.safetensors"

    @property
    def loss_curve(self) -> Path:
        """The picture of the loss."""
        return self.path / "loss.svg"

    def has_run(self) -> bool:
        """Whether training has saved anything here."""
        return bool(Checkpoints(self.path, keep=2).steps())

    def saved_plan(self) -> Plan | None:
        """The plan of the run that is here; None if training has saved nothing yet, so that nothing can be lost.

        Raises:
            RunError: there are checkpoints and the plan cannot be read or is of another format.
        """
        if not self.has_run():
            return None
        try:
            data = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
            if data.get("format") != FORMAT:
                raise ValueError(f"it is of format {data.get('format')}, and this version reads format {FORMAT}")
            return from_json(Plan, data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"there are checkpoints here, but plan.json cannot be used: {error}", where=str(self.path),
                remedy="Use the version of ltxforge that made this run, or give this run another directory with --out.",
            ) from error  # fmt: skip

    def require_same_run(self, saved: Plan, plan: Plan) -> None:
        """Raise RunError naming every field in which the plan is another run than the one that is here."""
        if changed := differences(saved, plan):
            lines = [f"    {name}: {old} -> {new}" for name, old, new in changed]
            raise RunError(
                "the recipe or the data changed since this run began:\n" + "\n".join(lines), where=str(self.path),
                remedy="Undo the change to continue, or start a new run with --out another/directory."
                " (run.steps, checkpoint.* and validation.* may change freely.)",
            )  # fmt: skip

    def save_plan(self, plan: Plan, recipe_text: str) -> None:
        """Write plan and recipe."""
        write_json(self.path / "plan.json", to_json(plan))
        write_file(self.path / "recipe.toml", recipe_text)

    def compare_data(self, data: dict[str, Any]) -> tuple[str, ...]:
        """Paths of samples whose encoded bits are not those that the run began with.

        Raises:
            RunError: there are other samples than before.
        """
        path = self.path / "data.json"
        if not self.has_run() or not path.exists():
            return ()
        saved = json.loads(path.read_text(encoding="utf-8"))["samples"]
        before = {entry["identity"]: entry for entry in saved}
        now = {entry["identity"]: entry for entry in data["samples"]}
        if before.keys() != now.keys():
            gone = [entry["path"] for key, entry in before.items() if key not in now]
            new = [entry["path"] for key, entry in now.items() if key not in before]
            raise RunError(
                f"the samples changed since this run began: {len(gone)} gone, {len(new)} new"
                f" ({', '.join(sorted(set(gone + new))[:5])})", where=str(self.path),
                remedy="Put the clips back as they were, or start a new run with --out another/directory.",
            )  # fmt: skip
        bits = ("latents", "prompt")
        return tuple(now[key]["path"] for key in before if any(before[key][bit] != now[key][bit] for bit in bits))

    def save_data(self, data: dict[str, Any]) -> None:
        """Write the data manifest, unless the run that is here has one already."""
        if not (self.has_run() and (self.path / "data.json").exists()):
            write_json(self.path / "data.json", data)
