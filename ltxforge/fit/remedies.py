"""Changes to a recipe that would make it fit: the two that cost least, as `--set` arguments. Pure; torch-free.

A change is a rung of an axis, from a small step to a large one; `Try` plans the recipe with it. What is lost by it is
the time that its steps take longer, and what of the run is given up: frames, pixels and rank as their share, numbers in
fewer bits as `_WORTH` has it. Single changes are looked for first, then changes of two axes, and so on. Decides no
plan: it only proposes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from ltxforge.fit.search import BASE_PRECISIONS, TEXT_ENCODERS
from ltxforge.media.buckets import bucket_sizes
from ltxforge.plan import Plan
from ltxforge.recipe.schema import Recipe, parse_size
from ltxforge.recipe.wording import toml
from ltxforge.specs import ModelSpec

_WORTH = {
    "int8": 0.02, "nf4": 0.1, "adamw8bit": 0.01, "text int8": 0.002, "text nf4": 0.005, "tiles": 0.001,
    "small tiles": 0.003, "frugal": 0.004, "smaller samples": 0.1, "samples": 0.15, "disk": 0.03,
}  # fmt: skip
"""What fewer bits, blended tiles, a busy disk and no samples while training count beside a share of a step's time: an
order of preference, no measurement.
"""
SMALLER_TILES = ((384, 64), (256, 64), (256, 32), (128, 16))
"""Sides in pixels and lengths in frames."""
SHARES_OF_SAMPLES = (0.75, 0.5, 0.25)
"""Of a sample's side or length: few, because each asks for another trace."""
LOWEST_RANK, FEWEST_FRAMES, LEAST_AREA = 4, 9, 0.25
MOST_TOGETHER = 3


@dataclass(frozen=True)
class Rung:
    """Keys and their new values, None to take a key out; `given_up` is the share of the run's worth that this costs."""

    sets: tuple[tuple[str, Any], ...]
    given_up: float = 0.0


Axis = tuple[Rung, ...]
Try = Callable[[Mapping[str, Any]], float | None]
"""Plans with these keys: the seconds of a step, or None if it does not fit."""


@dataclass(frozen=True)
class Remedy:
    """A change that makes the run fit: its keys, the seconds of a step, and what is lost beside what was asked for."""

    sets: Mapping[str, Any]
    seconds: float
    lost: float

    @property
    def arguments(self) -> str:
        """As it is typed: `--set memory.block_swap=20`."""
        return " ".join(f"--set {key}={_value(value)}" for key, value in self.sets.items())


def remedies(axes: Sequence[Axis], trial: Try, seconds: float, most: int = 2) -> list[Remedy]:
    """The cheapest changes, at most so many: of as few axes as there are enough of.

    Args:
        seconds: of a step as it was asked for, if it fitted.
    """
    tried = _remembered(trial)
    found: list[Remedy] = []
    for together in range(1, MOST_TOGETHER + 1):
        for chosen in sorted(combinations([axis for axis in axes if axis], together), key=_least_lost):
            if any(_is_part(other.sets, chosen) for other in found):
                continue
            if len(found) >= most and _least_lost(chosen) >= sorted(other.lost for other in found)[most - 1]:
                break  # to try is dear where a change asks for another trace
            if rungs := _least(chosen, tried):
                found.append(_remedy(rungs, tried, seconds))
        if len(found) >= most:
            break
    return sorted(found, key=lambda remedy: (round(remedy.lost, 3), len(remedy.sets)))[:most]


def _least_lost(axes: Sequence[Axis]) -> float:
    return sum(axis[0].given_up for axis in axes)


def axes_of(recipe: Recipe, plan: Plan, spec: ModelSpec, *, on_gpu: bool, packages: Iterable[str], folder: str,
            goes_on: bool, crowded: Iterable[str] = ()) -> list[Axis]:  # fmt: skip
    """What may be changed about a recipe, and how far.

    Args:
        crowded: the phases that do not fit; samples are left as they are where theirs do.
        folder: where weights could wait on a disk.
        goes_on: whether a run is continued, whose identity must stay.
    """
    found = [*_free_axes(recipe, plan, spec, on_gpu, folder)]
    if plan.validation.prompts and not {"sample", "decode"}.isdisjoint(crowded):
        found += [*_sample_axes(recipe, plan, spec)]
    if not goes_on:
        found += [*_identity_axes(recipe, plan, packages, on_gpu)]
    return found


