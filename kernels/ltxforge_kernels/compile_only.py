"""Compiles every kernel for a chip that is not here, by its real launch code on meta tensors, and tells what it takes.

`python -m ltxforge_kernels.compile_only sm_90` prints one JSON record per compiled kernel: registers, spilled bytes,
shared memory, and the instructions that tell a good kernel from a bad one. It runs nothing and times nothing. Wants a
process of its own without TRITON_INTERPRET, which Triton reads when kernels are defined.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ltxforge_kernels.production import LAUNCHES, Launch


@dataclass(frozen=True)
class Chip:
    """A chip to compile for, and the shared memory that one program may have on it."""

    target: GPUTarget
    shared_bytes: int


def cuda(arch: int, shared_kilobytes: int) -> Chip:
    return Chip(GPUTarget("cuda", arch, 32), shared_kilobytes * 1024)


# A100, RTX 30, RTX 40 and L40, H100 and H200, B200, RTX 50, MI300.
CHIPS = {
    "sm_80": cuda(80, 163),
    "sm_86": cuda(86, 99),
    "sm_89": cuda(89, 99),
    "sm_90": cuda(90, 227),
    "sm_100": cuda(100, 227),
    "sm_120": cuda(120, 99),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one chip.

    Attributes:
        launch: which launch of `production.LAUNCHES`, with its dtype.
        dot: whether it is meant for tensor cores: it has a `tl.dot`, and its launch a dtype for that.
        registers: per thread.
        spilled_bytes: local memory per thread: what registers could not hold.
        shared_bytes: per program, of `shared_limit`.
        widest_load, widest_store: bytes of the widest access to global memory by one thread.
        narrow: how many such accesses are narrower than 16 bytes.
        tensor_core: how many tensor-core instructions.
        bulk_copies: how many copies by the tensor memory engine (TMA).
        fused: how many multiplications round together with an addition, in one instruction.
    """

    launch: str
    kernel: str
    chip: str
    dot: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    widest_load: int
    widest_store: int
    narrow: int
    tensor_core: int
    bulk_copies: int
    fused: int


class StubDriver:
    """As much of a driver as Triton needs to specialise and compile a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device: a name of its own for each target.
        return str(self.target)

    def get_current_stream(self, device: object = None) -> int:  # noqa: ARG002
        return 0


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[tuple[JITFunction, object]]]:
    """Within it every launch compiles for the target and runs nothing; gives (kernel, compiled) as they come."""
    found: list[tuple[JITFunction, object]] = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *arguments: object, **options: object) -> object:
        options["warmup"] = True
        compiled = launch(self, *arguments, **options)
        found.append((self, compiled))
        return compiled

    active = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(StubDriver(target))
    JITFunction.run = compile_instead
    try:
        yield found
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = active


def compile_for(name: str, launches: tuple[Launch, ...] = LAUNCHES) -> list[Compiled]:
    """Every kernel of the launches, compiled for the chip of this name."""
    chip = CHIPS[name]
    results = []
    for launch in launches:
        for dtype in launch.dtypes:
            with compiling_for(chip.target) as found:
                launch.run(dtype)
            label = f"{launch.name} {str(dtype).removeprefix('torch.')}"
            for kernel, compiled in found:
                dot = launch.dot and "tl.dot" in "".join(kernel.raw_src)
                results.append(measure(label, dot, name, chip, kernel.fn.__name__, compiled))
    return results


def measure(label: str, dot: bool, name: str, chip: Chip, kernel: str, compiled: object) -> Compiled:
    """Read the compiler's output."""
    if chip.target.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spilled = cuda_resources(compiled.asm["cubin"])
        loads, stores = (ptx_widths(assembly, kind) for kind in ("ld", "st"))
        tensor_core = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)"
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = amd_resources(assembly)
        loads, stores = (amd_widths(assembly, kind) for kind in ("load", "store"))
        tensor_core = r"\bv_mfma_"
    return Compiled(
        launch=label,
        kernel=kernel,
        chip=name,
        dot=dot,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        shared_limit=chip.shared_bytes,
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        narrow=sum(width < 16 for width in loads + stores),
        tensor_core=len(re.findall(tensor_core, assembly)),
        bulk_copies=assembly.count("cp.async.bulk.tensor"),
        fused=len(re.findall(r"\bfma\.|\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f", assembly)),
    )


def ptx_widths(ptx: str, kind: str) -> list[int]:
    """Bytes of each access to global memory: `ld.global.v4.b32` is 16. Asynchronous copies count as loads.

    One by the tensor memory engine counts as 16, the least that it moves.
    """
    found = re.findall(rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    widths = [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]
    if kind == "ld":
        widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]+, [^,]+, (\w+)", ptx)]
    way = r"shared::\w+\.global" if kind == "ld" else r"global\.shared::\w+"
    return widths + [16] * len(re.findall(rf"cp\.async\.bulk\.tensor\.\dd\.{way}", ptx))


def amd_widths(assembly: str, kind: str) -> list[int]:
    """Bytes of each access: `buffer_load_dwordx4` and `global_load_dwordx4` are 16."""
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    found = re.findall(rf"\b(?:global|buffer)_{kind}_(\w+)", assembly)
    return [sizes.get(size, 2 if "short" in size or "b16" in size else 1) for size in found]


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) as `cuobjdump`, which comes with Triton, reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return usage["REG"], max(usage["STACK"], usage["LOCAL"])


def amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled bytes) as the assembly's own metadata tells them."""
    told = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", assembly)
    }
    return told["vgpr_count"], told["private_segment_fixed_size"]


def main(arguments: list[str]) -> None:
    """One JSON list of records for the chips named, or for all."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: kernels are interpreted in this process, and nothing compiles")
    with torch.no_grad():
        records = [dataclasses.asdict(kernel) for chip in arguments or CHIPS for kernel in compile_for(chip)]
    json.dump(records, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
