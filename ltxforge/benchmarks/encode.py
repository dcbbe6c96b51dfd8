"""The suite `encode`: a clip's latents by our streamed encoding, against diffusers' VAE in each of its ways.

Decides what is timed: from uint8 frames on the host to the normalised posterior on the host, random weights, synthetic
frames, all contenders in turns. First the gate: streamed is the whole clip's latents, in float32 to rounding and in
bf16 no worse than diffusers, both against diffusers in float64. Loads and writes no file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from ltxforge_kernels.choice import Kernels
from torch import Tensor

from ltxforge.benchmarks import timing
from ltxforge.benchmarks.bench import Bench, Told
from ltxforge.benchmarks.gate import relative_error
from ltxforge.benchmarks.quality import red
from ltxforge.errors import Stopped
from ltxforge.hardware import Hardware, is_out_of_memory, torch_device, torch_dtype
from ltxforge.kernel_choices import choose_kernels
from ltxforge.models.parts import cast, release_memory, whole_float32
from ltxforge.models.random_weights import random_vae
from ltxforge.models.vae import VideoVae, encode_frames
from ltxforge.models.vae import statistics as latent_statistics
from ltxforge.randomness import address
from ltxforge.shapes import ClipShape
from ltxforge.signals import StopRequest
from ltxforge.suites.case import Gate
from ltxforge.suites.encode import (
    ANOTHER_FUNCTION,
    CHANNELS_LAST,
    FRAMEWISE,
    OURS,
    TILED,
    WHOLE,
    EncodeCase,
    EncodeResult,
)

SEED = 0
GATE_SHAPE = ClipShape(128, 96, 41)
"""Several chunks of every size that we stream in, the last one cut short."""
GATE_TILE = 64
FLOAT32_BOUND = 2e-6
"""Rounding alone: the streamed clip is the clip. Relative, in the Frobenius norm."""
BESIDE_STOCK = 1.1
"""The error may be so many times that of diffusers in the same precision, whose own rounding a deep encoder adds up."""
HOW = {
    "times": "seconds from uint8 frames on the host to the normalised posterior on the host, random weights; median and"
    " the fifths at both ends",
    "peak_bytes": "what PyTorch held on the device at most during one clip, beside what was there before",
    "ratios": "the peer's median / our median",
    "deviations": "relative difference of a peer's latents from the whole clip's, in the Frobenius norm, on a small"
    " clip (and with small tiles) in float32: where it is large, the peer computes another function",
}
Encode = Callable[[Tensor], Tensor]


def begin(cases: Sequence[EncodeCase], hardware: Hardware, told: Told, stop: StopRequest) -> Bench:
    """Ready to measure encoding.

    Raises:
        PlanError: a case asks for kernels that cannot run here.
    """
    for case in cases:
        kernels_of(case, hardware)
    return Bench(lambda case: measure(case, hardware, told, stop), HOW)


def kernels_of(case: EncodeCase, hardware: Hardware) -> Kernels:
    """How ours carries out convolutions."""
    asked = {"causal_conv3d": case.kernels} if case.kernels else None
    machine, dtype = hardware.machine, case.precision
    return choose_kernels(("causal_conv3d",), machine, dtype, dtype, asked=asked, spec=case.spec)


def measure(case: EncodeCase, hardware: Hardware, told: Told, stop: StopRequest) -> EncodeResult:
    """Check, then time one clip. Too little memory is a result, not an error."""
    if hardware.kind == "cpu" and not case.spec.tiny:
        reason = f"{case.model} at full size needs a GPU, and this machine has none"
        return EncodeResult(case.name, "skipped", case.settings(), reason)
    torch.compiler.reset()
    device, kernels = torch_device(hardware.kind), kernels_of(case, hardware)
    try:
        told(f"{case.name}: is the streamed clip the clip?")
        gates, deviations = checked(case, kernels, device)
        found: dict[str, Any] = {"gates": tuple(gates), "deviations": deviations}
        if reason := red(gates):
            return EncodeResult(case.name, "gate failed", case.settings(), reason, **found)
        release_memory(device)
        return _measured(case, kernels, device, told, stop, found)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return EncodeResult(case.name, "out of memory", case.settings(), str(error).splitlines()[0])
    finally:
        release_memory(device)


def _measured(
    case: EncodeCase, kernels: Kernels, device: torch.device, told: Told, stop: StopRequest, found: dict[str, Any]
) -> EncodeResult:
    frames, dtype = synthetic_frames(case.shape), torch_dtype(case.precision)
    calls: dict[str, timing.Call] = {}
    peaks: dict[str, int] = {}
    unavailable: dict[str, str] = {}
    for name in (OURS, *case.peers):
        told(f"{case.name}: {case.size} by {name}")
        try:
            call = partial(contender(name, encoder_of(case, device, dtype), kernels, device), frames)
            call()
            if device.type == "cuda":
                peaks[name] = timing.call_peak(call, device)
            calls[name] = call
        except (RuntimeError, MemoryError) as error:
            if name == OURS:
                raise
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            unavailable[name] = f"{what}: {(str(error).splitlines() or [''])[0]}"
        release_memory(device)
    seconds = timing.time_against_each_other(
        {name: [call] for name, call in calls.items()}, case.repeats, device, lambda: stop.requested
    )
    if stop.requested:
        raise Stopped(stop.signal_number, f"stopped in the middle of {case.name}, which is not recorded")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return EncodeResult(
        name=case.name,
        outcome="measured",
        case=case.settings(),
        ratios={name: median / medians[OURS] for name, median in medians.items() if name != OURS},
        times={name: timing.timing(each) for name, each in seconds.items()},
        peak_bytes=peaks,
        unavailable=unavailable,
        weights_bytes=sum(p.nbytes for p in encoder_of(case, torch.device("meta"), dtype).parameters()),
        **found,
    )


def encoder_of(case: EncodeCase, device: torch.device, dtype: torch.dtype) -> VideoVae:
    """The version's VAE with the same random weights each time, without its decoder."""
    vae = random_vae(case.spec, device, dtype)
    vae.decoder = None
    return vae


