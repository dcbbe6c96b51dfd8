"""What one block's work takes in memory, exactly: the real forward and backward, run over shapes alone.

A transformer of the version's real width and three blocks is built on the meta device, with the run's adapter, kernels
and base precision; a ledger counts storages while it computes. The first block is its own case, because its input needs
no gradient, and the others are alike. Decides nothing; `costs.py` composes what is found here into phases.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from ltxforge_kernels.choice import Choice, Kernels
from ltxforge_kernels.implementations import HAS_TRITON
from torch import Tensor, nn

from ltxforge import flow_matching
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.layers import BLOCKS, linear_layers, modality_of
from ltxforge.lora.targets import Match, match
from ltxforge.memory.activations import LEAST_BYTES
from ltxforge.memory.costs import BlockWork, Effort, Pass, Weights
from ltxforge.memory.ledger import DeviceAttention, Ledger
from ltxforge.memory.recompute import recomputed
from ltxforge.memory.trace_parts import denoising
from ltxforge.memory.units import aligned
from ltxforge.modalities import Streams, has
from ltxforge.models.interface import Noisy, NoisyTokens, PromptEmbeddings, VideoModel
from ltxforge.models.random_weights import prompt_widths, random_model
from ltxforge.plan import BucketPlan, Plan, PromptPlan
from ltxforge.quant.formats import FORMATS, NARROW, why_not
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.specs import ModelSpec

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRACED_BLOCKS = 3


def block_work(
    plan: Plan,
    spec: ModelSpec,
    bucket: BucketPlan,
    base: str = "bf16",
    double: bool = False,
    prompt: PromptPlan | None = None,
) -> BlockWork:
    """One micro-batch of a bucket under a base precision.

    Args:
        base: as in a recipe's `memory.base_precision`; `double` of "nf4".
        prompt: a sample whose denoising is looked at, too.
    """
    model = traced_model(plan, spec, base, double)
    kept = _step(model, plan, bucket, again=False)
    again = _step(model, plan, bucket, again=True)
    gradients = _gradients(model, inside=True) // TRACED_BLOCKS
    weights = _weights(model, spec, kept.touched)
    sampled = 0 if prompt is None else denoising(model, prompt, plan.conditioning.prompt_tokens, plan.device.kind)
    return BlockWork(
        kept_first=kept.passes[0],
        kept=kept.passes[1],
        again_first=again.passes[0],
        again=again.passes[1],
        given=kept.given,
        head=kept.head,
        tail=kept.tail,
        gradients=gradients,
        gradients_outside=_gradients(model, inside=False),
        weights=weights,
        effort=_effort(plan, spec, bucket, base, kept),
        sampling=sampled,
        ropes=kept.ropes,
    )


def traced_model(plan: Plan, spec: ModelSpec, base: str, double: bool) -> VideoModel:
    """The version's transformer with `TRACED_BLOCKS` blocks on the meta device, as a run would have prepared it."""
    short = dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": TRACED_BLOCKS})
    model = random_model(short, META, DTYPES[plan.device.precision], plan.training.modalities)
    model.load_transformer()
    kernels = traceable(plan.kernels)
    if base != "bf16":
        _quantise(model.transformer, base, double, kernels)
    inject(model.transformer, plan.lora, traced_match(plan, spec), plan.seed, kernels)
    model.kernels = kernels
    model.transformer.train()
    return model


def traceable(kernels: Kernels) -> Kernels:
    """The run's choices, as far as shapes can follow them: a compiled definition saves about what our kernel saves."""
    instead = "triton" if HAS_TRITON else "eager"
    return Kernels(tuple(_uncompiled(choice, instead) for choice in kernels.choices))


def _uncompiled(choice: Choice, instead: Any) -> Choice:
    if choice.implementation not in ("compile", "triton") and not choice.exceptions:
        return choice
    ranges = tuple(
        dataclasses.replace(each, implementation=instead) if each.implementation != "eager" else each
        for each in choice.exceptions
    )
    own = choice.implementation if choice.implementation == "eager" else instead
    return dataclasses.replace(choice, implementation=own, exceptions=ranges)


def traced_match(plan: Plan, spec: ModelSpec) -> Match:
    """The adapter's layers in so many blocks. Where blocks differ, each has what any of them has."""
    found = match(plan.lora.targets, spec, plan.lora.modalities, plan.training.modalities)
    outside = {name: size for name, size in found.layers.items() if not name.startswith(BLOCKS)}
    inside = {name.split(".", 2)[2]: size for name, size in found.layers.items() if name.startswith(BLOCKS)}
    blocks = {f"{BLOCKS}{n}.{name}": size for n in range(TRACED_BLOCKS) for name, size in inside.items()}
    return Match({**outside, **blocks}, found.by_target, found.unread)


