"""The suite `kernels` end to end on this machine's CPU, with every op at a tiny size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ltxforge_kernels.choice import Kernels, Machine, choose
from ltxforge_kernels.profiles import rows_of

from ltxforge.benchmarks import kernels, resources
from ltxforge.benchmarks.gate import relative_error
from ltxforge.benchmarks.ops.table import SUBJECTS
from ltxforge.benchmarks.subject import Contender, bytes_of
from ltxforge.errors import Stopped
from ltxforge.hardware import detect
from ltxforge.signals import StopRequest
from ltxforge.suites.kernels import OPS, KernelCase, KernelResult

CPU = torch.device("cpu")
CPU_HARDWARE = dataclasses.replace(detect(), kind="cpu", name="Some CPU")
SIZES = {"tokens": 32, "width": 64, "out": 48, "rank": 4, "head_width": 32, "layout": "split", "extent": [2, 4, 6]}
# Not installed, not for a CPU, or compiled, which takes seconds.
WITHOUT = {"Liger", "torch.compile", "compile per token", "compile diffusers", "PEFT compiled", "_int_mm and rescale",
           "_scaled_mm rowwise", "cudnn", "efficient"}  # fmt: skip


def make_case(op: str, **changes: object) -> KernelCase:
    """Eager alone unless told otherwise: compiling takes seconds."""
    peers = [peer for peer in OPS[op].peers if peer not in WITHOUT]
    settings = {"name": "a", "op": op, "device": "cpu", "rounds": 3, "implementations": ["eager"], "peers": peers,
                "timed": OPS[op].timed[-1], **{key: SIZES[key] for key in OPS[op].needs}}  # fmt: skip
    return KernelCase(**{**settings, **changes})


def measure(case: KernelCase, stop: StopRequest | None = None) -> KernelResult:
    session = kernels._Session(CPU_HARDWARE, torch.device("cpu"), {"copy bandwidth": 1e10}, str, stop or StopRequest())
    return session.measure(case)


def test_every_op_of_the_schema_has_its_subject():
    assert SUBJECTS.keys() == OPS.keys()


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_measured_against_its_peers(op):
    case = make_case(op)
    result = measure(case)
    assert result.outcome == "measured", result.reason
    assert result.unavailable == {}
    assert result.medians.keys() == {"eager", *case.peers} and min(result.medians.values()) > 0
    assert result.ratios.keys() == set(case.peers) and result.ours == "eager"
    assert all(gate.passed for gate in result.gates)
    assert (result.op, result.arch, result.dtype, result.tokens, result.width) == (
        op, "cpu", "bf16", case.rows, case.width,
    )  # fmt: skip
    assert result.bytes_moved > 0


@pytest.mark.parametrize(
    "op", ["adaln_rms_norm", "gated_residual_norm", "gated_residual_norm_twice", "qk_norm_rope", "gelu"]
)
def test_a_backward_pass_alone_is_less_than_both(op):
    backward, both = (measure(make_case(op, timed=timed, tokens=512, rounds=9)) for timed in ("backward", "both"))
    assert backward.times["eager"].p20 < both.times["eager"].median
    assert any(gate.what.startswith("gradient of") for gate in backward.gates)


def test_a_convolution_is_measured_by_the_pixels_that_it_reads():
    """As an encoder asks for its implementation, B·T·H·W pixels of so many channels."""
    result = dataclasses.replace(measure(make_case("causal_conv3d", batch=2)), medians={"triton": 2.0, "eager": 1.0})
    assert (result.tokens, result.width) == (2 * 4 * 6, 64)
    small = {**result.entry(), "arch": "sm_90"}
    large = {**small, "tokens": 480, "medians": {"triton": 1.0, "eager": 2.0}}
    rows = rows_of({"cases": [small, large]}, ("causal_conv3d",), "h200")
    choice = choose("causal_conv3d", Machine("cuda", 90, "3.7.1"), "bf16", widths={64, 128}, measured=rows)
    shapes = [(1, 2, 4, 6, 64), (2, 20, 4, 6, 64), (1, 2, 4, 6, 128)]
    assert [Kernels((choice,)).on("causal_conv3d", shape) for shape in shapes] == ["eager", "triton", "triton"]


def gradients(call: kernels.Call) -> list[torch.Tensor]:
    return [each.float() for each in call()]


@pytest.mark.parametrize(
    ("op", "peer"),
    [("lora_linear", "PEFT"), ("lora_linear", "addmm per projection"), ("nf4_lora", "PEFT and bitsandbytes")],
)
def test_a_peer_s_lora_is_trained_in_its_own_dtype_and_no_cast_is_timed(op, peer):
    case = make_case(op)
    subject = SUBJECTS[op](case, CPU)
    given = subject.inputs(kernels.DeviceFiller(CPU))
    upstream = kernels.upstream_of(subject, given)
    ours, theirs = (
        kernels.Call("both", contender, given, subject.leaves, upstream)
        for contender in (subject.ours("eager"), subject.peers[peer]())
    )
    assert [each.dtype for each in theirs()] == [torch.bfloat16] * 3
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert relative_error(other, mine) < 0.02
    with torch.profiler.profile(acc_events=True, record_shapes=True) as watched:
        theirs()
    casts = [event.input_shapes[0] for event in watched.events() if event.name == "aten::_to_copy"]
    assert [case.rank, case.width] not in casts and [case.out, case.rank] not in casts, "made of the masters before"


@pytest.mark.parametrize("peer", [*OPS["causal_conv3d_activated"].peers[:3]])
def test_norm_silu_and_padding_are_a_chain_s_too(peer):
    """In float32 every layout's chain is ours, of a chunk that is not the first."""
    case = make_case("causal_conv3d_activated", dtype="fp32")
    subject = SUBJECTS[case.op](case, CPU)
    given = subject.inputs(kernels.DeviceFiller(CPU))
    with torch.no_grad():
        ours, _ = subject.ours("eager")(given)
        assert relative_error(subject.peers[peer]()(given), ours) < 1e-6
        plain, _ = SUBJECTS["causal_conv3d"](make_case("causal_conv3d", dtype="fp32"), CPU).ours("eager")(given)
    assert relative_error(plain, ours) > 0.1


