"""LTX-2's whole step against an independent formulation in float64, as `test_step.py` for LTX-Video: diffusers' stock
transformer with PEFT's own LoRA layers and the objective in plain torch, one sample at a time. Loss and every LoRA
gradient of `trainer.accumulate` for each wiring: joint, video alone, audio alone, and samples that have no sound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.flow_matching import noise_for
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.targets import match
from ltxforge.memory.strategy import run_block_of
from ltxforge.modalities import Streams
from ltxforge.models.interface import PromptEmbeddings
from ltxforge.models.ltx2_tiny import tiny_parts, tiny_transformer
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.plan import AudioPlan, ConditioningPlan, MemoryPlan, Plan, TrainingPlan, every_nth
from ltxforge.shapes import LatentShape
from ltxforge.signals import StopRequest
from ltxforge.specs import TINY
from ltxforge.trainer import StepLoss

pytestmark = pytest.mark.usefixtures("stock_in_float64")

CPU = torch.device("cpu")
WIRINGS = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]
SHAPE = LatentShape(3, 2, 3)
FPS, STEP, PROMPT, LENGTH, SAMPLES = 24.0, 5, 6, 17, 3
BOUNDS = ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 1e-5))
EVERY_LINEAR = ("re:.",)
ALL, SOME, NONE = (True, True, True), (True, False, True), (False, False, False)
Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One setting: what is trained, which of the samples are conditioned, and which have sound."""

    modalities: str
    conditioned: bool = False
    sound: tuple[bool, ...] = ALL
    sigma: str = "independent"
    weight: float = 1.0

    def plan(self, maker: Callable[..., Plan], base: str, micros: int = 1) -> Plan:
        plan = maker(base)
        return dataclasses.replace(
            plan,
            conditioning=ConditioningPlan(0.5, 0.0, PROMPT),
            lora=dataclasses.replace(plan.lora, alpha=6.0, modalities=self.modalities),
            training=TrainingPlan(SAMPLES, micros, 1.0, None, self.modalities),
            audio=None if self.modalities == "video" else AudioPlan(self.sigma, self.weight),
        )


CASES = [
    Case("both"),
    Case("both", conditioned=True),
    Case("both", conditioned=True, sound=SOME),
    Case("both", sound=NONE),
    Case("video"),
    Case("video", conditioned=True),
    Case("audio"),
]


def case_name(case: Case) -> str:
    sound = {ALL: "", SOME: "-some-silent", NONE: "-all-silent"}[case.sound]
    return case.modalities + ("-conditioned" if case.conditioned else "") + sound


class OneStep:
    """The same samples in every step, cut into micro-batches of the given sizes; see `trainer.StepData`."""

    def __init__(self, base: str, case: Case, dtype: torch.dtype, cut: Sequence[int] = (SAMPLES,), filler: float = 0.0):
        draw = torch.Generator().manual_seed(1)
        config = TINY[base].transformer_config
        widths = {"video": config["cross_attention_dim"], "audio": config["audio_cross_attention_dim"]}
        if config["use_prompt_embeddings"]:
            widths = dict.fromkeys(widths, config["caption_channels"])
        size = (SAMPLES, config["in_channels"], SHAPE.frames, SHAPE.height, SHAPE.width)
        self.video = torch.randn(size, generator=draw).to(dtype)
        self.sound = torch.randn(SAMPLES, LENGTH, config["audio_in_channels"], generator=draw).to(dtype)
        self.sound[[not has for has in case.sound]] = filler
        self.prompts = [
            {name: torch.randn(PROMPT, width, generator=draw).to(dtype) for name, width in widths.items()}
            for _ in range(SAMPLES)
        ]
        self.clean = torch.zeros(SAMPLES, SHAPE.tokens, dtype=torch.bool)
        if case.conditioned:
            self.clean[1:, : SHAPE.height * SHAPE.width] = True
        self.case, self.cut = case, cut
        assert sum(cut) == SAMPLES

    def load(self, step: int, micro: int) -> Batch:
        first = [0, *accumulate(self.cut)][micro]
        rows = slice(first, first + self.cut[micro])
        trained, have = self.case.modalities, self.case.sound[rows]
        heard = trained != "video" and any(have)
        kept = ("video", "audio") if trained == "both" else (trained,)
        return Batch(
            latents=Streams(self.video[rows] if trained != "audio" else None, self.sound[rows] if heard else None),
            present=torch.tensor(have) if heard else None,
            prompts=[PromptEmbeddings({name: each[name] for name in kept}, 3) for each in self.prompts[rows]],
            clean=self.clean[rows],
            shape=SHAPE,
            fps=FPS,
            samples=(),
            first_index=first,
        )

    def count_at(self, step: int) -> Streams[int]:
        video = SAMPLES if self.case.modalities != "audio" else None
        return Streams(video, sum(self.case.sound) or None if self.case.modalities != "video" else None)

    def epoch_at(self, step: int) -> float:
        return float(step)