def _quantise(transformer: nn.Module, base: str, double: bool, kernels: Kernels) -> None:
    """Every layer that is quantised by its name and size, as an empty one of the format."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in layers.items():
        if why_not(name, linear.out_features, linear.in_features, base):
            continue
        shape, dtype = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.dtype
        empty = QuantisedLinear.empty(*shape, base, double, kernels, device=META, dtype=dtype)
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, empty)


@dataclasses.dataclass(frozen=True)
class Traced:
    """One step's numbers, as in `BlockWork`, and the storages of weights that it read."""

    passes: tuple[Pass, ...]
    given: int
    head: int
    tail: int
    ropes: int
    traffic: tuple[int, int]
    touched: frozenset[int]


def _step(model: VideoModel, plan: Plan, bucket: BucketPlan, again: bool) -> Traced:
    """A forward and backward of all blocks, each computed again in the backward pass or none."""
    kind = plan.device.kind
    ledger = Ledger(kind, LEAST_BYTES)
    for parameter in adapter_parameters(model.transformer).values():
        parameter.grad = None
    model.run_block = partial(_marked, ledger, kind, again)
    gc.disable()  # collections would move what is freed when
    try:
        with ledger:
            total = _loss(model, plan, bucket)
            total.backward()
            del total
            ledger.mark("end")
    finally:
        gc.enable()
    return _read(ledger, _gradients(model, inside=True) // TRACED_BLOCKS, _gradients(model, inside=False))


def _read(ledger: Ledger, gradients: int, outside: int) -> Traced:
    """The ledger's stretches as passes; gradients of later blocks are taken off their peaks."""
    passes = []
    forwards = [ledger.stretch(f"forward {n}") for n in range(TRACED_BLOCKS)]
    after = [*forwards[1:], ledger.stretch("tail")]
    for number, forward in enumerate(forwards):
        backward = ledger.stretch(f"backward {number}")
        later = outside + (TRACED_BLOCKS - 1 - number) * gradients
        passes.append(
            Pass(
                stays=after[number].began - forward.began,
                forward=forward.peak - forward.began,
                backward=max(0, backward.peak - forward.began - later),
                small=after[number].small - forward.small,
            )
        )
    tail, back = ledger.stretch("tail"), ledger.stretch("backward 1")
    return Traced(
        tuple(passes),
        given=forwards[0].began,
        head=ledger.stretches[0].peak,
        tail=tail.peak - tail.began,
        ropes=ledger.stretch("end").began - outside - TRACED_BLOCKS * gradients,
        traffic=(forwards[1].read_and_written, back.read_and_written),
        touched=frozenset(ledger.read),
    )


def _marked(
    ledger: Ledger, kind: str, again: bool, number: int, forward: Callable, block: nn.Module, hidden: Any, *shared: Any
) -> Any:
    """Calls a block, and marks when it and its backward begin."""
    ledger.mark(f"forward {number}")
    call = partial(_with_attention, kind, forward, block, hidden, *shared)
    result = recomputed(call, META) if again else call()
    begun: list[bool] = []

    def begin_backward(_gradient: Tensor) -> None:
        if not begun:
            begun.append(True)
            ledger.mark(f"backward {number}")

    for tensor in result.values() if isinstance(result, Mapping) else [result]:
        if tensor.requires_grad:
            tensor.register_hook(begin_backward)
    if number == TRACED_BLOCKS - 1:
        ledger.mark("tail")
    return result


def _with_attention(kind: str, forward: Callable, *given: Any) -> Any:
    """Inside the call, which is also made during the backward pass, where no mode from outside is entered."""
    with DeviceAttention(kind):
        return forward(*given)


def _loss(model: VideoModel, plan: Plan, bucket: BucketPlan) -> Tensor:
    """What the trainer's forward computes, over empty latents and prompts, as large as the bucket's."""
    spec, size, modalities = model.spec, plan.training.batch_size, plan.training.modalities
    shape = bucket.shape.latent(spec.spatial_factor, spec.temporal_factor)
    dtype = DTYPES[plan.device.precision]
    drawn = {}
    if has(modalities, "video"):
        clean = torch.zeros(size, bucket.tokens, dtype=torch.bool)
        clean[:, : shape.height * shape.width] = plan.conditioning.first_frame > 0
        drawn["video"] = _mixed(clean, spec.latent_channels, dtype, model.kernels)
    if has(modalities, "audio"):
        clean = torch.zeros(size, bucket.audio_tokens, dtype=torch.bool)
        drawn["audio"] = _mixed(clean, spec.transformer_config["audio_in_channels"], dtype, model.kernels)
    noisy = {name: NoisyTokens(each.tokens, each.timesteps, each.sample_timesteps) for name, each in drawn.items()}
    length = plan.conditioning.prompt_tokens
    widths = prompt_widths(spec, modalities)
    prompt = PromptEmbeddings({name: torch.zeros(1, 1).expand(length, width) for name, width in widths.items()}, length)
    prompts = model.batch_prompts([prompt] * size, length, modalities)
    predicted = model.predict(Noisy(Streams(**noisy), shape, bucket.fps), prompts)
    losses = [flow_matching.loss_by_sample(predicted[name], each, model.kernels) for name, each in drawn.items()]
    return sum((each.sum() for each in losses[1:]), losses[0].sum())


def _mixed(clean: Tensor, channels: int, dtype: torch.dtype, kernels: Kernels) -> flow_matching.NoisyBatch:
    latents = torch.empty(*clean.shape, channels, device=META)
    noise = torch.empty(*clean.shape, channels, device=META)
    return flow_matching.mix(latents, noise, [0.5] * len(clean), clean, dtype, kernels)


def _gradients(model: VideoModel, inside: bool) -> int:
    """Bytes of the adapter's gradients inside the blocks, or outside."""
    return sum(
        parameter.numel() * 4
        for name, parameter in adapter_parameters(model.transformer).items()
        if name.startswith(BLOCKS) == inside
    )


def _weights(model: VideoModel, spec: ModelSpec, touched: frozenset[int]) -> Weights:
    """The stored transformer: of one block, and outside the blocks, of what a step reads and what lies idle."""
    adapter = {id(parameter) for parameter in adapter_parameters(model.transformer).values()}
    linear: dict[str, int] = {}
    found = dict.fromkeys(("block", "outside", "idle block", "idle linear", "idle outside"), 0)
    behind = 0
    for owner, module in model.transformer.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in adapter:
                continue
            block = owner.startswith(BLOCKS)
            if block and not owner.startswith(f"{BLOCKS}1."):
                continue
            idle = "" if tensor.untyped_storage()._cdata in touched else "idle "
            streamable = block and _is_large(module, name)
            if streamable and not idle:
                linear[f"{owner}.{name}"] = tensor.nbytes
                behind += tensor.untyped_storage().nbytes() - tensor.nbytes
            else:
                where = "linear" if streamable else "block" if block else "outside"
                found[f"{idle}{where}"] += tensor.nbytes
    layers: dict[str, int] = {}
    for name, size in linear.items():
        owner = name.rpartition(".")[0]
        layers[owner] = layers.get(owner, 0) + aligned(size)
    return Weights(
        linear=sum(linear.values()),
        largest=max(layers.values()),
        block=found["block"],
        outside=found["outside"],
        idle=spec.blocks * (found["idle block"] + found["idle linear"]) + found["idle outside"],
        behind=behind,
        idle_linear=found["idle linear"],
    )


def _is_large(module: nn.Module, name: str) -> bool:
    """Whether a tensor is a linear layer's weight, or of a quantised one; narrow ones are never streamed."""
    if isinstance(module, QuantisedLinear):
        return name in module.stored_names(module.format, module.double_quant)
    return isinstance(module, nn.Linear) and name == "weight" and min(module.weight.shape) >= NARROW


def _effort(plan: Plan, spec: ModelSpec, bucket: BucketPlan, base: str, traced: Traced) -> Effort:
    """Floating point operations by sizes, and the traffic of one block as it was traced."""
    rows = _rows_by_side(plan, bucket)
    own = traced_match(plan, spec).layers
    block, first = linear_layers(spec), f"{BLOCKS}0."
    layers = {name: size for name, size in block.items() if name.startswith(first) and _is_computed(name, plan)}
    linear = branch = attention = whole = 0.0
    for name, (inner, outer) in layers.items():
        tokens = rows[_side(name)]
        linear += 2.0 * tokens * inner * outer
        branch += 2.0 * tokens * plan.lora.rank * (inner + outer) * (name in own)
        if name.endswith("to_q"):
            attention += 4.0 * tokens * rows[_side(name.replace("to_q", "to_k"))] / plan.training.batch_size * outer
        if base != "bf16" and not why_not(name, outer, inner, base):
            whole += inner * outer
    narrow = FORMATS[base].op if base != "bf16" and FORMATS[base].quantises_activations else ""
    stored = {"nf4": 0.5, "int8": 1.0, "fp8": 1.0}
    item = DTYPES[plan.device.precision].itemsize
    made_whole = whole * (item + stored[FORMATS[base].op]) if base != "bf16" else 0.0
    return Effort(linear, branch, attention, *map(float, traced.traffic), made_whole, narrow)


def _is_computed(layer: str, plan: Plan) -> bool:
    return plan.training.modalities in ("both", modality_of(layer))


def _rows_by_side(plan: Plan, bucket: BucketPlan) -> dict[str, int]:
    """Tokens of a micro-batch: of the picture, the sound, and the prompt."""
    size = plan.training.batch_size
    return {
        "video": size * bucket.tokens,
        "audio": size * bucket.audio_tokens,
        "prompt": size * plan.conditioning.prompt_tokens,
    }


def _side(layer: str) -> str:
    """Whose tokens a layer of a block reads."""
    name = layer.split(".", 2)[2]
    answers = name.endswith(("to_k", "to_v"))
    if "attn2" in name and answers:
        return "prompt"
    if name.startswith(("audio_to_video", "video_to_audio")):
        asks = "video" if name.startswith("audio_to_video") else "audio"
        return asks if not answers else {"video": "audio", "audio": "video"}[asks]
    return "audio" if name.startswith("audio") else "video"