def _free_axes(recipe: Recipe, plan: Plan, spec: ModelSpec, on_gpu: bool, folder: str) -> Iterator[Axis]:
    memory, asked = plan.memory, recipe.memory
    yield tuple(
        Rung((("memory.text_encoder_precision", name),), _WORTH[f"text {name}"])
        for name in _below(memory.text_encoder_precision, TEXT_ENCODERS)
    )
    if len(memory.checkpointed) < spec.blocks:
        budget = (("memory.activation_budget", None),) if asked.activation_budget else ()
        yield (Rung((*budget, ("memory.checkpointing", True))),)
    if on_gpu and not asked.group_offload:
        least = len(memory.stream.blocks) if memory.stream else 0
        counts = range(least + 1, spec.blocks + 1)
        yield tuple(Rung((("memory.block_swap", count),)) for count in counts)
        if not (memory.stream and memory.stream.disk):
            to_disk = ("memory.offload_to_disk", folder)
            yield tuple(Rung((("memory.block_swap", count), to_disk), _WORTH["disk"]) for count in counts)
    if on_gpu and memory.stream and not memory.stream.disk:
        yield (Rung((("memory.offload_to_disk", folder),), _WORTH["disk"]),)
    if on_gpu and not memory.offload_activations:
        yield (Rung((("memory.offload_activations", True),)),)


def _sample_axes(recipe: Recipe, plan: Plan, spec: ModelSpec) -> Iterator[Axis]:
    """Ways to make the same samples in less memory."""
    tile, whole = (plan.memory.decode_tile, plan.memory.decode_frames), recipe.memory.decode == "whole"
    tiled = ("memory.decode", "tiles")
    smaller = tuple(
        Rung((tiled, ("memory.decode_tile", side), ("memory.decode_frames", frames)), _WORTH["small tiles"])
        for side, frames in SMALLER_TILES
        if not tile[0] or (side, frames) < tile
    )
    yield (*(() if tile[0] else (Rung((tiled,), _WORTH["tiles"]),)), *smaller)
    if spec.has_audio and not recipe.validation.frugal and not whole:
        yield (Rung((("validation.frugal", True),), _WORTH["frugal"]),)


def smaller_samples(plan: Plan, spec: ModelSpec) -> Iterator[Axis]:
    """Smaller samples, or none: what is only looked for where all else is dear."""
    largest = max((prompt.shape for prompt in plan.validation.prompts), key=lambda shape: shape.latent().tokens)
    sizes = [
        tuple(round(side * share / 32) * 32 for side in (largest.width, largest.height)) for share in SHARES_OF_SAMPLES
    ]
    yield tuple(
        Rung((("validation.resolution", f"{width}x{height}"),), _WORTH["smaller samples"] * (1 - share))
        for (width, height), share in zip(sizes, SHARES_OF_SAMPLES, strict=True)
        if min(width, height) >= max(64, spec.smallest_sampled_side)
    )
    yield tuple(
        Rung((("validation.frames", int(share * largest.frames / 8) * 8 + 1),), _WORTH["smaller samples"] * (1 - share))
        for share in SHARES_OF_SAMPLES
        if largest.frames > FEWEST_FRAMES
    )
    if plan.validation.every or plan.validation.at_start:
        yield (Rung((("validation.every", 0), ("validation.at_start", False)), _WORTH["samples"]),)


def _identity_axes(recipe: Recipe, plan: Plan, packages: Iterable[str], on_gpu: bool) -> Iterator[Axis]:
    yield tuple(
        Rung((("memory.base_precision", name),), _WORTH[name])
        for name in _below(plan.memory.base_precision, BASE_PRECISIONS)
    )
    if on_gpu and plan.optimizer.name == "adamw" and "bitsandbytes" in packages:
        yield (Rung((("optimizer.name", "adamw8bit"),), _WORTH["adamw8bit"]),)
    yield tuple(_batches(plan))
    yield tuple(_ranks(recipe, plan))
    yield tuple(_lengths(recipe))
    yield tuple(_sizes(recipe))


def _below(name: str, names: Sequence[str]) -> Sequence[str]:
    """What is coarser than this; fp8 and int8-w8a8 weigh what int8 weighs."""
    return names[names.index(name if name in names else "int8") + 1 :]


