"""Every kernel compiled for real chips by its own launch code: no spills, shared memory that fits, wide accesses.

In processes of their own, since this one interprets. Two chips here, all of them in the sweeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("sm_86", "sm_90")
OTHERS = ("sm_80", "sm_89", "sm_100", "sm_120", "gfx942")
# Kernels that touch a few kilobytes, where the width of an access does not matter.
SMALL = {"finish_kernel"}
# Kernels that read much and write little: the loss without its gradient, one row of a table per timestep, codes,
# few tokens times a whole weight, and a LoRA's few ranks.
SUMS = {"residual_kernel", "table_kernel", "pack_kernel", "small_product_kernel", "branch_kernel"}
# Kernels that round product and sum apart, as what they must equal to the bit does.
APART = {"unpack_kernel", "small_product_kernel", "quantise_kernel", "dequantise_kernel"}
# An exact division is five fused steps on AMD: two of them for a row's scale.
STEPS_OF_DIVISIONS = {"quantise_kernel": 10}
# Kernels whose matrices must be read 16 bytes at once, and the most narrower accesses: scales, bias, and nothing else.
NARROW = {"product_kernel": 48}
# (kernel, chip): why its spilled bytes are accepted.
SPILLS: dict[tuple[str, str], str] = {
    ("tile_kernel", "sm_120"): "Triton 3.6 alone sets 8 bytes of stack aside, whatever the tile",
}


def python(*arguments: str, triton: str = "", cache: Path, interpret: bool = False) -> subprocess.CompletedProcess:
    paths = [triton, str(ROOT), str(ROOT / "kernels")]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_CACHE_DIR": str(cache),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


def compiled_for(chips: tuple[str, ...], cache: Path, triton: str = "") -> list[dict]:
    result = python("-m", "ltxforge_kernels.compile_only", *chips, triton=triton, cache=cache)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def faults(kernel: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    name, found = kernel["kernel"], []
    if kernel["spilled_bytes"] and (name, kernel["chip"]) not in SPILLS:
        found.append(f"spills {kernel['spilled_bytes']} bytes")
    if kernel["shared_bytes"] > kernel["shared_limit"]:
        found.append(f"wants {kernel['shared_bytes']} bytes of shared memory of {kernel['shared_limit']}")
    if kernel["dot"] and not kernel["tensor_core"]:
        found.append("multiplies matrices without tensor cores")
    if name not in SMALL and kernel["widest_load"] < 16:
        found.append(f"loads at most {kernel['widest_load']} bytes at once")
    divisions = STEPS_OF_DIVISIONS.get(name, 0) if kernel["chip"].startswith("gfx") else 0
    if name in APART and kernel["fused"] != divisions:
        found.append(f"fuses {kernel['fused']} multiplications with additions")
    if kernel["narrow"] > NARROW.get(name, kernel["narrow"]):
        found.append(f"has {kernel['narrow']} accesses of less than 16 bytes")
    # AMD's matrix instructions leave four neighbours in a thread: 8 bytes of bf16.
    least = 8 if kernel["dot"] and kernel["chip"].startswith("gfx") else 16
    if name not in SMALL | SUMS and kernel["widest_store"] < least:
        found.append(f"stores at most {kernel['widest_store']} bytes at once")
    return [f"{kernel['chip']} {kernel['launch']} {name}: {fault}" for fault in found]


def require_sound(kernels: list[dict], chips: tuple[str, ...]) -> None:
    assert {kernel["chip"] for kernel in kernels} == set(chips)
    expected = {path.parent.name for path in (ROOT / "kernels" / "ltxforge_kernels").glob("*/kernel.py")}
    assert {kernel["launch"].split()[0] for kernel in kernels} == expected, "an op has no launch in production.py"
    wrong = [fault for kernel in kernels for fault in faults(kernel)]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_on_two_chips(tmp_path, record_property):
    kernels = compiled_for(QUICK, tmp_path)
    require_sound(kernels, QUICK)
    record_property("count", f"{len(kernels)} kernels compiled for {', '.join(QUICK)}")


@pytest.mark.sweep
@pytest.mark.parametrize("chip", OTHERS)
def test_every_kernel_on_the_other_chips(chip, tmp_path):
    require_sound(compiled_for((chip,), tmp_path), (chip,))


OTHER_TRITONS = [path for path in os.environ.get("LTXFORGE_OTHER_TRITONS", "").split(os.pathsep) if path]


@pytest.mark.sweep
@pytest.mark.skipif(not OTHER_TRITONS, reason="LTXFORGE_OTHER_TRITONS names no folder with another Triton")
@pytest.mark.parametrize("triton", OTHER_TRITONS)
def test_other_versions_of_triton(triton, tmp_path):
    """Each folder was filled by `pip install --target`. All chips, and all that runs in the interpreter."""
    which = python("-c", "import triton; print(triton.__file__)", triton=triton, cache=tmp_path).stdout
    assert which.startswith(triton)
    require_sound(compiled_for(QUICK + OTHERS, tmp_path, triton), QUICK + OTHERS)
    arguments = ("-m", "pytest", "-q", "tests/kernels", "-m", "not sweep", "-p", "no:cacheprovider")
    result = python(*arguments, triton=triton, cache=tmp_path, interpret=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_it_says_when_kernels_are_interpreted(tmp_path):
    result = python("-m", "ltxforge_kernels.compile_only", "sm_90", cache=tmp_path, interpret=True)
    assert result.returncode == 1
    assert "TRITON_INTERPRET is set" in result.stderr


WITHOUT_TRITON = """
import importlib.abc, importlib.util, sys

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else real(name, *rest)

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())
import torch
from ltxforge_kernels import flow_matching
from ltxforge_kernels.cases import Filler
draws = Filler().normal(2, 3, 4)
assert flow_matching.noise(draws, draws, torch.ones(2), implementation="eager").shape == (2, 3, 4)
try:
    flow_matching.noise(draws, draws, torch.ones(2), implementation="triton")
except RuntimeError as error:
    print(error)
"""

ON_A_CPU = """
import torch
from ltxforge_kernels import flow_matching
draws = torch.ones(1, 2, 4)
try:
    flow_matching.noise(draws, draws, torch.ones(1), implementation="triton")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "message"), [(WITHOUT_TRITON, "needs Triton, which is not installed"), (ON_A_CPU, "on a CPU tensor")]
)
def test_what_cannot_run_says_so(code, message, tmp_path):
    result = python("-c", code, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout
