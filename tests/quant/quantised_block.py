"""A tiny model of one block over a quantised base, with a LoRA on each of its linear layers that is not zero."""

from __future__ import annotations

import dataclasses

import torch
from one_block import make_batch, spec_of
from torch import Tensor, nn

from ltxforge import trainer
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import Plan
from ltxforge.quant.keep import Keep

CPU, STEP = torch.device("cpu"), 3
BASES = ("tiny/ltx-video", "tiny/ltx2.3")
# What a recipe can ask for, and whether NF4's scales are quantised too.
KEPT = (("nf4", False), ("nf4", True), ("int8", False), ("int8-w8a8", False), ("fp8", False))


def bare_model(base: str, format: str, double: bool, dtype: torch.dtype = torch.float32) -> VideoModel:
    """Without an adapter."""
    spec = spec_of(base)
    if spec.has_audio:
        model: VideoModel = LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, dtype, modalities="both")
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, dtype)
    model.keep = Keep(CPU, dtype, base_precision=format, double_quant=double)
    model.load_transformer()
    return model


def adapted_model(
    base: str, plan: Plan, format: str, double: bool = False, dtype: torch.dtype = torch.float32
) -> VideoModel:
    model = bare_model(base, format, double, dtype)
    add_lora(model.transformer, base, plan)
    return model


def add_lora(transformer: nn.Module, base: str, plan: Plan) -> None:
    """On every linear layer of the blocks, quantised or not."""
    modalities = plan.training.modalities
    matched = match(("all",), spec_of(base), modalities, modalities)
    inject(transformer, dataclasses.replace(plan.lora, targets=("all",)), matched, plan.seed, device=CPU)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    transformer.train()


def step(model: VideoModel, base: str, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """The samples' losses, and the adapter's gradient."""
    losses = torch.cat([each.by_sample for _, each in trainer.forward(plan, model, make_batch(base), STEP, 0).items()])
    losses.sum().backward()
    return losses.detach(), {name: each.grad for name, each in adapter_parameters(model.transformer).items()}