def computed(modalities: str, module: str) -> bool:
    """Whether a mode computes a module, by its name in diffusers: every one is video's, audio's or joins both."""
    joins = any(mark in module for mark in ("audio_to_video", "video_to_audio", "av_cross", "a2v", "v2a"))
    if modalities == "both":
        return True
    return not joins and ("audio" in module) == (modalities == "audio")


def all_linears(transformer: nn.Module, modalities: str) -> list[str]:
    """Every linear that a mode computes, in and outside the blocks."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if computed(modalities, name)]


def make_model(base: str, plan: Plan, dtype: torch.dtype) -> LTX2Video:
    """Ours, with a LoRA on every linear that the mode computes, drawn so that none is zero."""
    spec, modalities = TINY[base], plan.training.modalities
    model = LTX2Video(spec, spec.rope, tiny_parts(spec), CPU, dtype, modalities=modalities)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(EVERY_LINEAR, spec, modalities, modalities), plan.seed)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(model.transformer).values():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = (parameter.data + values).to(torch.float64 if dtype == torch.float64 else torch.float32)
    model.transformer.train()
    return model


def gradients_of(model: LTX2Video) -> Gradients:
    return {name: parameter.grad for name, parameter in adapter_parameters(model.transformer).items()}


def ours(plan: Plan, model: LTX2Video, data: OneStep) -> tuple[StepLoss, Gradients]:
    """The trainer's step: losses, and the gradients that it leaves."""
    assert plan.training.accumulate == len(data.cut)
    loss = trainer.accumulate(plan, model, data, STEP, StopRequest())
    assert loss is not None
    return loss, gradients_of(model)


@dataclass(frozen=True)
class Seen:
    """One modality of one sample as the stock transformer sees it, and its target."""

    tokens: Tensor
    timesteps: Tensor
    sample_timesteps: Tensor
    prompts: Tensor
    velocity: Tensor
    kept: Tensor

    def loss(self, prediction: Tensor) -> Tensor:
        return ((prediction[0] - self.velocity)[self.kept] ** 2).mean()


def seen(x0: Tensor, noise: Tensor, sigma: float, prompts: Tensor, clean: Tensor | None = None) -> Seen:
    """One sample, [T, C]: noised but for its clean tokens."""
    level = torch.full((len(x0), 1), sigma, dtype=torch.float64)
    if clean is not None:
        level[clean] = 0.0
    return Seen(
        tokens=((1 - level) * x0 + level * noise)[None],
        timesteps=(level * 1000).float().reshape(1, -1),
        sample_timesteps=torch.tensor([sigma * 1000], dtype=torch.float64).float(),
        prompts=prompts[None],
        velocity=noise - x0,
        kept=torch.ones(len(x0), dtype=torch.bool) if clean is None else ~clean,
    )


def stock(transformer: LTX2VideoTransformer3DModel, video: Seen, audio: Seen, **switches: bool) -> tuple[Tensor, ...]:
    return transformer(
        hidden_states=video.tokens, audio_hidden_states=audio.tokens,
        encoder_hidden_states=video.prompts, audio_encoder_hidden_states=audio.prompts,
        timestep=video.timesteps, audio_timestep=audio.timesteps,
        sigma=video.sample_timesteps, audio_sigma=audio.sample_timesteps,
        num_frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width, fps=FPS, audio_num_frames=LENGTH,
        return_dict=False, **switches,
    )  # fmt: skip


