"""The exported file, read by the programs that people use: diffusers itself, and ComfyUI's and Lightricks' rules
restated as small independent checkers.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import LTX2Pipeline, LTXConditionPipeline, LTXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ltxforge.lora import files
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject, load_adapter, without_adapter
from ltxforge.lora.layers import linear_layers
from ltxforge.lora.linear import LoraLinear
from ltxforge.lora.targets import match, unread
from ltxforge.modalities import Streams
from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.interface import Noisy, NoisyTokens, PromptBatch, VideoModel
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.plan import LoraPlan
from ltxforge.quant.keep import Keep
from ltxforge.shapes import LatentShape
from ltxforge.specs import TINY

CPU = torch.device("cpu")
BASE = "tiny/ltx-video"
WITH_SOUND = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]
SHAPE = LatentShape(2, 2, 2)
SOUND_LENGTH = 5
PLAIN = LoraPlan(8, 8.0, 0.0, False, ("attention", "feed_forward"), "fp32")


def bare_model(base: str = BASE) -> VideoModel:
    spec = TINY[base]
    if spec.has_audio:
        model = LTX2Video(spec, spec.rope, ltx2_tiny.tiny_parts(spec), CPU, torch.float32)
    else:
        model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, torch.float32)
    model.load_transformer()
    return model


def trained_model(lora: LoraPlan, base: str = BASE, computed: str | None = None) -> VideoModel:
    """A model with an adapter whose weights are all far from zero, as after training."""
    model = bare_model(base)
    matched = match(lora.targets, model.spec, lora.modalities, computed or lora.modalities)
    inject(model.transformer, lora, matched, seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(model.transformer).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.transformer.eval() and model


def velocity(model: VideoModel, computed: str | None = None) -> torch.Tensor:
    """Of everything that the model makes, or of one modality alone: all numbers in a row."""
    generator, config = torch.Generator().manual_seed(2), model.spec.transformer_config
    streams, embeds = {}, {}
    for name, prefix, tokens in (("video", "", SHAPE.tokens), ("audio", "audio_", SOUND_LENGTH)):
        if computed not in (None, "both", name) or f"{prefix}in_channels" not in config:
            continue
        level = torch.tensor([437.25])
        latents = torch.randn(1, tokens, config[f"{prefix}in_channels"], generator=generator)
        streams[name] = NoisyTokens(latents, level[:, None], level)
        projected = config.get("use_prompt_embeddings", True)
        width = config["caption_channels"] if projected else config[f"{prefix}cross_attention_dim"]
        embeds[name] = torch.randn(1, 16, width, generator=generator)
    with torch.no_grad():
        mask = None if model.spec.has_audio else torch.ones(1, 16)
        made = model.predict(Noisy(Streams(**streams), SHAPE, 25.0), PromptBatch(Streams(**embeds), mask))
    return torch.cat([each.flatten() for _, each in made.items()])


def write(model: VideoModel, lora: LoraPlan, path):
    scaling = adapter_scaling(model.transformer)
    files.export(path, adapter_parameters(model.transformer), scaling, lora.save_precision, {"name": "test"})
    return path


def in_diffusers(path, base: str = BASE) -> VideoModel:
    """The file loaded by diffusers' own loader into a fresh pipeline; the transformer handed back in our model."""
    model = bare_model(base)
    parts = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": model.transformer}
    if model.spec.has_audio:
        pipeline = LTX2Pipeline(**parts, audio_vae=None, connectors=None, vocoder=None)
    else:
        pipeline = (LTXConditionPipeline if model.spec.rope == "causal" else LTXPipeline)(**parts)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    for parameter in model.transformer.parameters():  # mapped at odd addresses, for which the CPU has other kernels
        parameter.data = parameter.data.clone()
    return model


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
    require_equal_in_diffusers(lora, BASE, exact, tmp_path)


@pytest.mark.parametrize("base", ["tiny/ltx-video-0.9.0", "tiny/ltx-video-13b"])
def test_other_wirings_load_too(base, tmp_path):
    require_equal_in_diffusers(PLAIN, base, True, tmp_path)


BOTH = dataclasses.replace(PLAIN, modalities="both")


@pytest.mark.parametrize("base", WITH_SOUND)
@pytest.mark.parametrize(
    ("lora", "exact", "computed"),
    [
        (dataclasses.replace(BOTH, alpha=16.0), True, "both"),
        (dataclasses.replace(BOTH, alpha=6.0, targets=("all",)), False, "both"),
        (dataclasses.replace(BOTH, rslora=True), False, "both"),
        (dataclasses.replace(BOTH, rank=4, alpha=2.0, rslora=True, targets=("re:.",)), True, "both"),
        (dataclasses.replace(PLAIN, alpha=4.0), True, "video"),
        (dataclasses.replace(PLAIN, alpha=4.0, modalities="audio"), True, "audio"),
        (dataclasses.replace(PLAIN, alpha=4.0), True, "both"),
        (dataclasses.replace(PLAIN, alpha=4.0, targets=("feed_forward", "cross_modal")), True, "both"),
    ],
    ids=["alpha", "odd alpha, all", "rslora", "every layer", "video", "audio", "video in joint", "cross-modal"],
)
def test_ltx2_in_diffusers_computes_what_the_trainer_computes(base, lora, exact, computed, tmp_path):
    require_equal_in_diffusers(lora, base, exact, tmp_path, computed)


