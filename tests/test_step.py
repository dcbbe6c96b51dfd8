"""The whole step against an independent formulation in float64: diffusers' stock transformer with PEFT's own LoRA
layers and the objective written out in plain torch. Loss and every LoRA gradient, for each wiring.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import LTXConditionPipeline
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
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import ConditioningPlan, MemoryPlan, Plan, every_nth
from ltxforge.quant.keep import Keep
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY

pytestmark = pytest.mark.usefixtures("stock_in_float64")

CPU = torch.device("cpu")
WIRINGS = [
    "tiny/ltx-video-0.9.0",
    "tiny/ltx-video-0.9.1",
    "tiny/ltx-video-0.9.5",
    "tiny/ltx-video-0.9.8",
    "tiny/ltx-video-13b",
]
SHAPE = LatentShape(3, 2, 3)
FPS, STEP, FIRST = 24.0, 5, 2
LENGTHS = (32, 7, 19)


def make_model(base: str, plan: Plan, dtype: torch.dtype) -> LTXVideo:
    spec = TINY[base]
    model = LTXVideo(spec, spec.rope, tiny_parts(spec), CPU, dtype)
    model.load_transformer()
    inject(model.transformer, plan.lora, match(plan.lora.targets, spec), plan.seed)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(model.transformer).values():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = (parameter.data + values).to(torch.float64 if dtype == torch.float64 else torch.float32)
    model.transformer.train()
    return model


def make_batch(base: str, dtype: torch.dtype) -> Batch:
    spec, generator = TINY[base], torch.Generator().manual_seed(1)
    size = (len(LENGTHS), spec.latent_channels, SHAPE.frames, SHAPE.height, SHAPE.width)
    latents = torch.randn(size, generator=generator)
    embeds = [torch.randn(n, spec.caption_channels, generator=generator) for n in LENGTHS]
    clean = torch.zeros(len(LENGTHS), SHAPE.tokens, dtype=torch.bool)
    clean[1, : SHAPE.height * SHAPE.width] = True
    prompts = [PromptEmbeddings({"embeds": each.to(dtype)}, len(each)) for each in embeds]
    return Batch(Streams(latents.to(dtype)), None, prompts, clean, SHAPE, FPS, (), FIRST)


def losses_of(plan: Plan, model: LTXVideo, batch: Batch, micro: int = 0) -> tuple[Tensor, tuple[float, ...]]:
    """The trainer's losses, one per sample, and their sigmas."""
    losses = trainer.forward(plan, model, batch, STEP, micro)
    assert losses.audio is None
    return losses.video.by_sample, losses.video.sigma


def ours(base: str, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], tuple[float, ...]]:
    model = make_model(base, plan, dtype)
    losses, sigma = losses_of(plan, model, make_batch(base, dtype))
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in adapter_parameters(model.transformer).items()}, sigma


def independent(base: str, plan: Plan, sigma: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """float64 throughout; nothing of ltxforge but the draws and the adapter's starting values."""
    spec, batch = TINY[base], make_batch(base, torch.float64)
    transformer = tiny_parts(spec).transformer(Keep(CPU, torch.float64)).requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    transformer.add_adapter(LoraConfig(r=plan.lora.rank, lora_alpha=plan.lora.alpha, target_modules=names))
    start = adapter_parameters(make_model(base, plan, torch.float64).transformer)
    adapter = {n.replace(".default", ""): p for n, p in transformer.named_parameters() if "lora_" in n}
    assert adapter.keys() == start.keys()
    for name, parameter in adapter.items():
        parameter.data = start[name].data.clone()

    latents = batch.latents.video
    b, c = latents.shape[:2]
    x0 = latents.reshape(b, c, -1).permute(0, 2, 1)
    noise = torch.stack([noise_for(x0.shape[1:], plan.seed, STEP, FIRST + row).double() for row in range(b)])
    level = torch.tensor(sigma, dtype=torch.float64).reshape(b, 1).repeat(1, SHAPE.tokens)
    level[batch.clean] = 0.0
    x = (1 - level[..., None]) * x0 + level[..., None] * noise
    embeds = torch.zeros(b, plan.conditioning.prompt_tokens, spec.caption_channels, dtype=torch.float64)
    mask = torch.zeros(b, plan.conditioning.prompt_tokens)
    for row, prompt in enumerate(batch.prompts):
        own = prompt.tensors["embeds"]
        embeds[row, : len(own)], mask[row, : len(own)] = own, 1
    if spec.rope == "plain":
        place = {"rope_interpolation_scale": (8 / FPS, 32, 32)}
    else:
        ids = LTXConditionPipeline._prepare_video_ids(b, SHAPE.frames, SHAPE.height, SHAPE.width)
        coords = LTXConditionPipeline._scale_video_ids(ids, 32, 8, 0).float()
        coords[:, 0] = coords[:, 0] * (1.0 / FPS)
        place = {"video_coords": coords}
    velocity = transformer(
        hidden_states=x,
        encoder_hidden_states=embeds,
        timestep=(level * 1000).float(),
        encoder_attention_mask=mask,
        num_frames=SHAPE.frames,
        height=SHAPE.height,
        width=SHAPE.width,
        return_dict=False,
        **place,
    )[0]
    losses = []
    for row in range(b):
        kept = ~batch.clean[row]
        losses.append(((velocity[row] - (noise[row] - x0[row]))[kept] ** 2).mean())
    total = torch.stack(losses)
    total.mean().backward()
    return total.detach(), {name: parameter.grad for name, parameter in adapter.items()}


@pytest.fixture
def step_plan(plan_maker):
    return plan_maker(conditioning=ConditioningPlan(0.5, 0.0, 32))


@pytest.mark.parametrize("base", WIRINGS)
def test_our_step_equals_the_independent_one(base, step_plan):
    for dtype, loss_bound, grad_bound in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 1e-5)):
        losses, gradients, sigma = ours(base, step_plan, dtype)
        expected_losses, expected_gradients = independent(base, step_plan, sigma)
        assert (losses.double() - expected_losses).norm() <= loss_bound * expected_losses.norm()
        assert gradients.keys() == expected_gradients.keys()
        for name, expected in expected_gradients.items():
            assert expected.norm() > 0, name
            assert (gradients[name].double() - expected).norm() <= grad_bound * expected.norm(), (dtype, name)


