"""Rules between keys, and warnings: what no single key can know. Each rule is one small function.

Rules judge the text alone: no files, no weights. What is legal within one key stands in `schema.py`; what depends on
the model's family, in `model_rules.py`; what [memory] asks for, in `memory_rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from ltxforge.moments import MOMENTS
from ltxforge.recipe import memory_rules  # noqa: F401  its rules join RULES
from ltxforge.recipe.faults import Fault, Key, dotted
from ltxforge.recipe.model_rules import family_named, spec_named
from ltxforge.recipe.rulebook import RULES, key_of, rule, warning
from ltxforge.recipe.schema import Dataset, Recipe
from ltxforge.recipe.suggest import nearest
from ltxforge.recipe.wording import toml
from ltxforge.specs import specs_of

BUILTIN_DATASETS = ("builtin/shapes",)


def break_rules(recipe: Recipe, unjudged: set[Key]) -> list[Fault]:
    """All faults and warnings that the rules find, those left out that would read an unjudged key."""
    return [fault for each in RULES if each.can_judge(unjudged) for fault in each.judge(recipe)]


# --- length and schedule ---------------------------------------------------------------------------------------------


@rule("run.steps", "run.epochs")
def _one_length(recipe: Recipe) -> Iterator[Fault]:
    if recipe.run.steps is not None and recipe.run.epochs is not None:
        hint = "keep one of them; on the command line, --set run.epochs= takes a key out"
        yield Fault(key_of("run.epochs"), "the run's length is said twice, in steps and in epochs", hint,
                    other=key_of("run.steps"))  # fmt: skip
    if recipe.run.steps is None and recipe.run.epochs is None:
        yield Fault(key_of("run.steps"), "the run's length is missing", "add steps or epochs to [run]", "key")


@rule("run.steps", "optimizer.warmup_steps")
def _warmup_ends(recipe: Recipe) -> Iterator[Fault]:
    steps, warmup = recipe.run.steps, recipe.optimizer.warmup_steps
    if steps is not None and warmup is not None and warmup >= steps:
        what = f"warmup_steps = {warmup} never ends: the run has {steps} steps"
        yield Fault(key_of("optimizer.warmup_steps"), what, f"at most {steps - 1}", other=key_of("run.steps"))


@rule("optimizer.schedule", "optimizer.power")
def _power_of_polynomial(recipe: Recipe) -> Iterator[Fault]:
    if "power" in recipe.optimizer.model_fields_set and recipe.optimizer.schedule != "polynomial":
        what = f'power means nothing to the schedule "{recipe.optimizer.schedule}"'
        yield warning(key_of("optimizer.power"), what, 'only schedule = "polynomial" reads it')


@rule("optimizer.schedule", "optimizer.end_fraction")
def _end_of_decay(recipe: Recipe) -> Iterator[Fault]:
    if "end_fraction" in recipe.optimizer.model_fields_set and recipe.optimizer.schedule == "constant":
        what = 'end_fraction means nothing to the schedule "constant"'
        yield warning(key_of("optimizer.end_fraction"), what, "the rate never falls")


@rule("optimizer.name", "optimizer.epsilon")
def _epsilon_is_read(recipe: Recipe) -> Iterator[Fault]:
    name = recipe.optimizer.name
    if "epsilon" in recipe.optimizer.model_fields_set and not MOMENTS[name].has_epsilon:
        yield warning(key_of("optimizer.epsilon"), f'epsilon means nothing to "{name}"', "Lion divides by nothing")


@rule("run.steps", "checkpoint.every")
def _checkpoints_within_run(recipe: Recipe) -> Iterator[Fault]:
    yield from _beyond_the_end(recipe, "checkpoint.every", recipe.checkpoint.every, "saves only at the end")


@rule("run.steps", "validation.every")
def _samples_within_run(recipe: Recipe) -> Iterator[Fault]:
    yield from _beyond_the_end(recipe, "validation.every", recipe.validation.every, "samples only at the end")


def _beyond_the_end(recipe: Recipe, key: str, every: int | None, then: str) -> Iterator[Fault]:
    steps = recipe.run.steps
    if steps is not None and every is not None and every > steps:
        yield warning(key_of(key), f"every = {every}: a run of {steps} steps {then}", other=key_of("run.steps"))


# --- gradient, noise, LoRA -------------------------------------------------------------------------------------------


@rule("training.clip_norm", "training.clip_value")
def _one_clip(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.clip_norm is not None and recipe.training.clip_value is not None:
        what = "clip_value and clip_norm exclude each other"
        yield Fault(key_of("training.clip_value"), what, "keep one of them", other=key_of("training.clip_norm"))


@rule("flow.sigma", "flow.shift")
def _uniform_has_no_shift(recipe: Recipe) -> Iterator[Fault]:
    if recipe.flow.sigma == "uniform" and recipe.flow.shift is not None:
        what = 'sigma = "uniform" takes no shift'
        yield Fault(key_of("flow.shift"), what, "leave it out, or choose another sigma", other=key_of("flow.sigma"))


@rule("flow.sigma", "flow.uniform_fraction")
def _uniform_has_no_fraction(recipe: Recipe) -> Iterator[Fault]:
    if recipe.flow.sigma == "uniform" and "uniform_fraction" in recipe.flow.model_fields_set:
        what = 'uniform_fraction means nothing to sigma = "uniform"'
        yield warning(key_of("flow.uniform_fraction"), what, "all samples are drawn uniformly", key_of("flow.sigma"))


@rule("lora.targets")
def _targets_are_meant(recipe: Recipe) -> Iterator[Fault]:
    presets = ("attention", "feed_forward", "cross_modal", "all")
    for place, target in enumerate(recipe.lora.targets):
        key: Key = ("lora", "targets", place)
        if target in recipe.lora.targets[:place]:
            yield warning(
                key, f'the target "{target}" is said twice', other=(*key[:-1], recipe.lora.targets.index(target))
            )
        elif target not in presets and (near := nearest(target, presets)):
            yield warning(key, f'the target "{target}" is taken as a module name', f'did you mean "{near}"?')


# --- datasets --------------------------------------------------------------------------------------------------------


@rule("dataset.*.enabled")
def _some_dataset(recipe: Recipe) -> Iterator[Fault]:
    if not any(item.enabled for item in recipe.dataset):
        yield Fault(("dataset", 0, "enabled"), "every dataset is switched off", "enable at least one")


@rule("dataset.*.path")
def _builtin_is_known(recipe: Recipe) -> Iterator[Fault]:
    for place, item in enumerate(recipe.dataset):
        if item.path.startswith("builtin/") and item.path not in BUILTIN_DATASETS:
            what = f'there is no built-in dataset "{item.path}"'
            yield Fault(("dataset", place, "path"), what, f"there is {', '.join(BUILTIN_DATASETS)}")


@rule("dataset.**")
def _datasets_differ(recipe: Recipe) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for place, item in enumerate(recipe.dataset):
        earlier = first.setdefault(_samples(item), place) if item.enabled else place
        if earlier != place:
            what = "this dataset gives the same samples as an earlier one"
            hint = "to see them more often, say repeats = 2 once"
            yield Fault(("dataset", place, "path"), what, hint, other=("dataset", earlier, "path"))


@rule("dataset.*.id", "dataset.*.path")
def _dataset_ids_differ(recipe: Recipe) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for place, item in enumerate(recipe.dataset):
        name = dataset_id(item)
        earlier = first.setdefault(name.casefold(), place)
        if earlier == place or _samples(item) == _samples(recipe.dataset[earlier]):
            continue
        part = "path" if item.id is None else "id"
        hint = f'give one an id of its own, such as id = "{re.sub(r"[^a-z0-9_-]", "-", name.lower())[:60]}-2"'
        other: Key = ("dataset", earlier, "path" if recipe.dataset[earlier].id is None else "id")
        yield Fault(("dataset", place, part), f'two datasets are called "{name}"', hint, other=other)


def dataset_id(item: Dataset) -> str:
    """A dataset's id: the one it was given, else its folder's name."""
    return item.id or re.split(r"[/\\]", item.path.rstrip("/\\"))[-1]


def _samples(item: Dataset) -> str:
    """All that decides which samples a dataset gives."""
    return item.model_dump_json(exclude={"id", "repeats", "enabled"})


@rule("run.directory", "cache.directory", "memory.offload_to_disk", "dataset.*.path")
def _folders_apart(recipe: Recipe) -> Iterator[Fault]:
    taken = [(("dataset", place, "path"), item.path) for place, item in enumerate(recipe.dataset)]
    ours = [
        (key_of("run.directory"), recipe.run.directory),
        (key_of("cache.directory"), recipe.cache.directory),
        (key_of("memory.offload_to_disk"), recipe.memory.offload_to_disk),
    ]
    for key, folder in ours:
        if folder is None:
            continue
        for other, path in taken:
            if _folder(folder) == _folder(path):
                what = f"{key[-1]} = {toml(folder)} is also {dotted(other)}"
                yield Fault(key, what, "each needs a folder of its own; clips are never written to", other=other)
                break
        taken.append((key, folder))


def _folder(path: str) -> str:
    return str(PurePosixPath(path.replace("\\", "/")))


@rule("conditioning.first_frame", "dataset.*.frames", "dataset.*.enabled")
def _first_frame_leaves_some(recipe: Recipe) -> Iterator[Fault]:
    for place, item in enumerate(recipe.dataset):
        if recipe.conditioning.first_frame > 0 and item.enabled and item.frames == 1:
            what = "frames = 1 with first_frame conditioning: there is no frame to follow, so it has no effect here"
            yield warning(("dataset", place, "frames"), what, other=key_of("conditioning.first_frame"))


# --- validation ------------------------------------------------------------------------------------------------------


@rule("validation.every", "validation.prompt", "validation.library")
def _something_to_sample(recipe: Recipe) -> Iterator[Fault]:
    validation = recipe.validation
    if validation.every and not validation.prompt and validation.library is None:
        what = f"every = {validation.every}, but there is nothing to sample"
        hint = "add [[validation.prompt]] or library, or say every = 0"
        yield Fault(key_of("validation.every"), what, hint)


@rule("validation.prompt.*.name")
def _prompt_names_differ(recipe: Recipe) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for place, prompt in enumerate(recipe.validation.prompt):
        earlier = first.setdefault(prompt.name.casefold(), place)
        if earlier != place:
            key: Key = ("validation", "prompt", place, "name")
            what = f'two prompts are called "{prompt.name}", and would write the same files'
            yield Fault(key, what, "names must differ", other=("validation", "prompt", earlier, "name"))


@rule("validation.resolution", "validation.prompt.*.resolution", "dataset.*.resolution", "dataset.*.enabled")
def _sampled_size_is_trained(recipe: Recipe) -> Iterator[Fault]:
    yield from _unlike_training(recipe, "resolution", {item.resolution for item in recipe.dataset if item.enabled})


@rule("validation.frames", "validation.prompt.*.frames", "dataset.*.frames", "dataset.*.enabled")
def _sampled_length_is_trained(recipe: Recipe) -> Iterator[Fault]:
    yield from _unlike_training(recipe, "frames", {item.frames for item in recipe.dataset if item.enabled})


@rule(
    "validation.fps", "validation.prompt.*.fps", "dataset.*.fps", "dataset.*.enabled", "model.base", "model.version",
    "model.transformer",
)  # fmt: skip
def _sampled_rate_is_trained(recipe: Recipe) -> Iterator[Fault]:
    rates = {item.fps or _default_rate(recipe) for item in recipe.dataset if item.enabled}
    if None not in rates:
        yield from _unlike_training(recipe, "fps", rates)


def _default_rate(recipe: Recipe) -> float | None:
    """The model's own rate, where the text says which model it is."""
    spec, family = spec_named(recipe.model), family_named(recipe.model)
    rates = {each.default_fps for each in ([spec] if spec else specs_of(family).values() if family else ())}
    return rates.pop() if len(rates) == 1 else None


def _unlike_training(recipe: Recipe, name: str, trained: set) -> Iterator[Fault]:
    """Warn where validation samples differ from what every dataset trains on."""
    told = " or ".join(toml(value) for value in sorted(trained))
    places: list[tuple[Key, object]] = [(("validation", name), getattr(recipe.validation, name))]
    for place, prompt in enumerate(recipe.validation.prompt):
        places.append((("validation", "prompt", place, name), getattr(prompt, name)))
    for key, value in places:
        if value is not None and trained and value not in trained:
            yield warning(key, f"{name} = {toml(value)} is not what is trained on", f"training uses {told}")
