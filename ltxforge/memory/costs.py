"""What each phase of a run takes, on the device and on the host, and how long a step takes: for a choice of strategies.

Pure composition of measured pieces, torch-free and cheap, so that a search can ask it ten thousand times. The pieces
(`Costs`) come from `trace.py`, which runs the real forward and backward over shapes. Bytes are what tensors take, as
`torch.cuda.max_memory_allocated` counts; what comes on top is named below as margins and is the planner's to add.
Decides nothing: it says what a choice costs and not which one is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ltxforge.memory.units import PAGE, SLOTS, STAGES, slot_count
from ltxforge.moments import MOMENTS, optimizer_bytes, paged_bytes
from ltxforge.plan import MemoryPlan, PhasePlan, StreamPlan

CONTEXT_BYTES = int(0.7 * 2**30)
"""A CUDA context, its libraries and a desktop: the share of a card that no allocator gives (kernels.md 6 measures caps
so). A margin, in no phase's bytes.
"""
RESERVED_OF_STANDING, RESERVED_OF_MOVING = 0.02, 0.15
"""What the caching allocator holds beyond the tensors, of what lies there throughout a phase, rounded up to whole
segments, and of what comes and goes in pieces. Assumptions until a GPU has measured. A margin, in no phase's bytes.
"""
STANDING = frozenset({"weights", "adapter", "optimizer state", "streamed slots", "VAE"})
"""The parts of a phase that lie there throughout."""
CUBLAS_BYTES = 32 * 2**20
"""cuBLAS's workspace on Hopper, taken through the allocator and kept; smaller ones on other chips."""
HOST_BASELINE = 560 * 2**20
"""Python, torch, diffusers, transformers and what they import: resident memory of a process that has imported a run,
with torch's CPU wheel (527 MiB at the time of writing), rounded up.
"""
HOST_CONTEXT = 1200 * 2**20
"""What CUDA's libraries add to a process on the host. An assumption until a GPU has measured."""
ATTENTION_SHARE = 0.6
"""How far attention gets of the speed at which matrix products run: 400 to 500 of 700 TFLOP/s on an H100, published
for flash attention at head widths of 64 and 128 (kernels.md 1.2).
"""
ATTENTION_BACKWARD = 2.5
"""Matrix products of attention's backward pass over those of its forward: five instead of two (arXiv 2205.14135)."""


def precision_key(memory: MemoryPlan) -> str:
    """How `Costs.works` names a base precision: the recipe's word, and "nf4-double" with its scales quantised."""
    return "nf4-double" if memory.base_precision == "nf4" and memory.double_quant else memory.base_precision


@dataclass(frozen=True)
class Pass:
    """One block, forward and backward, in bytes above what lay on the device before it.

    Attributes:
        stays: what is still there when the next block begins: what the backward pass will ask for.
        forward: the peak inside its forward.
        backward: the peak inside its backward, above what lay there before its forward; what stays and the gradients
            of its own adapter are counted in it, those of later blocks are not.
        small: of what stays, what is too small to be sent to the host.
    """

    stays: int
    forward: int
    backward: int
    small: int = 0


@dataclass(frozen=True)
class Weights:
    """A transformer as it is stored in one base precision, in bytes. The adapter is not in it.

    Attributes:
        linear: of one block's linear layers, what can be streamed.
        largest: of the largest of these layers.
        block: everything else of a block: tables, norms, biases, and layers that are never streamed.
        outside: of everything outside the blocks.
        idle: of the modality that is not trained, in all blocks and outside, which waits on the host until a sample;
            not counted in the fields above.
        behind: of the places for B behind the weights of one block, where our kernels want one matrix of both.
        idle_linear: of one block's idle linear layers, which travel with the others while a sample is made.
        quantising: what making the largest layer of them takes, as read, in between and stored; 0 if nothing is made.
    """

    linear: int
    largest: int
    block: int
    outside: int
    idle: int = 0
    behind: int = 0
    idle_linear: int = 0
    quantising: int = 0


