"""The verb `doctor`: what each of several machines is told about itself, and that the screen can be read."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ltxforge import doctor, hardware
from ltxforge.assumed import machine
from ltxforge.doctor import findings, show_doctor
from ltxforge.facts import Places
from ltxforge.recipe.parse import load
from ltxforge.ui.doctor_table import Finding, doctor_table
from ltxforge.ui.plain import Plain

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
HERE = hardware.detect()
NOBODY_S = {"capability": (0, 0), "memory_bytes": 0, "free_bytes": 0, "triton_lacks": "", "compile_lacks": ""}
CPU = dataclasses.replace(HERE, kind="cpu", name="a CPU", has_bf16=False, pins=False, **NOBODY_S)
MPS = dataclasses.replace(HERE, kind="mps", name="Apple M4", has_bf16=True, triton=None, pins=False, **NOBODY_S)
AMD = dataclasses.replace(
    HERE, kind="rocm", name="MI300X", capability=(9, 4), gfx="gfx942", memory_bytes=192 * GIB, free_bytes=190 * GIB,
    has_bf16=True, triton="3.7.1", triton_lacks="", interpreted=False, pins=True,
)  # fmt: skip
CARDS = {name: machine(name, "32GB") for name in ("RTX 4090", "T4", "V100", "RTX 3090")}


def rows(hardware_: hardware.Hardware) -> dict[str, Finding]:
    places = Places("", Path("runs").absolute(), Path("cache").absolute())
    return {f"{each.group} {each.name}": each for each in findings(hardware_, places)}


# + works, - works with less, ! does not; one sign for each row of the device.
DEVICE = ("memory", "bf16", "fp16", "int8", "fp8", "Triton", "compile", "streams")
SIGNS = {"fine": "+", "limit": "-", "missing": "!"}


@pytest.mark.parametrize(
    ("told", "signs"),
    [
        (CARDS["RTX 4090"], "++++++++"),
        (CARDS["RTX 3090"], "++++-+++"),
        (CARDS["T4"], "+-++--++"),
        (CARDS["V100"], "+-+---++"),
        (AMD, "++++++++"),
        (MPS, "-++---+-"),
        (CPU, "------+-"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_each_machine_can(told, signs):
    found = rows(told)
    assert "".join(SIGNS[found[f"Device {name}"].verdict] for name in DEVICE) == signs


def test_a_card_without_bf16_units_reads_what_to_choose():
    found = rows(CARDS["T4"])
    assert found["Device bf16"].value == "no units"
    assert 'fp32, in twice the memory; training.precision = "fp16"' in found["Device bf16"].means
    assert "this is sm_75" in found["Device Triton"].means and "every op is eager" in found["Device Triton"].means
    assert "int8-w8a8" in found["Device int8"].means and "of no use" in rows(CARDS["V100"])["Device int8"].means


def test_a_cpu_multiplies_in_8_bits_by_definition_as_its_runs_say():
    for name, precision in (("int8", "int8-w8a8"), ("fp8", "fp8")):
        means = rows(CPU)[f"Device {name}"].means
        assert f'"{precision}"' in means and "in 8 bits, slowly" in means and "whole" not in means
    assert "made whole" in rows(CARDS["RTX 3090"])["Device fp8"].means


def test_a_card_that_pytorch_has_no_code_for_is_told():
    found = rows(CARDS["V100"])["Device PyTorch"]
    assert found.verdict == "missing" and "CUDA 12.6" in found.means
    assert "Device PyTorch" not in rows(CARDS["T4"])


def test_memory_is_told_as_it_is_sold():
    assert rows(CARDS["RTX 4090"])["Device memory"].value == "24.0 GB, 24.0 GB free"
    assert rows(CARDS["T4"])["Host memory"].value == "32.0 GB, 32.0 GB available"
    assert rows(CPU)["Device memory"].value == "none of its own"


def test_little_disk_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "free_disk_bytes", lambda _path: 3 * 10**9)
    found = rows(CPU)
    assert [found[f"Disk {name}"].verdict for name in ("run", "cache", "weights")] == ["limit"] * 3
    assert found["Disk run"].value == "3.0 GB free"


def test_bitsandbytes_is_loaded_to_know_whether_it_works():
    """The build for CPUs is installed where tests run without a GPU: good for a CPU, none for a card."""
    pytest.importorskip("bitsandbytes")
    assert rows(CPU)["Packages bitsandbytes"].verdict == "fine"
    if HERE.kind == "cpu":
        found = rows(AMD)["Packages bitsandbytes"]
        assert found.verdict == "missing" and "does not load" in found.means
    without = dataclasses.replace(CPU, packages=frozenset())
    assert "pip install bitsandbytes" in rows(without)["Packages bitsandbytes"].means


def test_a_recipe_s_folders_are_looked_at(tmp_path, monkeypatch):
    recipe = load(ROOT / "recipes/quickstart.toml", (f"run.directory={tmp_path / 'mine'}", "cache.directory=elsewhere"))
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    show_doctor(recipe, Plain(stream))
    text = "".join(stream.getvalue().split())
    assert str(tmp_path / "mine").replace(" ", "") in text and str(tmp_path / "elsewhere").replace(" ", "") in text
    assert list(tmp_path.iterdir()) == []


GOLDEN = """
Doctor a card, sm_75 (assumed)

Device
+ memory        16.0 GB, 16.0 GB free         what memory.fit = "auto" may fill
- bf16          no units                      training and encoders in fp32, in twice the memory
! PyTorch       has no code for it
  threads       8

+ works   - works, with less   ! does not
"""


def test_the_table_reads_as_this(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    table = doctor_table(
        "a card, sm_75 (assumed)",
        [
            Finding("Device", "memory", "16.0 GB, 16.0 GB free", 'what memory.fit = "auto" may fill', "fine"),
            Finding("Device", "bf16", "no units", "training and encoders in fp32, in twice the memory", "limit"),
            Finding("Device", "PyTorch", "has no code for it", "", "missing"),
            Finding("Device", "threads", "8"),
        ],
    )
    Plain(stream).show(table)
    assert [line.rstrip() for line in stream.getvalue().strip().splitlines()] == GOLDEN.strip().splitlines()


def test_help_comes_without_torch_and_overrides_need_a_recipe():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    code = "import sys\nfrom ltxforge.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}

    def doctor_says(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, "doctor", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")

    shown = doctor_says("--help")
    assert shown.returncode == 0 and "--gpu" in shown.stdout, shown.stderr
    assert doctor_says("--set", "run.steps=3").returncode == 2


def test_doctor_needs_no_ffmpeg(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert rows(CPU)["Packages PyAV"].verdict == "fine"
