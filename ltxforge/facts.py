"""Asks the world what the planner must know: device, weights, clips, prompts. Tells all that is missing at once.

Reads; writes nothing but memoised digests and the rendered demo clips, both in the cache directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ltxforge import hardware
from ltxforge.dataset.scan import Clip, enforce_max_rejected, scan
from ltxforge.digests import FileDigests
from ltxforge.errors import HubError, LtxforgeError, PlanError, WeightsError
from ltxforge.events import Emit, Note
from ltxforge.lora.header import ALPHA, describe
from ltxforge.lora.init_from import LoraFile, digest_of, peft_scale
from ltxforge.media import demo
from ltxforge.media.decode import DecodeError, read_image
from ltxforge.models.detect import plan_model
from ltxforge.models.formats import PLAIN
from ltxforge.models.sources import spec_of
from ltxforge.models.weights import read_header
from ltxforge.plan import ModelPlan, Plan
from ltxforge.planner import Facts, modalities_of
from ltxforge.recipe.parse import Parsed
from ltxforge.recipe.rules import BUILTIN_DATASETS, dataset_id
from ltxforge.recipe.schema import Dataset, Recipe, parse_size
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


def gather(parsed: Parsed, where: Places, previous: Plan | None, emit: Emit, stop: StopRequest) -> Facts:
    """Everything the planner needs. Raises one PlanError with every reason why it cannot be had."""
    recipe = parsed.recipe
    missing: list[LtxforgeError] = []

    def attempt(ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except (PlanError, WeightsError, HubError) as error:
            missing.append(error)
            return None

    model = attempt(lambda: _model(recipe, where.memo))
    spec = spec_of(model) if model else None
    # Without a model, clips are judged as if for video: whatever else is missing must still be told.
    modalities = attempt(lambda: modalities_of(recipe, spec)) if spec else None
    judge = partial(_clips, spec=spec, modalities=modalities or "video", where=where, emit=emit, stop=stop)
    clips = [(d, attempt(lambda d=d: judge(d))) for d in recipe.dataset if d.enabled]
    library = attempt(lambda: _library(recipe))
    lora_file = attempt(lambda: _lora_file(recipe, where.memo, previous, emit))
    _require_images(recipe, library or [], missing)
    if missing or model is None or spec is None:
        raise missing[0] if len(missing) == 1 else _all_at_once(missing)
    found = [(dataset, judged or []) for dataset, judged in clips]
    enforce_max_rejected([clip for _, judged in found for clip in judged], recipe.run.max_rejected)
    return Facts(
        name=where.name, directory=str(where.run), cache_directory=str(where.cache), hardware=hardware.detect(),
        model=model, spec=spec, clips=found, library=library or [], said=parsed.said,
        overridden=parsed.overridden, out_given=where.out_given, warnings=parsed.warnings,
        previous=previous, lora_file=lora_file,
    )  # fmt: skip


def _all_at_once(missing: list[LtxforgeError]) -> PlanError:
    lines = "\n".join("- " + str(error).replace("\n", "\n  ") for error in missing)
    return PlanError(f"{len(missing)} things are missing:\n{lines}")


def _model(recipe: Recipe, memo: Path) -> ModelPlan:
    model = recipe.model
    return plan_model(
        base=model.base, version=model.version, rope=model.rope, transformer=model.transformer, vae=model.vae,
        audio_vae=model.audio_vae, vocoder=model.vocoder, connectors=model.connectors,
        text_encoder=model.text_encoder, memo_directory=memo,
    )  # fmt: skip


def _clips(
    dataset: Dataset, *, spec: ModelSpec | None, modalities: str, where: Places, emit: Emit, stop: StopRequest
) -> list[Clip]:  # fmt: skip
    is_demo = dataset.path in BUILTIN_DATASETS
    folder = demo.render(where.cache / "builtin" / "shapes") if is_demo else Path(dataset.path)
    return scan(
        folder.expanduser(), dataset_id=dataset_id(dataset), resolution=parse_size(dataset.resolution),
        frames=dataset.frames, fps=dataset.fps or (spec.default_fps if spec else 25.0), windows=dataset.windows,
        buckets=dataset.buckets, max_upscale=dataset.max_upscale,
        factors=(spec.spatial_factor, spec.temporal_factor) if spec else (32, 8), modalities=modalities,
        emit=emit, stop=stop, memo_directory=where.memo, leave_out=(where.run, where.cache),
    )  # fmt: skip


def _library(recipe: Recipe) -> list[PromptEntry]:
    return read_library(Path(recipe.validation.library).expanduser()) if recipe.validation.library else []


def _lora_file(recipe: Recipe, memo: Path, previous: Plan | None, emit: Emit) -> LoraFile | None:
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


def _digest(path: Path, memo: Path) -> str:
    """What names a LoRA file's content; "" if it cannot be read."""
    try:
        with FileDigests(memo / "weights.json") as digests:
            return digest_of(path, digests)
    except OSError:
        return ""


def _require_images(recipe: Recipe, library: list[PromptEntry], missing: list[LtxforgeError]) -> None:
    for entry in [*recipe.validation.prompt, *library]:
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
