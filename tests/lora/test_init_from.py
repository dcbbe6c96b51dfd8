"""LoRA files of other programs, read to go on from: diffusers and PEFT write them and say what they mean."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from diffusers import LTXPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.lora import files
from ltxforge.lora.header import LoraHeader
from ltxforge.lora.init_from import LoraFile, PeftScale, digest_of, peft_scale, require_trainable
from ltxforge.lora.inject import adapter_parameters, adapter_scaling, inject, load_adapter
from ltxforge.lora.layers import linear_layers, original_name
from ltxforge.lora.targets import match
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.tiny import tiny_parts
from ltxforge.plan import LoraPlan
from ltxforge.quant.keep import Keep
from ltxforge.specs import SPECS, TINY

SPEC = TINY["tiny/ltx-video"]
OURS = LoraPlan(4, 4.0, 0.0, False, ("attention", "time_embed.linear"), "fp32")
ENDS = r".*(to_q|to_k|to_v|to_out\.0)|time_embed\.linear"
Products = dict[str, torch.Tensor]


def transformer() -> torch.nn.Module:
    return tiny_parts(SPEC).transformer(Keep(torch.device("cpu"), torch.float32))


def settings(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ENDS, "init_lora_weights": False, **changes})


def products(module: torch.nn.Module) -> Products:
    """What each layer's adapter adds to its weight, in PEFT's own words and float64."""
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) > 20
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        * layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
        for name, layer in layers.items()
    }


def taken(path, plan: LoraPlan = OURS) -> torch.nn.Module:
    """A fresh transformer of ours that has taken the file."""
    model = LTXVideo(SPEC, SPEC.rope, tiny_parts(SPEC), torch.device("cpu"), torch.float32)
    model.load_transformer()
    inject(model.transformer, plan, match(plan.targets, SPEC), seed=1)
    found = files.read(path, digest_of(path, FileDigests()), adapter_scaling(model.transformer))
    load_adapter(model.transformer, found)
    return model.transformer


def read_products(path, scaling: float) -> Products:
    """What the file's adapter adds under another scale than its own."""
    found = files.read(path, digest_of(path, FileDigests()), scaling)
    layers = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    assert len(found) == 2 * len(layers)
    return {
        layer: scaling * found[f"{layer}.lora_B.weight"].double() @ found[f"{layer}.lora_A.weight"].double()
        for layer in layers
    }