@dataclass(frozen=True)
class Effort:
    """What one block's forward does for one micro-batch.

    Attributes:
        linear: FLOPs of the frozen linear layers. Their backward, which has no gradient of weights, does as many.
        branch: FLOPs of the LoRA; its backward does twice as many.
        attention: FLOPs of softmax attention.
        traffic, traffic_back: bytes read and written by everything else, forward and backward.
        dequantised: bytes read and written to make quantised weights whole, once a pass; 0 where they need not be.
        narrow: the format in which linear layers multiply, "int8" or "fp8"; "" for the run's own.
    """

    linear: float
    branch: float
    attention: float
    traffic: float
    traffic_back: float
    dequantised: float = 0.0
    narrow: str = ""


@dataclass(frozen=True)
class BlockWork:
    """What one micro-batch does on the device under one base precision; the bytes of one block and what is around all.

    Attributes:
        kept_first, kept: the first block, whose input needs no gradient, and any later one, keeping what they save.
        again_first, again: the same, computed again in the backward pass.
        given: what lies there when the first block begins: latents, noise, prompts, rotations, time embeddings.
        head: the peak until then.
        tail: the peak after the last block, above what lies there then: last norm, loss, and their gradients.
        gradients: of one block's adapter.
        gradients_outside: of the adapter outside the blocks.
        ropes: of `given`, the rotations, which are kept between steps.
        sampling: the peak inside a sample's denoising above all weights, latents and prompts included; 0 if none.
    """

    kept_first: Pass
    kept: Pass
    again_first: Pass
    again: Pass
    given: int
    head: int
    tail: int
    gradients: int
    gradients_outside: int
    weights: Weights
    effort: Effort
    sampling: int = 0
    ropes: int = 0


@dataclass(frozen=True)
class Part:
    """A part of the model that works on the device beside nothing else, or beside the transformer: bytes.

    `work` is its peak above the weights; `host` what it needs there.
    """

    weights: int
    work: int
    host: int = 0


@dataclass(frozen=True)
class Costs:
    """All that is known of a run before its memory strategies are chosen.

    Attributes:
        device: the plan's kind of device; on "cpu" device and host are the same memory.
        dtype: "bf16", "fp16" or "fp32": what is computed in.
        blocks: of the transformer.
        works: by `precision_key`.
        tensors: how many numbers each of the adapter's tensors has.
        accumulate: micro-batches of a step.
        captions: by the text encoder's precision, the parts that read captions, one after the other.
        clips, sound: the encoders; None where nothing is encoded.
        decodes: by (tile in pixels, tile in frames), (0, 0) for whole: the VAE while it decodes the largest sample.
        beside: what a sample's pipeline holds beside the transformer while it denoises: the VAE, or nothing.
        aside: whether the transformer waits on the host while a sample is decoded.
        largest_tensor: bytes of the largest tensor as it is read from the file.
    """

    device: str
    dtype: str
    blocks: int
    works: Mapping[str, BlockWork]
    tensors: tuple[int, ...]
    accumulate: int = 1
    captions: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    clips: Part | None = None
    sound: Part | None = None
    decodes: Mapping[tuple[int, int], Part] = field(default_factory=dict)
    beside: int = 0
    aside: bool = False
    largest_tensor: int = 0

    @cached_property
    def adapter(self) -> int:
        """Bytes of the adapter, in float32."""
        return 4 * sum(self.tensors)

    @cached_property
    def moments(self) -> dict[str, tuple[int, int]]:
        """Bytes of each optimiser's state, and how many of them may be paged."""
        return {name: (optimizer_bytes(name, self.tensors), paged_bytes(name, self.tensors)) for name in MOMENTS}


@dataclass(frozen=True)
class Rates:
    """What a device reaches: TFLOP/s of matrix products by format (0 where it has none), GB/s of memory, bus and disk.

    `efficiency` is how far products get of these. From a table of cards these are assumptions, and so are all seconds.
    """

    bf16: float
    fp16: float
    fp32: float
    memory: float
    bus: float
    disk: float = 2.0
    int8: float = 0.0
    fp8: float = 0.0
    efficiency: float = 0.75

    def products(self, name: str) -> float:
        """FLOP/s of matrix products of a dtype or format that the device has."""
        return getattr(self, name) * 1e12 * self.efficiency


