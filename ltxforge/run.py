"""A whole run, in order: facts → plan → model → dataset → session. The map of the program, in code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ltxforge.assumed import Elsewhere, machine
from ltxforge.dataset import encode
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.cached import CachedData
from ltxforge.device_full import GENERAL, device_full_told
from ltxforge.distributed import refuse_several_processes
from ltxforge.durable import faults_told
from ltxforge.errors import DeviceFullError, KernelError, LtxforgeError, RunError, Stopped
from ltxforge.events import (
    Emit,
    Note,
    PlanMade,
)
from ltxforge.facts import Places, ask, gather, places
from ltxforge.flow_matching import sigma_quantiles
from ltxforge.hardware import is_out_of_memory, torch_device, torch_dtype
from ltxforge.kernel_calls import calls_of
from ltxforge.lock import RunLock
from ltxforge.memory.store import require_folder
from ltxforge.models.blueprints import require_whole
from ltxforge.models.interface import VideoModel
from ltxforge.models.load import load_model
from ltxforge.models.sources import fetch, spec_of
from ltxforge.plan import Plan, to_json
from ltxforge.planner import Facts, make_plan
from ltxforge.recipe.parse import Parsed
from ltxforge.run_directory import RunDirectory
from ltxforge.session import open_session
from ltxforge.signals import StopRequest
from ltxforge.trackers.jsonl import EventLog, last_per_step, read_events
from ltxforge.ui.dispatch import Dispatcher
from ltxforge.ui.kernels_table import calls_table
from ltxforge.ui.plan_table import plan_table
from ltxforge.ui.screen import Screen
from ltxforge.ui.text import duration
from ltxforge.ways_out import ways_out

# Whose errors are about how an op is carried out, and never about the recipe.
COMPILERS = ("triton.", "torch._dynamo.", "torch._inductor.")


def run(parsed: Parsed, out: Path | None, screen: Screen) -> None:
    """Carry a recipe out, from the beginning or from its newest checkpoint."""
    refuse_several_processes(os.environ)
    where = places(parsed, out)
    with (
        StopRequest() as stop,
        faults_told(where.run),
        RunLock(where.run),
        EventLog(where.run / "events.jsonl") as log,
        Dispatcher([screen, log]) as emit,
        failures_logged(log),
    ):
        plan, facts = settle_plan(parsed, where, screen, log, emit, stop)
        full_told = partial(device_full_told, plan, changes=partial(ways_out, parsed.recipe, facts))
        encoders = torch_dtype(plan.device.encoder_precision)
        model = load_model(
            plan.model, torch_device(plan.device.kind), torch_dtype(plan.device.precision), vae_dtype=encoders,
            text_dtype=encoders, modalities=plan.training.modalities, text_cache=plan.cache.text,
            text_encoder_precision=plan.memory.text_encoder_precision,
        )  # fmt: skip
        model.kernels = plan.kernels
        cache = Cache(Path(plan.cache.directory), emit)
        cache.sweep()
        with full_told(model.device, "captions", "clips", "sound"):
            data = settle_data(plan, model, cache, emit, stop)
        RunDirectory(where.run).save_plan(plan, parsed.text, parsed.overrides)
        with full_told(model.device, "load"):
            session = open_session(plan, model, cache, data, log.attempt, emit, stop)
        with contextlib.closing(session), full_told(model.device, "step"):
            session.train()


def plan_only(parsed: Parsed, out: Path | None, screen: Screen, calls: bool = False) -> None:
    """Print the plan of a recipe, or everything that is missing for one; starts and changes nothing.

    Args:
        calls: print also which op a step calls on which tensors, and what carries it out.
    """
    where = places(parsed, out)
    with StopRequest() as stop, faults_told(where.run), Dispatcher([screen]) as emit:
        home = RunDirectory(where.run)
        saved = home.saved_plan()
        plan = make_plan(parsed.recipe, gather(parsed, where, saved, emit, stop))
        require_room(plan)
        require_whole(plan.model)
        show_plan(plan, screen)
        if calls:
            show_calls(plan, screen)
        if saved is not None:
            home.require_same_run(saved, plan)
            refuse_if_never(parsed, where)
            emit(Note(_where_it_stands(home, plan.steps)))


def plan_elsewhere(
    parsed: Parsed, out: Path | None, screen: Screen, gpu: str, ram: str | None, calls: bool = False
) -> None:  # fmt: skip
    """Print the plan of a recipe for a machine that is not here; asks no network and writes nothing.

    Args:
        gpu: a card's name or a size; `ram` a size, or None for the usual.
        calls: as in `plan_only`.
    """
    training = parsed.recipe.training
    world = Elsewhere(places(parsed, out), machine(gpu, ram), training.batch_size * training.accumulate)
    with StopRequest() as stop, Dispatcher([screen]) as emit:
        plan = make_plan(parsed.recipe, ask(world, parsed, emit, stop))
        told = tuple(f"assumed {what}: {why}" for what, why in world.assumptions.items())
        plan = dataclasses.replace(plan, assumed=tuple(world.assumptions), notes=(*told, *plan.notes))
        show_plan(plan, screen)
        if calls:
            show_calls(plan, screen)


def show_calls(plan: Plan, screen: Screen) -> None:
    """Which op a step of the largest bucket calls on which tensors, and what carries it out."""
    largest = max(plan.data.buckets, key=lambda bucket: (bucket.tokens, bucket.audio_tokens))
    screen.show(calls_table(calls_of(plan, spec_of(plan.model), largest), str(largest.shape)))


def _where_it_stands(home: RunDirectory, steps: int) -> str:
    done = home.last_step()
    if done == steps:
        return f"this run is finished at step {done}; raise run.steps to go on"
    return f"this run is at step {done}; `run` continues it{_time_left(home, steps - done)}"


def _time_left(home: RunDirectory, steps: int) -> str:
    """How long the remaining steps take at the pace of those that the run has made."""
    timed = [event.get("seconds", {}).get("step") for event in last_per_step(read_events(home.events)).values()]
    seconds = [second for second in timed if isinstance(second, float)]
    if not seconds:
        return ""
    pace = statistics.median(seconds)
    return f": {steps} steps at {pace:.2f} s as until now take {duration(steps * pace)}, saving and samples apart"


@contextlib.contextmanager
def failures_logged(log: EventLog) -> Iterator[None]:
    """What ends the run stands in its log too; want of memory and compilers' troubles become errors with ways out."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        told = error if isinstance(error, LtxforgeError) else _with_way_out(error)
        if told is None:
            raise
        _keep(log, told)
        if told is error:
            raise
        raise told from error


