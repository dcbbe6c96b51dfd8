"""[memory] of a recipe: what it says, what is done where it says nothing, and what `fit` may choose. Pure; torch-free.

Without `fit` the plain way holds: the base as it is, every block computed again on a GPU, samples decoded whole. What
this model or device cannot do is refused; what merely does not fit is refused later, when its bytes are known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltxforge.errors import PlanError
from ltxforge.fit.search import BASE_PRECISIONS, OPTIMIZERS, TEXT_ENCODERS, UNLIMITED, Asked, Budget, budget_of
from ltxforge.memory.combinations import remarks
from ltxforge.memory.units import groups, spread
from ltxforge.plan import MemoryPlan, ModelPlan, Plan, StreamPlan, every_nth
from ltxforge.recipe.schema import Recipe, parse_capacity
from ltxforge.specs import ModelSpec

if TYPE_CHECKING:
    from ltxforge.hardware import Hardware

STREAMED_FOLDER = "streamed"
"""Where, within the cache directory, `fit` lets weights wait when the host's memory is short."""
GPUS = ("cuda", "rocm")


def stored_format(model: ModelPlan) -> str:
    """The format that the transformer's weights come in, "" where they are whole."""
    part = model.components.get("transformer")
    return part.stored_format if part else ""


def wishes_of(
    recipe: Recipe, hardware: Hardware, spec: ModelSpec, previous: Plan | None, cache_directory: str, stored: str = ""
) -> Asked:  # fmt: skip
    """What the recipe asks for and what it leaves open; a run that goes on keeps its precision and its optimiser.

    Args:
        stored: the format that the weights come in, which is kept where nothing is said: making them whole would only
            take memory.

    Raises:
        PlanError: what is asked for cannot be had from this model or on this device.
    """
    memory, fits = recipe.memory, recipe.memory.fit is not None
    stream, disk = _stream(recipe, hardware, spec), _disk(recipe)
    base = memory.base_precision or (previous.memory.base_precision if previous else stored or None)
    double = previous.memory.double_quant if previous and base == "nf4" and not memory.base_precision else True
    double = double if memory.double_quant is None else memory.double_quant
    text = memory.text_encoder_precision or (previous.memory.text_encoder_precision if previous else None)
    again = _recomputes(recipe, hardware)
    tiles = _tiles(recipe, spec)
    on_gpu = hardware.kind in GPUS
    plain = MemoryPlan(
        checkpointed=every_nth(again, spec.blocks),
        base_precision=base or "bf16",
        double_quant=base == "nf4" and double,
        quantise_on=memory.quantise_on,
        text_encoder_precision=text or "bf16",
        stream=stream,
        offload_activations=bool(memory.offload_activations),
        decode_tile=tiles[0][0],
        decode_frames=tiles[0][1],
        dry_run=on_gpu if memory.dry_run is None else memory.dry_run,
        fit=memory.fit or "",
        blocks=spec.blocks,
    )
    unsaid = fits and memory.block_swap is None and memory.group_offload is None
    return Asked(
        plain,
        base_precisions=BASE_PRECISIONS if fits and base is None else (plain.base_precision,),
        optimizers=_optimizers(recipe, hardware, previous),
        text_encoders=TEXT_ENCODERS if fits and text is None else (plain.text_encoder_precision,),
        streams=unsaid and on_gpu,
        overlapped=_overlapped(recipe, hardware),
        disks=("", str(Path(cache_directory, STREAMED_FOLDER))) if fits and on_gpu and not disk else (disk,),
        recomputes=fits and memory.checkpointing is None and memory.activation_budget is None and _may_recompute(
            recipe, hardware
        ),
        offloads=(False, True) if fits and on_gpu and memory.offload_activations is None else (
            plain.offload_activations,
        ),
        tiles=tiles,
        double_quant=double,
    )  # fmt: skip