def require_equal(found: Products, expected: Products, bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert product.norm() > 1e-3, "an adapter of nothing proves nothing"
        assert (found[name] - product).norm() <= bound * product.norm(), name


CONFIGS = {
    "alpha = rank": {},
    "alpha": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "alphas of layers": {"alpha_pattern": {"to_q": 1, r"transformer_blocks\.1\..*to_k": 7}, "lora_alpha": 2},
}
PLANS = [OURS, dataclasses.replace(OURS, alpha=6.0), dataclasses.replace(OURS, alpha=3.0, rslora=True)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("writer", ["pipeline", "model", "peft"])
def test_diffusers_and_peft_s_files_mean_what_they_say(writer, config, tmp_path):
    module, settled = transformer(), settings(**config)
    if writer == "peft":
        wrapped = get_peft_model(module, settled)
        expected = products(wrapped)
        wrapped.save_pretrained(tmp_path)
    else:
        module.add_adapter(settled)
        expected = products(module)
    if writer == "model":
        module.save_lora_adapter(tmp_path)
    if writer == "pipeline":
        LTXPipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(module), transformer_lora_adapter_metadata=settled.to_dict()
        )
    (path,) = tmp_path.glob("*.safetensors")
    for scaling in (1.0, 1.5, 3 / math.sqrt(4), 0.1):
        require_equal(read_products(path, scaling), expected)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("halves", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_alphas_of_comfyui_s_files_count_by_the_rank(alpha, halves, tmp_path):
    tensors, expected, generator = {}, {}, torch.Generator().manual_seed(3)
    for name, (inner, outer) in match(OURS.targets, SPEC).layers.items():
        a, b = torch.randn(4, inner, generator=generator), torch.randn(outer, 4, generator=generator)
        stem = f"diffusion_model.{original_name(name)}"
        tensors |= {f"{stem}.{halves[0]}.weight": a, f"{stem}.{halves[1]}.weight": b}
        tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
        expected[name] = (1.0 if alpha is None else alpha / 4) * (b.double() @ a.double())
    save_file(tensors, tmp_path / "lora.safetensors")
    for scaling in (1.0, 1.5, 0.1):
        require_equal(read_products(tmp_path / "lora.safetensors", scaling), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", [*PLANS, dataclasses.replace(OURS, alpha=16.0)])
def test_our_own_file_gives_its_adapter_back(plan, precision, tmp_path):
    module = transformer()
    inject(module, plan, match(plan.targets, SPEC), seed=1)
    for n, parameter in enumerate(adapter_parameters(module).values()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(n))
    path, scaling = tmp_path / "lora.safetensors", adapter_scaling(module)
    files.export(path, adapter_parameters(module), scaling, precision, {"name": "mine"})
    again = taken(path, plan)
    written = load_file(path)
    for name, value in adapter_parameters(again).items():
        kept = adapter_parameters(module)[name]
        assert value.dtype == torch.float32
        assert (value - kept).abs().max() <= (1e-6 if precision == "fp32" else 2**-8) * kept.abs().max()
        if scaling in (1.0, 4.0) or "lora_A" in name:  # a power of two rounds nothing
            assert torch.equal(value * (scaling if "lora_B" in name else 1), written[_in_file(name)].float())
    if precision == "fp32":
        require_equal(products(again), products(module))


def _in_file(name: str) -> str:
    return f"diffusion_model.{original_name(name)}"


def test_a_file_that_changed_after_planning_is_not_read(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"a.lora_A.weight": torch.ones(1, 1), "a.lora_B.weight": torch.ones(1, 1)}, path)
    digest = digest_of(path, FileDigests())
    assert files.read(path, digest, 0.5)["a.lora_B.weight"] == 2
    save_file({"a.lora_A.weight": torch.ones(1, 1), "a.lora_B.weight": torch.zeros(1, 1)}, path)
    with pytest.raises(WeightsError, match="has changed since the plan"):
        files.read(path, digest, 0.5)
    path.unlink()
    with pytest.raises(WeightsError, match="is gone"):
        files.read(path, digest, 0.5)


def test_peft_s_configuration_beside_is_part_of_the_content(tmp_path):
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    path.write_bytes(b"x")
    alone = digest_of(path, FileDigests())
    config.write_text('{"lora_alpha": 16, "r": 4}', encoding="utf-8")
    assert peft_scale(path, {}) == PeftScale(16.0, {}, False)
    both = digest_of(path, FileDigests())
    config.write_text('{"lora_alpha": 8, "r": 4}', encoding="utf-8")
    assert len({alone, both, digest_of(path, FileDigests())}) == 3
    other = path.with_name("lora.safetensors")
    other.write_bytes(b"x")
    assert digest_of(other, FileDigests()) == alone and peft_scale(other, {}) is None


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"lora_alpha": "many"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', '{"alpha_pattern": [1]}',
     '{"transformer.alpha_pattern": {"to_q": null}}'],
)  # fmt: skip
def test_a_scale_that_cannot_be_read_is_refused(text, tmp_path):
    with pytest.raises(WeightsError, match=r"mine.*PEFT's configuration, which says the LoRA's scale"):
        peft_scale(tmp_path / "mine.safetensors", {"lora_adapter_metadata": text})


def test_the_connectors_configuration_is_not_the_transformer_s(tmp_path):
    both = {"connectors.lora_alpha": 99, "transformer.lora_alpha": 2, "transformer.use_rslora": True}
    assert peft_scale(tmp_path, {"lora_adapter_metadata": json.dumps(both)}) == PeftScale(2.0, {}, True)
    assert peft_scale(tmp_path, {"lora_adapter_metadata": json.dumps({"connectors.lora_alpha": 99})}) is None


def file_of(spec, targets, modalities="video", rank=8) -> LoraFile:
    layers = match(targets, spec, modalities, "both" if spec.has_audio else "video").layers
    return LoraFile("old.safetensors", "d", LoraHeader(layers, (rank,), spec.version))


def unsigned(file: LoraFile) -> LoraFile:
    return dataclasses.replace(file, header=dataclasses.replace(file.header, version=""))


def ask(file: LoraFile, spec, targets, modalities="video", computed="video", rank=8) -> None:
    lora = LoraPlan(rank, 8.0, 0.0, False, targets, modalities=modalities)
    require_trainable(file, lora, match(targets, spec, modalities, computed), spec, computed)