def _batches(plan: Plan) -> Iterator[Rung]:
    """The same samples in a step, in more and smaller parts."""
    size, accumulate = plan.training.batch_size, plan.training.accumulate
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            parts = accumulate * (size // smaller)
            yield Rung((("training.batch_size", smaller), ("training.accumulate", parts)))


def _ranks(recipe: Recipe, plan: Plan) -> Iterator[Rung]:
    rank = plan.lora.rank
    while (rank := rank // 2) >= LOWEST_RANK:
        share = rank / plan.lora.rank
        alpha = (("lora.alpha", recipe.lora.alpha * share),) if recipe.lora.alpha else ()
        yield Rung((("lora.rank", rank), *alpha), 1 - share)


def _lengths(recipe: Recipe) -> Iterator[Rung]:
    enabled = [(place, item) for place, item in enumerate(recipe.dataset) if item.enabled]
    longest = max(item.frames for _, item in enabled)
    for frames in range(longest - 8, FEWEST_FRAMES - 1, -8):
        yield Rung(
            tuple((_of_dataset(recipe, place, "frames"), frames) for place, item in enabled if item.frames > frames),
            1 - frames / longest,
        )


def _sizes(recipe: Recipe) -> Iterator[Rung]:
    """The largest picture of the same shape, row by row smaller."""
    enabled = [(place, parse_size(item.resolution)) for place, item in enumerate(recipe.dataset) if item.enabled]
    width, height = max((size for _, size in enabled), key=lambda size: size[0] * size[1])
    steps = min(width, height) // 32
    for side in range(steps - 1, 1, -1):
        smaller = round(width / 32 * side / steps) * 32, round(height / 32 * side / steps) * 32
        area = smaller[0] * smaller[1]
        if area < LEAST_AREA * width * height:
            return
        larger = [place for place, size in enabled if size[0] * size[1] > area]
        text = "x".join(map(str, smaller))
        assert smaller in bucket_sizes(smaller)
        sets = tuple((_of_dataset(recipe, place, "resolution"), text) for place in larger)
        yield Rung(sets, 1 - area / (width * height))


def _of_dataset(recipe: Recipe, place: int, key: str) -> str:
    return f"dataset.{key}" if len(recipe.dataset) == 1 else f"dataset.{place}.{key}"


def _least(axes: Sequence[Axis], trial: Try) -> list[Rung] | None:
    """The smallest steps on these axes that fit together; None if the largest do not, or if one is not needed."""
    places = [len(axis) - 1 for axis in axes]

    def fits(at: int, place: int) -> bool:
        rungs = [axis[place if n == at else places[n]] for n, axis in enumerate(axes)]
        return trial(_together(rungs)) is not None

    if trial(_together(axis[-1] for axis in axes)) is None:
        return None
    # What gives up most is taken back first.
    for at in sorted(range(len(axes)), key=lambda n: -axes[n][-1].given_up):
        low, high = 0, places[at]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(at, middle) else (middle + 1, high)
        places[at] = low
    return [axis[place] for axis, place in zip(axes, places, strict=True)]


def _together(rungs: Iterable[Rung]) -> dict[str, Any]:
    return {key: value for rung in rungs for key, value in rung.sets}


def _remedy(rungs: Sequence[Rung], trial: Try, seconds: float) -> Remedy:
    sets = _together(rungs)
    taken = trial(sets)
    assert taken is not None
    return Remedy(sets, taken, max(0.0, taken / seconds - 1) + sum(rung.given_up for rung in rungs))


def _is_part(sets: Mapping[str, Any], axes: Sequence[Axis]) -> bool:
    """Whether a change that is known already is one on some of these axes."""
    keys = {key for axis in axes for key, _ in axis[-1].sets}
    return sets.keys() <= keys


def _remembered(trial: Try) -> Try:
    @cache
    def ask(items: tuple[tuple[str, Any], ...]) -> float | None:
        return trial(dict(items))

    return lambda sets: ask(tuple(sets.items()))


def _value(value: Any) -> str:
    """As a shell takes it without quotes, where it can be."""
    if value is None:
        return ""
    return value if isinstance(value, str) and not set(value) & set(" \"'\\$") else toml(value)


def changed(recipe: Recipe, sets: Mapping[str, Any]) -> Recipe:
    """The recipe with these keys set, or taken out where a value is None; "dataset.frames" is the only dataset's."""
    data = recipe.model_dump(exclude_unset=True)
    for name, value in sets.items():
        at: Any = data
        *way, key = name.split(".")
        for part in way:
            at = at[int(part)] if isinstance(at, list) and part.isdigit() else at.setdefault(part, {})
        at = at[0] if isinstance(at, list) else at
        if value is None:
            at.pop(key, None)
        else:
            at[key] = value
    return Recipe.model_validate(data)