def phases(costs: Costs, memory: MemoryPlan, optimizer: str) -> tuple[PhasePlan, ...]:
    """Every phase of a run at its peak, in the order in which a run meets them; what does not happen is left out."""
    found = [
        *reading_phases(costs, memory),
        load_phase(costs, memory),
        step_phase(costs, memory, optimizer),
        *sample_phases(costs, memory, optimizer),
        save_phase(costs, memory, optimizer),
    ]
    return tuple(found)


def step_phase(costs: Costs, memory: MemoryPlan, optimizer: str) -> PhasePlan:
    """One step: the worst of head, blocks forward, tail, blocks backward and update."""
    work = costs.works[precision_key(memory)]
    parts = standing(costs, memory, optimizer) | {"conditioning": work.given}
    gradients, kept, block = _worst_moment(costs, work, memory, optimizer)
    parts |= {"gradients": gradients, "kept activations": kept, "one block's work": block}
    if costs.device == "cuda":
        parts["workspace"] = CUBLAS_BYTES
    on_host = waiting(costs, memory, optimizer)
    if memory.offload_activations:
        on_host += _sent(work, memory.checkpointed, costs.blocks)
    return _phase(costs, "step", parts, on_host)


def standing(costs: Costs, memory: MemoryPlan, optimizer: str) -> dict[str, int]:
    """What lies on the device throughout training, by name."""
    state, paged = costs.moments[optimizer]
    weights = costs.works[precision_key(memory)].weights
    streamed = len(memory.stream.blocks) if memory.stream else 0
    resident = (costs.blocks - streamed) * (weights.linear + weights.behind)
    found = {
        "weights": weights.outside + costs.blocks * weights.block + resident,
        "adapter": costs.adapter,
        "optimizer state": state - paged,
    }
    if memory.stream:
        found["streamed slots"] = slots(memory.stream, weights)
    return found


def slots(stream: StreamPlan, weights: Weights, whole: bool = False) -> int:
    """The places on the device that streamed weights come to; `whole` with the idle modality's, as a sample needs."""
    return slot_count(stream, _travels(stream)) * _unit(stream, weights, whole)


def waiting(costs: Costs, memory: MemoryPlan, optimizer: str) -> int:
    """What lies on the host throughout training: streamed weights, an idle modality, paged moments."""
    weights = costs.works[precision_key(memory)].weights
    found = weights.idle + costs.moments[optimizer][1]
    stream = memory.stream
    if stream is None:
        return found
    if stream.disk:
        stages = min(STAGES if stream.overlapped else 1, _travels(stream))
        return found - len(stream.blocks) * weights.idle_linear + stages * (_unit(stream, weights, True) + PAGE)
    return found + len(stream.blocks) * (weights.linear + PAGE)


def _unit(stream: StreamPlan, weights: Weights, whole: bool = False) -> int:
    """The largest thing that travels at once."""
    if stream.level == "leaf":
        return weights.largest
    return max(map(len, stream.units), default=0) * (weights.linear + whole * weights.idle_linear)


def _travels(stream: StreamPlan) -> int:
    """How many things travel in a pass; more than slots where each layer travels alone."""
    return len(stream.units) if stream.level == "block" else SLOTS * len(stream.units)


def _worst_moment(costs: Costs, work: BlockWork, memory: MemoryPlan, optimizer: str) -> tuple[int, int, int]:
    """The moment of a step that takes most: its gradients, kept activations, and what is worked on.

    Of activations that wait on the host one block's are in transit: still here from the block before in the forward,
    here again for it in the backward pass.
    """
    again, count = frozenset(memory.checkpointed), costs.blocks
    whole = work.gradients_outside + count * work.gradients
    before = whole if costs.accumulate > 1 else 0
    worst = max((before, 0, work.head - work.given), (whole, -work.given, _update(costs, optimizer)), key=sum)
    most, kept, near = sum(worst), 0, 0
    for number in range(count):
        each = _pass(work, number, number in again)
        held = kept + near
        if before + held + each.forward > most:
            worst, most = (before, held, each.forward), before + held + each.forward
        later = before or work.gradients_outside + (count - 1 - number) * work.gradients
        if later + held + each.backward > most:
            worst, most = (later, held, each.backward), later + held + each.backward
        near = each.stays - each.small if memory.offload_activations else 0
        kept += each.small if memory.offload_activations else each.stays
    return max(worst, (before, kept + near, work.tail), key=sum)


