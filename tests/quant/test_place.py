"""Placing a transformer's weights: the op's own bits, in their places, and never twice in memory."""

import dataclasses
from functools import partial

import pytest
import torch
from base_files import CPU, folder_of, loaded, same, transformer_of
from live_bytes import Live
from ltxforge_kernels.nf4 import quantise as quantise_nf4
from torch import Tensor, nn

from ltxforge.models.base_weights import placed
from ltxforge.models.ltx2 import unused_modules
from ltxforge.models.random_weights import random_model
from ltxforge.quant.formats import FORMATS, why_not
from ltxforge.quant.keep import Keep
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.quant.place import _Placer
from ltxforge.specs import TINY

BASES = ["tiny/ltx-video", "tiny/ltx2"]
# The weight as it was, what NF4's rule holds of it while it looks for codes, and the noise that it leaves.
FLOAT32_COPIES = 4


def quantised_layers(transformer: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, QuantisedLinear)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("base", BASES)
def test_every_weight_has_the_bits_that_its_op_gives(tmp_path, base, format):
    model = loaded(base, folder_of(tmp_path, base), base_precision=format)
    original = transformer_of(base).bfloat16()
    layers = quantised_layers(model.transformer)
    wanted = {
        name
        for name, layer in original.named_modules()
        if isinstance(layer, nn.Linear) and not why_not(name, layer.out_features, layer.in_features, format)
    }
    assert layers.keys() == wanted and len(wanted) >= 40
    for name, layer in layers.items():
        truth = original.get_submodule(name)
        made = QuantisedLinear.quantise(truth.weight.detach(), None, format, double=True)
        assert all(torch.equal(layer.stored[part], made.stored[part]) for part in made.stored), name
        assert layer.bias is None or torch.equal(layer.bias, truth.bias), name
    theirs = original.state_dict()
    for name, tensor in model.transformer.state_dict().items():
        if name in theirs:
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == torch.bfloat16, name
    assert not any(tensor.is_meta for tensor in (*model.transformer.parameters(), *model.transformer.buffers()))
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())


def test_double_quantisation_is_a_choice(tmp_path):
    folder = folder_of(tmp_path, "tiny/ltx-video")
    plain = loaded("tiny/ltx-video", folder, base_precision="nf4", double_quant=False)
    layer = plain.transformer.transformer_blocks[0].attn1.to_q
    weight = transformer_of("tiny/ltx-video").bfloat16().transformer_blocks[0].attn1.to_q.weight
    truth = quantise_nf4(weight.detach(), implementation="eager")
    assert (
        not layer.double_quant and torch.equal(layer.absmax, truth.absmax) and torch.equal(layer.packed, truth.packed)
    )


