"""The command line. `check`, `schema` and `--help` never import torch; the other verbs load the rest when called.

What a user can get wrong in a recipe or a suite is told before that.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ltxforge import __version__
from ltxforge.errors import LtxforgeError
from ltxforge.recipe import parse
from ltxforge.recipe.json_schema import recipe_schema
from ltxforge.suites import read as suites

# What PyTorch reads how to cut up a device's memory from, when it is imported: its name, and those of NVIDIA and AMD.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train LoRAs for Lightricks' video models: one TOML recipe in, one LoRA file out.",
)

Recipe = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)]
OptionalRecipe = Annotated[Path | None, typer.Argument(help="A recipe, for what it asks for.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. run.steps=500. Repeatable."),
]
SuiteName = Annotated[
    str | None,
    typer.Argument(
        metavar="[kernels|step|encode|memory|SUITE.toml]",
        help="One of ltxforge's own suites, or a file of cases. Default: kernels, then step.",
        show_default=False,
    ),
]
Cases = Annotated[list[str] | None, typer.Option("--case", metavar="NAME", help="Only this case. Repeatable.")]
Results = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE.json|FOLDER", help="Results; default results/<device>/<suite>.json beside the suite."
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="BASELINE.json", help="Compare with earlier results of the same GPU; over 5 % slower fails."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what --out already holds, measure the rest.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Begin no further case after so many minutes.")]
Calls = Annotated[bool, typer.Option("--calls", help="List also which op a step calls on which tensors.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="CARD|SIZE", help='For a card that is not here: "RTX 4090", T4, 16GB. No network.'),
]
Ram = Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="Beside --gpu: the host's memory; else 32GB.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; default runs/<recipe name>.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live display.")]


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ltxforge {__version__}")
        raise typer.Exit


@app.command()
def check(recipe: Recipe, set_: Set = None) -> None:
    """Judge the recipe's text, all mistakes at once."""
    parsed = parse.load(recipe, set_ or ())
    for warning in parsed.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"{recipe}: correct. `ltxforge plan {recipe}` shows what it would do.")


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = None,
    out: Out = None,
    gpu: Gpu = None,
    ram: Ram = None,
    calls: Calls = False,
    plain: Plain = False,
) -> None:
    """Decide every number, or list all that is missing. Starts nothing. With --gpu for a machine that is not here."""
    _require_gpu_with_ram(gpu, ram)
    parsed = parse.load(recipe, set_ or ())
    if gpu is None:
        _engine().plan_only(parsed, out, _screen(plain), calls)
    else:
        _engine().plan_elsewhere(parsed, out, _screen(plain), gpu, ram, calls)


@app.command()
def run(recipe: Recipe, set_: Set = None, out: Out = None, plain: Plain = False) -> None:
    """Carry the recipe out, or continue an interrupted run."""
    parsed = parse.load(recipe, set_ or ())
    _engine().run(parsed, out, _screen(plain))


@app.command()
def bench(
    suite: SuiteName = None,
    case: Cases = None,
    out: Results = None,
    against: Against = None,
    resume: Resume = False,
    minutes: Minutes = None,
    plain: Plain = False,
) -> None:
    """Measure kernels, training steps, encoding or memory. Weights are random, nothing is downloaded."""
    named = tuple(case or ())
    paths = [suites.find(word) for word in ([suite] if suite else ("kernels", "step"))]
    loaded = [(suites.load(path, named), path) for path in paths]
    engine = _engine("ltxforge.benchmark")
    engine.run(loaded, engine.Request(named, out, against, resume, minutes), _screen(plain))


@app.command()
def kernels(recipe: OptionalRecipe = None, set_: Set = None, plain: Plain = False) -> None:
    """List how each op is computed on this machine, and why."""
    _require_recipe_with_set(recipe, set_)
    parsed = parse.load(recipe, set_ or ()) if recipe else None
    _engine("ltxforge.kernel_listing").show_kernels(parsed and parsed.recipe, _screen(plain))


@app.command()
def doctor(
    recipe: OptionalRecipe = None, set_: Set = None, gpu: Gpu = None, ram: Ram = None, plain: Plain = False
) -> None:
    """Print the facts that plans follow from on this machine, and what each allows or rules out."""
    _require_gpu_with_ram(gpu, ram)
    _require_recipe_with_set(recipe, set_)
    parsed = parse.load(recipe, set_ or ()) if recipe else None
    _engine("ltxforge.doctor").show_doctor(parsed, _screen(plain), gpu, ram)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for TOML editors."""
    typer.echo(json.dumps(recipe_schema(), indent=2))


def _require_recipe_with_set(recipe: Path | None, set_: list[str] | None) -> None:
    if recipe is None and set_:
        raise typer.BadParameter("it overrides keys of a recipe, and none is given", param_hint="--set")


def _require_gpu_with_ram(gpu: str | None, ram: str | None) -> None:
    if ram is not None and gpu is None:
        raise typer.BadParameter("it describes a machine that is not here, and needs its --gpu", param_hint="--ram")


def _engine(module: str = "ltxforge.run") -> Any:
    """What carries a verb out, and brings torch and diffusers: 4 s that `check` does not have."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _settle_allocator()
    if sys.stderr.isatty():
        typer.echo("loading PyTorch", err=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import about kernels for other tasks
    return importlib.import_module(module)


def _settle_allocator() -> None:
    """PyTorch's memory on a GPU in segments that grow, so that batches of many sizes leave no holes; on Linux, where
    that is there. What the user has set stands, by its new name or an old one.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _screen(plain: bool) -> Any:
    return importlib.import_module("ltxforge.ui.screen").screen_for(sys.stdout, plain)


def main() -> None:
    """Run the command line; errors that are the user's to mend are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except LtxforgeError as error:
        typer.echo(f"{error}", err=True)
        raise SystemExit(error.exit_code) from None
