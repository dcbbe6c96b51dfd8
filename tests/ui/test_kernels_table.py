"""How each op is carried out, in words: once where all have the same answer, with exceptions where some have."""

from __future__ import annotations

import io

import pytest
from ltxforge_kernels.choice import EAGER, OPS, QUANTISED_OPS, Choice, Kernels, Machine, TokenRange, choose
from rich.console import Console

from ltxforge.ui.kernels_table import kernel_rows, kernels_table

NO_GPU = "our kernels need an NVIDIA or AMD GPU, and this is cpu"
ON_CPU = Kernels(tuple(choose(op, Machine("cpu"), "fp32") for op in OPS))
SMALL = TokenRange(0, 1119, 8192, "compile", "h200/kernels.json")
MIXED = Kernels(
    (
        Choice("gelu", "triton", "Triton 3.7.1 on sm_90", (SMALL,)),
        Choice("lora_linear", "triton", "Triton 3.7.1 on sm_90"),
        Choice("flow_matching", "eager", "asked for in the recipe"),
    )
)


def shown(table, width=100):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue()


def test_one_answer_is_one_row():
    origins = {f"kernels.{op}": "device" for op in OPS}
    assert kernel_rows(ON_CPU, origins) == [("kernels", f"eager: {NO_GPU}", "device")]
    assert kernel_rows(EAGER, origins) == []


def test_several_answers_name_their_ops_and_who_decided():
    origins = {"kernels.gelu": "device", "kernels.lora_linear": "device", "kernels.flow_matching": "recipe"}
    assert kernel_rows(MIXED, origins) == [
        ("kernels", "triton for gelu, lora_linear: Triton 3.7.1 on sm_90", "device"),
        ("", "eager for flow_matching: asked for in the recipe", "recipe"),
        ("", "gelu: compile up to 1,119 tokens, 8,192 wide, measured in h200/kernels.json", "device"),
    ]


@pytest.mark.parametrize(
    ("least", "most", "told"),
    [
        (0, None, "gelu: eager 96 wide"),
        (0, 9, "gelu: eager up to 9 tokens, 96 wide"),
        (10, 99, "gelu: eager at 10 to 99 tokens, 96 wide"),
        (6144, None, "gelu: eager from 6,144 tokens on, 96 wide"),
    ],
)
def test_where_an_exception_holds(least, most, told):
    choice = Choice("gelu", "triton", "fast", (TokenRange(least, most, 96, "eager", "x"),))
    assert kernel_rows(Kernels((choice,)), {})[1][1] == f"{told}, measured in x"


def test_the_list_has_every_op_with_what_it_computes_and_one_reason():
    ops = (*OPS, *QUANTISED_OPS)
    text = shown(kernels_table(Kernels(tuple(choose(op, Machine("cpu"), "bf16") for op in ops)), "in bf16 on cpu"))
    assert text.startswith("Kernels in bf16 on cpu\n")
    for op in ops:
        (line,) = [line for line in text.splitlines() if line.split()[:2] == [op, "eager"]]
        assert len(line.split()) > 3
    assert text.count(NO_GPU) == 1 and "Except" not in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_reasons_name_their_ops_where_they_differ(width):
    text = shown(kernels_table(MIXED, "here"), width)
    assert max(map(len, text.splitlines())) <= width
    told = " ".join(text.split())
    assert "Why triton Triton 3.7.1 on sm_90: gelu, lora_linear eager asked for in the recipe: flow_matching" in told
    assert told.endswith("Except gelu compile up to 1,119 tokens, 8,192 wide, measured in h200/kernels.json")
