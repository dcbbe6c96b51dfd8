"""The verb `kernels`: how each op would be computed on this machine, and why.

It looks at the device and at the recipe's text, and at no weights: what a run itself computes with, `plan` tells.
"""

from __future__ import annotations

from ltxforge_kernels.choice import OPS, QUANTISED_OPS, Machine, arch_name

from ltxforge.hardware import Hardware, detect
from ltxforge.kernel_choices import asked_for, choose_kernels
from ltxforge.precision import precisions
from ltxforge.recipe.model_rules import spec_named
from ltxforge.recipe.schema import Recipe
from ltxforge.ui.kernels_table import kernels_table
from ltxforge.ui.screen import Screen

WITHOUT_RECIPE = ("bf16", "bf16")


def show_kernels(recipe: Recipe | None, screen: Screen) -> None:
    """Print the table. Without a recipe nothing is asked for and everything is bf16.

    Raises:
        PlanError: the recipe asks for what cannot run here.
    """
    hardware = detect()
    dtypes = precisions(recipe, hardware, None) if recipe else WITHOUT_RECIPE
    kernels = choose_kernels(
        (*OPS, *QUANTISED_OPS), hardware.machine, *dtypes, asked=asked_for(recipe.kernels) if recipe else None,
        spec=spec_named(recipe.model) if recipe else None, rank=recipe.lora.rank if recipe else 0,
    )  # fmt: skip
    screen.show(kernels_table(kernels, f"in {_dtypes(*dtypes)} on {_machine(hardware)}"))


def _dtypes(precision: str, encoders: str) -> str:
    return precision if precision == encoders else f"{precision}, encoders in {encoders}"


def _machine(hardware: Hardware) -> str:
    machine: Machine = hardware.machine
    chip = f"{hardware.name}, {arch_name(machine)}" if machine.arch else f"{machine.device} ({hardware.name})"
    return f"{chip}; {f'Triton {machine.triton}' if machine.triton else 'no Triton'}"