LTX2, FF, ATTENTION = SPECS["2.3-dev"], ("feed_forward",), ("attention",)
BOTH = (*ATTENTION, *FF)


@pytest.mark.parametrize(
    ("file", "run", "remedy"),
    [
        (file_of(LTX2, BOTH), (ATTENTION,), 'Write lora.targets = ["attention", "feed_forward"].'),
        (file_of(LTX2, ATTENTION), (FF,), 'Write lora.targets = ["feed_forward", "attention"].'),
        (file_of(LTX2, ATTENTION, "both"), (ATTENTION, "video", "both"), 'Write lora.modalities = "both".'),
        (file_of(LTX2, ATTENTION, "audio"), (ATTENTION, "video", "both"), 'Write lora.modalities = "audio".'),
        (
            file_of(LTX2, ATTENTION, "both"),
            (ATTENTION,),
            'Write lora.modalities = "both" and training.modalities = "both".',
        ),
        (
            file_of(LTX2, BOTH, "audio"),
            (ATTENTION,),
            'Write lora.targets = ["attention", "feed_forward"] and lora.modalities = "audio" and'
            ' training.modalities = "audio".',
        ),
        (
            file_of(LTX2, (*ATTENTION, "time_embed.linear")),
            (ATTENTION,),
            'Write lora.targets = ["attention", "time_embed.linear"].',
        ),
        (file_of(LTX2, ("to_gate_logits", "to_q")), (ATTENTION,), 'Write lora.targets = ["attention", "all"].'),
        (file_of(SPECS["0.9.5"], BOTH), (ATTENTION,), 'Write lora.targets = ["attention", "feed_forward"].'),
    ],
)
def test_layers_that_would_be_lost_are_refused_and_what_covers_them_is_told(file, run, remedy):
    spec = SPECS[file.header.version]
    with pytest.raises(WeightsError) as refused:
        ask(file, spec, *run)
    assert refused.value.remedy == remedy
    assert "by this run, such as" in refused.value.what and "rank 8" in refused.value.what
    written = dict(re.findall(r"(\S+) = (\[.*?\]|\".*?\")", remedy))
    targets = tuple(json.loads(written.get("lora.targets", json.dumps(run[0]))))
    modalities = json.loads(written.get("lora.modalities", json.dumps([*run, "video"][1])))
    computed = json.loads(written.get("training.modalities", json.dumps([*run, "video", "video"][2])))
    ask(file, spec, targets, modalities, computed)


def test_none_and_some_layers_are_told_apart():
    with pytest.raises(WeightsError, match="none of its 384 layers is trained by this run"):
        ask(file_of(LTX2, ATTENTION), LTX2, FF)
    with pytest.raises(WeightsError, match="96 of its 480 layers are not trained by this run"):
        ask(file_of(LTX2, BOTH), LTX2, ATTENTION)


def test_the_rank_is_the_file_s():
    with pytest.raises(WeightsError, match=r"lora.rank is 8\n  Write lora.rank = 16\."):
        ask(file_of(LTX2, ATTENTION, rank=16), LTX2, ATTENTION)
    file = file_of(LTX2, ATTENTION)
    mixed = dataclasses.replace(file, header=dataclasses.replace(file.header, ranks=(4, 8)))
    with pytest.raises(WeightsError, match=r"rank 4 to 8.*\n  A run has one rank"):
        ask(mixed, LTX2, ATTENTION)


def test_another_version_s_file_is_refused_first():
    with pytest.raises(WeightsError, match=r"this LoRA was trained on 2.0-dev, and 2.3-dev differs in wiring"):
        ask(file_of(SPECS["2.0-dev"], ATTENTION, rank=4), LTX2, ATTENTION)
    with pytest.raises(WeightsError, match=r"goes from 2048 to 2048, and from 4096"):
        ask(unsigned(file_of(SPECS["0.9.5"], ATTENTION)), LTX2, ATTENTION)


def test_every_layer_can_be_covered():
    spec = TINY["tiny/ltx2.5"]
    file = LoraFile("old.safetensors", "d", LoraHeader(linear_layers(spec), (8,), ""))
    with pytest.raises(WeightsError) as refused:
        ask(file, spec, ATTENTION)
    assert "av_cross_attn_video_a2v_gate.linear" in refused.value.remedy and '"all"' in refused.value.remedy
