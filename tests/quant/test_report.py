"""What is told of a quantised base: noise measured in float64, reasons, sizes, one line."""

import dataclasses
import json
import math

import pytest
import torch
from base_files import loaded, transformer_of
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from ltxforge.events import BaseQuantised, to_json
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.quant.report import BaseReport, LayerReport
from ltxforge.ui.lines import line


def decibels(weight: torch.Tensor, result: torch.Tensor) -> float:
    weight, result = weight.double(), result.double()
    return (10 * torch.log10(weight.square().sum() / (weight - result).square().sum())).item()


def test_the_noise_is_bitsandbytes_own():
    report = loaded("tiny/ltx-video", None, base_precision="nf4").base_report
    modules = dict(transformer_of("tiny/ltx-video").named_modules())
    assert len(report.quantised) == 40
    for layer in report.quantised:
        weight = modules[layer.name].weight.detach()
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert layer.sqnr == pytest.approx(decibels(weight, dequantize_4bit(packed, state)), abs=1e-3)
        assert layer.floor == 15 and layer.sqnr > 20
    assert report.worst.sqnr == min(layer.sqnr for layer in report.quantised)


@pytest.mark.parametrize(("format", "largest"), [("int8", 127.0), ("fp8", 448.0)])
def test_the_noise_of_eight_bits_is_that_of_the_definition(format, largest):
    report = loaded("tiny/ltx2", None, base_precision=format).base_report
    modules = dict(transformer_of("tiny/ltx2").named_modules())
    for layer in report.quantised[::7]:
        weight = modules[layer.name].weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / largest
        codes = (weight / scale).round() if format == "int8" else (weight / scale).to(torch.float8_e4m3fn).float()
        assert layer.sqnr == pytest.approx(decibels(weight, codes * scale), abs=0.05), layer.name


def test_sizes_are_those_of_what_is_held():
    model = loaded("tiny/ltx2", None, base_precision="nf4")
    layers = [module for module in model.transformer.modules() if isinstance(module, QuantisedLinear)]
    held = sum(part.nbytes for layer in layers for part in layer.stored.values())
    whole = dict(transformer_of("tiny/ltx2").named_modules())
    report = model.base_report
    assert report.bytes_after == held
    assert report.bytes_before == sum(2 * whole[layer.name].weight.numel() for layer in report.quantised)


REPORT = BaseReport(
    "nf4",
    "bf16",
    (
        LayerReport("a", "nf4", "", 21.5, 20.0, 8_000_000_000, 2_063_000_000),
        LayerReport("b", "nf4", "", 20.94, 20.0, 4_000_000_000, 1_031_000_000),
        LayerReport("c", "", "below 20 dB", 19.2, 20.0, 100, 100),
        LayerReport("d", "", "outside the blocks", None, 20.0, 100, 100),
        LayerReport("e", "", "outside the blocks", None, 20.0, 100, 100),
        LayerReport("f", "nf4", "", math.inf, 20.0, 0, 0),
    ),
)


def test_one_line_says_it():
    assert line(BaseQuantised(REPORT.to_json())) == (
        "base",
        "nf4: 3 of 6 layers, 12.0 GB → 3.1 GB, worst 20.9 dB of signal to quantisation noise (b);"
        " 3 stay bf16: 2 outside the blocks, 1 below 20 dB",
    )


def test_one_reason_is_not_counted_twice():
    one = dataclasses.replace(REPORT, layers=tuple(each for each in REPORT.layers if each.name != "c"))
    assert line(BaseQuantised(one.to_json()))[1].endswith("; 2 stay bf16: outside the blocks")


def test_the_report_survives_json():
    text = json.dumps(to_json(BaseQuantised(REPORT.to_json())), allow_nan=False)
    again = BaseReport.from_json(json.loads(text)["report"])
    assert again.to_json() == REPORT.to_json()
    assert again == REPORT and again.layers[3].sqnr is None and again.layers[5].sqnr == math.inf


def test_how_far_quantising_is_is_told_block_by_block():
    told = []
    loaded("tiny/ltx-video", None, base_precision="int8", emit=told.append)
    phase = [line(event) for event in told if not isinstance(event, BaseQuantised)]
    assert phase[0] == ("quantise", "40 layers; to int8 on cpu")
    assert [text for _, text in phase[1:-1]] == ["1 done", "11 done", "21 done", "31 done"]
    assert phase[-1][1].startswith("done in")
    told.clear()
    loaded("tiny/ltx-video", None, emit=told.append)
    assert not told
