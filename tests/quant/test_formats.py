"""What each format stores, to the byte, and of which layers: known without torch, held to what torch then stores."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ltxforge_kernels.choice import QUANTISED_OPS
from ltxforge_kernels.precision import FLOORS
from quantised_block import KEPT

from ltxforge.lora.layers import linear_layers
from ltxforge.quant.formats import FORMATS, constant_bytes, quantisable, stored_bytes, stored_tensors, why_not
from ltxforge.quant.linear import TABLES, QuantisedLinear
from ltxforge.recipe.schema import Memory
from ltxforge.specs import SPECS, TINY

# Odd numbers of elements, blocks that are not full, more than one nested block, the sides of real layers.
SHAPES = [(64, 64), (65, 67), (1, 3), (128, 512), (640, 128), (256, 1024), (63, 2048)]


@pytest.mark.parametrize(("format", "double"), KEPT)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bytes_are_those_of_the_real_tensors(format, double, rows, columns):
    draw = torch.Generator().manual_seed(rows)
    layer = QuantisedLinear.quantise(torch.randn(rows, columns, generator=draw), None, format, double)
    assert sum(part.nbytes for part in layer.stored.values()) == stored_bytes(format, rows, columns, double)
    assert sum(layer.get_buffer(name).nbytes for name in TABLES if hasattr(layer, name)) == constant_bytes(
        format, double
    )
    assert {name: part.shape for name, part in stored_tensors(format, rows, columns, double).items()} == {
        name: tuple(part.shape) for name, part in layer.stored.items()
    }


def test_bits_for_each_weight():
    """Of LTX-2's widest layer: what the field says of each format."""
    bits = {key: 8 * stored_bytes(key[0], 4096, 16384, key[1]) / (4096 * 16384) for key in KEPT}
    assert {key: round(value, 3) for key, value in bits.items()} == {
        ("nf4", False): 4.5,
        ("nf4", True): 4.127,
        ("int8", False): 8.002,
        ("int8-w8a8", False): 8.002,
        ("fp8", False): 8.002,
    }


@pytest.mark.parametrize("version", sorted(SPECS) + sorted(TINY))
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_all_but_gates_are_quantised_in_the_blocks_of_every_version(version, format):
    layers = linear_layers((SPECS | TINY)[version])
    inside = {name for name in layers if name.startswith("transformer_blocks.") and "to_gate_logits" not in name}
    assert inside == quantisable(layers, format).keys()


def test_why_a_layer_stays_as_it_is():
    name = "transformer_blocks.0.ff.net.2"
    assert [why_not(name, 128, 512, each) for each in FORMATS] == [""] * len(FORMATS)
    assert why_not("proj_out", 128, 512, "nf4") == "outside the blocks"
    assert why_not(name, 128, 63, "nf4") == why_not(name, 32, 128, "int8") == "narrower than 64"
    assert why_not(name, 128, 72, "fp8") == "128 x 72 are no multiples of 16" and not why_not(name, 128, 72, "nf4")


def test_formats_are_the_recipe_s_and_their_ops_the_kernels():
    asked = Memory.model_json_schema()["properties"]["base_precision"]["anyOf"][0]["enum"]
    assert {*FORMATS, "bf16"} == set(asked) and [format.name for format in FORMATS.values()] == list(FORMATS)
    assert {format.op for format in FORMATS.values()} == set(QUANTISED_OPS)
    assert {format.floor for format in FORMATS.values()} == set(FLOORS.values())


def test_formats_are_known_without_torch():
    code = "import ltxforge.quant.formats, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
