"""Asks the world what the planner must know: device, weights, clips, prompts. Tells all that is missing at once.

Reads; writes nothing but memoised digests and the rendered demo clips, both in the cache directory. Whom it asks is a
`World`: this machine, or one that is assumed (`assumed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ltxforge import hardware
from ltxforge.dataset.scan import Clip, enforce_max_rejected, scan
from ltxforge.digests import FileDigests
from ltxforge.errors import HubError, LtxforgeError, PlanError, WeightsError
from ltxforge.events import Emit, Note
from ltxforge.fit.search import Asked
from ltxforge.lora.header import ALPHA, describe
from ltxforge.lora.init_from import LoraFile, digest_of, peft_scale
from ltxforge.media import demo
from ltxforge.media.decode import DecodeError, read_image
from ltxforge.memory import appraisal
from ltxforge.memory.costs import Costs
from ltxforge.models.detect import plan_model
from ltxforge.models.formats import PLAIN
from ltxforge.models.sources import spec_of
from ltxforge.models.weights import read_header
from ltxforge.plan import ModelPlan, Plan
from ltxforge.planner import Facts, modalities_of
from ltxforge.recipe.parse import Parsed
from ltxforge.recipe.rules import BUILTIN_DATASETS, dataset_id
from ltxforge.recipe.schema import Dataset, Prompt, Recipe, parse_size
from ltxforge.signals import StopRequest
from ltxforge.specs import ModelSpec
from ltxforge.validation.prompts import PromptEntry, read_library

T = TypeVar("T")


@dataclass(frozen=True)
class Places:
    """Where a run and its cache live."""

    name: str
    run: Path
    cache: Path
    out_given: bool = False

    @property
    def memo(self) -> Path:
        """Where facts about files are remembered."""
        return self.cache / "memo"


def places(parsed: Parsed, out: Path | None) -> Places:
    """The run and cache directories: --out, else the recipe's, else `runs/<recipe name>` and `cache` here."""
    recipe, name = parsed.recipe, Path(parsed.path).stem
    run = out or (Path(recipe.run.directory).expanduser() if recipe.run.directory else Path("runs") / name)
    cache = Path(recipe.cache.directory).expanduser() if recipe.cache.directory else Path("cache")
    return Places(name, run.absolute(), cache.absolute(), out is not None)


class World:
    """This machine: its device, its files, and the Hub."""

    def __init__(self, where: Places, previous: Plan | None = None) -> None:
        self.where, self.previous = where, previous

    def hardware(self) -> hardware.Hardware:
        return hardware.detect()

    def model(self, recipe: Recipe) -> ModelPlan:
        return plan_model(**sources_of(recipe), memo_directory=self.where.memo)

    def clips(
        self, dataset: Dataset, spec: ModelSpec | None, modalities: str, emit: Emit, stop: StopRequest
    ) -> list[Clip]:
        is_demo = dataset.path in BUILTIN_DATASETS
        folder = demo.render(self.where.cache / "builtin" / "shapes") if is_demo else Path(dataset.path)
        return judged(dataset, folder, spec, modalities, self.where, self.where.memo, emit, stop)

    def library(self, recipe: Recipe) -> list[PromptEntry]:
        return read_library(Path(recipe.validation.library).expanduser()) if recipe.validation.library else []

    def lora_file(self, recipe: Recipe, emit: Emit) -> LoraFile | None:
        return lora_file_of(recipe, self.where.memo, self.previous, emit)

    def require_images(self, entries: Sequence[Prompt | PromptEntry], missing: list[LtxforgeError]) -> None:
        require_images(entries, missing)


def gather(parsed: Parsed, where: Places, previous: Plan | None, emit: Emit, stop: StopRequest) -> Facts:
    """Everything the planner needs. Raises one PlanError with every reason why it cannot be had."""
    return ask(World(where, previous), parsed, emit, stop)


def ask(world: World, parsed: Parsed, emit: Emit, stop: StopRequest) -> Facts:
    """What `gather` does, of any world."""
    recipe, where = parsed.recipe, world.where
    missing: list[LtxforgeError] = []

    def attempt(question: Callable[[], T]) -> T | None:
        try:
            return question()
        except (PlanError, WeightsError, HubError) as error:
            missing.append(error)
            return None

    model = attempt(lambda: world.model(recipe))
    spec = spec_of(model) if model else None
    # Without a model, clips are judged as if for video: whatever else is missing must still be told.
    modalities = (attempt(lambda: modalities_of(recipe, spec)) if spec else None) or "video"
    clips = [
        (d, attempt(lambda d=d: world.clips(d, spec, modalities, emit, stop))) for d in recipe.dataset if d.enabled
    ]
    library = attempt(lambda: world.library(recipe))
    lora_file = attempt(lambda: world.lora_file(recipe, emit))
    world.require_images([*recipe.validation.prompt, *(library or [])], missing)
    if missing or model is None or spec is None:
        raise missing[0] if len(missing) == 1 else _all_at_once(missing)
    found = [(dataset, judged or []) for dataset, judged in clips]
    enforce_max_rejected([clip for _, judged in found for clip in judged], recipe.run.max_rejected)
    return Facts(
        name=where.name, directory=str(where.run), cache_directory=str(where.cache), hardware=world.hardware(),
        model=model, spec=spec, clips=found, library=library or [], said=parsed.said,
        overridden=parsed.overridden, out_given=where.out_given, warnings=parsed.warnings,
        previous=world.previous, lora_file=lora_file, costs_of=costs,
    )  # fmt: skip


