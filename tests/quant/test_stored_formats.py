"""Bases that come quantised: bitsandbytes' NF4, fp8 with and without scales, torchao's; and what is refused.

The files are written by bitsandbytes and diffusers, or as the published ones are laid out.
"""

import json

import pytest
import torch
from base_files import folder_of, loaded, same, stored_as, transformer_of
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltxforge.errors import WeightsError
from ltxforge.events import BaseQuantised, Note
from ltxforge.models.detect import plan_model
from ltxforge.models.tiny import tiny_vae
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.specs import TINY
from ltxforge.ui.lines import line

BASES = ["tiny/ltx-video", "tiny/ltx2"]
FP8 = torch.float8_e4m3fn


def bitsandbytes_folder(path, base: str, double: bool = True):
    """A folder as diffusers saves a model whose linears are bitsandbytes' own; diffusers quantises on GPUs alone.

    Rows shorter than a block are left whole: bitsandbytes 0.50.2 dequantises them wrongly on a CPU.
    """
    model, layers = transformer_of(base).bfloat16(), {}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features >= 64]:
        layer = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, double, "nf4"
        )  # fmt: skip
        layer.load_state_dict({each: value.detach() for each, value in linear.state_dict().items()})
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.to("cpu"))
        layers[name] = layer
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    return stored_as(path / "nf4", base, tensors), layers


def codes_of(layer: Linear4bit) -> dict[str, Tensor]:
    """A layer of bitsandbytes by our names."""
    state = layer.weight.quant_state
    found = {"packed": layer.weight.data, "absmax": state.absmax}
    if state.state2 is not None:
        found |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
    return found


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_nf4_of_bitsandbytes_is_taken_bit_for_bit(tmp_path, base, double):
    folder, layers = bitsandbytes_folder(tmp_path, base, double)
    model = loaded(base, folder, base_precision="nf4", double_quant=not double)  # what the file has is what counts
    ours = {name: each for name, each in model.transformer.named_modules() if isinstance(each, QuantisedLinear)}
    assert len(ours) >= 40 and ours.keys() < layers.keys()
    for name, layer in ours.items():
        theirs = codes_of(layers[name])
        assert layer.stored.keys() == theirs.keys() and layer.double_quant is double
        assert all(torch.equal(layer.stored[part], theirs[part].reshape(layer.stored[part].shape)) for part in theirs)
    for name in layers.keys() - ours.keys():  # outside the blocks: whole, and the very numbers
        whole = dequantize_4bit(layers[name].weight.data, layers[name].weight.quant_state).bfloat16()
        assert torch.equal(model.transformer.get_submodule(name).weight, whole)
    report = model.base_report
    assert report.source == "file" and "nf4" in report.notes[0] and report.worst is None


def test_nf4_in_shards_that_part_a_weight_from_its_scales(tmp_path):
    base = "tiny/ltx-video"
    folder, _ = bitsandbytes_folder(tmp_path, base)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    parts = {f"diffusion_pytorch_model-{n:05d}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    (tmp_path / "shards").mkdir()
    for name, names in parts.items():
        save_file({each: tensors[each] for each in names}, tmp_path / "shards" / name, metadata={"format": "pt"})
    places = {each: name for name, names in parts.items() for each in names}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "shards" / "config.json").write_bytes((folder / "config.json").read_bytes())
    one, other = (loaded(base, each, base_precision="nf4").transformer for each in (folder, tmp_path / "shards"))
    assert same(one, other)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int8-w8a8"])
def test_nf4_becomes_what_is_asked_for(tmp_path, format):
    """Layer by layer: as if the file had held what its NF4 stands for."""
    base = "tiny/ltx-video"
    folder, layers = bitsandbytes_folder(tmp_path, base)
    told = []
    model = loaded(base, folder, base_precision=format, emit=told.append)
    truth = transformer_of(base).bfloat16()
    for name, layer in layers.items():
        whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        found = model.transformer.get_submodule(name)
        if isinstance(found, nn.Linear):
            assert torch.equal(found.weight, whole.bfloat16()), name
        else:
            made = QuantisedLinear.quantise(whole, None, format)
            assert all(torch.equal(found.stored[part], made.stored[part]) for part in made.stored), name
        truth.get_submodule(name).weight.data = whole.bfloat16()
    if format == "bf16":
        assert same(model.transformer, truth)
    assert model.base_report.source == "" and "came in nf4" in model.base_report.notes[0]
    (event,) = (each for each in told if isinstance(each, Note if format == "bf16" else BaseQuantised))
    assert "came in nf4" in line(event)[1]


