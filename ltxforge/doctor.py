"""The verb `doctor`: the facts that plans follow from on this machine, and what each allows or rules out.

Looks at the device, the host, the disks and the packages; changes nothing and asks no network. What a recipe gets of
it is `plan`'s to say; with a recipe the folders that it names are looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import av
from huggingface_hub import constants as hub
from ltxforge_kernels.choice import arch_name, why_no_compile, why_no_triton

from ltxforge.assumed import machine
from ltxforge.facts import Places, places
from ltxforge.hardware import Hardware, detect, free_disk_bytes
from ltxforge.optim import bitsandbytes_optim
from ltxforge.recipe.parse import Parsed
from ltxforge.ui.doctor_table import Finding, doctor_table
from ltxforge.ui.screen import Screen
from ltxforge.ui.text import size

GPUS = ("cuda", "rocm")
LITTLE_DISK = 20 * 10**9
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "av")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def show_doctor(parsed: Parsed | None, screen: Screen, gpu: str | None = None, ram: str | None = None) -> None:
    """Print the facts, of this machine or of one that is described.

    Args:
        parsed: a recipe, whose folders are looked at; without one those that are used by default.
        gpu, ram: as for `plan`.
    """
    hardware = machine(gpu, ram) if gpu else detect()
    where = places(parsed, None) if parsed else Places("", Path("runs").absolute(), Path("cache").absolute())
    assumed = " (assumed)" if hardware.is_assumed else ""
    screen.show(doctor_table(f"{hardware.name}, {arch_name(hardware.machine)}{assumed}", findings(hardware, where)))


def findings(hardware: Hardware, where: Places) -> list[Finding]:
    """All facts, in the order in which a run meets them."""
    found = [*_device(hardware), *_host(hardware)]
    return found if hardware.is_assumed else [*found, *_disks(where), *_packages(hardware)]


def _device(hardware: Hardware) -> Iterator[Finding]:
    yield _memory(hardware)
    if hardware.torch_lacks:
        yield Finding("Device", "PyTorch", "has no code for it", hardware.torch_lacks, "missing")
    yield from _formats(hardware)
    yield from _compilers(hardware)
    yield _streams(hardware)


def _memory(hardware: Hardware) -> Finding:
    if hardware.has_own_memory:
        value = f"{_gb(hardware.memory_bytes)}, {_gb(hardware.free_bytes)} free"
        return Finding("Device", "memory", value, 'what memory.fit = "auto" may fill', "fine")
    means = "computes in the host's memory: that is the budget" + (
        "; meant for tiny models and tests" if hardware.kind == "cpu" else ""
    )
    return Finding("Device", "memory", "none of its own", means, "limit")


def _formats(hardware: Hardware) -> Iterator[Finding]:
    """Which formats have units of their own. Without them a format is possible, at another one's speed."""
    if hardware.has_bf16:
        yield Finding("Device", "bf16", "native", "training and encoders in bf16, as the weights were made", "fine")
    else:
        means = "training and encoders in fp32, in twice the memory"
        if hardware.has_fp16:
            means += '; training.precision = "fp16" is smaller and faster, if the weights stay in its range'
        yield Finding("Device", "bf16", "no units", means, "limit")
    if hardware.has_fp16:
        means = "with a loss scale that the plan decides" if hardware.has_bf16 else "the way to 16 bits here"
        yield Finding("Device", "fp16", "native", means, "fine")
    else:
        yield Finding("Device", "fp16", "no units", "possible, and no faster than fp32", "limit")
    in_8_bits = 'memory.base_precision = "{}" multiplies in 8 bits'
    if hardware.kind == "cpu":
        yield from _eight_bits_on_a_cpu()
        return
    if hardware.has_int8:
        yield Finding("Device", "int8", "native", in_8_bits.format("int8-w8a8"), "fine")
    else:
        means = 'memory.base_precision = "int8" saves memory; "int8-w8a8" is of no use'
        yield Finding("Device", "int8", "no units", means, "limit")
    if hardware.has_fp8:
        yield Finding("Device", "fp8", "native", in_8_bits.format("fp8"), "fine")
    else:
        means = 'memory.base_precision = "fp8" saves memory and no time: weights are made whole for each product'
        yield Finding("Device", "fp8", "no units", means, "limit")


def _eight_bits_on_a_cpu() -> Iterator[Finding]:
    for name, precision in (("int8", "int8-w8a8"), ("fp8", "fp8")):
        means = f'memory.base_precision = "{precision}" saves memory; products follow its definition in 8 bits, slowly'
        yield Finding("Device", name, "no units", means, "limit")