def _pass(work: BlockWork, number: int, again: bool) -> Pass:
    if number == 0:
        return work.again_first if again else work.kept_first
    return work.again if again else work.kept


def _sent(work: BlockWork, again: Iterable[int], blocks: int) -> int:
    """What blocks send to the host until their backward passes; the last one, whose comes first, sends nothing."""
    chosen = frozenset(again)
    passes = (_pass(work, number, number in chosen) for number in range(blocks - 1))
    return sum(each.stays - each.small for each in passes)


def _update(costs: Costs, optimizer: str) -> int:
    """What the update takes beside gradients: torch's AdamW makes a denominator, on a GPU for all tensors at once."""
    if MOMENTS[optimizer].in_8_bits:
        return 0
    return 4 * max(costs.tensors) if costs.device == "cpu" else costs.adapter


def reading_phases(costs: Costs, memory: MemoryPlan) -> list[PhasePlan]:
    """Captions, clips and sound, before the transformer is there; each part alone on the device."""
    found = []
    readers = costs.captions.get(memory.text_encoder_precision, ())
    for name, parts in (("captions", readers), ("clips", [costs.clips]), ("sound", [costs.sound])):
        if present := [part for part in parts if part is not None]:
            most = max(present, key=lambda part: part.weights + part.work)
            host = max(part.host for part in present)
            found.append(_phase(costs, name, {"weights": most.weights, "work": most.work}, host))
    return found


def load_phase(costs: Costs, memory: MemoryPlan) -> PhasePlan:
    """The transformer, tensor by tensor: what is kept, and the largest tensor while it is quantised."""
    parts = standing(costs, memory, "adamw")
    parts = {name: parts[name] for name in ("weights", "adapter")}
    quantising = costs.works[precision_key(memory)].weights.quantising
    is_here = memory.quantise_on == "device"
    parts["quantising"] = quantising if is_here else 0
    on_host = waiting(costs, memory, "adamw") + 2 * costs.largest_tensor + (0 if is_here else quantising)
    return _phase(costs, "load", parts, on_host)


def sample_phases(costs: Costs, memory: MemoryPlan, optimizer: str) -> list[PhasePlan]:
    """A sample's denoising, by the whole model, and the decoding of its picture."""
    if not costs.decodes:
        return []
    work, decoder = costs.works[precision_key(memory)], costs.decodes[memory.decode_tile, memory.decode_frames]
    parts, on_host = standing(costs, memory, optimizer), waiting(costs, memory, optimizer)
    streamed = len(memory.stream.blocks) if memory.stream else 0
    joined = work.weights.idle - streamed * work.weights.idle_linear  # the rest of it travels
    parts["weights"] += joined
    denoised = parts | {"VAE": costs.beside, "denoising": work.sampling}
    if memory.stream:
        denoised["streamed slots"] = slots(memory.stream, work.weights, whole=True)
    parts.pop("streamed slots", None)  # they are cleared before a decoder comes
    aside = 0
    if costs.aside:
        aside = parts.pop("weights") + parts.pop("adapter")
    decoded = parts | {"VAE": decoder.weights, "decoding": decoder.work}
    return [
        _phase(costs, "sample", denoised, on_host - joined),
        _phase(costs, "decode", decoded, on_host - joined + aside + decoder.host),
    ]


def save_phase(costs: Costs, memory: MemoryPlan, optimizer: str) -> PhasePlan:
    """A checkpoint: the adapter and its moments pass through the host as they are written."""
    copies = costs.adapter + costs.moments[optimizer][0]
    return _phase(costs, "save", standing(costs, memory, optimizer), waiting(costs, memory, optimizer) + copies)


def _phase(costs: Costs, name: str, parts: Mapping[str, int], on_host: int) -> PhasePlan:
    held = {part: size for part, size in parts.items() if size}
    device = sum(held.values())
    baseline = HOST_BASELINE + (HOST_CONTEXT if costs.device in ("cuda", "rocm") else 0)
    shared = device if costs.device in ("cpu", "mps") else 0
    return PhasePlan(name, device, baseline + on_host + shared, held)


