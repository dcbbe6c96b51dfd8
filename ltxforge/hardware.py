"""The facts of this machine: which device, what it can, and the versions that results depend on.

Facts only; what follows from them is decided by the planner. The one place that names devices.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ltxforge_kernels.choice import Machine

from ltxforge import __version__
from ltxforge.host_memory import free_host_bytes, host_bytes, locked_limit_bytes

__all__ = [
    "Hardware", "Moment", "allocated_bytes", "assumed", "detect", "free_disk_bytes", "free_host_bytes",
    "is_out_of_memory", "moment", "peak_bytes", "reserved_peak_bytes", "reset_peak", "reset_resident_peak",
    "resident_peak_bytes", "seconds_between", "synchronize", "torch_device", "torch_dtype",
]  # fmt: skip

# NVIDIA's first compute capability with tensor cores for each format: Volta, Turing, Ampere, Ada.
FP16_FROM, INT8_FROM, BF16_FROM, FP8_FROM = (7, 0), (7, 5), (8, 0), (8, 9)
NEWER_CODES = ("sm_75", "compute_75")
"""Of PyTorch's builds for CUDA 12.8 and later, from 2.11 on: Turing and what came after it."""
FP8_GFX = frozenset({"gfx942", "gfx950"})

# Who ships a module `triton`: the project, PyTorch for AMD's GPUs, and a port to Windows.
TRITON_PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton", "triton-windows")


@dataclass(frozen=True)
class Hardware:
    """One device. `kind` is cuda, rocm, mps or cpu; capability is (major, minor) on cuda and (0, 0) elsewhere.

    `gfx` names an AMD chip ("gfx942"); `triton` and what follows it are as in `ltxforge_kernels.choice.Machine`.

    `memory_bytes` and `free_bytes` are the device's own memory, 0 where it has none; `host_bytes` and
    `host_free_bytes` the host's, a container's bound considered. `pins` says whether the host's memory can be pinned
    for the device's copies, `locked_limit_bytes` is what `ulimit -l` says, None for no limit. `is_assumed`: this
    machine is described and not here. `torch_lacks` is what the installed PyTorch cannot do with the card.
    """

    kind: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    has_bf16: bool
    threads: int
    versions: dict[str, str]
    missing: tuple[str, ...]
    packages: frozenset[str]
    gfx: str = ""
    triton: str | None = None
    interpreted: bool = False
    triton_lacks: str = ""
    compile_lacks: str = ""
    free_bytes: int = 0
    host_bytes: int = 0
    host_free_bytes: int = 0
    torch_lacks: str = ""
    pins: bool = False
    locked_limit_bytes: int | None = None
    is_assumed: bool = False

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is not the host's."""
        return self.kind in ("cuda", "rocm")

    @property
    def budget_bytes(self) -> int:
        """What a run may fill: the device's memory, or the host's where the device has none of its own."""
        return self.memory_bytes if self.has_own_memory else self.host_bytes

    @property
    def has_fp16(self) -> bool:
        """Whether there are units for fp16; the CPU and the oldest cards compute it by way of float32."""
        return self.kind in ("rocm", "mps") or (self.kind == "cuda" and self.capability >= FP16_FROM)

    @property
    def has_fp8(self) -> bool:
        """Whether matrices are multiplied in fp8: Ada and later; AMD's CDNA 3 and 4."""
        return self.gfx in FP8_GFX if self.kind == "rocm" else self.kind == "cuda" and self.capability >= FP8_FROM

    @property
    def has_int8(self) -> bool:
        """Whether matrices are multiplied in int8 by tensor cores: Turing and later; AMD's CDNA."""
        is_cdna = self.gfx.startswith("gfx9")
        return is_cdna if self.kind == "rocm" else self.kind == "cuda" and self.capability >= INT8_FROM

    @property
    def machine(self) -> Machine:
        """What the choice of kernels depends on."""
        major, minor = self.capability
        arch = {"cuda": 10 * major + minor, "rocm": self.gfx or None}.get(self.kind)
        return Machine(self.kind, arch, self.triton, self.interpreted, self.triton_lacks, self.compile_lacks)