def test_interleaved_pairs_too():
    assert measure(make_case("qk_norm_rope", layout="interleaved", dtype="fp32")).outcome == "measured"


@pytest.mark.sweep
def test_compiled_code_takes_part():
    result = measure(make_case("gelu", implementations=["compile", "eager"], peers=["PyTorch"], dtype="fp32"))
    assert result.ours == "compile" and result.ratios.keys() == {"eager", "PyTorch"}
    assert result.seconds().keys() == {"compile", "eager"}, "a peer is no figure of ours"


def planted(monkeypatch, op: str, **changes: object) -> None:
    """Change the op's subject: fields by functions of it."""
    make = SUBJECTS[op]

    def changed(case: KernelCase, device: torch.device) -> object:
        subject = make(case, device)
        return dataclasses.replace(subject, **{name: change(subject) for name, change in changes.items()})

    monkeypatch.setitem(SUBJECTS, op, changed)


@pytest.mark.parametrize(("op", "least"), [("int8_w8a8", 35), ("fp8_linear", 27), ("nf4_linear", 20)])
def test_few_bits_leave_what_their_format_must(op, least):
    result = measure(make_case(op, width=512))
    (told,) = [gate.what for gate in result.gates if "quantisation noise" in gate.what]
    assert least <= float(told.split()[0]) < least + 10 and told.endswith(f"at least {least}")


def test_more_noise_than_a_format_may_leave_is_red(monkeypatch):
    def noisy(subject):
        return dataclasses.replace(subject.unquantised, ideal=lambda given: 1.1 * given.x @ given.weight.T)

    planted(monkeypatch, "fp8_linear", unquantised=noisy)
    result = measure(make_case("fp8_linear"))
    assert result.outcome == "gate failed" and "quantisation noise, at least 27: not so" in result.reason


def test_a_red_gate_reports_no_speed(monkeypatch):
    """The truth is eager in float64, so that eager itself, wrong in its own dtype alone, is red."""

    def wrong(subject):
        right = subject.ours("eager")
        return lambda name: Contender(lambda given: right(given) * (1 if given.x.dtype == torch.float64 else 1.1))

    planted(monkeypatch, "gelu", ours=wrong)
    result = measure(make_case("gelu"))
    assert result.outcome == "gate failed" and "output 0: relative error 1.0" in result.reason
    assert result.times == {} and result.medians == {} and result.ratios == {}
    assert result.faults() == [result.reason] and [gate.passed for gate in result.gates] == [False, False]


