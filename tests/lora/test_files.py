"""The exported file, read by the programs that people use: diffusers itself, and ComfyUI's and Lightricks' rules
restated as small independent checkers.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ltxforge.errors import PlanError
from ltxforge.lora import files
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject, load_adapter, without_adapter
from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import PRESETS, linear_layers, match, unread
from ltxforge.modalities import Streams
from ltxforge.models.interface import Noisy, NoisyTokens, PromptBatch
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import LoraPlan
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY

CPU = torch.device("cpu")
BASE = "tiny/ltx-video"
SHAPE = LatentShape(2, 2, 2)


def trained_model(lora: LoraPlan, base: str = BASE) -> LTXVideo:
    """A model with an adapter whose weights are all far from zero, as after training."""
    spec = TINY[base]
    model = LTXVideo(spec, spec.rope, tiny_parts(spec), CPU, torch.float32)
    model.load_transformer()
    inject(model.transformer, lora, match(lora.targets, spec), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(model.transformer).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.transformer.eval() and model


def velocity(model: LTXVideo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(1, SHAPE.tokens, model.spec.latent_channels, generator=generator)
    embeds = torch.randn(1, 16, model.spec.caption_channels, generator=generator)
    level = torch.tensor([437.25])
    noisy = Noisy(Streams(NoisyTokens(tokens, level[:, None], level)), SHAPE, 25.0)
    with torch.no_grad():
        return model.predict(noisy, PromptBatch(Streams(embeds), torch.ones(1, 16))).video


def write(model: LTXVideo, lora: LoraPlan, path):
    scaling = adapter_scaling(model.transformer)
    files.export(path, adapter_parameters(model.transformer), scaling, lora.save_precision, {"name": "test"})
    return path


def in_diffusers(path, base: str = BASE) -> LTXVideo:
    """The file loaded by diffusers' own loader into a fresh pipeline; the transformer handed back in our model."""
    spec = TINY[base]
    model = LTXVideo(spec, spec.rope, tiny_parts(spec), CPU, torch.float32)
    model.load_transformer()
    kind = LTXConditionPipeline if spec.rope == "causal" else LTXPipeline
    parts = tiny_parts(spec)
    pipeline = kind(
        scheduler=parts.scheduler(),
        vae=parts.vae(CPU, torch.float32),
        text_encoder=None,
        tokenizer=None,
        transformer=model.transformer,
    )
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return model


PLAIN = LoraPlan(8, 8.0, 0.0, False, ("attention", "feed_forward"), "fp32")


@pytest.mark.parametrize(
    ("lora", "exact"),
    [
        (PLAIN, True),
        (dataclasses.replace(PLAIN, alpha=16.0), True),
        (dataclasses.replace(PLAIN, alpha=2.0, targets=("all",)), True),
        (dataclasses.replace(PLAIN, alpha=6.0), False),
        (dataclasses.replace(PLAIN, alpha=8.0, rslora=True), False),
        (dataclasses.replace(PLAIN, rank=4, alpha=8.0, rslora=True), True),
        (dataclasses.replace(PLAIN, targets=("to_q", "re:transformer_blocks\\.[02]\\.ff")), True),
    ],
)
def test_diffusers_computes_what_the_trainer_computes(lora, exact, tmp_path):
    model = trained_model(lora)
    ours = velocity(model)
    theirs = velocity(in_diffusers(write(model, lora, tmp_path / "lora.safetensors")))
    assert (theirs - ours).norm() <= 1e-6 * ours.norm()
    if exact:  # the scale is a power of two: folding it into B rounds nothing
        assert torch.equal(theirs, ours)
    with without_adapter(model.transformer):
        assert (velocity(model) - ours).norm() > 1e-2 * ours.norm(), "the adapter does nothing, so this proves nothing"


@pytest.mark.parametrize("base", ["tiny/ltx-video-0.9.0", "tiny/ltx-video-13b"])
def test_other_wirings_load_too(base, tmp_path):
    model = trained_model(PLAIN, base)
    theirs = velocity(in_diffusers(write(model, PLAIN, tmp_path / "lora.safetensors"), base))
    assert torch.equal(theirs, velocity(model))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_rounded_file_is_the_adapter_rounded_once(precision, dtype, tmp_path):
    lora = dataclasses.replace(PLAIN, alpha=6.0, save_precision=precision)
    model = trained_model(lora)
    saved = load_file(write(model, lora, tmp_path / "lora.safetensors"))
    for name, parameter in adapter_parameters(model.transformer).items():
        scale = 0.75 if "lora_B" in name else 1.0
        assert torch.equal(saved[f"diffusion_model.{name}"], (parameter.data * scale).to(dtype))


def comfy_key_map(original_modules: list[str]) -> dict[str, str]:
    """ComfyUI's generic map: `diffusion_model.<module>` and `lora_unet_<module with underscores>` to the weight."""
    found = {}
    for module in original_modules:
        found[f"diffusion_model.{module}"] = found[f"lora_unet_{module.replace('.', '_')}"] = f"{module}.weight"
    return found


def comfy_deltas(tensors: dict[str, torch.Tensor], key_map: dict[str, str]) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each weight: alpha/rank·B·A, alpha/rank 1 without `.alpha`; unknown keys are refused."""
    deltas, used = {}, set()
    for stem, weight in key_map.items():
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if a in tensors and b in tensors:
            alpha = tensors.get(f"{stem}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / tensors[a].shape[0]
            deltas[weight] = scale * (tensors[b].double() @ tensors[a].double())
            used |= {a, b, f"{stem}.alpha"}
    assert tensors.keys() <= used, f"ComfyUI would ignore {sorted(tensors.keys() - used)[:3]}"
    return deltas


def official_deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lightricks' loader: strip `diffusion_model.`, take lora_A and lora_B, add B·A; alpha is never applied."""
    stripped = {name.removeprefix("diffusion_model."): value for name, value in tensors.items()}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stripped)
    modules = {name.rpartition(".lora_")[0] for name in stripped}
    return {
        f"{m}.weight": stripped[f"{m}.lora_B.weight"].double() @ stripped[f"{m}.lora_A.weight"].double()
        for m in modules
    }


