"""The verb `kernels`: on this machine without a GPU, without Triton, with a recipe and with mistakes."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ltxforge_kernels.choice import OPS, QUANTISED_OPS

from ltxforge import hardware
from ltxforge.errors import PlanError
from ltxforge.kernel_listing import show_kernels
from ltxforge.recipe.parse import load
from ltxforge.ui.plain import Plain

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "ltx2-lora.toml"
HERE = dataclasses.replace(hardware.detect(), kind="cpu", name="a CPU", triton=None, compile_lacks="")
H200 = dataclasses.replace(
    HERE, kind="cuda", name="NVIDIA H200", capability=(9, 0), has_bf16=True, triton="3.7.1", interpreted=False,
    triton_lacks="",
)  # fmt: skip


@pytest.fixture
def listed(monkeypatch):
    """The listing on a machine, folded to one line."""

    def show(machine, recipe=None, *overrides):
        monkeypatch.setattr("ltxforge.kernel_listing.detect", lambda: machine)
        stream = io.StringIO()
        show_kernels(load(recipe, overrides).recipe if recipe else None, Plain(stream))
        return " ".join(stream.getvalue().split())

    return show


def test_without_a_recipe_it_is_bf16_on_this_machine(listed):
    text = listed(HERE)
    assert text.startswith("Kernels in bf16 on cpu (a CPU); no Triton ")
    assert all(f" {op} eager " in text for op in (*OPS, *QUANTISED_OPS))
    assert text.endswith("Why eager our kernels need an NVIDIA or AMD GPU, and this is cpu")


def test_a_gpu_has_kernels(listed):
    text = listed(H200)
    assert text.startswith("Kernels in bf16 on NVIDIA H200, sm_90; Triton 3.7.1 ")
    assert all(f" {op} triton " in text for op in OPS)


def test_a_recipe_s_word_and_dtypes_count(listed):
    text = listed(H200, RECIPE, 'kernels.gelu="compile"', 'training.precision="fp32"')
    assert text.startswith("Kernels in fp32, encoders in bf16 on")
    assert " gelu compile " in text and "compile asked for in the recipe: gelu" in text
    with pytest.raises(PlanError, match=r"triton for gelu: our kernels need an NVIDIA or AMD GPU, and this is cpu"):
        listed(HERE, RECIPE, 'kernels.gelu="triton"')


NO_TRITON = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
from ltxforge.cli import app
app(["kernels", "--plain", *sys.argv[1:]], standalone_mode=False)
heavy = {"diffusers", "transformers", "peft", "av"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_verb_needs_no_triton_and_loads_no_models():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", NO_TRITON, str(RECIPE), "--set", 'kernels.gelu="eager"']
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "no Triton" in result.stdout and "asked for in the recipe: gelu" in " ".join(result.stdout.split())


def test_overrides_need_a_recipe():
    command = [sys.executable, "-m", "ltxforge", "kernels", "--set", "kernels.gelu=eager"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 2 and "none is given" in result.stderr
