"""Validation samples, made by diffusers' own pipelines from the model as it is being trained.

Decides how a planned prompt becomes a pipeline call, and writes each sample as an mp4 and a contact sheet. Training
must not notice: modes, torch's random state and gradients are as they were. Knows no model family; the pipeline comes
from the model, its sampling numbers from the version's spec.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline, LTXImageToVideoPipeline
from PIL import Image
from torch import Tensor

from ltxforge.durable import inside, make_folder
from ltxforge.errors import LtxforgeError
from ltxforge.events import Emit, Note, PhaseAdvanced, PhaseEnded, PhaseStarted, SampleReady
from ltxforge.media.decode import read_image
from ltxforge.media.write import write_video
from ltxforge.models.interface import PromptEmbeddings, VideoModel
from ltxforge.plan import Plan, PromptPlan
from ltxforge.signals import StopRequest
from ltxforge.validation.contact_sheet import SheetText, write_contact_sheet

PHASE = "validate"
Prompts = Mapping[str, PromptEmbeddings]
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One sampled video: `latents` [T, C] after the last denoising step, `frames` uint8 [N, height, width, 3]."""

    latents: Tensor
    frames: np.ndarray


class _Interrupted(Exception):
    """A stop was asked for between two denoising steps."""


def validate(
    plan: Plan, model: VideoModel, prompts: Prompts, step: int, directory: Path, emit: Emit, stop: StopRequest
) -> list[SampleReady]:
    """Sample every prompt of the plan and write `directory/step-000100/<name>.mp4` and `.png`.

    Args:
        prompts: the embedding of each text, negative prompts included where guidance is above 1.
        step: the last finished update; 0 before training.
        stop: read between denoising steps; samples that were finished by then are kept, the rest left out.

    A sample that cannot be made (memory, an image that has gone, a fault of the pipeline) is passed over with a
    warning: the run goes on.
    """
    planned = plan.validation.prompts
    began, done, ready = time.perf_counter(), 0, []
    emit(PhaseStarted(PHASE, sum(prompt.steps for prompt in planned), f"after step {step}"))
    folder = inside(directory, f"step-{step:06}")
    for prompt in planned:
        if stop.requested:
            break

        def advance(finished: int, before: int = done, name: str = prompt.name) -> None:
            emit(PhaseAdvanced(PHASE, before + finished, name))

        try:
            ready.append(_sample_to_files(plan, model, prompt, prompts, step, folder, advance, stop))
            emit(ready[-1])
        except _Interrupted:
            break
        except LtxforgeError:
            raise
        except Exception as error:  # whatever a pipeline raises, a sample is not worth a run of hours
            reason = f"{type(error).__name__}: {error}"
            emit(Note(f"no sample {prompt.name} after step {step}, training goes on ({reason})", "warning"))
        done += prompt.steps
    emit(PhaseEnded(PHASE, time.perf_counter() - began, "stopped" if stop.requested else ""))
    return ready


def _sample_to_files(
    plan: Plan, model: VideoModel, prompt: PromptPlan, prompts: Prompts, step: int, folder: Path, on_step: OnStep,
    stop: StopRequest,
) -> SampleReady:  # fmt: skip
    began = time.perf_counter()
    made = sample(model, prompt, prompts, plan.conditioning.prompt_tokens, on_step, stop)
    video, sheet = folder / f"{prompt.name}.mp4", folder / f"{prompt.name}.png"
    make_folder(folder)
    write_video(video, made.frames, prompt.fps)
    write_contact_sheet(sheet, made.frames, prompt.fps, SheetText(prompt.name, prompt.prompt, _facts(prompt, step)))
    return SampleReady(step, prompt.name, str(video), str(sheet), time.perf_counter() - began)


def sample(
    model: VideoModel,
    prompt: PromptPlan,
    prompts: Prompts,
    prompt_tokens: int,
    on_step: OnStep = lambda _done: None,
    stop: StopRequest | None = None,
) -> Sample:
    """Make one sample and write nothing: bit for bit what the stock pipeline gives with these parts and this seed."""
    size = prompt.shape.width, prompt.shape.height
    image = Image.fromarray(read_image(Path(prompt.image), size)) if prompt.image else None
    with training_untouched(model), model.vae(), quiet_diffusers():
        pipeline = model.pipeline(with_image=image is not None)
        # Decoders of 0.9.1's kind draw noise inside; so it comes from the sample's seed and not from the training's.
        torch.manual_seed(prompt.seed)
        call = pipeline_arguments(model, pipeline, prompt, prompts, prompt_tokens)
        latents: list[Tensor] = []

        def after_step(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latents[:] = [tensors["latents"]]
            on_step(index + 1)
            if stop is not None and stop.requested:
                raise _Interrupted
            return {}

        if image is not None:
            call["image"] = image
        video = pipeline(**call, callback_on_step_end=after_step).frames[0]
    return Sample(latents[0][0].cpu(), np.rint(video * 255.0).astype(np.uint8))


def pipeline_arguments(
    model: VideoModel, pipeline: Any, prompt: PromptPlan, prompts: Prompts, prompt_tokens: int
) -> dict[str, Any]:
    """The pipeline call of a planned prompt, its image excepted.

    The noise comes from a CPU generator, the same for every device; LTXImageToVideoPipeline alone takes only one that
    lives on its own device.
    """
    sampling = model.spec.sampling
    device = model.device if isinstance(pipeline, LTXImageToVideoPipeline) else torch.device("cpu")
    call: dict[str, Any] = {
        "width": prompt.shape.width,
        "height": prompt.shape.height,
        "num_frames": prompt.shape.frames,
        "frame_rate": prompt.fps,
        "num_inference_steps": prompt.steps,
        "guidance_scale": prompt.guidance,
        "decode_timestep": sampling.decode_timestep,
        "decode_noise_scale": sampling.decode_noise_scale,
        "generator": torch.Generator(device).manual_seed(prompt.seed),
        "output_type": "np",
    }
    texts = {"": prompt.prompt} | ({"negative_": prompt.negative_prompt} if prompt.guidance > 1 else {})
    for prefix, text in texts.items():
        batch = model.batch_prompts([prompts[text]], prompt_tokens)
        call[f"{prefix}prompt_embeds"], call[f"{prefix}prompt_attention_mask"] = batch.embeds.video, batch.mask
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


@contextlib.contextmanager
def training_untouched(model: VideoModel) -> Iterator[None]:
    """Evaluation mode, no gradients and a random state of one's own; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.transformer.modules()]
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind), torch.no_grad():
        model.transformer.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _facts(prompt: PromptPlan, step: int) -> str:
    shape = prompt.shape
    parts = (
        f"step {step}" if step else "step 0, before training",
        f"{shape.width}x{shape.height}",
        f"{shape.frames} frames at {prompt.fps:g} fps",
        f"{prompt.steps} denoising steps",
        f"guidance {prompt.guidance:g}",
        f"seed {prompt.seed}",
    )
    return "    ".join(parts)
