"""What this machine reaches at best, measured in the same run: the ceilings that an op's figures are shares of.

A share of a data sheet would say as much about the data sheet.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable

import torch

from ltxforge.benchmarks.timing import time_against_each_other

FP8 = 448.0
ROUNDS = 12
SMALL, LARGE = 512, 8192
COPY_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Name → bytes or operations a second: "copy bandwidth" (read and written), "bf16 matmul" and the like."""
    found = {"copy bandwidth": _copy_bandwidth(device)}
    side = LARGE if device.type == "cuda" else SMALL
    for name, product in matrix_products(device, side, side, side).items():
        # A GPU may lack a format, or its libraries this product of it: then it has no such ceiling.
        try:
            found[f"{name} matmul"] = 2 * side**3 / _median(product, device)
        except (RuntimeError, NotImplementedError):
            continue
    return found


def matrix_products(device: torch.device, rows: int, inward: int, outward: int) -> dict[str, Callable[[], object]]:
    """Format → x [rows, inward] times W [outward, inward]ᵀ by PyTorch's own product of that format."""
    x = torch.randn(rows, inward, device=device)
    w = torch.randn(outward, inward, device=device)
    half, weight = x.bfloat16(), w.bfloat16()
    products: dict[str, Callable[[], object]] = {"bf16": lambda: half @ weight.T, "fp32": lambda: x @ w.T}
    codes, codes_w = ((20 * each).clamp(-127, 127).to(torch.int8) for each in (x, w))
    products["int8"] = lambda: torch._int_mm(codes, codes_w.T)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        eight, eight_w = (each.clamp(-FP8, FP8).to(torch.float8_e4m3fn) for each in (x, w))
        scale, scale_w = torch.ones(rows, 1, device=device), torch.ones(1, outward, device=device)
        products["fp8"] = lambda: torch._scaled_mm(eight, eight_w.T, scale, scale_w, out_dtype=torch.bfloat16)
    return products


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.empty(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


def _median(call: Callable[[], object], device: torch.device) -> float:
    return statistics.median(time_against_each_other({"": [call]}, ROUNDS, device)[""])


def clocks() -> dict[str, str]:
    """Driver, clocks, power limit and temperature, as nvidia-smi tells them; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    asked = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, encoding="utf-8", check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS.split(","), (word.strip() for word in told.strip().split(",")), strict=False))
