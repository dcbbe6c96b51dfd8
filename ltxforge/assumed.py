"""A plan for a machine that is not here: `plan --gpu 16GB --ram 32GB`, with whatever of weights and clips is here too.

Decides what stands for what is missing: a card by its name or size, weights by their published name, clips of the
recipe's own size. What is here is used. Asks no network and writes nothing; no run can follow such a plan.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from ltxforge.cards import CARDS, cards_called, known_card, typical_card
from ltxforge.dataset.scan import Clip
from ltxforge.digests import NoDigests
from ltxforge.errors import HubError, LtxforgeError, PlanError, WeightsError
from ltxforge.events import Emit
from ltxforge.facts import Places, World, judged, lora_file_of, sources_of
from ltxforge.hardware import Hardware, assumed
from ltxforge.lora.init_from import LoraFile
from ltxforge.modalities import has
from ltxforge.models.detect import plan_model
from ltxforge.models.published import published_model
from ltxforge.models.sources import open_tree, parse_source
from ltxforge.plan import ModelPlan
from ltxforge.recipe.rules import BUILTIN_DATASETS
from ltxforge.recipe.schema import Dataset, Prompt, Recipe, parse_size
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.specs import ModelSpec
from ltxforge.validation.prompts import PromptEntry

USUAL_RAM = "32GB"
# Of an English caption that says what is seen and how: a hundred words.
CAPTION_LETTERS = 500
_SIZE = re.compile(r"(?<![\w.])(\d{1,5}(?:\.\d{1,3})?)\s*([MGT])(?:i?B)?(?!\w)", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"\s*\d{1,3}(?:\.\d{1,3})?\s*")
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def machine(gpu: str, ram: str | None) -> Hardware:
    """The machine of `--gpu` ("16GB", "RTX 4090", "V100 32GB", 4090) and `--ram` ("32GB", the default).

    Raises:
        PlanError: a card that is not known, or an amount that is none.
    """
    host = _host(ram or USUAL_RAM)
    size = _SIZE.search(gpu)
    memory = _bytes("--gpu", size) if size else 0
    name = _SIZE.sub("", gpu).strip()
    if size and not name:
        card = typical_card(memory)
        return assumed(f"a card of {_gib(memory)}, like {card.name}", card.arch, memory, host)
    meant = cards_called(name)
    card = known_card(meant[0] if len(meant) == 1 else name, memory)
    if card is None:
        raise _unknown(gpu, name, meant)
    return assumed(card.name, card.arch, memory or card.memory_bytes, host)


def _host(ram: str) -> int:
    size = _SIZE.fullmatch(ram.strip())
    if size is None:
        hint = f"Did you mean {ram.strip()}GB?" if _BARE_NUMBER.fullmatch(ram) else "Write it as in 64GB."
        raise PlanError(f"--ram {ram!r} is no amount of memory", remedy=hint)
    return _bytes("--ram", size)


def _bytes(option: str, size: re.Match[str]) -> int:
    """Capital letters or not, as people type it."""
    found = round(float(size[1]) * _UNITS[size[2].upper()])
    if not found:
        raise PlanError(f"{option} {size[0]!r} is no memory at all")
    return found


def _unknown(gpu: str, name: str, meant: Sequence[str]) -> PlanError:
    if _BARE_NUMBER.fullmatch(gpu):
        return PlanError(f"--gpu {gpu!r} is no card and no amount of memory", remedy=f"Did you mean {gpu.strip()}GB?")
    lower = {card.name.lower(): card.name for card in CARDS}
    near = meant or [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    nearest = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.0)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Nearest in name are {', '.join(nearest)}."
    return PlanError(f"--gpu {gpu!r} is no card that ltxforge knows", remedy=f"{hint} A size will do too: --gpu 16GB.")


class Elsewhere(World):
    """A machine that is described; of weights, clips and prompts what is here, and assumptions for the rest.

    `assumptions` collects, by what it stands for, one sentence about each.
    """

    def __init__(self, where: Places, machine: Hardware, samples: int) -> None:
        """`samples` are those of a whole step: an assumed dataset has as many."""
        super().__init__(where)
        self.machine, self.samples = machine, samples
        self.assumptions = {"device": f"{machine.name} with {_gib(machine.host_bytes)} of host memory beside it"}

    def hardware(self) -> Hardware:
        return self.machine

    def model(self, recipe: Recipe) -> ModelPlan:
        """The model by its files, if every source is here and whole; else by the published name or `model.version`.

        A file that is here and wrong is told as ever.
        """
        sources = sources_of(recipe)
        named = [text for name, text in sources.items() if text and name not in ("version", "rope")]
        absent = [text for text in named if not _is_here(text)]
        if not absent:
            try:
                return plan_model(**sources, only_here=True)
            except (WeightsError, HubError):
                if all(parse_source(text).kind != "hub" for text in named):
                    raise
                absent = named  # the Hub's cache has a part of it
        model = published_model(recipe.model, absent)
        self.assumptions["weights"] = f"{', '.join(absent)}: the published sizes of {model.version}"
        return model

    def clips(
        self, dataset: Dataset, spec: ModelSpec | None, modalities: str, emit: Emit, stop: StopRequest
    ) -> list[Clip]:
        is_demo = dataset.path in BUILTIN_DATASETS
        folder = self.where.cache / "builtin" / "shapes" if is_demo else Path(dataset.path).expanduser()
        if folder.is_dir():
            return judged(dataset, folder, spec, modalities, self.where, None, emit, stop)
        clip = _synthetic(dataset, modalities, self.samples)
        told = f"{dataset.path}: a step's clips of {clip.shape}, each with a caption of {CAPTION_LETTERS} letters"
        self.assumptions["data"] = "; ".join(filter(None, (self.assumptions.get("data"), told)))
        return [clip]

    def library(self, recipe: Recipe) -> list[PromptEntry]:
        path = recipe.validation.library
        if path and not Path(path).expanduser().is_file():
            self.assumptions["prompts"] = f"{path}: no prompts"
            return []
        return super().library(recipe)

    def lora_file(self, recipe: Recipe, emit: Emit) -> LoraFile | None:
        path = recipe.lora.init_from
        if path and not Path(path).expanduser().is_file():
            self.assumptions["starts from"] = f"{path}: a LoRA that fits"
            return None
        return lora_file_of(recipe, None, None, emit)

    def require_images(self, entries: Sequence[Prompt | PromptEntry], missing: list[LtxforgeError]) -> None:
        here = [entry for entry in entries if entry.image and Path(entry.image).expanduser().exists()]
        if absent := [str(entry.image) for entry in entries if entry.image and entry not in here]:
            self.assumptions["images"] = f"{', '.join(absent)}: first frames that can be read"
        super().require_images(here, missing)


def _is_here(text: str) -> bool:
    """Whether a source lies on this machine, in the Hub's cache for one of the Hub's names."""
    source = parse_source(text)
    if source.kind == "builtin":
        return True
    with contextlib.suppress(WeightsError, HubError):
        return bool(open_tree(source, NoDigests(), offline=True))
    return False


def _synthetic(dataset: Dataset, modalities: str, samples: int) -> Clip:
    """A clip of the recipe's own size with so many windows: what they weigh is known, how many there are is not."""
    shape = ClipShape(*parse_size(dataset.resolution), dataset.frames)
    path, sound = Path(dataset.path) / "assumed", "own" if has(modalities, "audio") else ""
    starts = tuple(map(float, range(samples)))
    return Clip(
        path, "assumed", f"assumed:{dataset.path}", "a" * CAPTION_LETTERS, shape=shape, starts=starts, sound=sound
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.4g} GB"
