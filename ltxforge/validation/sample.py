"""Validation samples, made by diffusers' own pipelines from the model as it is being trained.

Decides which prompts are sampled and what becomes of a stop or a fault, and writes each sample as an mp4, with its
sound if it has one, and a contact sheet. Training must not notice: modes, torch's random state and gradients are as
they were. Knows no model family: how a planned prompt becomes a pipeline call is the model's part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image

from ltxforge.durable import inside, make_folder
from ltxforge.errors import LtxforgeError
from ltxforge.events import Emit, Note, PhaseAdvanced, PhaseEnded, PhaseStarted, SampleReady
from ltxforge.media.decode import read_image
from ltxforge.media.write import write_video
from ltxforge.models.interface import PromptEmbeddings, Sample, VideoModel
from ltxforge.plan import Plan, PromptPlan
from ltxforge.signals import StopRequest
from ltxforge.validation.contact_sheet import SheetText, write_contact_sheet

PHASE = "validate"
Prompts = Mapping[str, PromptEmbeddings]
OnStep = Callable[[int], None]


class _Interrupted(Exception):
    """A stop was asked for between two denoising steps."""


def validate(
    plan: Plan, model: VideoModel, prompts: Prompts, step: int, directory: Path, emit: Emit, stop: StopRequest
) -> list[SampleReady]:
    """Sample every prompt of the plan and write `directory/step-000100/<name>.mp4` and `.png`.

    Args:
        prompts: the embeddings of each text, negative prompts included where guidance uses them.
        step: the last finished update; 0 before training.
        stop: read between denoising steps; samples that were finished by then are kept, the rest left out.

    A sample that cannot be made (memory, an image that has gone, numbers that are not finite, a fault of the pipeline)
    is passed over with a warning: the run goes on.
    """
    planned = plan.validation.prompts
    began, done, ready = time.perf_counter(), 0, []
    emit(PhaseStarted(PHASE, sum(prompt.steps for prompt in planned), f"after step {step}"))
    folder = inside(directory, f"step-{step:06}")
    for prompt in planned:
        if stop.requested:
            break

        def advance(finished: int, before: int = done, prompt: PromptPlan = prompt) -> None:
            decoding = ", decoding" if finished == prompt.steps else ""  # which takes a while, and tells nothing
            emit(PhaseAdvanced(PHASE, before + finished, prompt.name + decoding))

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
    text = SheetText(prompt.name, prompt.prompt, _facts(prompt, step))
    write_video(video, made.frames, prompt.fps, audio=made.sound, sample_rate=made.sound_rate)
    write_contact_sheet(sheet, made.frames, prompt.fps, text, made.sound)
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

    def after_step(finished: int) -> None:
        on_step(finished)
        if stop is not None and stop.requested:
            raise _Interrupted

    with training_untouched(model):
        return model.sample(prompt, prompts, prompt_tokens, image, after_step)


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
        _guidance(prompt),
        f"seed {prompt.seed}",
    )
    return "    ".join(parts)


def _guidance(prompt: PromptPlan) -> str:
    """The kinds of guidance that are on."""
    parts = [f"guidance {prompt.guidance:g}"]
    if prompt.audio_guidance is not None:
        parts.append(f"sound {prompt.audio_guidance:g}")
    if prompt.stg:
        parts.append(f"STG {prompt.stg:g}")
    if prompt.modality_guidance > 1:
        parts.append(f"modality {prompt.modality_guidance:g}")
    return ", ".join(parts)