def synthetic_frames(shape: ClipShape) -> Tensor:
    """uint8 [N, height, width, 3]: noise, which encoders are as busy with as with pictures."""
    generator = torch.Generator().manual_seed(address(SEED, "synthetic-frames"))
    size = (shape.frames, shape.height, shape.width, 3)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def contender(name: str, vae: VideoVae, kernels: Kernels, device: torch.device) -> Encode:
    """Ours or a peer: frames on the host → means [C, F, Y, X] on the host. May change the VAE, which is its own."""
    if name == OURS:
        return lambda frames: encode_frames(vae, frames, device, kernels).mean
    if name == CHANNELS_LAST:
        for parameter in vae.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    if name == FRAMEWISE:
        vae.use_framewise_encoding = vae.use_framewise_decoding = True  # diffusers 0.42's encode asks the latter
    if name == TILED:
        vae.enable_tiling()
    assert name in (WHOLE, CHANNELS_LAST, FRAMEWISE, TILED), name
    layout = torch.channels_last_3d if name == CHANNELS_LAST else torch.contiguous_format
    return lambda frames: stock_encode(vae, frames, device, layout)


@torch.no_grad()
def stock_encode(vae: VideoVae, frames: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    """The whole clip on the device, and diffusers' `encode`: normalised means [C, F, Y, X] on the host.

    Float32 from the posterior on, or float64 of a VAE that computes in that.
    """
    pixels = (frames.to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).to(vae.dtype)
    posterior = vae.encode(pixels.contiguous(memory_format=layout)).latent_dist
    mean, std, scale = latent_statistics(vae)
    dtype = torch.promote_types(vae.dtype, torch.float32)
    centred, _ = (posterior.mean.to(dtype) - mean) * scale / std, (posterior.std.to(dtype) * scale / std).cpu()
    return centred[0].cpu()


def checked(case: EncodeCase, kernels: Kernels, device: torch.device) -> tuple[list[Gate], dict[str, float]]:
    """Ours against diffusers' whole clip in float64, on a small clip; how far the case's other peers are from it.

    The weights are float32's, as are the means of squares that LTX-Video's norms take: their rounding stays below 1e-7.
    """
    frames, float32 = synthetic_frames(GATE_SHAPE), torch.float32

    def encoded(name: str, dtype: torch.dtype) -> Tensor:
        # Numbers that are drawn in another dtype may be others.
        vae = cast(encoder_of(case, device, float32), device, dtype)
        encode = contender(name, vae, kernels, device)
        vae.tile_sample_min_height = vae.tile_sample_min_width = GATE_TILE  # the clip is smaller than the usual ones
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = GATE_TILE // 2
        return encode(frames)

    with whole_float32():
        truth = encoded(WHOLE, torch.float64)
        stock, error = (relative_error(encoded(name, float32), truth) for name in (WHOLE, OURS))
        gates = [_gate("streamed in float32", error, max(FLOAT32_BOUND, BESIDE_STOCK * stock), stock)]
        others = [name for name in case.peers if name in ANOTHER_FUNCTION]
        deviations = {name: relative_error(encoded(name, float32), truth) for name in others}
    if case.precision != "fp32":
        dtype = torch_dtype(case.precision)
        stock = relative_error(encoded(WHOLE, dtype), truth)
        error = relative_error(encoded(OURS, dtype), truth)
        gates.append(_gate(f"streamed in {case.precision}", error, BESIDE_STOCK * stock, stock))
    return gates, deviations


def _gate(what: str, error: float, bound: float, beside: float | None = None) -> Gate:
    return Gate(OURS, what, error <= bound, error, bound, beside)
