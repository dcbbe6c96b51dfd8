"""What the command line settles before PyTorch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASKED = """
import json, os
from ltxforge import cli
cli._engine("torch")
import torch
print(json.dumps([torch._C._accelerator_getAllocatorSettings(), os.environ.get("PYTORCH_ALLOC_CONF")]))
"""


def settings(**environment: str) -> str:
    """What PyTorch's allocator was told, by its own word and by the environment, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", ASKED], env={**kept, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="segments that grow are Linux's alone")
def test_segments_that_grow_are_asked_for_before_torch_is_there():
    assert settings() == '["expandable_segments:True", "expandable_segments:True"]'


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stands(name):
    said = "max_split_size_mb:512"
    found = settings(**{name: said})
    assert "expandable" not in found and (name != "PYTORCH_ALLOC_CONF" or found == f'["{said}", "{said}"]')
