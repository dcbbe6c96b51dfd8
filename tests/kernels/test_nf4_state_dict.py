"""NF4 weights by bitsandbytes' keys: its files read, ours read by it, and what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.nf4 import dequantise, quantise
from ltxforge_kernels.nf4.state_dict import DESCRIPTION, from_state_dict, holds_nf4, to_state_dict
from safetensors.torch import load, save

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAME = "transformer_blocks.0.attn1.to_q.weight"
KEY = f"{NAME}.{DESCRIPTION}"


def source(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (0.1 * Filler().normal(24, 128)).to(dtype)


def layer_of(dtype: torch.dtype, double: bool, **options: object) -> Linear4bit:
    """bitsandbytes' own, quantised."""
    layer = Linear4bit(128, 24, bias=False, compress_statistics=double, quant_type="nf4", **options)
    layer.weight = Params4bit(source(dtype), compress_statistics=double, quant_type="nf4", module=layer, **options)
    return layer.to("cpu")


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_we_write_is_what_linear4bit_writes(dtype, double):
    """Every key, dtype, shape and byte; and what is read is what was written."""
    written = layer_of(dtype, double).state_dict(prefix=NAME.removesuffix("weight"))
    ours = to_state_dict(quantise(source(dtype), double=double, implementation="eager"), NAME)
    assert ours.keys() == written.keys()
    for key, tensor in written.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    for tensors in (ours, load(save({key: tensor.contiguous() for key, tensor in written.items()}))):
        again = to_state_dict(from_state_dict(tensors, NAME), NAME)
        assert all(torch.equal(again[key], tensor) for key, tensor in written.items())


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_bitsandbytes_reads_ours(double):
    """As diffusers and transformers load files that are quantised already."""
    weight = quantise(source(), 128, double, implementation="eager")
    tensors = load(save(to_state_dict(weight, "weight")))
    stats = {key: tensor for key, tensor in tensors.items() if key != "weight"}
    layer = Linear4bit(128, 24, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit.from_prequantized(tensors["weight"], stats, device="cpu", module=layer)
    x = Filler(seed=1).normal(3, 128, dtype=torch.bfloat16).requires_grad_()
    assert torch.equal(layer(x), x @ dequantise(weight, implementation="eager").mT)


@pytest.mark.parametrize("storage", DTYPES, ids=str)
def test_codes_may_be_stored_as_another_dtype(storage):
    tensors = layer_of(torch.bfloat16, True, quant_storage=storage).state_dict()
    assert tensors["weight"].dtype == storage
    weight = from_state_dict(tensors, "weight")
    assert torch.equal(weight.packed, quantise(source(), double=True, implementation="eager").packed)


def test_which_weights_are_nf4():
    tensors = to_state_dict(quantise(source(), implementation="eager"), NAME)
    assert holds_nf4(tensors.keys(), NAME)
    assert not holds_nf4(tensors.keys(), NAME.replace("to_q", "to_k"))
    assert not holds_nf4({NAME}, NAME)


def described(**changes: object) -> torch.Tensor:
    tensors = to_state_dict(quantise(source(), double=True, implementation="eager"), NAME)
    return json_tensor({**json.loads(bytes(tensors[KEY].tolist())), **changes})


def json_tensor(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"": None}, f"{NAME} is missing"),
        ({".absmax": None}, f"{NAME}.absmax is missing"),
        ({".quant_map": None}, f"{NAME}.quant_map is missing"),
        ({".nested_quant_map": None}, f"{NAME}.nested_quant_map is missing"),
        ({f".{DESCRIPTION}": None}, f"{KEY} is missing"),
        ({".nested_absmax": None}, r"absmax is torch.uint8 \[48\], not torch.float32 of 48 elements"),
        ({"": torch.zeros(1535, 1, dtype=torch.uint8)}, r"not the 1536 bytes of \[24, 128\]"),
        ({".absmax": torch.zeros(47, dtype=torch.uint8)}, r"absmax is torch.uint8 \[47\], not torch.uint8 of 48"),
        ({".absmax": torch.zeros(48)}, r"absmax is torch.float32 \[48\], not torch.uint8"),
        ({".nested_absmax": torch.zeros(2)}, r"nested_absmax is torch.float32 \[2\], not torch.float32 of 1 elements"),
        ({".nested_absmax": torch.tensor([torch.nan])}, "nested_absmax holds numbers that are not finite"),
        ({".quant_map": torch.linspace(-1, 1, 16)}, "quant_map holds other values than NF4's"),
        ({".quant_map": torch.zeros(15)}, "quant_map is"),
        ({".nested_quant_map": torch.zeros(255)}, "nested_quant_map is"),
        ({f".{DESCRIPTION}": torch.tensor([255, 1], dtype=torch.uint8)}, "is no JSON: "),
        ({f".{DESCRIPTION}": json_tensor([1])}, "is no JSON object"),
        ({f".{DESCRIPTION}": torch.zeros(3)}, f"{KEY} is torch.float32"),
        ({f".{DESCRIPTION}": described(quant_type="fp4")}, "quant_type is 'fp4', not 'nf4'"),
        ({f".{DESCRIPTION}": described(blocksize=48)}, "blocksize is 48, not one of"),
        ({f".{DESCRIPTION}": described(blocksize=True)}, "blocksize is True"),
        ({f".{DESCRIPTION}": described(dtype="int8")}, "dtype is 'int8', not one of"),
        ({f".{DESCRIPTION}": described(dtype=[])}, r"dtype is \[\]"),
        ({f".{DESCRIPTION}": described(shape=[24])}, r"shape is \[24\], not two whole numbers"),
        ({f".{DESCRIPTION}": described(shape=[24, -128])}, r"shape is \[24, -128\]"),
        ({f".{DESCRIPTION}": described(shape=None)}, "shape is None"),
        ({f".{DESCRIPTION}": described(nested_offset=float("inf"))}, "nested_offset is inf, not a finite number"),
        ({f".{DESCRIPTION}": described(nested_offset="1")}, "nested_offset is '1'"),
        ({f".{DESCRIPTION}": described(nested_blocksize=0)}, "nested_blocksize is 0"),
        ({f".{DESCRIPTION}": described(nested_dtype="float16")}, "nested_dtype is 'float16', not 'float32'"),
    ],
)
def test_what_is_damaged_is_named(changes, message):
    tensors = to_state_dict(quantise(source(), double=True, implementation="eager"), NAME)
    for suffix, tensor in changes.items():
        if tensor is None:
            del tensors[NAME + suffix]
        else:
            tensors[NAME + suffix] = tensor
    with pytest.raises(ValueError, match=message):
        from_state_dict(tensors, NAME)


def test_a_description_without_its_nested_part():
    tensors = to_state_dict(quantise(source(), double=True, implementation="eager"), NAME)
    tensors[KEY] = to_state_dict(quantise(source(), implementation="eager"), NAME)[KEY]
    with pytest.raises(ValueError, match="does not describe .*nested_absmax"):
        from_state_dict(tensors, NAME)