def eighths(tensors: dict[str, Tensor], how: str, prefix: str = "") -> dict[str, Tensor]:
    """The blocks' linears in e4m3, all else in bf16, but for the first and the last block, as Lightricks leaves them.

    `how` is "cast" (no scales), "scaled" (a scalar for weight and input), "old" (ComfyUI's names) or "rows".
    """
    made = {}
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    for name, value in tensors.items():
        middle = name.startswith("transformer_blocks.") and 0 < int(name.split(".")[1]) < last
        if not middle or value.ndim != 2 or not name.endswith(".weight"):
            made[prefix + name] = value.bfloat16()
            continue
        stem = prefix + name.removesuffix(".weight")
        largest = value.abs().amax(1, keepdim=True) if how == "rows" else value.abs().max()
        scale = torch.tensor(1.0) if how == "cast" else (largest / 448).float()
        made[f"{stem}.weight"] = (value.float() / scale).to(FP8)
        if how != "cast":
            made[f"{stem}.{'scale_weight' if how == 'old' else 'weight_scale'}"] = scale
        if how == "scaled":
            made[f"{stem}.input_scale"] = torch.tensor(0.5)
    if how == "old":
        made[f"{prefix}scaled_fp8"] = torch.zeros(0).to(FP8)
    return made


@pytest.mark.parametrize("how", ["cast", "scaled", "old", "rows"])
@pytest.mark.parametrize("base", BASES)
def test_fp8_codes_stay_as_they_are(tmp_path, base, how):
    stored = eighths(transformer_of(base).state_dict(), how)
    folder = stored_as(tmp_path, base, stored)
    model = loaded(base, folder, base_precision="fp8")
    seen = 0
    for name, layer in model.transformer.named_modules():
        if not isinstance(layer, QuantisedLinear):
            continue
        weight = stored[f"{name}.weight"]
        if weight.dtype == FP8:
            scale = stored.get(f"{name}.weight_scale", stored.get(f"{name}.scale_weight", torch.tensor(1.0)))
            assert torch.equal(layer.values.view(torch.uint8), weight.view(torch.uint8)), name
            assert torch.equal(layer.dequantised(torch.float32), weight.float() * scale), name
            seen += 1
        else:  # what the file left whole is quantised here
            made = QuantisedLinear.quantise(weight, None, "fp8")
            assert torch.equal(layer.values.view(torch.uint8), made.values.view(torch.uint8)), name
    assert seen >= 20
    assert "fp8" in model.base_report.notes[0] and model.base_report.worst is not None


@pytest.mark.parametrize("how", ["cast", "scaled"])
@pytest.mark.parametrize("base", BASES)
def test_fp8_is_made_whole_where_that_is_asked_for(tmp_path, base, how):
    stored = eighths(transformer_of(base).state_dict(), how)
    model = loaded(base, stored_as(tmp_path, base, stored))
    for name, tensor in model.transformer.state_dict().items():
        value = stored[name]
        if value.dtype == FP8:
            value = (value.float() * stored.get(f"{name}_scale", torch.tensor(1.0))).bfloat16()
        assert torch.equal(tensor, value), name


@pytest.mark.parametrize("wide", ["e5m2", "fp8 of a bias"])
def test_other_floats_of_eight_bits_are_made_whole(tmp_path, wide):
    base, name = "tiny/ltx-video", "transformer_blocks.1.attn1.to_q"
    stored = {each: value.bfloat16() for each, value in transformer_of(base).state_dict().items()}
    changed = f"{name}.weight" if wide == "e5m2" else f"{name}.bias"
    stored[changed] = stored[changed].to(torch.float8_e5m2 if wide == "e5m2" else FP8)
    model = loaded(base, stored_as(tmp_path, base, stored), base_precision="fp8")
    layer = model.transformer.get_submodule(name)
    if wide == "e5m2":
        made = QuantisedLinear.quantise(stored[changed].float(), None, "fp8")
        assert torch.equal(layer.values.view(torch.uint8), made.values.view(torch.uint8))
    else:
        assert torch.equal(layer.bias, stored[changed].bfloat16())