def _compilers(hardware: Hardware) -> Iterator[Finding]:
    triton, machine = hardware.triton or "not installed", hardware.machine
    obstacle = why_no_triton(machine, "fp32")
    means = f"every op is eager: {obstacle}" if obstacle else "our kernels carry out every op; see `ltxforge kernels`"
    yield Finding("Device", "Triton", triton, means, "limit" if obstacle else "fine")
    lacks = why_no_compile(machine)
    means = lacks or "training.compile makes one program of a block"
    yield Finding("Device", "compile", "no" if lacks else "yes", means, "limit" if lacks else "fine")


def _streams(hardware: Hardware) -> Finding:
    if hardware.kind not in GPUS:
        means = "block_swap and group_offload bring weights one after the other, not beside the computation"
        return Finding("Device", "streams", "none", means, "limit")
    if hardware.pins:
        return Finding("Device", "streams", "yes", "swapped weights come beside the computation", "fine")
    means = "the host's memory cannot be pinned here: swapped weights are waited for"
    return Finding("Device", "streams", "not overlapped", means, "limit")


def _host(hardware: Hardware) -> Iterator[Finding]:
    value = f"{_gb(hardware.host_bytes)}, {_gb(hardware.host_free_bytes)} available"
    yield Finding("Host", "memory", value, "holds swapped weights, activations that wait, and a sample's parts", "fine")
    if hardware.is_assumed:
        return
    limit = hardware.locked_limit_bytes
    value = "no limit" if limit is None else _gb(limit)
    means = "`ulimit -l`; the drivers of NVIDIA and AMD pin memory whatever it says"
    yield Finding("Host", "locked memory", value, means)
    yield Finding("Host", "threads", str(hardware.threads), "PyTorch's; OMP_NUM_THREADS sets them")


def _disks(where: Places) -> Iterator[Finding]:
    weights = Path(hub.HF_HUB_CACHE)
    rows = (("run", where.run, "checkpoints, samples"), ("cache", where.cache, "latents, captions, quantised bases"),
            ("weights", weights, "what the Hub's library downloads; HF_HOME moves it"))  # fmt: skip
    for name, folder, holds in rows:
        free = free_disk_bytes(folder)
        verdict = "fine" if free >= LITTLE_DISK else "limit"
        yield Finding("Disk", name, f"{size(free)} free", f"{holds}: {folder}", verdict)


def _packages(hardware: Hardware) -> Iterator[Finding]:
    yield _bitsandbytes(hardware)
    if "sageattention" in hardware.packages:
        yield Finding("Packages", "sageattention", "installed", "not used: attention is PyTorch's own")
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    yield Finding(
        "Packages", "PyAV", av.__version__, f"brings FFmpeg's libavcodec {codec}; no ffmpeg is needed", "fine"
    )
    for name in LIBRARIES:
        if name not in ("bitsandbytes", "av"):
            yield Finding("Packages", name, _version(name))
    yield Finding("Packages", "Python", sys.version.split()[0])
    settings = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    if settings and hardware.kind in GPUS:
        yield Finding("Packages", "allocator", ", ".join(settings), "how PyTorch cuts up the device's memory")


def _bitsandbytes(hardware: Hardware) -> Finding:
    """Whether bitsandbytes is there and its own library loads: only then can 8-bit optimisers run."""
    needs = "optimizers in 8 bits"
    if "bitsandbytes" not in hardware.packages:
        return Finding("Packages", "bitsandbytes", "not installed", f"no {needs}: pip install bitsandbytes", "limit")
    try:
        bitsandbytes_optim()
        library = sys.modules["bitsandbytes.cextension"].lib
    except (ImportError, OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        return Finding("Packages", "bitsandbytes", _version("bitsandbytes"), f"no {needs}: {first}", "missing")
    on_gpu = bool(getattr(library, "compiled_with_cuda", False))
    if hardware.kind in GPUS and not on_gpu:
        means = f"no {needs}: its library for this GPU does not load; python -m bitsandbytes says why"
        return Finding("Packages", "bitsandbytes", _version("bitsandbytes"), means, "missing")
    paged = ", paged ones too" if on_gpu else "; paged ones page nothing here"
    return Finding("Packages", "bitsandbytes", _version("bitsandbytes"), needs + paged, "fine")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gb(count: int) -> str:
    """Memory as it is sold: GB of 2^30 bytes."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MB"
    return f"{count / 2**30:.1f} GB"