def _with_way_out(error: Exception) -> LtxforgeError | None:
    """What a user can do about an error of PyTorch's or a compiler's; None about others."""
    first = (str(error).splitlines() or [""])[0]
    if is_out_of_memory(error):  # while no plan is there to compare with
        return DeviceFullError(f"there is too little memory: {first}", remedy=f"{GENERAL}.")
    if not type(error).__module__.startswith(COMPILERS):
        return None
    return KernelError(
        f"{type(error).__name__}: {first}",
        where="a kernel cannot be made or started here",
        remedy="The last checkpoint is whole. Without kernels of ours it goes on: --set kernels.all=eager."
        " Please report it with the output of `ltxforge kernels`.",
    )


def _keep(log: EventLog, error: LtxforgeError) -> None:
    """Write the error down, unless the log is what failed: a full disk closes it, and the error must still be told."""
    with contextlib.suppress(OSError, ValueError):
        log(Note(str(error), "error"))


def refuse_if_never(parsed: Parsed, where: Places) -> None:
    """Raise RunError for a directory with a run in it if the recipe forbids to continue it."""
    if parsed.recipe.run.resume == "never":
        raise RunError(
            'this directory has a run in it, and run.resume = "never" forbids to continue it', where=str(where.run),
            remedy="Start with --out another/directory, or leave run.resume out to continue.",
        )  # fmt: skip


def settle_plan(
    parsed: Parsed, where: Places, screen: Screen, log: EventLog, emit: Emit, stop: StopRequest
) -> tuple[Plan, Facts]:  # fmt: skip
    """Gather facts, decide, compare with the run that is there, fetch weights, print the plan.

    The plan of a new run is saved at once; that of a run that goes on only when its data are accepted too.
    """
    home = RunDirectory(where.run)
    home.sweep()
    saved = home.saved_plan()
    if saved is not None:
        refuse_if_never(parsed, where)
    facts = gather(parsed, where, saved, emit, stop)
    plan = make_plan(parsed.recipe, facts)
    require_room(plan)
    if saved is not None:
        home.require_same_run(saved, plan)
        if plan.device.exactness_reason != saved.device.exactness_reason:
            emit(Note(f"not bit for bit from here on: {plan.device.exactness_reason}", "warning"))
    if home.is_false_start_of_another(plan):
        home.clear()
        log.begin_anew()
    show_plan(plan, screen)
    plan = dataclasses.replace(plan, model=fetch(plan.model, emit, stop))
    require_whole(plan.model)
    if saved is None:
        home.save_plan(plan, parsed.text, parsed.overrides)
    emit(PlanMade(to_json(dataclasses.replace(plan, data=dataclasses.replace(plan.data, samples=())))))
    return plan, facts


def require_room(plan: Plan) -> None:
    """Raise PlanError if weights shall wait in a folder where nothing can be written."""
    if plan.memory.stream is not None and plan.memory.stream.disk:
        require_folder(Path(plan.memory.stream.disk), made=(Path(plan.cache.directory), Path(plan.directory)))


def show_plan(plan: Plan, screen: Screen) -> None:
    """The plan as a table, with the quantiles of the sigma that each bucket's video and sound train."""
    quantiles = {name: sigma_quantiles(plan.flow, tokens) for name, tokens in plan.noised_lengths().items()}
    screen.show(plan_table(plan, quantiles))


def settle_data(plan: Plan, model: VideoModel, cache: Cache, emit: Emit, stop: StopRequest) -> CachedData:
    """Fill the cache and compare what the run trains on with what it began with."""
    home = RunDirectory(Path(plan.directory))
    data = encode.fill(plan, model, cache, emit, stop)
    changes = home.compare_data(data.to_json())
    if told := changes.encoded_words():
        emit(Note(f"not bit for bit from here on: encoded to other bits: {told}", "warning"))
    if changes.late:
        count = len(changes.late)
        emit(Note(f"{count} samples that could not be decoded when this run began stay out of it", "warning"))
        data = data.without(changes.late)
    if changes.late_sound:
        count = len(changes.late_sound)
        emit(Note(f"the sound of {count} samples that had none when this run began stays out of it", "warning"))
        data = data.without_sound(changes.late_sound)
    home.save_data(data.to_json())
    return data