def step_seconds(costs: Costs, memory: MemoryPlan, optimizer: str, rates: Rates) -> float:
    """How long a step takes, by a roofline. An assumption in itself: what is used are ratios between choices.

    Matrix products, attention and memory traffic follow each other; copies over the bus run beside them where they are
    overlapped, so that a pass takes the longer of both and what nothing hides, its first unit.
    """
    work = costs.works[precision_key(memory)]
    forward, backward = _compute(work.effort, costs.dtype, rates)
    again = len(memory.checkpointed)
    first = costs.blocks * forward
    second = costs.blocks * backward + again * forward
    weights_seconds, unit_seconds = _weights_seconds(work.weights, memory.stream, rates)
    activations = 0.0
    if memory.offload_activations:
        activations = _sent(work, memory.checkpointed, costs.blocks) / (rates.bus * 1e9)
    copies = weights_seconds + activations
    if memory.stream is not None and not memory.stream.overlapped:
        micro = first + second + 2 * copies
    else:
        micro = max(first, copies) + max(second, copies) + 2 * unit_seconds
    return costs.accumulate * micro + _update_seconds(costs, optimizer, rates)


def _compute(effort: Effort, dtype: str, rates: Rates) -> tuple[float, float]:
    """Seconds of one block's forward and backward."""
    products, memory = rates.products(dtype), rates.memory * 1e9
    narrow = effort.narrow if effort.narrow and getattr(rates, effort.narrow) else ""
    linear = effort.linear / (rates.products(narrow) if narrow else products)
    attention = effort.attention / (products * ATTENTION_SHARE)
    whole = 0.0 if narrow else effort.dequantised / memory
    forward = linear + effort.branch / products + attention + effort.traffic / memory + whole
    backward = linear + 2 * effort.branch / products + ATTENTION_BACKWARD * attention
    return forward, backward + effort.traffic_back / memory + whole


def _weights_seconds(weights: Weights, stream: StreamPlan | None, rates: Rates) -> tuple[float, float]:
    """Seconds that streamed weights travel in one pass, and the first unit of them."""
    if stream is None:
        return 0.0, 0.0
    rate = (min(rates.bus, rates.disk) if stream.disk else rates.bus) * 1e9
    return len(stream.blocks) * weights.linear / rate, _unit(stream, weights) / rate


def _update_seconds(costs: Costs, optimizer: str, rates: Rates) -> float:
    """Numbers, gradients and moments are read, and all but gradients written; paged moments cross the bus both ways."""
    state, paged = costs.moments[optimizer]
    moved = 3 * costs.adapter + 2 * (state - paged)
    return moved / (rates.memory * 1e9) + 2 * paged / (rates.bus * 1e9)


def reserved_bytes(phase: PhasePlan) -> int:
    """What a phase takes of the device with all that the allocator holds for it."""
    standing = sum(size for name, size in phase.parts.items() if name in STANDING)
    moving = phase.device_bytes - standing
    return phase.device_bytes + round(RESERVED_OF_STANDING * standing + RESERVED_OF_MOVING * moving)


def compare(estimated: PhasePlan, measured: Mapping[str, int]) -> list[str]:
    """A phase's estimate beside a measurement, part by part, a line each; the largest excess comes first.

    Args:
        measured: by the estimate's names, as far as they were measured; "all" is the peak of everything.
    """
    whole = measured.get("all", sum(measured.values()))
    rows = {name: (estimated.parts.get(name, 0), measured.get(name)) for name in [*estimated.parts, *measured]}
    rows.pop("all", None)
    ordered = sorted(rows.items(), key=lambda row: -((row[1][1] or 0) - row[1][0]) if row[1][1] is not None else 0)
    lines = [_line(name, *sizes) for name, sizes in ordered]
    return [_line(f"{estimated.name}: all", estimated.device_bytes, whole), *lines]


def _line(name: str, planned: int, found: int | None) -> str:
    told = f"{name}: {planned / 1e9:.2f} GB planned"
    if found is None:
        return told
    share = f" ({found / planned - 1:+.0%})" if planned else ""
    return f"{told}, {found / 1e9:.2f} GB measured{share}"
