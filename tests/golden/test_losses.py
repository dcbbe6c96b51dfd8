"""Losses of a hundred steps, to the last bit: what no refactor may change without saying so.

The real loop, batches, adapter and optimiser over a tiny model, on the CPU and one thread; latents, sound and prompts
are made up, so that torch alone decides. NAME.json holds the losses as hexadecimal floats and where they were made.
There they are compared bit for bit, elsewhere to 1e-5. After an intended change run `LTXFORGE_REWRITE_GOLDEN=1 pytest
tests/golden` and say in the commit why the numbers moved.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from torch import Tensor

from ltxforge import trainer
from ltxforge.dataset.batches import Batches
from ltxforge.dataset.cache import Cache
from ltxforge.dataset.cached import CachedData, CachedSample
from ltxforge.events import Event, StepDone
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.optim import Optimizer
from ltxforge.plan import (
    AudioPlan,
    CachePlan,
    ConditioningPlan,
    FlowPlan,
    LoraPlan,
    OptimizerPlan,
    Plan,
    SamplePlan,
    TrainingPlan,
)
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY

HERE = Path(__file__).parent
STEPS, AGAIN, PROMPT = 100, 10, 32
SILENT = (1, 4, 5)  # positions of the samples without sound: one of the first shape, all of the second
ELSEWHERE = 1e-5
Losses = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Setting:
    """What differs between the golden runs."""

    base: str
    batch_size: int
    accumulate: int
    sigma: str = "independent"


GOLDEN = {
    "ltx_video": Setting("tiny/ltx-video", 2, 2),
    "ltx2": Setting("tiny/ltx2", 2, 2),
    "ltx2_3": Setting("tiny/ltx2.3", 3, 1, "shared"),
}


def golden_plan(make, setting: Setting, folder: Path) -> Plan:
    """All that has draws of its own is on: conditioning, dropped captions, posteriors, the adapter's dropout."""
    modalities = "both" if TINY[setting.base].has_audio else "video"
    return dataclasses.replace(
        make(folder, setting.base),
        steps=STEPS,
        seed=42,
        cache=CachePlan(str(folder / "cache"), "sample"),
        flow=FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=ConditioningPlan(0.5, 0.25, PROMPT),
        lora=LoraPlan(4, 4.0, 0.05, False, ("attention", "feed_forward"), "fp32", modalities),
        optimizer=OptimizerPlan("adamw", 1e-2, (0.9, 0.999), 1e-8, 0.01, "cosine", 10, STEPS, 0.1, 1.0),
        training=TrainingPlan(setting.batch_size, setting.accumulate, 1.0, None, modalities),
        audio=AudioPlan(setting.sigma, 0.7) if modalities == "both" else None,
    )


def make_model(base: str, plan: Plan) -> VideoModel:
    spec, device = TINY[base], torch.device("cpu")
    if spec.has_audio:
        model: VideoModel = LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), device, torch.float32)
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), device, torch.float32)
    model.load_transformer()
    chosen = match(plan.lora.targets, spec, plan.lora.modalities, plan.training.modalities)
    inject(model.transformer, plan.lora, chosen, plan.seed)
    model.transformer.train()
    return model


def make_data(base: str, plan: Plan, model: VideoModel, cache: Cache) -> CachedData:
    """Cache entries of seeded numbers for the plan's samples and the empty prompt."""
    config = TINY[base].transformer_config
    draw = torch.Generator().manual_seed(7)

    def entry(kind: str, name: str, tensors: dict[str, Tensor]) -> tuple[dict[str, str], str]:
        return {kind: name}, cache.write(kind, {kind: name}, tensors).digest

    def posterior(*size: int) -> dict[str, Tensor]:
        mean = torch.randn(size, generator=draw)
        return {"mean": mean, "std": torch.full_like(mean, 0.1)}

    def prompt(tokens: int) -> dict[str, Tensor]:
        if not TINY[base].has_audio:
            return {"embeds": torch.randn(tokens, config["caption_channels"], generator=draw)}
        projected = config["use_prompt_embeddings"]  # 2.0's transformer projects both, the later ones' connectors do
        widths = {"video": config["cross_attention_dim"], "audio": config["audio_cross_attention_dim"]}
        return {
            name: torch.randn(PROMPT, config["caption_channels"] if projected else width, generator=draw)
            for name, width in widths.items()
        }

    def cached(number: int, sample: SamplePlan) -> CachedSample:
        shape, name = sample.shape.latent(), str(number)
        latents = entry("latents", name, posterior(config["in_channels"], shape.frames, shape.height, shape.width))
        words = entry("prompts", name, {**prompt(5 + number), "tokens": torch.tensor(5 + number)})
        if not TINY[base].has_audio or number in SILENT:
            return CachedSample(sample, *latents, *words)
        length = model.sound_length(sample.shape.frames / sample.fps)
        return CachedSample(
            sample, *latents, *words, *entry("audio", name, posterior(length, config["audio_in_channels"]))
        )

    samples = tuple(cached(number, sample) for number, sample in enumerate(plan.data.samples))
    return CachedData(samples, *entry("prompts", "empty", {**prompt(1), "tokens": torch.tensor(1)}))


