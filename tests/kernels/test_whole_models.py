"""Whole models on our kernels, interpreted or on a GPU, against the same models on the stock definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ltxforge_kernels.choice import EAGER, Kernels, everything

from ltxforge import trainer
from ltxforge.dataset.batches import Batch
from ltxforge.lora.inject import adapter_parameters, inject
from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import match
from ltxforge.modalities import Streams
from ltxforge.models import ltx2, ltx2_tiny, ltx_video, tiny
from ltxforge.models.interface import PromptEmbeddings, VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import AudioPlan, ConditioningPlan, Plan, TrainingPlan
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY, ModelSpec

triton = pytest.importorskip("triton")
DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
SHAPE, FPS, STEP, PROMPT, LENGTH = LatentShape(2, 2, 2), 24.0, 5, 6, 5
LONG = ["tiny/ltx-video-0.9.1", "tiny/ltx2"]
BASES = ["tiny/ltx-video", "tiny/ltx2.3", *(pytest.param(base, marks=pytest.mark.sweep) for base in LONG)]
# Of sums in another order.
LOSS_BOUND, GRADIENT_BOUND = 1e-6, 1e-5


def spec_of(base: str) -> ModelSpec:
    """The tiny model with one block: the interpreter takes its time."""
    spec = TINY[base]
    return dataclasses.replace(spec, transformer_config={**spec.transformer_config, "num_layers": 1})


def make_model(base: str, plan: Plan, kernels: Kernels, dtype: torch.dtype) -> VideoModel:
    """Of one block, with a LoRA on each of its linears that is not zero."""
    spec, modalities = spec_of(base), plan.training.modalities
    if spec.has_audio:
        parts = ltx2_tiny.tiny_parts(spec)
        model: VideoModel = LTX2Video(spec, spec.rope, parts, DEVICE, dtype, modalities=modalities)
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), DEVICE, dtype)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(("all",), spec, modalities, modalities), plan.seed, kernels)
    model.kernels = kernels
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model.transformer).values():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=draw)).to(DEVICE))
    model.transformer.train()
    return model


def make_batch(base: str) -> Batch:
    """Two samples, of which the first one's first frame is clean."""
    spec, draw = TINY[base], torch.Generator().manual_seed(1)
    video = torch.randn(2, spec.latent_channels, SHAPE.frames, SHAPE.height, SHAPE.width, generator=draw)
    clean = torch.zeros(2, SHAPE.tokens, dtype=torch.bool)
    clean[0, : SHAPE.height * SHAPE.width] = True
    config, audio, present = spec.transformer_config, None, None
    if spec.has_audio:
        audio = torch.randn(2, LENGTH, config["audio_in_channels"], generator=draw)
        present = torch.tensor([True, True])
        widths = {"video": config["cross_attention_dim"], "audio": config["audio_cross_attention_dim"]}
        if config["use_prompt_embeddings"]:
            widths = dict.fromkeys(widths, config["caption_channels"])
    else:
        widths = {"embeds": spec.caption_channels}
    prompts = [
        PromptEmbeddings({name: torch.randn(PROMPT, width, generator=draw) for name, width in widths.items()}, PROMPT)
        for _ in range(2)
    ]
    return Batch(Streams(video, audio), present, prompts, clean, SHAPE, FPS, (), 0)


def plan_for(base: str, maker, dropout: float = 0.0) -> Plan:
    modalities = "both" if TINY[base].has_audio else "video"
    plan = maker(base)
    return dataclasses.replace(
        plan,
        conditioning=ConditioningPlan(0.5, 0.0, PROMPT),
        lora=dataclasses.replace(plan.lora, alpha=6.0, modalities=modalities, dropout=dropout),
        training=TrainingPlan(2, 1, 1.0, None, modalities),
        audio=AudioPlan("independent", 1.0) if modalities == "both" else None,
    )


def step(
    base: str, plan: Plan, kernels: Kernels, dtype: torch.dtype = torch.float32, checkpointing: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the samples and the gradient of every LoRA weight."""
    model = make_model(base, plan, kernels, dtype)
    model.set_checkpointing(checkpointing)
    for module in model.transformer.modules():
        if isinstance(module, LoraLinear):
            module.refresh()  # which a compiled block leaves to its caller
    losses = torch.cat([each.by_sample for _, each in trainer.forward(plan, model, make_batch(base), STEP, 0).items()])
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in adapter_parameters(model.transformer).items()}


def apart(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("base", BASES)
def test_a_step_on_our_kernels_is_the_stock_step(base, plan_maker):
    plan = plan_for(base, plan_maker)
    (losses, gradients), (true_losses, true_gradients) = (
        step(base, plan, kernels) for kernels in (everything("triton"), EAGER)
    )
    assert apart(losses, true_losses) <= LOSS_BOUND
    for name, truth in true_gradients.items():
        assert truth.norm() > 0, name
        assert apart(gradients[name], truth) <= GRADIENT_BOUND, name


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2.3"])
def test_in_bf16_with_weights_and_loras_in_one_matrix(base, plan_maker):
    """Our kernels are no further from the float64 step than the eager ones, over all gradients together."""
    plan = plan_for(base, plan_maker)
    found = {
        name: step(base, plan, kernels, dtype)
        for name, kernels, dtype in (
            ("ours", everything("triton"), torch.bfloat16),
            ("eager", EAGER, torch.bfloat16),
            ("truth", EAGER, torch.float32),
        )
    }
    flat = {name: torch.cat([g.flatten() for g in gradients.values()]) for name, (_, gradients) in found.items()}
    assert apart(found["ours"][0], found["truth"][0]) <= 1e-2
    assert apart(flat["ours"], flat["truth"]) <= 1.1 * apart(flat["eager"], flat["truth"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(dropout, plan_maker):
    base = "tiny/ltx-video"
    plan = plan_for(base, plan_maker, dropout)
    results = [step(base, plan, everything("triton"), torch.bfloat16, every) for every in (0, 1)]
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


BLOCKS = [
    (ltx_video, "tiny/ltx-video", "triton", 1),
    (ltx_video, "tiny/ltx-video", "eager", 1),
    (ltx2, "tiny/ltx2.3", "triton", 0),
    pytest.param(ltx2, "tiny/ltx2.3", "triton", 1, marks=pytest.mark.sweep),
    pytest.param(ltx2, "tiny/ltx2.3", "eager", 1, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("family", "base", "implementation", "checkpointing"), BLOCKS)
def test_a_block_is_one_graph(family, base, implementation, checkpointing, plan_maker, monkeypatch):
    """torch.compile finds no break in a block, and changes no bit of the step."""
    plan, kernels = plan_for(base, plan_maker), everything(implementation)
    plain = step(base, plan, kernels, torch.bfloat16)
    torch._dynamo.reset()
    whole = torch.compile(family.block_forward, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(family, "block_forward", whole)
    compiled = step(base, plan, kernels, torch.bfloat16, checkpointing)
    assert torch.equal(plain[0], compiled[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, compiled[1][name]), name