def reset_peak(device: torch.device) -> None:
    """Start counting the device's memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors took on the device since `reset_peak`; 0 where the device does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated_bytes(device: torch.device) -> int:
    """The memory that tensors take on the device now; 0 where the device does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reserved_peak_bytes(device: torch.device) -> int:
    """The most memory that PyTorch held on the device for tensors since `reset_peak`, as `peak_bytes`."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def reset_resident_peak() -> None:
    """Start counting the process's own memory anew, where the system allows it: Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_peak_bytes() -> int:
    """The most memory of the host that the process took since `reset_resident_peak`; 0 where that is not told."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"VmHWM:\s*(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0
    return 0


def free_disk_bytes(path: Path) -> int:
    """What is free where a file or folder is, or would be made; 0 where that cannot be told."""
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    with contextlib.suppress(OSError):
        return shutil.disk_usage(there).free if there else 0
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had too little memory: CUDA has an error of its own, others only a message."""
    told = (
        "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "MPS backend out of memory",
    )  # fmt: skip
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in told)


def synchronize(device: torch.device) -> None:
    """Wait for all work that is queued on the device."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


Moment = torch.cuda.Event | float


def moment(device: torch.device) -> Moment:
    """Now, as the device gets there. Queued work is not waited for on CUDA; elsewhere it is."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    synchronize(device)
    return time.perf_counter()


def seconds_between(first: Moment, last: Moment) -> float:
    """Between two moments of one device. Both must be past: `synchronize` first."""
    if isinstance(first, float) or isinstance(last, float):
        return last - first
    return first.elapsed_time(last) / 1000


def torch_dtype(precision: str) -> torch.dtype:
    """torch's dtype for a recipe's word: bf16, fp16 or fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def torch_device(kind: str) -> torch.device:
    """torch's device for a kind: rocm is spelt cuda there."""
    return torch.device("cuda" if kind == "rocm" else kind)


def detect() -> Hardware:
    """Look at the machine: the first GPU if there is one, else Apple's, else the CPU."""
    kind, name, capability, memory, has_bf16 = _device()
    triton = _triton()
    lacks = _torch_lacks(kind, capability, torch.cuda.get_arch_list())
    free = torch.cuda.mem_get_info(0)[0] if kind in ("cuda", "rocm") else 0
    return Hardware(
        kind=kind, name=name, capability=capability, memory_bytes=memory, has_bf16=has_bf16,
        threads=torch.get_num_threads(), versions=_versions(triton if kind in ("cuda", "rocm") else None),
        missing=(*_missing(kind, capability), *filter(None, [lacks, _taken(memory, free)])), torch_lacks=lacks,
        packages=_packages(), gfx=_gfx() if kind == "rocm" else "", triton=triton,
        interpreted=_interpreted(), triton_lacks=_triton_lacks(), compile_lacks=_compile_lacks(),
        free_bytes=free, host_bytes=host_bytes(),
        host_free_bytes=free_host_bytes(), pins=kind in ("cuda", "rocm") and _pins(),
        locked_limit_bytes=locked_limit_bytes(),
    )  # fmt: skip


def assumed(name: str, arch: int | str, memory_bytes: int, host: int) -> Hardware:
    """A card that is not here, with nothing else on it: Triton and bitsandbytes are taken as installed, versions as
    they are here.

    Args:
        arch: 10 · major + minor of NVIDIA's, AMD's name of the chip.
        memory_bytes, host: the card's memory, and the host's beside it.
    """
    kind, capability = ("cuda", divmod(arch, 10)) if isinstance(arch, int) else ("rocm", (0, 0))
    lacks = _torch_lacks(kind, capability, torch.cuda.get_arch_list() or NEWER_CODES)
    return Hardware(
        kind=kind, name=name, capability=capability, memory_bytes=memory_bytes,
        has_bf16=kind == "rocm" or capability >= BF16_FROM, threads=torch.get_num_threads(), versions=_versions(None),
        missing=(*_missing(kind, capability), *filter(None, [lacks])), torch_lacks=lacks,
        packages=_packages() | {"bitsandbytes", "triton"},
        gfx="" if isinstance(arch, int) else arch, triton=_triton() or "assumed", free_bytes=memory_bytes,
        host_bytes=host, host_free_bytes=host, pins=True, is_assumed=True,
    )  # fmt: skip


