"""Which implementation, and why: every machine's answer in words."""

from __future__ import annotations

import pytest
from ltxforge_kernels.choice import Machine, Unavailable, choose

H200 = Machine("cuda", 90, "3.7.1")
MI300 = Machine("rocm", "gfx942", "3.7.1")


@pytest.mark.parametrize(
    ("machine", "dtype", "implementation", "reason"),
    [
        (H200, "bf16", "triton", "Triton 3.7.1 on sm_90"),
        (MI300, "fp16", "triton", "Triton 3.7.1 on gfx942"),
        (Machine("cpu", None, "3.7.1"), "fp32", "eager", "our kernels need an NVIDIA or AMD GPU, and this is cpu"),
        (Machine("mps"), "bf16", "eager", "our kernels need an NVIDIA or AMD GPU, and this is mps"),
        (Machine("cuda", 90), "bf16", "eager", "Triton is not installed"),
        (Machine("cuda", 75, "3.7.1"), "fp16", "eager", "our kernels start at sm_80, and this is sm_75"),
        (Machine("cuda", 90, "3.7.1", True), "bf16", "eager", "TRITON_INTERPRET is set"),
        (H200, "fp64", "eager", "our kernels hold fp32, bf16, fp16, not fp64"),
    ],
)
def test_the_choice_and_its_reason(machine, dtype, implementation, reason):
    choice = choose("flow_matching", machine, dtype)
    assert choice.implementation == implementation
    assert choice.reason.startswith(reason)


@pytest.mark.parametrize("override", ["triton", "compile", "eager"])
def test_the_recipe_s_word_holds(override):
    choice = choose("flow_matching", H200, "bf16", override)
    assert (choice.implementation, choice.reason) == (override, "asked for in the recipe")


@pytest.mark.parametrize("override", ["compile", "eager"])
def test_a_cpu_can_compile(override):
    assert choose("flow_matching", Machine("cpu"), "fp32", override).implementation == override


@pytest.mark.parametrize(
    ("machine", "override", "message"),
    [
        (Machine("cpu"), "triton", "flow_matching cannot be triton here: our kernels need an NVIDIA or AMD GPU"),
        (Machine("cuda", 90), "compile", "torch.compile needs Triton on a GPU"),
        (H200, "cuda", "flow_matching has no implementation 'cuda', only triton, compile, eager"),
    ],
)
def test_what_cannot_be_is_refused(machine, override, message):
    with pytest.raises(Unavailable, match=message):
        choose("flow_matching", machine, "bf16", override)
