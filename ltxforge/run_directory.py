"""What a run directory holds, and whether a plan may go on in it.

    recipe.toml   the recipe as it was given          plan.json    every number of the run
    events.jsonl  what happened                       data.json    which samples, with their latents' digests
    checkpoints/  step-000250/ …                      samples/     step-000250/<prompt>.mp4 and .png
    lora.safetensors                                  loss.svg

Decides nothing about training. A directory with a run in it is continued or refused, never started over.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxforge.checkpoint import Checkpoints
from ltxforge.durable import retire, sweep_leftovers, write_file, write_json
from ltxforge.errors import RunError
from ltxforge.plan import FORMAT, Plan, differences, from_json, to_json
from ltxforge.printable import printable
from ltxforge.recipe.schema import Memory

ENCODED = {"latents": "pictures", "audio": "sound", "prompt": "captions"}
"""What of a sample is encoded, by its name in the data manifest, and in words."""
MOST_NAMED = 5
BASE = ("base_precision", "double_quant")
"""The keys of [memory] that say what is trained on; the others say how it is made to fit."""
OTHER_BITS = ("text_encoder_precision",)
FREE_MEMORY = tuple(name for name in Memory.model_fields if name not in (*BASE, *OTHER_BITS))
FREELY = (
    "run.steps, checkpoint.*, validation.* may change freely, and of [memory] " + ", ".join(FREE_MEMORY)
    + "; with other bits from then on also kernels.*, training.compile and memory.text_encoder_precision"
)  # fmt: skip


@dataclass(frozen=True)
class DataChanges:
    """How data differ from what a run began with.

    `encoded` names, by what was encoded ("latents", "audio", "prompt"), the paths of samples that got other bits, and
    `empty_caption` says whether that did; `late` the identities of samples that could not be decoded then (too slow,
    too little memory) and can be now, `late_sound` of those of which only the sound could not.
    """

    encoded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    empty_caption: bool = False
    late: frozenset[str] = frozenset()
    late_sound: frozenset[str] = frozenset()

    def encoded_words(self) -> str:
        """What was encoded to other bits, counted and by name: "the captions of 2 samples (a.mp4, b.mp4)"; "" if
        nothing was.
        """
        told = [f"the {ENCODED[part]} of {_samples(paths)}" for part, paths in self.encoded.items()]
        return ", ".join([*told, *(["the empty caption"] if self.empty_caption else [])])


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
        return self.last_step() > 0

    def last_step(self) -> int:
        """The step of the newest checkpoint, whether or not it verifies; 0 if there is none."""
        return max(Checkpoints(self.path, keep=2).steps(), default=0)

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

    def is_false_start_of_another(self, plan: Plan) -> bool:
        """Whether another run began here and ended before it saved anything: what it left is none of this one's."""
        path = self.path / "plan.json"
        if self.has_run() or not path.exists():
            return False
        try:
            other = from_json(Plan, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return True
        same_samples = other.validation.prompts == plan.validation.prompts
        return other.identity_digest() != plan.identity_digest() or not same_samples

    def clear(self) -> None:
        """Remove the samples and pictures of a false start."""
        for path in (self.samples, self.loss_curve):
            if path.exists():
                retire(path)

    def sweep(self) -> None:
        """Remove what killed processes left half written. Only for the holder of the run's lock."""
        for folder in (self.path, self.path / "checkpoints", *self.samples.glob("*/")):
            sweep_leftovers(folder)

    def require_same_run(self, saved: Plan, plan: Plan) -> None:
        """Raise RunError naming every field in which the plan is another run, or if it ends before what is done."""
        if changed := differences(saved, plan):
            lines = [f"    {name}: {old} -> {new}" for name, old, new in changed]
            raise RunError(
                "the recipe or the data changed since this run began:\n" + "\n".join(lines), where=str(self.path),
                remedy="Undo the change to continue, or start a new run with --out another/directory."
                f" ({FREELY}.)",
            )  # fmt: skip

        if plan.steps < (done := self.last_step()):
            raise RunError(
                f"this run is at step {done} already, and the recipe wants {plan.steps} steps", where=str(self.path),
                remedy=f"Give it {done} steps or more, or train a shorter one with --out another/directory.",
            )  # fmt: skip

    def save_plan(self, plan: Plan, recipe_text: str, overrides: Sequence[str]) -> None:
        """Write the plan, and the recipe with a note of what --set changed in it."""
        assert not plan.assumed, "no run follows a plan that nobody looked at"
        write_json(self.path / "plan.json", to_json(plan))
        note = ""
        if overrides:
            flags = printable(" ".join(f"--set {shlex.quote(override)}" for override in overrides))
            told = "Started with overrides, which win over what stands above. To use this file, add them:"
            note = f"\n# {told}\n# {flags}\n"
        write_file(self.path / "recipe.toml", recipe_text + note)

    def compare_data(self, data: dict[str, Any]) -> DataChanges:
        """How the samples differ from those that the run began with.

        Raises:
            RunError: some are gone, or the manifest cannot be read.
        """
        path = self.path / "data.json"
        if not self.has_run() or not path.exists():
            return DataChanges()
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            before, empty_prompt = {entry["identity"]: entry for entry in saved["samples"]}, saved["empty_prompt"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"data.json, which says what this run trains on, cannot be read: {error}", where=str(self.path),
                remedy="Put an intact copy back, or start a new run with --out another/directory.",
            ) from error  # fmt: skip
        now = {entry["identity"]: entry for entry in data["samples"]}
        self._require_all("samples", [entry["path"] for key, entry in before.items() if key not in now])
        sounding = {key for key, entry in before.items() if entry.get("audio")}
        self._require_all("samples' sound", [before[key]["path"] for key in sounding if not now[key]["audio"]])
        late_sound = {key for key in before if key not in sounding and now[key]["audio"]}
        encoded = {
            part: tuple(now[key]["path"] for key in before if _has_other_bits(part, before[key], now[key]))
            for part in ENCODED
        }
        return DataChanges(
            encoded={part: paths for part, paths in encoded.items() if paths},
            empty_caption=empty_prompt != data["empty_prompt"],
            late=frozenset(now.keys() - before.keys()),
            late_sound=frozenset(late_sound),
        )

    def _require_all(self, what: str, gone: Sequence[str]) -> None:
        """Raise RunError naming what cannot be decoded any more."""
        if gone:
            raise RunError(
                f"{len(gone)} {what} that this run began with cannot be decoded any more:"
                f" {', '.join(sorted(gone)[:5])}",
                where=str(self.path),
                remedy="Put the clips back as they were, or start a new run with --out another/directory.",
            )

    def save_data(self, data: dict[str, Any]) -> None:
        """Write the data manifest, unless the run that is here has one already."""
        if not (self.has_run() and (self.path / "data.json").exists()):
            write_json(self.path / "data.json", data)


def _has_other_bits(part: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a part of what a sample trains on was encoded to other bits; sound that it had not then is left out."""
    if part == "audio" and not before.get("audio"):
        return False
    return before[part] != now[part]


def _samples(paths: Sequence[str]) -> str:
    """How many samples, and the names of the first few clips that they come from."""
    names = list(dict.fromkeys(Path(path).name for path in paths))
    more = ", …" if len(names) > MOST_NAMED else ""
    return f"{len(paths)} sample{'' if len(paths) == 1 else 's'} ({', '.join(names[:MOST_NAMED])}{more})"
