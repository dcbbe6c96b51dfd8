"""What the machine is to the choice of kernels, and what Triton and torch.compile lack on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import shutil

import psutil
import pytest
import torch

from ltxforge import hardware, host_memory

HERE = hardware.detect()


@pytest.mark.parametrize(
    ("changes", "arch"),
    [
        ({"kind": "cuda", "capability": (8, 6)}, 86),
        ({"kind": "cuda", "capability": (12, 0)}, 120),
        ({"kind": "rocm", "capability": (9, 4), "gfx": "gfx942"}, "gfx942"),
        ({"kind": "mps", "capability": (0, 0)}, None),
        ({"kind": "cpu", "capability": (0, 0)}, None),
    ],
)
def test_the_chip_as_the_choice_names_it(changes, arch):
    machine = dataclasses.replace(HERE, **changes).machine
    assert (machine.device, machine.arch) == (changes["kind"], arch)


def test_triton_s_version_is_told_without_importing_it(monkeypatch):
    installed = importlib.util.find_spec("triton") is not None
    assert HERE.triton == (importlib.metadata.version("triton") if installed else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert hardware.detect().triton is None


def test_the_device_s_versions_hold_triton_only_where_bits_depend_on_it():
    assert ("triton" in HERE.versions) == (HERE.kind in ("cuda", "rocm") and HERE.triton is not None)


@pytest.mark.parametrize(("value", "interpreted"), [("1", True), ("True", True), ("0", False), ("", False)])
def test_the_interpreter_is_noticed(monkeypatch, value, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert hardware.detect().interpreted is interpreted


@pytest.mark.skipif(platform.system() == "Windows", reason="Triton brings its compiler there")
def test_missing_compilers_are_facts(monkeypatch):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    found = hardware.detect().machine
    assert found.triton_lacks.startswith("a C compiler") and found.compile_lacks.startswith("a C++ compiler")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    found = hardware.detect().machine
    assert found.triton_lacks.startswith("Python's headers") and not found.compile_lacks


def test_the_host_s_memory_is_what_the_system_says():
    """psutil is asked here too; what a container may take is no more than the machine has."""
    assert 0 < HERE.host_free_bytes <= HERE.host_bytes <= psutil.virtual_memory().total
    assert HERE.budget_bytes == (HERE.memory_bytes if HERE.has_own_memory else HERE.host_bytes)


def test_a_container_s_bound_counts(monkeypatch, tmp_path):
    for name, text in {"max": "4000000000", "current": "3000000000", "stat": "file 9\ninactive_file 500000000"}.items():
        (tmp_path / name).write_text(f"{text}\n", encoding="ascii")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(host_memory, "_GROUPS", ((*files, "inactive_file"),))
    assert host_memory.host_bytes() == 4_000_000_000
    assert host_memory.free_host_bytes() == min(1_500_000_000, psutil.virtual_memory().available)
    (tmp_path / "max").write_text("max\n", encoding="ascii")  # no bound
    assert host_memory.host_bytes() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("capability", "can"),
    [
        ((6, 1), ""),
        ((7, 0), "fp16"),
        ((7, 5), "fp16 int8"),
        ((8, 0), "bf16 fp16 int8"),
        ((8, 9), "bf16 fp16 fp8 int8"),
        ((9, 0), "bf16 fp16 fp8 int8"),
        ((12, 0), "bf16 fp16 fp8 int8"),
    ],
)
def test_what_a_card_multiplies_natively(capability, can):
    card = hardware.assumed("a card", 10 * capability[0] + capability[1], 16 * 2**30, 32 * 2**30)
    found = {"bf16": card.has_bf16, "fp16": card.has_fp16, "fp8": card.has_fp8, "int8": card.has_int8}
    assert [name for name, has in found.items() if has] == can.split()
    assert card.is_assumed and card.budget_bytes == 16 * 2**30 and card.host_bytes == 32 * 2**30
    assert any("no bf16 units" in line for line in card.missing) == (not card.has_bf16)


def test_amd_s_chips_differ_by_name():
    amd = dataclasses.replace(HERE, kind="rocm", capability=(9, 4), gfx="gfx942")
    assert (amd.has_fp16, amd.has_fp8, amd.has_int8) == (True, True, True)
    gamer = dataclasses.replace(amd, gfx="gfx1100")
    assert (gamer.has_fp16, gamer.has_fp8, gamer.has_int8) == (True, False, False)


def test_free_disk_is_that_of_the_folder_which_will_hold_it(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert hardware.free_disk_bytes(tmp_path / "not" / "there" / "yet") == pytest.approx(free, rel=0.05)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("x"), False),
    ],
)
def test_want_of_memory_is_known_by_its_error(error, is_memory):
    assert hardware.is_out_of_memory(error) is is_memory


def test_what_others_hold_of_the_device_is_told_beyond_a_context():
    card = 24 * 2**30
    assert hardware._taken(card, card - 2**30) == "" == hardware._taken(0, 0)
    assert hardware._taken(card, card - 5 * 2**30).startswith("5.0 GB of the device's memory are taken")
