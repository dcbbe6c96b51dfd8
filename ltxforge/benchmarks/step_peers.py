"""What a training step is measured and judged against: diffusers' own forward, PEFT's own LoRA, the rest plain torch.

Decides what a fair peer does: the same frozen weights (shared, not copied), the same layers and rank, gradient
checkpointing of every block, one timestep per token, sigma and noise drawn on the device, AdamW: what the official
trainers run. Adapters have the dtype that `add_adapter` gives them, which is the fastest. Uses nothing of our own
forward, LoRA or loss.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXConditionPipeline, LTXVideoTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from ltxforge.dataset.batches import Batch
from ltxforge.flow_matching import noise_for, sigma_at
from ltxforge.hardware import synchronize
from ltxforge.modalities import MODALITIES, Streams
from ltxforge.model_spec import BLOCKS
from ltxforge.models.random_weights import drawn, empty_transformer
from ltxforge.plan import OptimizerPlan, Plan
from ltxforge.specs import ModelSpec


@dataclass(frozen=True)
class Drawn:
    """One modality's draws of a micro-batch, on the device: `noise` [B, T, C] and `sigma` [B], float32."""

    noise: Tensor
    sigma: Tensor


Draw = Callable[[Batch, int], Streams[Drawn]]
"""(micro-batch, step) → the draws."""


def on_device(device: torch.device) -> Draw:
    """New draws each time, made on the device as trainers make them: a logit-normal sigma, shared with the sound."""

    def draw(batch: Batch, _step: int) -> Streams[Drawn]:
        tokens = tokens_of(batch, device)
        size = len(next(each for _, each in tokens.items()))
        sigma = torch.sigmoid(torch.randn(size, device=device))
        return tokens.map(lambda each: Drawn(torch.randn_like(each), sigma))

    return draw


def as_ours(plan: Plan, device: torch.device) -> Draw:
    """The draws that a run of the plan makes, so that losses and gradients can be compared."""

    def draw(batch: Batch, step: int) -> Streams[Drawn]:
        tokens = tokens_of(batch, device)
        size, first = len(batch.prompts), batch.first_index
        rows = range(first, first + size)
        found: dict[str, Drawn] = {}
        for name, each in tokens.items():
            shared = plan.audio is not None and plan.audio.sigma == "shared" and tokens.video is not None
            whose, count = ("video", tokens.video.shape[1]) if shared else (name, each.shape[1])
            sigma = [sigma_at(plan.flow, count, plan.seed, step, row, whose) for row in rows]
            noise = [noise_for(each.shape[1:], plan.seed, step, row, name) for row in rows]
            found[name] = Drawn(
                torch.stack(noise).to(device), torch.tensor(sigma, dtype=torch.float64).float().to(device)
            )
        return Streams(**found)

    return draw


def tokens_of(batch: Batch, device: torch.device) -> Streams[Tensor]:
    """Clean latents as tokens, [B, T, C] and [B, L, C], on the device."""
    video, audio = batch.latents.video, batch.latents.audio
    return Streams(
        None if video is None else video.to(device).flatten(2).transpose(1, 2).contiguous(),
        None if audio is None else audio.to(device),
    )