def single_file(path, base: str, how: str, name: str):
    """An LTX-Video file in Lightricks' spelling, its transformer in fp8."""
    spelled = {
        key.replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm."): value
        for key, value in eighths(transformer_of(base).state_dict(), how).items()
    }
    for ours, theirs in (("proj_in.", "patchify_proj."), ("time_embed.", "adaln_single.")):
        spelled = {theirs + k.removeprefix(ours) if k.startswith(ours) else k: v for k, v in spelled.items()}
    config = {key: TINY[base].transformer_config[key] for key in ("num_attention_heads", "attention_head_dim")}
    file = path / name
    tensors = {f"model.diffusion_model.{key}": value for key, value in spelled.items()}
    save_file(tensors, file, metadata={"config": json.dumps({"transformer": config})})
    return file


@pytest.mark.parametrize("how", ["cast", "scaled"])
def test_ltx_videos_single_files_in_fp8_load(tmp_path, how):
    file = single_file(tmp_path, "tiny/ltx-video", how, "mine_fp8_e4m3fn.safetensors")
    folder = stored_as(tmp_path / "f", "tiny/ltx-video", eighths(transformer_of("tiny/ltx-video").state_dict(), how))
    for format in ("bf16", "fp8"):
        one, other = (loaded("tiny/ltx-video", each, base_precision=format).transformer for each in (file, folder))
        assert same(one, other)


@pytest.mark.parametrize("name", ["ltxv-13b-0.9.7-dev-fp8.safetensors", "ltxv-2b-0.9.8-distilled-fp8.safetensors"])
def test_lightricks_own_fp8_files_of_ltx_video_are_refused(tmp_path, name):
    file = single_file(tmp_path, "tiny/ltx-video", "cast", name)
    with pytest.raises(WeightsError, match="may be rotated, and nothing in the file tells"):
        plan_model(base="tiny/ltx-video", transformer=str(file), version="0.9.5")


