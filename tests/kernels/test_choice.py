"""Which implementation, and why: every machine's answer in words."""

from __future__ import annotations

from pathlib import Path

import ltxforge_kernels
import pytest
from ltxforge_kernels.choice import (
    EAGER,
    OPS,
    QUANTISED_OPS,
    Choice,
    Kernels,
    Machine,
    TokenRange,
    Unavailable,
    choose,
    everything,
)
from ltxforge_kernels.profiles import Measured

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
        (Machine("cuda", 90, "3.7.1", triton_lacks="a C compiler"), "bf16", "eager", "Triton needs a C compiler"),
        (Machine("cuda", 75, "3.7.1"), "fp16", "eager", "our kernels are configured for sm_80, sm_86, "),
        (Machine("cuda", 121, "3.7.1"), "bf16", "triton", "Triton 3.7.1 on sm_121"),
        (Machine("cuda", 110, "3.7.1"), "bf16", "eager", "our kernels are configured for sm_80, sm_86, "),
        (Machine("rocm", "gfx1100", "3.7.1"), "bf16", "eager", "our kernels are configured for sm_80, sm_86, "),
        (Machine("rocm", None, "3.7.1"), "bf16", "eager", "our kernels are configured for sm_80, sm_86, "),
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
        (
            Machine("cuda", 90, "3.7.1", triton_lacks="a C compiler"),
            "compile",
            "needs Triton, which needs a C compiler",
        ),
        (Machine("cpu", compile_lacks="a C++ compiler"), "compile", "torch.compile needs a C\\+\\+ compiler"),
        (H200, "cuda", "flow_matching has no implementation 'cuda', only triton, compile, eager"),
    ],
)
def test_what_cannot_be_is_refused(machine, override, message):
    with pytest.raises(Unavailable, match=message):
        choose("flow_matching", machine, "bf16", override)


# --- what was measured -----------------------------------------------------------------------------------------------

FASTEST = (
    Measured("gelu", 90, "bf16", 8192, 0, 1119, "compile", "h200"),
    Measured("gelu", 90, "bf16", 8192, 1120, None, "triton", "h200"),
    Measured("gelu", 90, "bf16", 16384, 0, None, "compile", "h200"),
)


def test_an_op_is_not_used_where_it_was_measured_to_be_slower():
    choice = choose("gelu", H200, "bf16", measured=FASTEST)
    assert (choice.implementation, choice.reason) == ("triton", "Triton 3.7.1 on sm_90")
    assert choice.exceptions == (
        TokenRange(0, 1119, 8192, "compile", "h200"),
        TokenRange(0, None, 16384, "compile", "h200"),
    )
    assert [choice.of(tokens, 8192) for tokens in (0, 126, 1119, 1120, 6144)] == [*["compile"] * 3, *["triton"] * 2]
    assert choice.of(6144, 16384) == "compile" and choice.of(126, 4096) == "triton"


def test_of_an_unknown_width_every_exception_holds():
    choice = choose("gelu", H200, "bf16", widths={8192}, measured=FASTEST)
    assert [exception.width for exception in choice.exceptions] == [8192]
    assert (choice.of(126), choice.of(6144), choice.of()) == ("compile", "triton", "triton")


def test_of_unknown_tokens_only_what_holds_for_all_does():
    choice = choose("gelu", H200, "bf16", measured=FASTEST)
    assert (choice.of(width=16384), choice.of(width=8192), choice.of()) == ("compile", "triton", "triton")


def test_what_is_slower_everywhere_is_not_used_at_all():
    choice = choose("gelu", H200, "bf16", widths={16384}, measured=FASTEST)
    assert choice == Choice("gelu", "compile", "the fastest at every size that was measured (h200)")
    unmeasured = choose("gelu", H200, "bf16", widths={16384, 4096}, measured=FASTEST)
    assert (unmeasured.of(126, 16384), unmeasured.of(126, 4096)) == ("compile", "triton")


@pytest.mark.parametrize(
    ("op", "machine", "dtype"),
    [("lora_linear", H200, "bf16"), ("gelu", MI300, "bf16"), ("gelu", H200, "fp32")],
)
def test_a_measurement_says_nothing_of_other_ops_chips_and_dtypes(op, machine, dtype):
    choice = choose(op, machine, dtype, measured=FASTEST)
    assert (choice.implementation, choice.exceptions) == ("triton", ())


def test_the_recipe_s_word_wins_over_measurements():
    assert choose("gelu", H200, "bf16", "triton", measured=FASTEST).exceptions == ()


# --- as forwards ask -------------------------------------------------------------------------------------------------


def test_a_run_s_choices_are_asked_by_op():
    kernels = Kernels((choose("gelu", H200, "bf16", widths={8192}, measured=FASTEST),))
    assert (kernels.of("gelu", 6144), kernels.of("gelu", 126), kernels.of("gelu")) == ("triton", "compile", "triton")
    assert kernels.of("lora_linear", 6144) == "eager", "what was not chosen is eager"
    assert hash(kernels) == hash(Kernels((choose("gelu", H200, "bf16", widths={8192}, measured=FASTEST),)))
    assert kernels.choice("gelu").implementations == {"triton", "compile"}
    assert kernels.choice("lora_linear").implementations == {"eager"}
    with pytest.raises(KeyError, match="no op 'gleu', only causal_conv3d"):
        kernels.of("gleu")


@pytest.mark.parametrize("op", [*OPS, *QUANTISED_OPS])
def test_everything_and_nothing(op):
    assert EAGER.of(op) == "eager"
    assert everything("compile").of(op, 6144, 4096) == "compile"


def test_every_op_that_has_a_folder_is_named():
    folders = {path.parent.name for path in Path(ltxforge_kernels.__file__).parent.glob("*/__init__.py")}
    assert folders <= {*OPS, *QUANTISED_OPS}


def test_a_rank_that_the_kernel_does_not_take():
    assert choose("lora_linear", H200, "bf16", rank=256).implementation == "triton"
    choice = choose("lora_linear", H200, "bf16", rank=257)
    assert (choice.implementation, choice.reason) == (
        "eager",
        "our kernel takes a rank of 256 at most, and this is 257",
    )
    with pytest.raises(Unavailable, match="a rank of 256 at most"):
        choose("lora_linear", H200, "bf16", "triton", rank=257)
