"""LTX-Video's samples by diffusers' own pipelines over the transformer that is being trained.

Decides which pipeline a rope convention means and how a planned prompt becomes its call, so that a sample equals the
stock pipeline's bit for bit. Loads and frees nothing, and writes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from PIL import Image
from torch import Tensor

from ltxforge.modalities import Streams
from ltxforge.models.interface import PromptBatch, Sample
from ltxforge.models.sampling import pictures, plain_arguments, require_finite
from ltxforge.plan import PromptPlan
from ltxforge.specs import SamplingDefaults

Pipeline = LTXPipeline | LTXImageToVideoPipeline | LTXConditionPipeline


def make_pipeline(
    rope: str,
    with_image: bool,
    transformer: LTXVideoTransformer3DModel,
    vae: AutoencoderKLLTXVideo,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> Pipeline:
    """The pipeline of the rope convention; prompts go in as embeddings, there is no text encoder.

    The VAE has the transformer's dtype, in which these pipelines hand latents over.
    """
    plain = LTXImageToVideoPipeline if with_image else LTXPipeline
    kind = LTXConditionPipeline if rope == "causal" else plain
    if kind is LTXConditionPipeline and scheduler.config.use_dynamic_shifting:
        # It brings a schedule of its own, which a shift by token count would need more than it gives.
        scheduler = scheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift_terminal=None)
    made = kind(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    made.set_progress_bar_config(disable=True)
    return made


def sample(
    pipeline: Pipeline,
    sampling: SamplingDefaults,
    prompt: PromptPlan,
    embeds: PromptBatch,
    negative: PromptBatch | None,
    image: Image.Image | None,
    on_step: Callable[[int], None],
) -> Sample:
    """One sample; see `VideoModel.sample`. Seeds torch's default generators, from which 0.9.1's decoder draws."""
    call = call_arguments(pipeline, sampling, prompt, embeds, negative)
    if image is not None:
        call["image"] = image
    latents: list[Tensor] = []

    def after_step(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents[:] = [tensors["latents"]]
        on_step(index + 1)
        return {}

    torch.manual_seed(prompt.seed)
    with quiet_diffusers():
        video = pipeline(**call, callback_on_step_end=after_step).frames[0]
    require_finite("latents", latents[0])
    return Sample(Streams(latents[0][0].cpu()), pictures(video))


def call_arguments(
    pipeline: Pipeline,
    sampling: SamplingDefaults,
    prompt: PromptPlan,
    embeds: PromptBatch,
    negative: PromptBatch | None,
) -> dict[str, Any]:
    """The pipeline call of a planned prompt, its image excepted.

    The noise comes from a CPU generator, the same for every device; LTXImageToVideoPipeline alone takes only one that
    lives on its own device.
    """
    own_device = isinstance(pipeline, LTXImageToVideoPipeline)
    device = pipeline.transformer.device if own_device else torch.device("cpu")
    call: dict[str, Any] = {
        **plain_arguments(prompt),
        "decode_timestep": sampling.decode_timestep,
        "decode_noise_scale": sampling.decode_noise_scale,
        "generator": torch.Generator(device).manual_seed(prompt.seed),
        "output_type": "np",
        "prompt_embeds": embeds.embeds.video,
        "prompt_attention_mask": embeds.mask,
    }
    if negative is not None:
        call["negative_prompt_embeds"], call["negative_prompt_attention_mask"] = negative.embeds.video, negative.mask
    if sampling.timesteps and prompt.steps == sampling.steps:
        if isinstance(pipeline, LTXConditionPipeline):
            call["timesteps"] = list(sampling.timesteps)
        else:  # these pipelines name the argument but always pass sigmas of their own beside it, which is refused
            pipeline.scheduler = FixedTimesteps.of(pipeline.scheduler, sampling.timesteps)
    return call


class FixedTimesteps(FlowMatchEulerDiscreteScheduler):
    """The pipeline's Euler scheduler on a given list of timesteps (of 1000), whatever it is asked for."""

    fixed: tuple[float, ...] = ()

    @classmethod
    def of(cls, scheduler: FlowMatchEulerDiscreteScheduler, timesteps: tuple[float, ...]) -> FixedTimesteps:
        """A copy of `scheduler` that neither shifts nor stretches the list."""
        made = cls.from_config(scheduler.config, use_dynamic_shifting=False, shift_terminal=None, shift=1.0)
        made.fixed = timesteps
        return made

    def set_timesteps(self, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:  # noqa: ARG002
        """Set the list. `sigmas` and `mu` are the pipeline's own wishes and are passed over."""
        super().set_timesteps(timesteps=list(self.fixed), device=device)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warnings: LTXConditionPipeline's own way of giving its timesteps draws one at every call."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