def torchao_tensors(base: str, rows: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What diffusers 0.42.1 and torchao 0.18 write for Float8WeightOnlyConfig: read off such a file."""
    tensors, metadata = {}, {}
    linears = {f"{n}.weight" for n, m in transformer_of(base).named_modules() if isinstance(m, nn.Linear)}
    for name, value in transformer_of(base).bfloat16().state_dict().items():
        if name not in linears:
            tensors[name], metadata[name] = value, json.dumps({"_type": "Tensor"})
            continue
        stem = name.removesuffix("weight")
        scale = (value.float().abs().amax(1, keepdim=True) if rows else value.float().abs().max().reshape(1, 1)) / 448
        tensors[f"{stem}_weight_qdata"] = (value.float() / scale).to(FP8)
        tensors[f"{stem}_weight_scale"] = scale
        block = [1, value.shape[1]] if rows else list(value.shape)
        described = {"_type": "Float8Tensor", "_data": {"block_size": block}, "_tensor_data_names": ["qdata", "scale"]}
        metadata[name] = json.dumps(described)
    return tensors, metadata


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tensor"])
@pytest.mark.parametrize("base", BASES)
def test_torchao_s_fp8_is_taken_as_it_is(tmp_path, base, rows):
    tensors, metadata = torchao_tensors(base, rows)
    folder = stored_as(tmp_path, base, tensors, {"format": "pt", **metadata})
    model, whole = loaded(base, folder, base_precision="fp8"), loaded(base, folder)
    for name, layer in model.transformer.named_modules():
        if not isinstance(layer, nn.Linear | QuantisedLinear):
            continue
        codes, scale = tensors[f"{name}._weight_qdata"], tensors[f"{name}._weight_scale"]
        if isinstance(layer, QuantisedLinear):
            assert torch.equal(layer.values.view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(layer.scale, scale.reshape(-1).expand(codes.shape[0])), name
        assert torch.equal(whole.transformer.get_submodule(name).weight, (codes.float() * scale).bfloat16()), name
    assert model.base_report.source == "file"


@pytest.mark.parametrize("how", ["nf4", "fp8", "torchao", "whole"])
@pytest.mark.parametrize("base", BASES)
def test_a_plan_knows_what_the_blocks_come_in(tmp_path, base, how):
    if how == "nf4":
        folder, _ = bitsandbytes_folder(tmp_path, base)
    elif how == "torchao":
        folder = stored_as(tmp_path, base, *torchao_tensors(base, True))
    elif how == "fp8":
        folder = stored_as(tmp_path, base, eighths(transformer_of(base).state_dict(), "scaled"))
    else:
        folder = folder_of(tmp_path, base)
    plan = plan_model(base=base, transformer=str(folder), version=TINY[base].version)
    format = {"torchao": "fp8", "whole": ""}.get(how, how)
    assert plan.components["transformer"].stored_format == format
    assert plan.components["vae"].stored_format == ""
    told = [text for text in plan.evidence if "blocks come in" in text]
    assert len(told) == (how != "whole") and all(f"come in {format}" in text for text in told)


def refused(path, base: str, change) -> str:
    tensors = {name: value.bfloat16() for name, value in transformer_of(base).state_dict().items()}
    change(tensors, "transformer_blocks.1.attn1.to_q")
    folder = stored_as(path, base, tensors)
    with pytest.raises(WeightsError) as raised:
        plan_model(base=base, transformer=str(folder), version=TINY[base].version)
    assert "bf16" in raised.value.remedy and "transformer_blocks.1.attn1.to_q.weight" in str(raised.value)
    return str(raised.value)


def as_llm_int8(tensors, layer: str) -> None:
    tensors[f"{layer}.SCB"] = torch.ones(tensors[f"{layer}.weight"].shape[0])
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.int8)


def as_int8(tensors, layer: str) -> None:
    tensors[f"{layer}.weight_scale"] = torch.ones(tensors[f"{layer}.weight"].shape[0], 1)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.int8)


def as_fp4(tensors, layer: str) -> None:
    tensors[f"{layer}.weight"] = torch.zeros(tensors[f"{layer}.weight"].numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{layer}.weight.quant_state.bitsandbytes__fp4"] = torch.zeros(8, dtype=torch.uint8)


def as_nvfp4(tensors, layer: str) -> None:
    rows, columns = tensors[f"{layer}.weight"].shape
    tensors[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    tensors[f"{layer}.weight_scale"] = torch.zeros(rows, columns // 16).to(FP8)
    tensors[f"{layer}.weight_scale_2"] = torch.tensor(1.0)


def as_blocks(tensors, layer: str) -> None:
    tensors[f"{layer}.weight_scale"] = torch.ones(2, 2)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(FP8)


REFUSED = {
    "LLM.int8": (as_llm_int8, "LLM.int8"),
    "int8": (as_int8, "8-bit integers"),
    "FP4": (as_fp4, "FP4"),
    "NVFP4": (as_nvfp4, "NVFP4"),
    "fp8 by blocks": (as_blocks, "scale per block"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("base", BASES)
def test_what_is_not_read_is_refused_by_name(tmp_path, base, change, said):
    assert said in refused(tmp_path, base, change)


def test_gguf_is_refused(tmp_path):
    (tmp_path / "ltxv-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="GGUF"):
        plan_model(base="tiny/ltx-video", transformer=str(tmp_path / "ltxv-Q4_K_M.gguf"), version="0.9.5")


@pytest.mark.parametrize("part", ["absmax", "quant_state.bitsandbytes__nf4", "nested_absmax"])
def test_damaged_nf4_says_what_is_wrong(tmp_path, part):
    folder, _ = bitsandbytes_folder(tmp_path, "tiny/ltx-video")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = f"transformer_blocks.0.attn1.to_q.weight.{part}"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"is no NF4 that can be read: .*to_q\.weight"):
        loaded("tiny/ltx-video", folder, base_precision="nf4")


def test_a_vae_in_fp8_is_refused(tmp_path):
    tiny_vae(TINY["tiny/ltx-video"]).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.conv.weight"] = tensors["encoder.conv_in.conv.weight"].to(FP8)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="has a VAE that is quantised"):
        plan_model(base="tiny/ltx-video", vae=str(tmp_path), version="0.9.5")