def run(base: str, plan: Plan) -> Losses:
    """The video's and the sound's loss in each of the plan's steps, by the real loop."""
    model, cache = make_model(base, plan), Cache(Path(plan.cache.directory), lambda _event: None)
    data = Batches(plan, make_data(base, plan, model, cache), cache)
    optimizer = Optimizer(plan.optimizer, adapter_parameters(model.transformer))
    found: list[StepDone] = []

    def keep(event: Event) -> None:
        assert isinstance(event, StepDone), event
        found.append(event)

    finished = trainer.train(plan, model, data, optimizer, 0, keep, StopRequest(), lambda _step: None)
    assert finished == plan.steps == len(found)
    return [(each.loss, each.audio_loss) for each in found]


def environment() -> dict[str, str | int]:
    """All that the last bits depend on beside the code."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's model: the matrix libraries choose their code by it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = [facts[key] for key in ("model name", "cpu family", "model") if key in facts]
    return " / ".join(named or [platform.machine(), platform.processor()])


def write(path: Path, losses: Losses) -> None:
    steps = [[loss.hex(), None if audio is None else audio.hex()] for loss, audio in losses]
    listed = ",\n".join(f"    {json.dumps(step)}" for step in steps)
    made_at = json.dumps(environment(), indent=2).replace("\n", "\n  ")
    path.write_text(f'{{\n  "environment": {made_at},\n  "losses": [\n{listed}\n  ]\n}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, str | int], Losses]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    losses = [
        (float.fromhex(loss), None if audio is None else float.fromhex(audio)) for loss, audio in stored["losses"]
    ]
    return stored["environment"], losses


def agree(found: Losses, expected: Losses, exactly: bool) -> bool:
    """Whether all losses are equal, or within 1e-5 of each other."""
    if exactly:
        return found == expected
    return all(
        (ours is None) == (theirs is None) and (ours is None or math.isclose(ours, theirs, rel_tol=ELSEWHERE))
        for mine, other in zip(found, expected, strict=True)
        for ours, theirs in zip(mine, other, strict=True)
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_hundred_losses_are_the_golden_ones(name, plan_in, tmp_path, one_thread, record_property):
    base, path = GOLDEN[name].base, HERE / f"{name}.json"
    plan = golden_plan(plan_in, GOLDEN[name], tmp_path)
    losses = run(base, plan)
    assert run(base, dataclasses.replace(plan, steps=AGAIN)) == losses[:AGAIN], "two runs in one process differ"
    if os.environ.get("LTXFORGE_REWRITE_GOLDEN"):
        write(path, losses)
    made_at, expected = read(path)
    exactly = made_at == environment()
    record_property("count", f"golden losses of {base}: compared {'bit for bit' if exactly else f'to {ELSEWHERE}'}")
    assert agree(losses, expected, exactly), next(
        f"step {step}: {ours} instead of {theirs}"
        for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True), start=1)
        if not agree([ours], [theirs], exactly)
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_runs_train_what_they_should(name):
    """Ordinary losses, and with sound, steps that have some and steps that have none."""
    _, losses = read(HERE / f"{name}.json")
    assert (
        len(losses) == STEPS
        and all(0.1 < loss < 10 for loss, _ in losses)
        and len({loss for loss, _ in losses}) == STEPS
    )
    sounding = sum(audio is not None for _, audio in losses)
    assert 0 < sounding < STEPS if TINY[GOLDEN[name].base].has_audio else sounding == 0


def test_one_last_bit_is_noticed_and_elsewhere_a_hundred_thousandth():
    losses: Losses = [(1.25, None), (0.75, 2.0)]
    assert agree(losses, list(losses), True)
    assert not agree(losses, [(1.25, None), (math.nextafter(0.75, 1), 2.0)], True)
    assert agree(losses, [(1.25, None), (0.75 * (1 + 9e-6), 2.0)], False)
    assert not agree(losses, [(1.25, None), (0.75, 2.0 * (1 + 2e-5))], False)
    assert not agree(losses, [(1.25, 1.0), (0.75, 2.0)], False)