def _torch_lacks(kind: str, capability: tuple[int, int], codes: Sequence[str]) -> str:
    """What the installed PyTorch cannot do with this card: its builds hold code for some architectures alone.

    Args:
        codes: "sm_86" runs on 8.6 and later of the same generation, "compute_90" is compiled anew for anything later.
    """
    if kind != "cuda" or not codes or any(_runs(code, capability) for code in codes):
        return ""
    chip = f"sm_{capability[0]}{capability[1]}"
    remedy = "that for CUDA 12.6 has, with Volta and older" if capability < INT8_FROM else "install another"
    return f"a PyTorch with code for {', '.join(codes)} has none for {chip}: {remedy}"


def _runs(code: str, capability: tuple[int, int]) -> bool:
    kind, _, number = code.partition("_")
    digits = re.match(r"\d+", number)
    if digits is None:
        return False
    of = divmod(int(digits[0]), 10)
    return of <= capability and (kind == "compute" or of[0] == capability[0])


def _taken(memory: int, free: int) -> str:
    """How much of a device's memory others have; "" for less than a context of CUDA's own and a desktop take."""
    taken = memory - free
    if taken <= max(2**30, memory // 10):
        return ""
    return f"{taken / 2**30:.1f} GB of the device's memory are taken by others; plans count with all of it"


def _pins() -> bool:
    """Whether the host's memory can be pinned, found out by pinning a page."""
    try:
        return torch.empty(4096, dtype=torch.uint8, pin_memory=True).is_pinned()
    except RuntimeError:
        return False


def _device() -> tuple[str, str, tuple[int, int], int, bool]:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        kind = "rocm" if torch.version.hip else "cuda"
        return (
            kind, properties.name, (properties.major, properties.minor), properties.total_memory,
            torch.cuda.is_bf16_supported(including_emulation=False),
        )  # fmt: skip
    if torch.backends.mps.is_available():
        return "mps", platform.processor() or "Apple GPU", (0, 0), 0, True
    return "cpu", platform.processor() or platform.machine(), (0, 0), 0, False


def _gfx() -> str:
    """`gfx942` of "gfx942:sramecc+:xnack-"."""
    return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]


def _triton() -> str | None:
    """Triton's version, without importing it; "of unknown version" for a module that no package claims."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of unknown version"


def _interpreted() -> bool:
    """Whether Triton would run kernels in its interpreter; the words are Triton's own."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton_lacks() -> str:
    """What Triton compiles its launchers with. On Windows it brings that along."""
    if platform.system() == "Windows":
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler: gcc or clang, or the environment's CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers (Python.h), a package such as python3-dev"
    return ""


def _compile_lacks() -> str:
    """What torch.compile makes code for the CPU with, where Inductor looks for it."""
    usual = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
    return "" if shutil.which(os.environ.get("CXX", usual)) else f"a C++ compiler: {usual}, or the environment's CXX"


def _versions(triton: str | None) -> dict[str, str]:
    """What bits depend on: torch, the CPU's vector units, the number of threads; on a GPU Triton's compiler."""
    return {
        "ltxforge": __version__,
        "torch": torch.__version__,
        **({"triton": triton} if triton else {}),
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _missing(kind: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """What this device or installation lacks, one line each, for the plan."""
    lines = []
    if kind == "cuda" and capability < BF16_FROM:
        lines.append(
            'no bf16 units: computes in fp32. training.precision = "fp16" takes half the memory and is faster, but'
            " weights that were trained in bf16 may leave its range; such a step is refused before it changes a thing"
        )
    if kind == "cpu":
        lines.append("no GPU: computes on the CPU, which is only meant for tiny models and tests")
    if kind == "mps":
        lines.append("Apple GPU: no Triton, bitsandbytes or SageAttention; plain PyTorch is used")
    return tuple(lines)


def _packages() -> frozenset[str]:
    """Which of the packages that not every platform has are installed."""
    return frozenset(name for name in ("bitsandbytes", "triton", "sageattention") if importlib.util.find_spec(name))