def original_modules(base: str) -> list[str]:
    """Module names as in Lightricks' checkpoints, by the renaming that diffusers' conversion script undoes."""
    names = linear_layers(TINY[base])
    return [n.replace("proj_in", "patchify_proj").replace("time_embed", "adaln_single") for n in names]


@pytest.mark.parametrize(
    "targets", [("attention",), ("all",), ("attention", "proj_in", "time_embed.linear", "proj_out")]
)
def test_comfyui_and_the_official_loader_add_the_same_deltas(targets, tmp_path):
    lora = dataclasses.replace(PLAIN, alpha=6.0, targets=targets)
    model = trained_model(lora)
    tensors = load_file(write(model, lora, tmp_path / "lora.safetensors"))
    comfy = comfy_deltas(tensors, comfy_key_map(original_modules(BASE)))
    official = official_deltas(tensors)
    wrapped = {n: m for n, m in model.transformer.named_modules() if isinstance(m, LoraLinear)}
    assert len(wrapped) == len(comfy) == len(official) > 0
    for name, module in wrapped.items():
        delta = module.get_delta_weight("default").double()  # PEFT's own: scaling · B · A
        key = name.replace("proj_in", "patchify_proj").replace("time_embed", "adaln_single") + ".weight"
        assert torch.allclose(comfy[key], delta, rtol=1e-5, atol=1e-7)
        assert torch.equal(comfy[key], official[key])


def test_no_alpha_keys_and_readable_provenance(tmp_path):
    path = tmp_path / "lora.safetensors"
    facts = files.provenance({"name": "my clips", "version": "0.9.5", "step": 7})
    model = trained_model(PLAIN)
    files.export(path, adapter_parameters(model.transformer), 1.0, "bf16", facts)
    with safe_open(path, framework="pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert not [key for key in keys if "alpha" in key]
    assert metadata["modelspec.title"] == "my clips" and '"step": 7' in metadata["ltxforge"]
    assert keys and all(key.startswith("diffusion_model.") for key in keys)


def test_layers_that_diffusers_cannot_read_are_reported(tmp_path):
    """Against diffusers itself: what the report names is what its loader does not put in."""
    names = ["attention", "proj_in", "proj_out", "caption_projection.linear_1", "time_embed.linear"]
    lora = dataclasses.replace(PLAIN, targets=tuple(names))
    model = trained_model(lora)
    told = unread(match(lora.targets, model.spec).layers)
    theirs = in_diffusers(write(model, lora, tmp_path / "lora.safetensors"))
    loaded = {name.rpartition(".lora_A")[0] for name, _ in theirs.transformer.named_parameters() if ".lora_A" in name}
    assert told.keys() == match(lora.targets, model.spec).layers.keys() - loaded
    assert all("diffusers" in why for why in told.values())


@pytest.mark.parametrize("base", list(TINY))
def test_the_torch_free_list_of_linears_is_the_model_s(base):
    spec = TINY[base]
    transformer = tiny_parts(spec).transformer(CPU, torch.float32)
    real = {
        n: (m.in_features, m.out_features) for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert linear_layers(spec) == real


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_stay_inside_the_blocks(preset):
    layers = match([preset], TINY[BASE]).layers
    per_block = {"attention": 8, "feed_forward": 2, "all": 10}[preset]
    assert len(layers) == per_block * TINY[BASE].blocks
    assert all(name.startswith("transformer_blocks.") for name in layers)


def test_targets_that_match_nothing_are_refused_by_name():
    with pytest.raises(PlanError, match=r"'to_qq'.*match no linear") as refused:
        match(["attention", "to_qq"], TINY[BASE])
    assert "attn1.to_q" in str(refused.value)


def test_the_start_depends_on_seed_and_name_alone(tmp_path):
    spec = TINY[BASE]

    def start(seed: int) -> dict[str, torch.Tensor]:
        transformer = tiny_parts(spec).transformer(CPU, torch.float32)
        inject(transformer, PLAIN, match(PLAIN.targets, spec), seed)
        return {name: p.detach().clone() for name, p in adapter_parameters(transformer).items()}

    first = start(7)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again, other = start(7), start(8)
    assert torch.equal(torch.get_rng_state(), before), "injection consumed global randomness"
    assert all(torch.equal(first[name], again[name]) for name in first)
    a = [name for name in first if "lora_A" in name]
    assert all(not torch.equal(first[name], other[name]) for name in a)
    assert all((first[name] == 0).all() for name in first if "lora_B" in name)
    # Kaiming-uniform for a = √5 is uniform in ±1/√fan_in: its standard deviation is 1/√(3·fan_in).
    values = torch.cat([first[name].flatten() * math.sqrt(3 * first[name].shape[1]) for name in a])
    assert values.std().item() == pytest.approx(1.0, abs=0.02)


def test_load_adapter_puts_every_value_back():
    model = trained_model(PLAIN)
    saved = {name: p.detach().clone() for name, p in adapter_parameters(model.transformer).items()}
    before = velocity(model)
    for parameter in adapter_parameters(model.transformer).values():
        parameter.data.zero_()
    load_adapter(model.transformer, saved)
    assert torch.equal(velocity(model), before)
