"""How a run's memory is decided: what the recipe wishes, what `fit` chooses, and a refusal of what cannot fit. Pure.

`planner.py` gives a draft of the plan in which everything else is decided, and a way to draft the recipe with other
keys. Where nobody can say what a run costs (`CostsOf`), only the wishes are carried out; built-in tiny models
fit everywhere, so that nobody asks. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxforge.cards import card_of
from ltxforge.errors import PlanError
from ltxforge.fit.remedies import Remedy, axes_of, changed, remedies, smaller_samples
from ltxforge.fit.search import CPU_RATES, UNLIMITED, Asked, Budget, Search, Way, rates_of, recomputed_blocks
from ltxforge.fit.wishes import GPUS, STREAMED_FOLDER, budget_for, memory_remarks, wishes_of
from ltxforge.fit.words import too_large, words_on
from ltxforge.memory.combinations import refusal
from ltxforge.memory.costs import Costs, Rates, phases, precision_key
from ltxforge.plan import MemoryPlan, PhasePlan, Plan
from ltxforge.recipe.schema import Recipe, parse_capacity
from ltxforge.specs import ModelSpec

if TYPE_CHECKING:
    from ltxforge.hardware import Hardware

DEAR = 0.1
"""What a change may lose before smaller samples, or none, are looked at too."""
FITTED: Mapping[str, Any] = {"memory.fit": "auto"}
CostsOf = Callable[[Plan, ModelSpec, Asked], Costs]
"""What the run of a drafted plan costs, for every base precision, text encoder and tile that is in question."""
Draft = Callable[[Recipe], Plan]
"""A recipe's plan with everything decided but its memory."""


@dataclass(frozen=True)
class Decision:
    """What was decided, what every phase then takes, why, and what the reader should know.

    `chosen` are the dotted keys that `fit` decided.
    """

    memory: MemoryPlan
    optimizer: str
    phases: tuple[PhasePlan, ...] = ()
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    chosen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One machine and one model, for which recipes are judged.

    Attributes:
        stored: the format that the transformer's weights come in, "" where they are whole.
        draft: drafts another recipe's plan.
        costs_of: what a drafted plan costs; None where nobody knows.
    """

    hardware: Hardware
    spec: ModelSpec
    previous: Plan | None
    cache_directory: str
    stored: str
    costs_of: CostsOf | None
    draft: Draft

    def wishes(self, recipe: Recipe) -> Asked:
        """See `wishes_of`."""
        return wishes_of(recipe, self.hardware, self.spec, self.previous, self.cache_directory, self.stored)

    @property
    def rates(self) -> Rates:
        """How fast the device is, as far as tables know."""
        if self.hardware.kind not in GPUS:
            return CPU_RATES
        return rates_of(card_of(self.hardware.name, self.hardware.memory_bytes, self.hardware.machine.arch))


def decide(recipe: Recipe, plan: Plan, case: Case) -> Decision:
    """Decide how a drafted plan's model is made to fit.

    Raises:
        PlanError: the wishes exclude each other, or nothing that they leave open makes every phase fit.
    """
    asked = case.wishes(recipe)
    notes = memory_remarks(recipe, asked.memory, case.hardware)
    if case.costs_of is None or (case.spec.tiny and not _is_asked(recipe)):
        return Decision(_legal(asked.memory, recipe, case), asked.optimizers[0], notes=notes)
    decision = (_plain if recipe.memory.fit is None else _fitted)(recipe, plan, asked, case)
    return replace(decision, notes=(*notes, *decision.notes))


def _plain(recipe: Recipe, plan: Plan, asked: Asked, case: Case) -> Decision:
    """What the recipe says, nothing chosen."""
    search = _search(recipe, plan, asked, case)
    way, limits = search.plain(), search.budget.hard
    found = phases(search.costs, way.memory, way.optimizer)
    if any(not limits.holds(phase) for phase in found):
        raise _does_not_fit(recipe, plan, search, case, max(found, key=limits.excess), limits)
    return Decision(_with_budget(way.memory, search.budget), way.optimizer, found, notes=_close(search.budget, found))


def _fitted(recipe: Recipe, plan: Plan, asked: Asked, case: Case) -> Decision:
    """What `fit` chooses. Coarser bases are asked about only where the first one does not fit with all in its place:
    to make weights whole takes time, so that nothing is faster than that.
    """
    search = _search(recipe, plan, replace(asked, base_precisions=asked.base_precisions[:1]), case)
    if not search.fits(search.resident()):
        search = _search(recipe, plan, asked, case)
    way = search.best()
    if way is None:
        leanest = search.leanest()
        worst = max(phases(search.costs, leanest.memory, leanest.optimizer), key=search.budget.excess)
        raise _does_not_fit(recipe, plan, search, case, worst, search.budget)
    memory = _legal(_with_budget(way.memory, search.budget), recipe, case)
    found, words = phases(search.costs, memory, way.optimizer), words_on(search, way, _assumed(case))
    return Decision(memory, way.optimizer, found, words, chosen=_chosen(asked))


def _search(recipe: Recipe, plan: Plan, asked: Asked, case: Case) -> Search:
    """The search over what is asked, with what it costs."""
    assert case.costs_of is not None
    costs = case.costs_of(plan, case.spec, asked)
    asked = _within_budget(recipe, asked, costs)
    _legal(asked.memory, recipe, case)
    return Search(costs, asked, budget_for(recipe, case.hardware), case.rates)


def _is_asked(recipe: Recipe) -> bool:
    """Whether the recipe asks for a choice that needs to know what things take."""
    return recipe.memory.fit is not None or recipe.memory.activation_budget is not None


def _with_budget(memory: MemoryPlan, budget: Budget) -> MemoryPlan:
    """The memory's plan with what there is, as far as that is known."""
    there = (0 if each >= UNLIMITED else each for each in (budget.whole_device, budget.whole_host))
    return replace(memory, budget=tuple(there))


