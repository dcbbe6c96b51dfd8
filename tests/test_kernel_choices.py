"""What a recipe and an earlier attempt say about the ops: which are used, how, and what is told when that changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from ltxforge_kernels.choice import EAGER, OPS, QUANTISED_OPS, Choice, Kernels, Machine, TokenRange

from ltxforge.errors import PlanError
from ltxforge.kernel_choices import asked_for, changed, choose_kernels, used_ops, widths_of
from ltxforge.recipe.schema import Kernels as Section
from ltxforge.specs import SPECS, TINY

CPU = Machine("cpu", triton="3.7.1")
H200 = Machine("cuda", 90, "3.7.1")
A10 = Machine("cuda", 86, "3.7.1")
BARE = Machine("cuda", 90)


def chosen(machine=H200, precision="bf16", encoders="bf16", ops=OPS, **options):
    return choose_kernels(ops, machine, precision, encoders, **options)


def answers(kernels):
    return {choice.op: choice.implementation for choice in kernels.choices}


@pytest.mark.parametrize(("machine", "implementation"), [(CPU, "eager"), (BARE, "eager"), (H200, "triton")])
def test_every_used_op_has_one_answer(machine, implementation):
    assert answers(chosen(machine)) == dict.fromkeys(OPS, implementation)


def test_sound_alone_meets_no_convolution_of_pictures():
    assert set(used_ops("both")) == set(used_ops("video")) == set(OPS)
    assert set(OPS) - set(used_ops("audio")) == {"causal_conv3d"}


@pytest.mark.parametrize(("base", "op"), [("nf4", "nf4"), ("int8", "int8"), ("int8-w8a8", "int8"), ("fp8", "fp8")])
def test_a_quantised_base_has_its_own_op_and_a_plain_one_none(base, op):
    assert used_ops("both", base) == (*OPS, op) and used_ops("both", "bf16") == OPS
    kernels = chosen(ops=used_ops("both", base), asked=asked_for(Section(**{op: "eager"})))
    assert answers(kernels) == {**dict.fromkeys(OPS, "triton"), op: "eager"}


def test_a_key_wins_over_all():
    section = Section(all="compile", gelu="eager")
    assert asked_for(section) == {**dict.fromkeys((*OPS, *QUANTISED_OPS), "compile"), "gelu": "eager"}
    assert asked_for(Section(gelu="eager")) == {"gelu": "eager"} and asked_for(Section()) == {}
    kernels = chosen(ops=(*OPS, *QUANTISED_OPS), asked=asked_for(section))
    assert answers(kernels) == asked_for(section)
    assert {choice.reason for choice in kernels.choices} == {"asked for in the recipe"}


def test_the_section_has_a_key_for_each_op():
    assert set(Section.model_fields) == {"all", *OPS, *QUANTISED_OPS}


def test_encoding_has_a_dtype_of_its_own():
    kernels = chosen(precision="bf16", encoders="fp64")
    assert answers(kernels) == {**dict.fromkeys(OPS, "triton"), "causal_conv3d": "eager"}


def test_what_cannot_run_is_refused_all_at_once():
    with pytest.raises(PlanError) as refusal:
        chosen(CPU, asked={"gelu": "triton", "lora_linear": "triton", "flow_matching": "compile"})
    assert str(refusal.value) == (
        "what [kernels] asks for cannot run here: triton for gelu, lora_linear: our kernels need an NVIDIA or AMD GPU,"
        ' and this is cpu\n  Leave it out, then the plan chooses; "eager" runs everywhere.'
    )
    lacking = dataclasses.replace(BARE, triton="3.7.1", triton_lacks="a C compiler")
    with pytest.raises(PlanError, match="triton for gelu: Triton needs a C compiler; compile for lora_linear: torch"):
        chosen(lacking, asked={"gelu": "triton", "lora_linear": "compile"})


# --- a run that goes on ----------------------------------------------------------------------------------------------

MIXED = Kernels(
    (
        Choice("gelu", "compile", "asked for in the recipe"),
        Choice("lora_linear", "triton", "old", (TokenRange(0, 9, 2048, "eager", "old"),)),
        Choice("flow_matching", "triton", "Triton 3.6.0 on sm_90"),
    )
)


def test_a_run_keeps_what_it_began_with():
    kernels = chosen(A10, ops=("gelu", "lora_linear", "flow_matching"), previous=MIXED)
    assert kernels.choices == (
        Choice("gelu", "compile", "this run began with it"),
        Choice("lora_linear", "triton", "this run began with it", (TokenRange(0, 9, 2048, "eager", "old"),)),
        Choice("flow_matching", "triton", "Triton 3.7.1 on sm_86"),
    )
    assert changed(MIXED, kernels) == []
    assert chosen(A10, ops=("gelu", "lora_linear", "flow_matching"), previous=kernels) == kernels


def test_unless_the_recipe_says_another():
    kernels = chosen(asked={"gelu": "eager"}, ops=("gelu", "flow_matching"), previous=MIXED)
    assert answers(kernels) == {"gelu": "eager", "flow_matching": "triton"}
    assert changed(MIXED, kernels) == ["gelu: eager instead of compile"]


def test_or_the_machine_cannot():
    kernels = chosen(BARE, ops=("gelu", "lora_linear", "flow_matching"), previous=MIXED)
    assert {(choice.implementation, choice.reason) for choice in kernels.choices} == {
        ("eager", "Triton is not installed")
    }
    assert changed(MIXED, kernels) == [
        "gelu: eager instead of compile",
        "lora_linear, flow_matching: eager instead of triton",
    ]


def test_an_exception_must_be_able_to_run_too():
    before = Kernels((Choice("gelu", "eager", "", (TokenRange(0, 9, 2048, "triton", "x"),)),))
    assert before.choices[0].implementations == {"eager", "triton"}
    kernels = chosen(CPU, ops=("gelu",), previous=before)
    assert kernels.choices[0].exceptions == ()
    assert changed(before, kernels) == ["gelu: eager at other sizes"]


def test_a_run_without_choices_was_eager():
    kernels = chosen(ops=("gelu",), previous=EAGER)
    assert kernels.choices == (Choice("gelu", "eager", "this run began with it"),)
    assert changed(EAGER, kernels) == [] and changed(EAGER, chosen(ops=("gelu",))) == ["gelu: triton instead of eager"]


# --- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "op", "widths"),
    [
        ("0.9.5", "adaln_rms_norm", {2048}),
        ("0.9.5", "gelu", {8192}),
        ("0.9.5", "flow_matching", {128}),
        ("0.9.7", "lora_linear", {4096, 16384}),
        ("0.9.7", "nf4", {4096, 16384}),
        ("2.0", "qk_norm_rope", {4096, 2048}),
        ("2.0", "gelu", {16384, 8192}),
        ("0.9.0", "causal_conv3d", {48, 128, 256, 512}),
        ("2.0", "causal_conv3d", {48, 128, 256, 512, 1024, 2048}),
    ],
)
def test_the_widths_are_those_of_the_published_models(version, op, widths):
    spec = next(spec for name, spec in SPECS.items() if name.startswith(version))
    assert widths_of(op, spec) == widths


def test_a_convolution_is_as_wide_as_what_it_reads_in_this_encoder():
    """So that what was measured of an encoder that is wider says nothing of this one, and nothing of it is missed."""
    for name, spec in {**SPECS, **TINY}.items():
        with torch.device("meta"):
            vae = (AutoencoderKLLTX2Video if spec.has_audio else AutoencoderKLLTXVideo)(**spec.vae_config)
        read = {module.in_channels for module in vae.encoder.modules() if isinstance(module, torch.nn.Conv3d)}
        assert widths_of("causal_conv3d", spec) == read, name


def test_a_high_rank_is_eager_in_its_own_op_alone():
    high = answers(chosen(rank=512))
    assert high.pop("lora_linear") == "eager" and set(high.values()) == {"triton"}
    with pytest.raises(PlanError, match="a rank of 256 at most, and this is 512"):
        chosen(rank=512, asked={"lora_linear": "triton"})