def test_rslora_and_another_alpha_scale_the_branch(step_plan):
    """PEFT's own layers give the same step when the scale is neither 1 nor a power of two."""
    base = "tiny/ltx-video"
    plan = dataclasses.replace(step_plan, lora=dataclasses.replace(step_plan.lora, alpha=6.0))
    losses, gradients, sigma = ours(base, plan, torch.float64)
    expected_losses, expected_gradients = independent(base, plan, sigma)
    assert (losses - expected_losses).norm() <= 1e-10 * expected_losses.norm()
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-10 * expected.norm(), name


@pytest.mark.parametrize("every", [1, 2, 3])
def test_dropout_draws_the_same_mask_under_checkpointing(every, step_plan):
    """Equal gradients to the last bit with dropout 0.1, whatever is recomputed."""
    plan = dataclasses.replace(step_plan, lora=dataclasses.replace(step_plan.lora, dropout=0.1))
    base = "tiny/ltx-video"
    results = []
    for checkpointing in (0, every):
        model = make_model(base, plan, torch.float32)
        model.run_block = run_block_of(MemoryPlan(every_nth(checkpointing, model.spec.blocks)), model.device)
        losses, _ = losses_of(plan, model, make_batch(base, torch.float32))
        losses.mean().backward()
        results.append({n: p.grad for n, p in adapter_parameters(model.transformer).items()})
    plain, recomputed = results
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    undropped = ours(base, step_plan, torch.float32)[1]
    assert any(not torch.equal(plain[name], undropped[name]) for name in plain), "dropout did nothing"


def test_cutting_a_step_into_micro_batches_changes_nothing_but_rounding(step_plan):
    """Losses add up over samples with the whole step's divisor: 1 × 3 and 3 × 1 give the same gradient."""
    base = "tiny/ltx-video"
    whole = ours(base, step_plan, torch.float64)[1]
    model = make_model(base, step_plan, torch.float64)
    batch = make_batch(base, torch.float64)
    for row in range(3):
        part = dataclasses.replace(
            batch,
            latents=Streams(batch.latents.video[row : row + 1]),
            prompts=batch.prompts[row : row + 1],
            clean=batch.clean[row : row + 1],
            first_index=FIRST + row,
        )
        losses, _ = losses_of(step_plan, model, part, row)
        (losses.sum() / 3).backward()
    for name, parameter in adapter_parameters(model.transformer).items():
        assert (parameter.grad - whole[name]).norm() <= 1e-10 * whole[name].norm()


def test_the_adapter_trains_in_float32_on_a_bf16_base(step_plan):
    model = make_model("tiny/ltx-video", step_plan, torch.bfloat16)
    losses, _ = losses_of(step_plan, model, make_batch("tiny/ltx-video", torch.float32))
    losses.mean().backward()
    parameters = adapter_parameters(model.transformer)
    assert losses.dtype == torch.float32
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in parameters.values()} == {torch.float32}
    base = [m.weight for n, m in model.transformer.named_modules() if isinstance(m, nn.Linear) and "lora" not in n]
    assert {w.dtype for w in base} == {torch.bfloat16} and not any(w.requires_grad for w in base)


def test_scale_zero_is_the_base_to_the_last_bit(step_plan):
    model = make_model("tiny/ltx-video", step_plan, torch.float32)
    batch = make_batch("tiny/ltx-video", torch.float32)
    for module in model.transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] = 0.0
    scaled, _ = losses_of(step_plan, model, batch)
    spec = TINY["tiny/ltx-video"]
    bare = LTXVideo(spec, spec.rope, tiny_parts(spec), CPU, torch.float32)
    bare.load_transformer()
    plain, _ = losses_of(step_plan, bare, batch)
    assert torch.equal(scaled, plain)