def boom(_given: object) -> torch.Tensor:
    raise RuntimeError("backend raised:\nno such kernel\nmore")


def test_a_peer_s_trouble_is_told_and_costs_nothing_of_ours(monkeypatch):
    def late(given):
        """Right in the gate, where nothing asks for gradients."""
        if given.x.requires_grad:
            raise MemoryError("no room")
        return torch.nn.functional.gelu(given.x, approximate="tanh")

    peers = {"PyTorch": boom, "other": lambda given: given.x, "late": late}
    planted(monkeypatch, "gelu", peers=lambda _: {k: lambda f=f: Contender(f) for k, f in peers.items()})
    case = make_case("gelu").model_copy(update={"peers": [*peers]})
    result = measure(case)
    assert result.outcome == "measured" and result.medians.keys() == {"eager"}
    assert result.unavailable["PyTorch"] == "RuntimeError: no such kernel"
    assert result.unavailable["other"].startswith("computes something else")
    assert result.unavailable["late"] == "MemoryError: no room"


def test_what_fails_is_a_result(monkeypatch):
    planted(monkeypatch, "gelu", ours=lambda _: lambda name: Contender(boom))
    result = measure(make_case("gelu"))
    assert result.outcome == "failed" and result.reason == "RuntimeError: no such kernel"
    assert result.faults()


def test_too_little_memory_is_no_fault():
    result = measure(make_case("gelu", tokens=10_000_000, width=10_000_000))
    assert result.outcome == "out of memory" and result.faults() == []


def test_cases_for_a_gpu_are_skipped_and_the_other_way_round():
    assert "needs a GPU" in measure(make_case("gelu", device="gpu")).reason
    gpu = dataclasses.replace(CPU_HARDWARE, kind="cuda")
    session = kernels._Session(gpu, torch.device("cpu"), {}, str, StopRequest())
    assert session.measure(make_case("gelu")).outcome == "skipped"


def test_a_stop_leaves_an_unfinished_case_out():
    stop = StopRequest()
    stop.request()
    with pytest.raises(Stopped):
        measure(make_case("gelu"), stop)


def test_a_set_counts_the_bytes_of_packed_weights_too():
    subject = SUBJECTS["nf4_linear"](make_case("nf4_linear"), torch.device("cpu"))
    given = subject.inputs(kernels.DeviceFiller(torch.device("cpu")))
    assert bytes_of(given) == sum(t.nbytes for t in (given.x, given.weight, given.bias)) + given.packed.nbytes


RECORD = {"launch": "gelu bfloat16", "kernel": "forward_kernel", "chip": "sm_90", "dot": False, "registers": 30,
          "spilled_bytes": 0, "shared_bytes": 0, "shared_limit": 1, "widest_load": 16, "widest_store": 16, "narrow": 0,
          "tensor_core": 0, "bulk_copies": 0}  # fmt: skip


def test_of_a_kernel_s_variants_the_worst_is_told():
    others = [{**RECORD, "registers": 40, "widest_load": 4}, {**RECORD, "kernel": "backward_kernel"}]
    worst = resources.worst_of([RECORD, *others])
    assert [(each["kernel"], each["variants"]) for each in worst] == [("forward_kernel", 2), ("backward_kernel", 1)]
    assert worst[0]["registers"] == 40 and worst[0]["widest_load"] == 4 and worst[0]["widest_store"] == 16


@pytest.mark.parametrize(("launch", "mine"), [("gelu bfloat16", True), ("int8 rows float32", True), ("nf4 x", False)])
def test_launches_belong_to_the_ops_that_begin_with_their_name(launch, mine):
    assert resources._is_of(launch, {"gelu", "int8_w8a8"}) is mine


def test_without_triton_nothing_is_compiled_and_that_is_told(monkeypatch):
    lines = []
    monkeypatch.setattr(resources.sys, "executable", "/nowhere/python")
    assert resources.resources_of({"gelu"}, lines.append) == []
    assert "nothing could be compiled" in lines[-1]