@dataclass(frozen=True)
class Noised:
    """One modality of a micro-batch: the model's input and target. `timesteps` [B, T], `clean` [B, T]."""

    tokens: Tensor
    timesteps: Tensor
    velocity: Tensor
    clean: Tensor

    def loss(self, predicted: Tensor) -> Tensor:
        """The mean over the batch of each sample's mean squared error where it is not conditioned."""
        kept = (~self.clean).float()
        error = (predicted.float() - self.velocity).square().mean(dim=-1)
        return ((error * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean()


def noised(latents: Tensor, drawn: Drawn, clean: Tensor) -> Noised:
    """x = (1 − σ)·x0 + σ·ε with σ = 0 on conditioned tokens; the target is ε − x0."""
    level = drawn.sigma[:, None].expand(clean.shape).masked_fill(clean, 0.0)
    x = (1 - level[..., None]) * latents + level[..., None] * drawn.noise
    return Noised(x, level * 1000, drawn.noise - latents, clean)


class Forward(Protocol):
    """diffusers' own forward of a family, called as its trainers call it."""

    def __call__(
        self, transformer: Any, spec: ModelSpec, batch: Batch, inputs: Streams[Noised], dtype: torch.dtype
    ) -> Streams[Tensor]: ...


def ltx_video_forward(
    transformer: LTXVideoTransformer3DModel, spec: ModelSpec, batch: Batch, inputs: Streams[Noised], dtype: torch.dtype
) -> Streams[Tensor]:
    """LTX-Video's velocity, [B, T, C]."""
    video, shape = inputs.video, batch.shape
    assert video is not None and inputs.audio is None
    device = video.tokens.device
    embeds, mask = padded([prompt.tensors["embeds"] for prompt in batch.prompts], spec.default_prompt_tokens)
    place: dict[str, Any] = {"rope_interpolation_scale": (8 / batch.fps, 32, 32)}
    if spec.rope == "causal":
        size = (len(batch.prompts), shape.frames, shape.height, shape.width)
        coordinates = LTXConditionPipeline._prepare_video_ids(*size, device=device)
        coordinates = LTXConditionPipeline._scale_video_ids(coordinates, 32, 8, 0).float()
        coordinates[:, 0] = coordinates[:, 0] * (1.0 / batch.fps)
        place = {"video_coords": coordinates}
    predicted = transformer(
        hidden_states=video.tokens.to(dtype),
        encoder_hidden_states=embeds.to(device, dtype),
        encoder_attention_mask=mask.to(device),
        timestep=video.timesteps,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        return_dict=False,
        **place,
    )[0]
    return Streams(predicted)


def ltx2_forward(
    transformer: LTX2VideoTransformer3DModel, _spec: ModelSpec, batch: Batch, inputs: Streams[Noised],
    dtype: torch.dtype,
) -> Streams[Tensor]:  # fmt: skip
    """LTX-2's velocities of video and sound; one alone is isolated from a stand-in for the other."""
    shape, wanted = batch.shape, dict(inputs.items())
    alone, (name, one) = len(wanted) == 1, next(iter(wanted.items()))
    device = one.tokens.device
    prompts = {key: torch.stack([each.tensors[key] for each in batch.prompts]) for key in batch.prompts[0].tensors}
    if alone:
        (other,) = set(MODALITIES) - {name}
        inputs = Streams(**{name: one, other: stand_in(transformer, other, batch, device)})
        prompts[other] = torch.zeros(len(batch.prompts), 1, prompt_width(transformer, other))
    video, audio = inputs.video, inputs.audio
    assert video is not None and audio is not None
    prompts = {key: value.to(device, dtype) for key, value in prompts.items()}
    predicted = transformer(
        hidden_states=video.tokens.to(dtype),
        audio_hidden_states=audio.tokens.to(dtype),
        encoder_hidden_states=prompts["video"],
        audio_encoder_hidden_states=prompts["audio"],
        timestep=video.timesteps,
        audio_timestep=audio.timesteps,
        sigma=video.timesteps.amax(dim=1),
        audio_sigma=audio.timesteps.amax(dim=1),
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        fps=batch.fps,
        audio_num_frames=audio.tokens.shape[1],
        isolate_modalities=alone,
        return_dict=False,
    )
    return Streams(**{key: value for key, value in zip(MODALITIES, predicted, strict=True) if key in wanted})


def stand_in(transformer: LTX2VideoTransformer3DModel, name: str, batch: Batch, device: torch.device) -> Noised:
    """What stands in the place of a modality that takes no part: diffusers computes it all the same."""
    config, size = transformer.config, len(batch.prompts)
    channels = {"video": config.in_channels, "audio": config.audio_in_channels}[name]
    tokens = torch.zeros(size, {"video": batch.shape.tokens, "audio": 1}[name], channels, device=device)
    timesteps = torch.zeros(tokens.shape[:2], device=device)
    return Noised(tokens, timesteps, tokens, timesteps.bool())


def prompt_width(transformer: LTX2VideoTransformer3DModel, name: str) -> int:
    """E of a modality's prompts, before any projection."""
    config = transformer.config
    if config.use_prompt_embeddings:
        return config.caption_channels
    return {"video": config.cross_attention_dim, "audio": config.audio_cross_attention_dim}[name]


FORWARDS: dict[type[nn.Module], Forward] = {
    LTXVideoTransformer3DModel: ltx_video_forward,
    LTX2VideoTransformer3DModel: ltx2_forward,
}


def padded(prompts: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Prompts [P, E] as [B, tokens, E], and what is real of them, [B, tokens]."""
    embeds = prompts[0].new_zeros(len(prompts), tokens, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), tokens)
    for row, prompt in enumerate(prompts):
        embeds[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    return embeds, mask


class StockStep:
    """A training step over diffusers' transformer with PEFT's LoRA.

    Attributes:
        transformer: over the weights it was given, frozen.
        adapter: A and B by the names that ours have, `<module>.lora_A.weight`.
    """

    def __init__(
        self, transformer: nn.Module, spec: ModelSpec, layers: Iterable[str], plan: Plan, device: torch.device
    ) -> None:
        """`transformer` from `stock_transformer`; `layers` are the linears that take the adapter."""
        self.transformer: Any = transformer
        self.spec, self.plan, self.device = spec, plan, device
        self.dtype = next(transformer.parameters()).dtype
        config = LoraConfig(r=plan.lora.rank, lora_alpha=plan.lora.alpha, target_modules=list(layers))  # type: ignore[arg-type]
        self.transformer.add_adapter(config)
        self.transformer.train()
        self.transformer.enable_gradient_checkpointing()
        self._forward = FORWARDS[type(transformer)]
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """By name; looked up anew, since `take` may change dtypes."""
        named = self.transformer.named_parameters()
        return {name.replace(".default", ""): p for name, p in named if ".lora_" in name}

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Set A and B, in the values' own dtype."""
        own = self.adapter
        assert own.keys() == values.keys(), "peer and ours adapt the same layers"
        for name, parameter in own.items():
            parameter.data = values[name].detach().clone()

    def losses(self, batch: Batch, drawn: Streams[Drawn]) -> Streams[Tensor]:
        """Each modality's loss of a micro-batch."""
        clean = {"video": batch.clean.to(self.device)}
        inputs = {}
        for name, latents in tokens_of(batch, self.device).items():
            each = drawn[name]
            assert each is not None
            whole = torch.zeros(latents.shape[:2], dtype=torch.bool, device=self.device)
            inputs[name] = noised(latents, each, clean.get(name, whole))
        predicted = self._forward(self.transformer, self.spec, batch, Streams(**inputs), self.dtype)
        return Streams(**{name: inputs[name].loss(each) for name, each in predicted.items()})

    def accumulate(self, batches: Sequence[Batch], draw: Draw, step: int) -> Streams[float]:
        """Forward and backward over a step's micro-batches of equal size; the step's losses."""
        found: dict[str, list[Tensor]] = {}
        for batch in batches:
            losses = self.losses(batch, draw(batch, step))
            parts = [each / len(batches) for _, each in losses.items()]
            sum(parts[1:], parts[0]).backward()
            for name, each in losses.items():
                found.setdefault(name, []).append(each.detach())
        return Streams(**{name: float(torch.stack(each).mean()) for name, each in found.items()})

    def update(self) -> None:
        """Clip as the plan says, and one step of AdamW."""
        if self._optimizer is None:
            self._optimizer = adamw(self.plan.optimizer, self.adapter.values())
        nn.utils.clip_grad_norm_(self.adapter.values(), self.plan.training.clip_norm or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def run(self, batches: Sequence[Batch], draw: Draw, steps: Iterable[int]) -> tuple[list[float], list[float]]:
        """Train these steps: the seconds of each, between two synchronisations with the device, and its main loss."""
        seconds, losses = [], []
        for step in steps:
            synchronize(self.device)
            began = time.perf_counter()
            found = self.accumulate(batches, draw, step)
            self.update()
            synchronize(self.device)
            seconds.append(time.perf_counter() - began)
            losses.append(found.items()[0][1])
        return seconds, losses

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, as diffusers offers it; options are `torch.compile`'s."""
        self.transformer.compile_repeated_blocks(**options)


@torch.no_grad()
def bitsandbytes_nf4(transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A transformer of the meta device with random values, the linear layers of its blocks as bitsandbytes'
    `Linear4bit` with double quantisation: one after the other, so that no more is held than in the end.
    """
    for name, value in drawn(transformer, device, dtype):
        path, _, leaf = name.rpartition(".")
        layer = transformer.get_submodule(path)
        if leaf == "weight" and isinstance(layer, nn.Linear) and name.startswith(BLOCKS):
            parent, _, own = path.rpartition(".")
            setattr(transformer.get_submodule(parent), own, _linear_4bit(layer, value))
        else:
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    return transformer


def _linear_4bit(layer: nn.Linear, weight: Tensor) -> nn.Module:
    """With the layer's bias, which comes later."""
    nn4 = importlib.import_module("bitsandbytes.nn")
    made = nn4.Linear4bit(layer.in_features, layer.out_features, False, weight.dtype, quant_type="nf4", device="meta")
    packed = nn4.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    made.weight = packed.to(weight.device)  # which is where it is quantised
    made.bias = layer.bias
    return made


def adamw(plan: OptimizerPlan, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """torch's, with its own choice of how to update many tensors."""
    return torch.optim.AdamW(
        list(parameters), lr=plan.learning_rate, betas=tuple(plan.betas), eps=plan.epsilon,
        weight_decay=plan.weight_decay,
    )  # fmt: skip


def stock_transformer(
    spec: ModelSpec, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """diffusers' transformer over given weights, frozen. Copied is only what is elsewhere, of another dtype or not
    contiguous.

    Args:
        weights: `base_weights` of ours.
    """
    transformer = empty_transformer(spec)
    held = {name: value.detach().to(device, dtype).contiguous() for name, value in weights.items()}
    transformer.load_state_dict(held, strict=True, assign=True)
    return transformer.requires_grad_(False)


def base_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The frozen weights under a transformer's adapter, by the names that they have without it."""
    named = transformer.named_parameters()
    return {name.replace(".base_layer.", "."): value.detach() for name, value in named if ".lora_" not in name}
