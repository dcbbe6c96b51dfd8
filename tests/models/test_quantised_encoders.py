"""Text encoders in few bits: against bitsandbytes' own NF4, against the encoder in 16 bits, and what loading takes."""

import bitsandbytes.functional
import pytest
import torch
from live_bytes import Live
from torch import Tensor, nn

from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.detect import plan_model
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.load import load_model
from ltxforge.models.ltx2_text import hidden_states
from ltxforge.models.quantised_encoders import device_of, markers, quantised_module
from ltxforge.models.text_encoders import load_gemma, load_t5
from ltxforge.quant.formats import NARROW
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.specs import TINY

CPU = torch.device("cpu")
CAPTION = "a red ball rolls over green hills"
NAMES = ["tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.5"]
# Relative error of what the encoder gives, whose random weights are the worst case: nothing averages their noise out.
BOUNDS = {"int8": 0.04, "nf4": 0.4}


def tiny_encoder(name: str):
    return (ltx2_tiny if TINY[name].has_audio else tiny).tiny_text_encoder(TINY[name])


def loaded(tiny_folder, name: str, precision: str, dtype=torch.float32, source=None):
    """An encoder and its tokenizer from the folder of a whole model."""
    folder = tiny_folder(name)
    load = load_gemma if TINY[name].has_audio else load_t5
    tokenizer = source or folder / "tokenizer"
    return load(source or folder / "text_encoder", tokenizer, CPU, dtype, precision)


@torch.no_grad()
def read(encoder, tokenizer) -> Tensor:
    if hasattr(encoder, "model"):
        return hidden_states(encoder, tokenizer, CAPTION, 64)
    return encoder(tokenizer([CAPTION], return_tensors="pt").input_ids)[0]


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_close_to_those_of_16_bits(name, precision, tiny_folder, record_property):
    whole, quantised = (read(*loaded(tiny_folder, name, each)) for each in ("bf16", precision))
    record_property("count", f"text of {name} in {precision}: {error(quantised, whole):.3f} from 16 bits")
    assert 0 < error(quantised, whole) < BOUNDS[precision]


@pytest.mark.parametrize("name", NAMES)
def test_layers_in_nf4_are_bitsandbytes_own(name, tiny_folder):
    """The stock encoder over weights that bitsandbytes has quantised and made whole again, with its doubled scales."""
    stock, tokenizer = loaded(tiny_folder, name, "bf16")
    for layer_name, layer in stock.named_modules():
        if isinstance(layer, nn.Linear) and is_repeated(layer_name) and min(layer.weight.shape) >= NARROW:
            packed, state = bitsandbytes.functional.quantize_4bit(
                layer.weight.detach(), quant_type="nf4", compress_statistics=True
            )
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state).reshape(layer.weight.shape)
    assert error(read(*loaded(tiny_folder, name, "nf4")), read(stock, tokenizer)) < 1e-5


def is_repeated(name: str) -> bool:
    """Within the layers that read text, not the towers beside them."""
    return (".layers." in name or ".block." in name) and "vision" not in name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantised_and_what_is_kept(name, tiny_folder):
    encoder, _ = loaded(tiny_folder, name, "nf4", torch.bfloat16)
    original = dict(tiny_encoder(name).named_modules())
    for layer_name, layer in encoder.named_modules():
        was = original[layer_name]
        if isinstance(was, nn.Linear):
            quantised = is_repeated(layer_name) and min(was.weight.shape) >= NARROW
            assert isinstance(layer, QuantisedLinear if quantised else nn.Linear), layer_name
    kept = {key: value for key, value in encoder.named_parameters() if not key.startswith("lm_head")}
    assert kept and all(value.dtype == torch.bfloat16 and not value.requires_grad for value in kept.values())
    for key, value in kept.items():
        assert torch.equal(value, dict(tiny_encoder(name).named_parameters())[key].bfloat16()), key
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept.values()), "a marker was left"
    assert not [key for key, _ in encoder.named_modules() if "vision" in key or "projector" in key]
    words = encoder.get_input_embeddings().weight
    tables = [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight.shape == words.shape]
    assert all(part.weight is words for part in tables), "what was tied is no longer"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_packed_file_a_folder_and_a_built_in_encoder_give_the_same_bits(precision, tiny_folder, packed_gemma):
    name = "tiny/ltx2.5"
    from_folder, tokenizer = loaded(tiny_folder, name, precision)
    states = [read(from_folder, tokenizer), read(*loaded(tiny_folder, name, precision, source=packed_gemma))]
    states.append(read(quantised_module(tiny_encoder(name), CPU, torch.float32, precision), tokenizer))
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["tiny/ltx-video", "tiny/ltx2"])
def test_the_whole_way_from_a_plan(name, tiny_folder):
    """Folder and built-in model; the connectors stay what they are."""
    made = {}
    for base in (str(tiny_folder(name)), name):
        for precision in ("bf16", "nf4"):
            plan = plan_model(base=base, version=TINY[name].version if base != name else None)
            model = load_model(
                plan, CPU, torch.float32, modalities="both" if TINY[name].has_audio else "video",
                text_encoder_precision=precision,
            )  # fmt: skip
            (prompt,) = model.encode_prompts([WantedPrompt(CAPTION, "video")], 128)
            made[base, precision] = next(iter(prompt.tensors.values()))
    folder = str(tiny_folder(name))
    for precision in ("bf16", "nf4"):
        assert torch.equal(made[folder, precision], made[name, precision])
    assert 0 < error(made[name, "nf4"], made[name, "bf16"]) < BOUNDS["nf4"]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_while_loading_is_what_stays_and_one_layer(name, precision, tiny_folder, packed_gemma):
    """From float32 files, whose whole would be several times as much; transformers' own building included."""
    source = packed_gemma if name == "tiny/ltx2.5" else None
    with Live() as memory:
        encoder, _ = loaded(tiny_folder, name, precision, torch.bfloat16, source)
    final = sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers()))
    sizes = [parameter.numel() for parameter in tiny_encoder(name).parameters()]
    assert memory.peak <= final + 10 * 4 * max(sizes), "more than a layer's copies in float32 beside what stays"
    if name == "tiny/ltx-video":  # the others have more layers too small to be quantised than large ones
        assert memory.peak < 0.8 * 4 * sum(sizes)


def test_markers_weigh_nothing_and_say_who_they_are():
    made = markers({"a": (4000, 4000, 4000), "b": (), "c": (7,)})
    assert [int(value[(0,) * value.ndim]) for value in made.values()] == [0, 1, 2]
    assert made["a"].shape == (4000, 4000, 4000) and made["a"].untyped_storage().nbytes() == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_the_words_wait_on_the_host(name, tiny_folder):
    cuda = torch.device("cuda", 0)
    here, tokenizer = loaded(tiny_folder, name, "nf4")
    there = quantised_module(tiny_encoder(name), cuda, torch.float32, "nf4")
    assert device_of(there) == cuda and there.get_input_embeddings().weight.device == CPU
    if hasattr(there, "model"):
        states = hidden_states(there, tokenizer, CAPTION, 64)
    else:
        states = there(tokenizer([CAPTION], return_tensors="pt").input_ids.to(cuda))[0]
    assert states.device == cuda and error(states.cpu(), read(here, tokenizer)) < 1e-2