def require_equal_in_diffusers(lora: LoraPlan, base: str, exact: bool, folder, computed: str | None = None) -> None:
    model = trained_model(lora, base, computed)
    ours = velocity(model, computed)
    loaded = in_diffusers(write(model, lora, folder / "lora.safetensors"), base)
    theirs = velocity(loaded, computed)
    assert (theirs - ours).norm() <= 1e-6 * ours.norm()
    if exact:  # the scale is a power of two: folding it into B rounds nothing
        assert torch.equal(theirs, ours)
    with without_adapter(model.transformer):
        assert (velocity(model, computed) - ours).norm() > 1e-2 * ours.norm(), "the adapter does nothing: no proof"


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


# Names in Lightricks' checkpoints and ComfyUI's modules, for what diffusers' conversion script renames.
RENAMED = {
    "proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj", "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single", "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}  # fmt: skip


def in_the_original(module: str) -> str:
    return ".".join(RENAMED.get(part, part) for part in module.split("."))


@pytest.mark.parametrize(
    ("base", "targets", "modalities"),
    [
        (BASE, ("attention",), "video"),
        (BASE, ("all",), "video"),
        (BASE, ("attention", "proj_in", "time_embed.linear", "proj_out"), "video"),
        *((base, ("re:.",), "both") for base in WITH_SOUND),
        *(("tiny/ltx2.3", ("attention", "feed_forward"), modalities) for modalities in ("video", "audio")),
    ],
)
def test_comfyui_and_the_official_loader_add_the_same_deltas(base, targets, modalities, tmp_path):
    lora = dataclasses.replace(PLAIN, alpha=6.0, targets=targets, modalities=modalities)
    model = trained_model(lora, base)
    tensors = load_file(write(model, lora, tmp_path / "lora.safetensors"))
    comfy = comfy_deltas(tensors, comfy_key_map([in_the_original(name) for name in linear_layers(TINY[base])]))
    official = official_deltas(tensors)
    wrapped = {n: m for n, m in model.transformer.named_modules() if isinstance(m, LoraLinear)}
    assert len(wrapped) == len(comfy) == len(official) > 0
    for name, module in wrapped.items():
        delta = module.get_delta_weight("default").double()  # PEFT's own: scaling · B · A
        key = in_the_original(name) + ".weight"
        assert torch.allclose(comfy[key], delta, rtol=1e-5, atol=1e-7)
        assert torch.equal(comfy[key], official[key])


@pytest.mark.parametrize(("modalities", "foreign"), [("video", "audio"), ("audio", ".attn")])
@pytest.mark.parametrize("base", WITH_SOUND)
def test_the_file_has_no_key_of_a_modality_without_adapter(base, modalities, foreign, tmp_path):
    lora = dataclasses.replace(PLAIN, targets=("all",), modalities=modalities)
    keys = load_file(write(trained_model(lora, base), lora, tmp_path / "lora.safetensors")).keys()
    assert keys and not [key for key in keys if foreign in key or "connector" in key]
    # ltx-core's own way of finding what a file changes: every A has its B.
    assert {k for k in keys if "lora_B" in k} == {k.replace("lora_A", "lora_B") for k in keys if "lora_A" in k}


@pytest.mark.parametrize(
    ("version", "architecture", "repository"),
    [("0.9.5", "ltx-video-0.9.5/lora", "LTX-Video"), ("2.3-dev", "ltx-2.3-dev/lora", "LTX-2")],
)
def test_provenance_names_the_family_and_its_code(version, architecture, repository):
    made = files.provenance({"name": "mine", "version": version, "modalities": "video"})
    assert made["modelspec.architecture"] == architecture
    assert made["modelspec.implementation"] == f"https://github.com/Lightricks/{repository}"
    assert '"modalities": "video"' in made["ltxforge"]


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


READ_BY_DIFFUSERS = {
    BASE: ("attention", "proj_in", "proj_out", "caption_projection.linear_1", "time_embed.linear"),
    **dict.fromkeys(WITH_SOUND, ("re:.",)),
}


@pytest.mark.parametrize("base", READ_BY_DIFFUSERS)
def test_layers_that_diffusers_cannot_read_are_reported(base, tmp_path):
    """Against diffusers itself: what the report names is what its loader does not put in."""
    modalities = "both" if base in WITH_SOUND else "video"
    lora = dataclasses.replace(PLAIN, targets=READ_BY_DIFFUSERS[base], modalities=modalities)
    model = trained_model(lora, base)
    layers = match(lora.targets, model.spec, modalities, modalities).layers
    told = unread(layers, model.spec)
    theirs = in_diffusers(write(model, lora, tmp_path / "lora.safetensors"), base)
    loaded = {name.rpartition(".lora_A")[0] for name, _ in theirs.transformer.named_parameters() if ".lora_A" in name}
    assert told.keys() == layers.keys() - loaded and loaded <= layers.keys()
    assert all("diffusers" in why for why in told.values())


def test_the_start_depends_on_seed_and_name_alone(tmp_path):
    spec = TINY[BASE]

    def start(seed: int) -> dict[str, torch.Tensor]:
        transformer = tiny.tiny_parts(spec).transformer(Keep(CPU, torch.float32))
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
