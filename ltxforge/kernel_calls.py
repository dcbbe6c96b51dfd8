"""Which op a training step calls on which tensors, and how often: one forward over shapes alone, nothing computed.

Asks the models' own forwards, by standing where they ask for their implementations; so it cannot differ from them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from ltxforge_kernels.choice import Implementation, Kernels

from ltxforge.events import ignore
from ltxforge.modalities import Streams, has
from ltxforge.models.interface import Noisy, NoisyTokens, VideoModel
from ltxforge.models.random_weights import random_model, random_prompt
from ltxforge.plan import BucketPlan, MemoryPlan, Plan
from ltxforge.session import adapt
from ltxforge.specs import ModelSpec
from ltxforge.ui.kernels_table import Calls

META = torch.device("meta")


class Recorder(Kernels):
    """Stands in for a run's choices: notes what is asked, and answers eager, which meta tensors can do."""

    asked: Counter[tuple[str, int, int]]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "asked", Counter())

    def of(self, op: str, tokens: int | None = None, width: int | None = None) -> Implementation:
        if tokens is not None:  # about one tensor, and not how weights or tables are stored
            self.asked[op, tokens, width or 0] += 1
        return "eager"


def calls_of(plan: Plan, spec: ModelSpec, bucket: BucketPlan) -> list[Calls]:
    """What one micro-batch of this bucket calls in its forward; each call has its backward too.

    Noising and loss are not among them: they are called once for each modality.
    """
    recorder = Recorder()
    model = random_model(spec, META, torch.bfloat16, plan.training.modalities)
    adapt(_resident(plan, recorder), model, ignore)
    _predict(model, plan, spec, bucket)
    return [
        Calls(op, plan.kernels.of(op, tokens, width), tokens, width, count)
        for (op, tokens, width), count in sorted(recorder.asked.items())
    ]


def _resident(plan: Plan, recorder: Recorder) -> Plan:
    """The plan with everything in its place: where weights wait, and what is computed again, changes no call."""
    base = MemoryPlan(base_precision=plan.memory.base_precision, double_quant=plan.memory.double_quant)
    return dataclasses.replace(
        plan, kernels=recorder, memory=base, training=dataclasses.replace(plan.training, compile=False)
    )


@torch.no_grad()
def _predict(model: VideoModel, plan: Plan, spec: ModelSpec, bucket: BucketPlan) -> None:
    size, modalities = plan.training.batch_size, plan.training.modalities
    level = torch.zeros(size)

    def tokens(count: int, channels: int) -> NoisyTokens:
        return NoisyTokens(torch.empty(size, count, channels, device=META), level[:, None], level)

    noisy = Streams(
        tokens(bucket.tokens, spec.latent_channels) if has(modalities, "video") else None,
        tokens(bucket.audio_tokens, spec.transformer_config["audio_in_channels"]) if has(modalities, "audio") else None,
    )
    prompt = random_prompt(spec, plan.conditioning.prompt_tokens, modalities, torch.bfloat16)
    prompts: Sequence = [prompt] * size
    shape = bucket.shape.latent(spec.spatial_factor, spec.temporal_factor)
    model.predict(Noisy(noisy, shape, bucket.fps), model.batch_prompts(prompts, plan.conditioning.prompt_tokens))