def budget_for(recipe: Recipe, hardware: Hardware) -> Budget:
    """What the run may take: as `fit` says, of the device at most what it has, and of the host all but the system's."""
    said = recipe.memory.fit
    device, host = hardware.memory_bytes or UNLIMITED, hardware.host_bytes or UNLIMITED
    if said not in (None, "auto"):
        device = min(device, parse_capacity(said))
    shared = hardware.kind not in GPUS
    return budget_of(0 if shared and device == UNLIMITED else device, host, shared=shared)


def memory_remarks(recipe: Recipe, memory: MemoryPlan, hardware: Hardware) -> tuple[str, ...]:
    """In plain words, what was wished for and cannot be had here."""
    stream = memory.stream
    if stream is not None and recipe.memory.use_stream:
        memory = replace(memory, stream=replace(stream, overlapped=True))
    notes = remarks(memory, hardware.kind)
    said = recipe.memory.fit
    if said not in (None, "auto") and 0 < hardware.memory_bytes < parse_capacity(said):
        notes += (f'memory.fit = "{said}", but this device has {hardware.memory_bytes / 2**30:.1f} GB: these count',)
    return notes


def _stream(recipe: Recipe, hardware: Hardware, spec: ModelSpec) -> StreamPlan | None:
    memory, blocks = recipe.memory, spec.blocks
    for name, count in (("block_swap", memory.block_swap or 0), ("blocks_per_group", memory.blocks_per_group)):
        if count > blocks:
            raise PlanError(
                f"memory.{name} = {count}, but {spec.version} has {blocks} blocks", remedy=f"At most {blocks}."
            )
    shared = {"overlapped": _overlapped(recipe, hardware), "disk": _disk(recipe)}
    if memory.block_swap:
        return StreamPlan(spread(memory.block_swap, blocks), **shared)
    if memory.group_offload is None:
        return None
    level = memory.group_offload.removesuffix("_level")
    return StreamPlan(groups(blocks, memory.blocks_per_group), level, **shared)


def _overlapped(recipe: Recipe, hardware: Hardware) -> bool:
    """Copies beside the computation need a GPU; where there is none a recipe that asks for them runs without."""
    return hardware.kind in GPUS and recipe.memory.use_stream is not False


def _disk(recipe: Recipe) -> str:
    folder = recipe.memory.offload_to_disk
    return str(Path(folder).expanduser()) if folder else ""


def _tiles(recipe: Recipe, spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    memory = recipe.memory
    tiles = memory.decode_tile, memory.decode_frames
    if memory.decode == "tiles" or (recipe.validation.frugal and spec.has_audio):
        return (tiles,)
    return ((0, 0), tiles) if memory.fit is not None and memory.decode is None else ((0, 0),)


def _optimizers(recipe: Recipe, hardware: Hardware, previous: Plan | None) -> tuple[str, ...]:
    if "name" in recipe.optimizer.model_fields_set:
        return (recipe.optimizer.name,)
    if previous is not None:
        return (previous.optimizer.name,)
    can_choose = recipe.memory.fit is not None and hardware.kind in GPUS and "bitsandbytes" in hardware.packages
    return OPTIMIZERS if can_choose else (recipe.optimizer.name,)


def _may_recompute(recipe: Recipe, hardware: Hardware) -> bool:
    """On Apple's GPUs torch does not put the device's random state back before it recomputes: dropout would draw
    another mask there and the gradients would be silently wrong.
    """
    return hardware.kind != "mps" or recipe.lora.dropout == 0


def _recomputes(recipe: Recipe, hardware: Hardware) -> int:
    """Every how many blocks one is computed again, 0 for none; all of them on GPUs where nothing is said."""
    said = recipe.memory.checkpointing
    if not _may_recompute(recipe, hardware):
        if said or recipe.memory.activation_budget:
            raise PlanError(
                "lora.dropout with memory.checkpointing gives wrong gradients on Apple GPUs",
                remedy="Set memory.checkpointing = false or lora.dropout = 0.",
            )
        return 0
    if said is None and recipe.memory.activation_budget is not None:
        return 1
    return int(hardware.kind != "cpu") if said is None else int(said)