def _legal(memory: MemoryPlan, recipe: Recipe, case: Case) -> MemoryPlan:
    """The memory's plan, if its parts go together."""
    if why := refusal(memory, recipe.training.compile, case.spec.blocks, case.hardware.compile_lacks):
        raise PlanError(why, remedy="Leave one of them out.")
    return memory


def _within_budget(recipe: Recipe, asked: Asked, costs: Costs) -> Asked:
    """The blocks that an activation budget keeps: as many as it holds, spread over the model."""
    if recipe.memory.activation_budget is None:
        return asked
    each = costs.works[precision_key(asked.memory)].kept.stays
    kept = min(costs.blocks, parse_capacity(recipe.memory.activation_budget) // max(1, each))
    again = recomputed_blocks(costs.blocks - kept, costs.blocks)
    return replace(asked, memory=replace(asked.memory, checkpointed=again))


def _close(budget: Budget, found: tuple[PhasePlan, ...]) -> tuple[str, ...]:
    """A word where what fits by the estimate leaves the allocator no room."""
    worst = max(found, key=budget.excess)
    if budget.holds(worst):
        return ()
    return (f"memory is tight, and what the allocator holds back may be too much: {too_large(budget, worst)}",)


def _does_not_fit(
    recipe: Recipe, plan: Plan, search: Search, case: Case, worst: PhasePlan, limits: Budget
) -> PlanError:  # fmt: skip
    """The refusal: the phase that binds, its parts, and what would make everything fit: `fit`, if it does and is not
    asked for, and the two cheapest changes.
    """
    folder = str(Path(case.cache_directory, STREAMED_FOLDER))
    asked_for = search.leanest() if recipe.memory.fit else search.plain()
    all_phases = phases(search.costs, asked_for.memory, asked_for.optimizer)
    crowded = [phase.name for phase in all_phases if not search.budget.holds(phase)]
    axes = axes_of(
        recipe, plan, case.spec, on_gpu=case.hardware.kind in GPUS, packages=case.hardware.packages, folder=folder,
        goes_on=case.previous is not None, crowded=crowded,
    )  # fmt: skip

    def trial(sets: Mapping[str, Any]) -> float | None:
        return _seconds_with(sets, recipe, search, case)

    found = remedies(axes, trial, asked_for.seconds)
    is_dear = len(found) < 2 or found[-1].lost > DEAR
    if is_dear and plan.validation.prompts and not {"sample", "decode"}.isdisjoint(crowded):
        last = remedies([*axes, *smaller_samples(plan, case.spec)], trial, asked_for.seconds)
        found = sorted([*found, *(each for each in last if each not in found)], key=lambda each: each.lost)[:2]
    if recipe.memory.fit is None and (seconds := trial(FITTED)) is not None:
        found = [Remedy(FITTED, seconds, 0.0), *found]
    told = "\n  ".join(_told(remedy, 0 if recipe.memory.fit else asked_for.seconds) for remedy in found)
    return PlanError(
        f"this does not fit{_machine(case.hardware)}: {too_large(limits, worst)}",
        remedy=f"{'What would fit' if told else 'No change of memory, size or rank that is known here makes it fit'}"
        + (f":\n  {told}" if told else ". It needs a larger machine."),
    )


def _machine(hardware: Hardware) -> str:
    """A machine that is not here, as it is assumed: which card stands for a size is to be seen."""
    return f" {hardware.name}" if hardware.is_assumed else ""


def _told(remedy: Remedy, seconds: float) -> str:
    """A remedy, and what it does to the seconds of a step as it was asked for, where one was."""
    if not seconds:
        return remedy.arguments
    return f"{remedy.arguments}   (a step takes about {remedy.seconds / seconds:.2f}x of its time)"


def _seconds_with(sets: Mapping[str, Any], recipe: Recipe, search: Search, case: Case) -> float | None:
    """The seconds of a step with these keys changed; None if it does not fit or cannot be had."""
    assert case.costs_of is not None
    try:
        other = changed(recipe, sets)
        plan, asked = case.draft(other), case.wishes(other)
        same_work = all(key.startswith(("memory.", "optimizer.")) for key in sets)
        known = search.costs if same_work and _is_priced(asked, search.costs) else None
        costs = known or case.costs_of(plan, case.spec, asked)
        asked = _within_budget(other, asked, costs)
    except (PlanError, ValueError):
        return None
    if refusal(asked.memory, other.training.compile, case.spec.blocks, case.hardware.compile_lacks):
        return None
    trial = replace(search, costs=costs, asked=asked)
    if other.memory.fit is not None:
        way = trial.best()
        return way.seconds if way else None
    plain: Way = trial.plain()
    return plain.seconds if trial.fits(plain) else None


def _is_priced(asked: Asked, costs: Costs) -> bool:
    """Whether costs that are known cover what is in question."""
    keys = {precision_key(replace(asked.memory, base_precision=base, double_quant=asked.double_quant))
            for base in asked.base_precisions}  # fmt: skip
    encoders = not costs.captions or set(asked.text_encoders) <= costs.captions.keys()
    return keys <= costs.works.keys() and encoders and (not costs.decodes or set(asked.tiles) <= costs.decodes.keys())


def _chosen(asked: Asked) -> frozenset[str]:
    open_keys = {
        "memory.base_precision": len(asked.base_precisions) > 1,
        "memory.block_swap": asked.streams,
        "memory.checkpointing": asked.recomputes,
        "memory.offload_activations": len(asked.offloads) > 1,
        "memory.offload_to_disk": len(asked.disks) > 1,
        "memory.text_encoder_precision": len(asked.text_encoders) > 1,
        "memory.decode": len(asked.tiles) > 1,
        "optimizer.name": len(asked.optimizers) > 1,
    }
    return frozenset(key for key, is_open in open_keys.items() if is_open)


def _assumed(case: Case) -> str:
    """Whose rates were taken, where the device is not in the table or has no rates of its own."""
    if case.hardware.kind not in GPUS:
        return "a usual CPU"
    card = card_of(case.hardware.name, case.hardware.memory_bytes, case.hardware.machine.arch)
    return f"{card.name}, the nearest card that is known" if card.assumed else card.name
