"""What the machine is to the choice of kernels, and what Triton and torch.compile lack on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import shutil

import pytest

from ltxforge import hardware

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