def costs(plan: Plan, spec: ModelSpec, asked: Asked) -> Costs:
    """What the run of a drafted plan takes, whatever of `asked` is chosen."""
    bases = [(base, base == "nf4" and asked.double_quant) for base in asked.base_precisions]
    return appraisal.costs_of(plan, spec, bases, asked.tiles)


def _all_at_once(missing: list[LtxforgeError]) -> PlanError:
    lines = "\n".join("- " + str(error).replace("\n", "\n  ") for error in missing)
    return PlanError(f"{len(missing)} things are missing:\n{lines}")


def sources_of(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says about the model, as `plan_model` takes it."""
    model = recipe.model
    return {
        "base": model.base, "version": model.version, "rope": model.rope, "transformer": model.transformer,
        "vae": model.vae, "audio_vae": model.audio_vae, "vocoder": model.vocoder, "connectors": model.connectors,
        "text_encoder": model.text_encoder,
    }  # fmt: skip


def judged(
    dataset: Dataset, folder: Path, spec: ModelSpec | None, modalities: str, where: Places, memo: Path | None,
    emit: Emit, stop: StopRequest,
) -> list[Clip]:  # fmt: skip
    """A dataset's clips with their verdicts; what was found is remembered in `memo` if it is given."""
    return scan(
        folder.expanduser(), dataset_id=dataset_id(dataset), resolution=parse_size(dataset.resolution),
        frames=dataset.frames, fps=dataset.fps or (spec.default_fps if spec else 25.0), windows=dataset.windows,
        buckets=dataset.buckets, max_upscale=dataset.max_upscale,
        factors=(spec.spatial_factor, spec.temporal_factor) if spec else (32, 8), modalities=modalities,
        emit=emit, stop=stop, memo_directory=memo, leave_out=(where.run, where.cache),
    )  # fmt: skip


def lora_file_of(recipe: Recipe, memo: Path | None, previous: Plan | None, emit: Emit) -> LoraFile | None:
    """What `lora.init_from` names; None where a run that has a checkpoint began from it and so needs it no more."""
    if not recipe.lora.init_from:
        return None
    path = Path(recipe.lora.init_from).expanduser()
    if previous is not None and previous.lora.init_from == str(path):
        if path.is_file() and _digest(path, memo) != previous.lora.init_digest:
            emit(Note(f"{path} is another file than this run began from; it goes on from its checkpoint", "warning"))
        return None
    if not path.is_file():
        raise WeightsError(
            "there is no such LoRA file", where=str(path),
            remedy="lora.init_from takes a .safetensors file on this machine; download one that is on the Hub first.",
        )  # fmt: skip
    header = read_header(path)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    lora = describe(shapes, header.metadata, str(path))
    dtypes = {entry.dtype for name, entry in header.tensors.items() if not name.endswith(ALPHA)}
    if packed := sorted(dtypes - set(PLAIN)):
        raise WeightsError(f"holds {', '.join(packed)}: A and B must be floats of 16 bits or more", where=str(path))
    peft_scale(path, header.metadata)  # refused early if it cannot be read
    return LoraFile(str(path), _digest(path, memo), lora)


def _digest(path: Path, memo: Path | None) -> str:
    """What names a LoRA file's content; "" if it cannot be read."""
    try:
        with FileDigests(memo and memo / "weights.json") as digests:
            return digest_of(path, digests)
    except OSError:
        return ""


def require_images(entries: Sequence[Prompt | PromptEntry], missing: list[LtxforgeError]) -> None:
    """Add to `missing` what is wrong with the first frames of validation prompts."""
    for entry in entries:
        if not entry.image:
            continue
        path = Path(entry.image).expanduser()
        try:
            if not path.is_file():
                raise DecodeError("it is a folder" if path.is_dir() else "it does not exist")
            read_image(path, (32, 32))
        except DecodeError as error:
            missing.append(
                PlanError(
                    f"the image of validation prompt {entry.name!r} cannot be used: {error}", where=str(path),
                    remedy="" if path.exists() else "Paths are relative to the folder where ltxforge is started.",
                )
            )  # fmt: skip