@pytest.mark.parametrize("base", BASES)
def test_files_shards_and_built_in_models_load_alike(tmp_path, base):
    """From a float32 folder in shards, in any order of tensors, as from the built-in model's own memory."""
    folder = folder_of(tmp_path, base, torch.float32, "2MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = loaded(base, folder, base_precision="nf4")
    assert same(ours.transformer, loaded(base, None, base_precision="nf4").transformer)
    assert same(ours.transformer, loaded(base, folder, base_precision="nf4").transformer)
    assert ours.base_report.to_json() == loaded(base, None, base_precision="nf4").base_report.to_json()


@pytest.mark.parametrize("base", BASES)
def test_without_a_format_the_bits_are_the_files(tmp_path, base):
    assert same(loaded(base, folder_of(tmp_path, base)).transformer, transformer_of(base).bfloat16())
    assert not loaded(base, tmp_path).base_report.layers


class Parked:
    """Takes parked tensors, and knows the order."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], Tensor] = {}

    def __call__(self, block: int, name: str, tensor: Tensor) -> None:
        assert (block, name) not in self.tensors and tensor.device.type == "cpu"
        self.tensors[block, name] = tensor


@pytest.mark.parametrize("format", ["bf16", "nf4", "fp8"])
def test_parked_blocks_give_their_large_weights_away_and_nothing_else(tmp_path, format):
    base, folder = "tiny/ltx2", folder_of(tmp_path, "tiny/ltx2")
    parked, whole = Parked(), loaded(base, folder, base_precision=format)
    model = loaded(base, folder, base_precision=format, parked=frozenset({1, 3}), park=parked)
    assert {block for block, _ in parked.tensors} == {1, 3}
    for (block, name), tensor in parked.tensors.items():
        holder, _, part = name.rpartition(".")
        layer = model.transformer.transformer_blocks[block].get_submodule(holder)
        assert getattr(layer, part) is None, name
        truth = getattr(whole.transformer.transformer_blocks[block].get_submodule(holder), part)
        assert tensor.dtype == truth.dtype and torch.equal(tensor, truth), name
        setattr(layer, part, nn.Parameter(tensor, requires_grad=False) if part == "weight" else tensor)
    assert same(model.transformer, whole.transformer)  # nothing is missing, and nothing was given away twice
    blocks = whole.transformer.transformer_blocks
    linears = [m for m in blocks[1].modules() if isinstance(m, nn.Linear | QuantisedLinear)]
    assert len({name.rpartition(".")[0] for block, name in parked.tensors if block == 1}) == len(linears)


def test_a_layer_below_its_floor_stays_whole_and_is_parked_all_the_same():
    """In each of NF4's blocks one weight is 1 and the rest lies half way between two codes."""
    keep, parked = Keep(CPU, torch.bfloat16, "nf4", parked=frozenset({0})), Parked()
    module = transformer_of("tiny/ltx-video")
    spoiled = "transformer_blocks.{}.attn1.to_q"
    for block in (0, 1):
        weight = module.get_submodule(spoiled.format(block)).weight
        weight.data = torch.full(weight.shape, 0.12)
        weight.data[:, ::64] = 1
    values = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    made = placed(module, values.items(), dataclasses.replace(keep, park=parked))
    stayed = {layer.name: layer for layer in made.base_report.layers if layer.reason.startswith("below 15 dB")}
    assert stayed.keys() == {spoiled.format(block) for block in (0, 1)}
    assert all(layer.sqnr < 15 and not layer.format for layer in stayed.values())
    assert torch.equal(parked.tensors[0, "attn1.to_q.weight"], values[spoiled.format(0) + ".weight"].bfloat16())
    assert torch.equal(made.get_submodule(spoiled.format(1)).weight, values[spoiled.format(1) + ".weight"].bfloat16())


@pytest.mark.parametrize("modalities", ["video", "audio"])
def test_what_is_not_computed_waits_on_the_host(modalities):
    module = transformer_of("tiny/ltx2")
    waiting = {id(tensor) for each in unused_modules(module, modalities) for tensor in each.parameters()}
    there = torch.device("cuda")
    keep = Keep(there, torch.bfloat16, waiting=partial(unused_modules, modalities=modalities))
    placer = _Placer(module, keep, None, None)
    places = {name: placer._device(name) for name, _ in module.named_parameters()}
    assert {CPU, there} == set(places.values())
    for name, tensor in module.named_parameters():
        assert places[name] == (CPU if id(tensor) in waiting else there), name


@pytest.mark.parametrize("base", BASES)
def test_on_the_meta_device_the_shapes_are_those_of_a_real_load(base):
    spec = TINY[base]
    model = random_model(spec, torch.device("meta"), torch.bfloat16, "both" if spec.has_audio else "video")
    model.keep = dataclasses.replace(model.keep, base_precision="nf4")
    model.load_transformer()
    real = loaded(base, None, base_precision="nf4").transformer.state_dict()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.transformer.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in real.items()}
    assert all(tensor.is_meta for tensor in model.transformer.state_dict().values())


@pytest.mark.parametrize(("format", "dtype"), [("bf16", torch.float32), ("nf4", torch.float32), ("fp8", torch.bfloat16),
                                               ("int8", torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("source", ["file", "random", "cache"])
def test_the_peak_while_loading_is_what_stays_and_one_layer(tmp_path, format, dtype, source):
    """Whatever a weight passes through in float32, it does so alone."""
    base = "tiny/ltx-video"
    folder = folder_of(tmp_path / "folder", base, dtype)
    cached = {"cache": tmp_path / "cache"} if source == "cache" else {}
    if source == "cache":
        loaded(base, folder, base_precision=format, **cached)
    made = random_model(TINY[base], CPU, torch.bfloat16, "video")
    made.keep = dataclasses.replace(made.keep, base_precision=format)
    with Live() as memory:
        if source == "random":
            made.load_transformer()
        else:
            made = loaded(base, folder, base_precision=format, **cached)
    final = sum(tensor.nbytes for tensor in (*made.transformer.parameters(), *made.transformer.buffers()))
    largest = max(p.numel() for p in transformer_of(base).parameters())
    assert memory.live >= final, "not all that stays was seen"
    whole = sum(p.numel() for p in transformer_of(base).parameters()) * 2
    assert memory.peak <= final + FLOAT32_COPIES * 4 * largest, (memory.peak, final, largest)
    assert memory.peak < 1.2 * whole  # the file's float32 is twice as much