@contextmanager
def official_rule(transformer: LTX2VideoTransformer3DModel, video: Seen, audio: Seen) -> Iterator[None]:
    """Own timesteps put back for scale and shift of audio-video attention, where `use_cross_timestep` hands over the
    other modality's sigma as it does for the gate.
    """

    def give(timesteps: Tensor):
        return lambda _module, _arguments, keywords: ((timesteps.flatten(),), keywords)

    hooks = [
        module.register_forward_pre_hook(give(each.timesteps), with_kwargs=True)
        for module, each in (
            (transformer.av_cross_attn_video_scale_shift, video),
            (transformer.av_cross_attn_audio_scale_shift, audio),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stock_with_peft(base: str, plan: Plan) -> tuple[LTX2VideoTransformer3DModel, dict[str, nn.Parameter]]:
    """The stock transformer in float64 with PEFT's own layers on the same linears and at the same values as ours."""
    transformer = nn.Module.to(tiny_transformer(TINY[base]), torch.float64).requires_grad_(False)
    names = all_linears(transformer, plan.training.modalities)
    transformer.add_adapter(LoraConfig(r=plan.lora.rank, lora_alpha=plan.lora.alpha, target_modules=names))
    start = adapter_parameters(make_model(base, plan, torch.float64).transformer)
    adapter = {n.replace(".default", ""): p for n, p in transformer.named_parameters() if "lora_" in n}
    assert adapter.keys() == start.keys()
    for name, parameter in adapter.items():
        parameter.data = start[name].data.clone()
    return transformer, adapter


def independent(base: str, plan: Plan, case: Case, drawn: StepLoss) -> tuple[dict[str, Tensor], Gradients]:
    """Losses of each modality's samples, and gradients: float64 throughout, and nothing of ltxforge but the draws and
    the adapter's starting values.
    """
    data = OneStep(base, case, torch.float64)
    transformer, adapter = stock_with_peft(base, plan)
    losses: dict[str, list[Tensor]] = {"video": [], "audio": []}
    sigmas = {name: iter(each.sigma) for name, each in drawn.streams.items()}
    other = torch.Generator().manual_seed(99)  # what stands in the place of a modality that takes no part
    for row in range(SAMPLES):
        x0 = {"video": data.video[row].reshape(data.video.shape[1], -1).T, "audio": data.sound[row]}
        clean = {"video": data.clean[row], "audio": None}
        inputs = {}
        for name, latents in x0.items():
            if case.modalities not in (name, "both") or (name == "audio" and not case.sound[row]):
                anything = torch.randn(latents.shape, generator=other, dtype=torch.float64)
                inputs[name] = seen(anything, -anything, 0.7, torch.randn_like(data.prompts[row][name]))
                continue
            noise = noise_for(latents.shape, plan.seed, STEP, row, name).double()
            inputs[name] = seen(latents, noise, next(sigmas[name]), data.prompts[row][name], clean[name])
        if case.modalities == "both" and case.sound[row]:
            with official_rule(transformer, inputs["video"], inputs["audio"]):
                outputs = stock(transformer, inputs["video"], inputs["audio"], use_cross_timestep=True)
        else:
            outputs = stock(transformer, inputs["video"], inputs["audio"], isolate_modalities=True)
        for name, output in zip(("video", "audio"), outputs, strict=True):
            if case.modalities in (name, "both") and (name == "video" or case.sound[row]):
                losses[name].append(inputs[name].loss(output))
    found = {name: torch.stack(each) for name, each in losses.items() if each}
    sum(each.mean() * (case.weight if name == "audio" else 1.0) for name, each in found.items()).backward()
    return {name: each.detach() for name, each in found.items()}, {n: p.grad for n, p in adapter.items()}


def compare_gradients(found: Gradients, expected: Gradients, bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert found[name] is None, f"{name} takes no part but has a gradient"
            continue
        assert found[name] is not None, f"{name} has no gradient"
        assert (found[name].double() - wanted).norm() <= bound * wanted.norm(), name


def check_against_oracle(maker: Callable[..., Plan], base: str, case: Case) -> Gradients:
    """Losses and gradients within the bounds in both precisions; gives the expected gradients."""
    plan = case.plan(maker, base)
    expected: dict[str, Tensor] = {}
    gradients: Gradients = {}
    for dtype, loss_bound, gradient_bound in BOUNDS:
        loss, found = ours(plan, make_model(base, plan, dtype), OneStep(base, case, dtype))
        expected, gradients = (expected, gradients) if expected else independent(base, plan, case, loss)
        assert dict(loss.streams.items()).keys() == expected.keys()
        for name, each in loss.streams.items():
            by_sample, mean = torch.tensor(each.by_sample, dtype=torch.float64), float(expected[name].mean())
            assert (by_sample - expected[name]).norm() <= loss_bound * expected[name].norm(), (name, dtype)
            assert abs(each.value - mean) <= loss_bound * mean, (name, dtype)
        compare_gradients(found, gradients, gradient_bound)
    return gradients


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("base", WIRINGS)
def test_our_step_equals_the_independent_one(base, case, plan_maker):
    gradients = check_against_oracle(plan_maker, base, case)
    trained = {name for name, gradient in gradients.items() if gradient is not None}
    if case.sound == NONE:
        assert trained == {name for name in gradients if computed("video", name)}
    else:
        assert trained == gradients.keys()
    assert all(gradients[name].norm() > 0 for name in trained)


def test_sigma_is_each_modality_s_own_or_shared(plan_maker):
    base = "tiny/ltx2.3"
    drawn = {}
    for kind in ("independent", "shared"):
        case = Case("both", conditioned=True, sound=SOME, sigma=kind)
        plan = case.plan(plan_maker, base)
        loss, _ = ours(plan, make_model(base, plan, torch.float64), OneStep(base, case, torch.float64))
        drawn[kind] = loss.streams
    video = drawn["shared"].video.sigma
    assert drawn["independent"].video.sigma == video and len(set(video)) == SAMPLES
    assert drawn["shared"].audio.sigma == (video[0], video[2])
    assert not set(drawn["independent"].audio.sigma) & set(video)


@pytest.mark.parametrize("base", WIRINGS)
def test_a_shared_sigma_s_step_equals_the_independent_one(base, plan_maker):
    check_against_oracle(plan_maker, base, Case("both", conditioned=True, sound=SOME, sigma="shared"))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_sound_s_loss_counts_as_much_as_the_plan_says(weight, plan_maker):
    """Also compared with the oracle. At 0 what only makes sound gets nothing, and what serves the picture does."""
    base, case = "tiny/ltx2.3", Case("both", conditioned=True, sound=SOME, weight=weight)
    gradients = check_against_oracle(plan_maker, base, case)
    only_sound = {"audio_ff", "video_to_audio_attn", "audio_proj_out"}
    last = f"transformer_blocks.{TINY[base].blocks - 1}."
    for name, gradient in gradients.items():
        part = name.removeprefix(last).split(".")[0]
        serves_sound_alone = part in only_sound and (name.startswith(last) or part == "audio_proj_out")
        assert bool(gradient.any()) == (weight > 0 or not serves_sound_alone), name


def test_the_sound_s_reported_loss_is_unweighted(plan_maker):
    base, values = "tiny/ltx2", []
    for weight in (0.0, 0.3, 1.0):
        case = Case("both", weight=weight)
        plan = case.plan(plan_maker, base)
        loss, _ = ours(plan, make_model(base, plan, torch.float32), OneStep(base, case, torch.float32))
        values.append((loss.main.value, loss.streams.audio.value))
    assert len(set(values)) == 1 and values[0][1] > 0


@pytest.mark.parametrize("cut", [(1, 1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("sound", [ALL, SOME, (False, True, False), NONE])
def test_cutting_a_step_into_micro_batches_changes_nothing_but_rounding(sound, cut, plan_maker):
    """Whichever micro-batches have sound; those that have none run without any audio."""
    base, case = "tiny/ltx2.3", Case("both", conditioned=True, sound=sound, weight=0.3)
    results = []
    for sizes in ((SAMPLES,), cut):
        plan = case.plan(plan_maker, base, len(sizes))
        data = OneStep(base, case, torch.float64, sizes)
        results.append(ours(plan, make_model(base, plan, torch.float64), data))
    (whole, expected), (parts, found) = results
    compare_gradients(found, expected, 1e-10)
    assert [name for name, _ in parts.streams.items()] == [name for name, _ in whole.streams.items()]
    for (_, part), (_, one) in zip(parts.streams.items(), whole.streams.items(), strict=True):
        assert part.sigma == one.sigma and part.by_sample == pytest.approx(one.by_sample, rel=1e-10)
        assert part.value == pytest.approx(one.value, rel=1e-10)


def test_what_fills_the_place_of_missing_sound_reaches_no_loss_and_no_gradient(plan_maker):
    base, case = "tiny/ltx2.5", Case("both", sound=SOME)
    plan = case.plan(plan_maker, base)
    (quiet, expected), (loud, found) = (
        ours(plan, make_model(base, plan, torch.float32), OneStep(base, case, torch.float32, filler=filler))
        for filler in (0.0, 50.0)
    )
    assert quiet.streams == loud.streams
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("modalities", ["video", "audio"])
@pytest.mark.parametrize("base", WIRINGS)
def test_a_modality_alone_touches_nothing_of_the_other(base, modalities, plan_maker):
    """With NaN in every parameter of the other one the step has the same bits; its own adapter alone is trained."""
    case = Case(modalities, conditioned=modalities == "video")
    plan = case.plan(plan_maker, base)
    results = []
    for poisoned in (False, True):
        model = make_model(base, plan, torch.float32)
        foreign = [p for name, p in model.transformer.named_parameters() if not computed(modalities, name)]
        assert len(foreign) > 100
        if poisoned:
            for parameter in foreign:
                nn.init.constant_(parameter, torch.nan)
        results.append(ours(plan, model, OneStep(base, case, torch.float32)))
        with_gradient = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
        assert with_gradient and all("lora_" in name and computed(modalities, name) for name in with_gradient)
        assert not any(parameter.requires_grad for parameter in foreign)
    (clean, expected), (poison, found) = results
    assert clean.streams == poison.streams and getattr(clean.streams, modalities) is clean.main
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    named = {"audio" in name for name in adapter_parameters(model.transformer)}
    assert named == {modalities == "audio"}


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_bit_of_a_step_with_dropout(every, plan_maker):
    base, case = "tiny/ltx2.3", Case("both", conditioned=True, sound=SOME)
    plan = case.plan(plan_maker, base)
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.1))
    results = []
    for checkpointing in (0, every):
        model = make_model(base, plan, torch.float32)
        model.run_block = run_block_of(MemoryPlan(every_nth(checkpointing, model.spec.blocks)), model.device)
        results.append(ours(plan, model, OneStep(base, case, torch.float32)))
    (kept, expected), (recomputed, found) = results
    assert kept.streams == recomputed.streams
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    undropped = case.plan(plan_maker, base)
    _, whole = ours(undropped, make_model(base, undropped, torch.float32), OneStep(base, case, torch.float32))
    assert any(not torch.equal(found[name], whole[name]) for name in whole), "dropout did nothing"


def test_the_adapter_trains_in_float32_on_a_bf16_base(plan_maker):
    base, case = "tiny/ltx2.5", Case("both", conditioned=True, sound=SOME)
    plan = case.plan(plan_maker, base)
    model = make_model(base, plan, torch.bfloat16)
    _, gradients = ours(plan, model, OneStep(base, case, torch.float32))
    assert {parameter.dtype for parameter in adapter_parameters(model.transformer).values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("targets", [("re:audio",), ("cross_modal",)])
def test_samples_without_sound_teach_an_adapter_of_sound_nothing_and_do_no_harm(targets, plan_maker):
    """A micro-batch without sound touches no layer of such an adapter: no gradient, but losses are told."""
    base = "tiny/ltx2.3"
    plan, spec = Case("both", sound=NONE).plan(plan_maker, base), TINY[base]
    model = LTX2Video(spec, spec.rope, tiny_parts(spec), CPU, torch.float32, modalities="both")
    model.load_transformer()
    inject(model.transformer, plan.lora, match(targets, spec, "both", "both"), plan.seed)
    loss, gradients = ours(plan, model, OneStep(base, Case("both", sound=NONE), torch.float32))
    assert loss.streams.video is not None and loss.streams.audio is None
    assert gradients and all(gradient is None for gradient in gradients.values())
