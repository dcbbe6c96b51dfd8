"""Fp8 products: codes to the bit, against float64, operands that a GPU would refuse, and inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error
from ltxforge_kernels import fp8
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.fp8 import launch, reference
from ltxforge_kernels.fp8.inputs import Inputs, inputs
from ltxforge_kernels.fp8.weight import FP8, quantise_rows
from ltxforge_kernels.lora_linear import lora_branch
from ltxforge_kernels.precision import FLOORS, sqnr
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# Tokens, K, N.
SHAPES = [(24, 2048, 256), (37, 144, 80), (1, 64, 32)]


def run(given: Inputs, implementation: str = "triton") -> torch.Tensor:
    return fp8.fp8_linear(given.x, given.quantised, given.bias, implementation=implementation)


def everything(given: Inputs, implementation: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the gradient of x."""
    x = given.x.detach().requires_grad_()
    y = run(dataclasses.replace(given, x=x), implementation)
    y.backward(given.upstream.to(y.dtype))
    return y.detach(), x.grad


def in_float64(given: Inputs) -> Inputs:
    names = ("x", "weight", "bias", "upstream")
    return dataclasses.replace(given, **{name: getattr(given, name).double() for name in names})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["activations", "gradients"])
def test_codes_are_the_reference_s_to_the_bit(dtype, folded, device):
    x = inputs(48, 300, 64, Filler(device), dtype).x
    x[3], x[4], x[5] = 0, 1e-34, 0.1
    factor = Filler(device, 1).uniform(300) if folded else None
    codes, scale = launch.launch_quantise(x, factor)
    true_codes, true_scale = quantise_rows(x, factor)
    assert torch.equal(codes.view(torch.uint8), true_codes.view(torch.uint8)) and torch.equal(scale, true_scale)
    largest = codes.to(torch.float32).abs().amax(dim=1)
    assert largest.tolist() == [0 if row in (3, 4) else 448 for row in range(48)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_every_value_dequantised_to_the_bit(dtype, device):
    """All of e4m3 but its NaNs, the smallest ones included."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    values = values[values.to(torch.float32).isfinite()].expand(3, -1).contiguous()
    weight = fp8.Fp8Weight(values, torch.tensor([1.0, 2.5e-3, 0.7], device=device))
    result = fp8.dequantise(weight, dtype, implementation="triton")
    assert result.shape == (3, 254)
    assert torch.equal(result, fp8.dequantise(weight, dtype, implementation="eager"))
    assert torch.equal(result[0].float(), values[0].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_and_gradient(shape, dtype, device):
    """Against the same codes in float64; whatever x is, `_scaled_mm` gives bf16."""
    given = inputs(*shape, Filler(device), dtype)
    truths = everything(in_float64(given), "eager")
    for name, found, bound in (
        ("triton", everything(given), BF16_ROUNDING),
        ("eager", everything(given, "eager"), None),
    ):
        for result, truth in zip(found, truths, strict=True):
            assert result.dtype == dtype, name
            # One rounding of few values may cost more than that of many.
            worst = 2**-9 + 1e-6 if truth.numel() <= 256 else BF16_ROUNDING
            allowed = FLOAT32 if bound is None and dtype == torch.float32 else worst
            assert relative_error(result, truth) <= allowed, name


def test_float64_is_the_formula(device):
    """The reference in float64 against a linear layer and autograd over dequantised x, W and gradient."""
    given = in_float64(inputs(*SHAPES[1], Filler(device)))
    (codes, scale), (w, w_scale) = quantise_rows(given.x), given.quantised
    y = linear(codes.double() * scale.double()[:, None], w.double() * w_scale.double()[:, None], given.bias)
    folded, folded_scale = quantise_rows(given.upstream, w_scale)
    of_x = folded.double() * folded_scale.double()[:, None] @ w.double()
    for result, truth in zip(everything(given, "eager"), (y, of_x), strict=True):
        assert relative_error(result, truth) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_the_plain_layer(dtype, device):
    """3.7 % on Gaussian data, both ways: above the floor, in dB."""
    given = inputs(32, 1024, 128, Filler(device), dtype)
    exact = in_float64(given)
    x = exact.x.requires_grad_()
    y = linear(x, exact.weight, exact.bias)
    y.backward(exact.upstream)
    result, gradient = everything(given)
    for truth, found in ((y.detach() - exact.bias, result.double() - exact.bias), (x.grad, gradient.double())):
        assert sqnr(truth, found) >= FLOORS["fp8"]
        assert 0.03 < relative_error(found, truth) < 0.042


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_with_a_lora(implementation, device):
    """The branch of `lora_linear`, over x itself, and its gradients."""
    given = inputs(*SHAPES[1], Filler(device))
    _, width, outputs = SHAPES[1]
    fill = Filler(device, 2)
    learning = [fill.normal(*size).requires_grad_() for size in (given.x.shape, (8, width), (outputs, 8))]
    kept = fill.uniform(*given.x.shape) < 0.75
    mine = fp8.fp8_lora_linear(
        learning[0], given.quantised, given.bias, *learning[1:], 0.5, kept, 0.75, implementation=implementation
    )
    gradients = torch.autograd.grad(mine, learning, given.upstream)
    base = run(dataclasses.replace(given, x=learning[0]), implementation)
    theirs = lora_branch(learning[0], base, *learning[1:], 0.5, kept, 0.75, implementation="eager")
    assert relative_error(mine, theirs) <= FLOAT32
    for one, other in zip(gradients, torch.autograd.grad(theirs, learning, given.upstream), strict=True):
        assert relative_error(one, other) <= FLOAT32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_fp8_is_storage_only(dtype, device, monkeypatch):
    """Before sm_89: the bits of a linear layer over the dequantised weight, of any width, and x is not quantised."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: False)
    given = inputs(9, 75, 33, Filler(device), dtype)
    x = given.x.detach().requires_grad_()
    y = linear(x, fp8.dequantise(given.quantised, dtype, implementation="eager"), given.bias)
    y.backward(given.upstream)
    for implementation in ("triton", "eager"):
        result, gradient = everything(given, implementation)
        assert torch.equal(result, y) and torch.equal(gradient, x.grad)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((8, 9), None, True), ((8, 6), None, False), ((9, 4), "6.4", False)]
)
def test_which_devices_multiply(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert fp8.multiplies_fp8(torch.device("cuda", 0)) is expected
    assert fp8.multiplies_fp8(torch.device("cpu"))
    assert not launch.has_fp8("gfx942") and not launch.has_fp8(86) and launch.has_fp8(90)


def operands() -> dict[str, torch.Tensor]:
    right = torch.zeros(48, 32).to(FP8).t()
    return {
        "left": torch.zeros(5, 32).to(FP8),
        "left_scale": torch.ones(5),
        "right": right,
        "right_scale": torch.ones(48),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.zeros(5, 32)}, "not torch.float32 and torch.float8_e4m3fn"),
        ({"left": torch.zeros(5, 48).to(FP8)}, r"not \[5, 48\] and \[32, 48\]"),
        ({"right": torch.zeros(40, 32).to(FP8).t()}, r"multiples of 16, not \[32, 40\]"),
        ({"left": torch.zeros(32, 5).to(FP8).t()}, r"row-major and the second column-major: \(1, 5\)"),
        ({"right": torch.zeros(32, 48).to(FP8)}, r"column-major: \(32, 1\), \(48, 1\)"),
        ({"left_scale": torch.ones(5).double()}, r"float32 \[5\] without gaps, not torch.float64"),
        ({"left_scale": torch.ones(1)}, r"not torch.float32 \[1\]"),
        ({"right_scale": torch.ones(96)[::2]}, r"float32 \[48\] without gaps"),
    ],
)
def test_what_a_gpu_would_refuse_is_refused_here(change, message):
    assert launch.product(*operands().values(), None).shape == (5, 48)
    with pytest.raises(ValueError, match=message):
        launch.product(*{**operands(), **change}.values(), None)


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_no_token_and_leading_dimensions(implementation, device):
    given = inputs(6, 64, 48, Filler(device))
    plain = everything(given, implementation)
    apart = dataclasses.replace(given, x=given.x.reshape(2, 3, 64), upstream=given.upstream.reshape(2, 3, 48))
    for one, other in zip(everything(apart, implementation), plain, strict=True):
        assert torch.equal(one.reshape(other.shape), other)
    none = dataclasses.replace(given, x=given.x[:0], upstream=given.upstream[:0])
    assert [list(result.shape) for result in everything(none, implementation)] == [[0, 48], [0, 64]]


def test_layouts_do_not_matter(device):
    plain = inputs(20, 48, 32, Filler(device))
    viewed = {name: getattr(plain, name).mT.contiguous().mT for name in ("x", "upstream")}
    values = plain.quantised.values.view(torch.uint8).mT.contiguous().mT.view(FP8)
    weight = fp8.Fp8Weight(values, plain.quantised.scale.repeat(2, 1).t()[:, 0])
    bias = torch.stack([plain.bias] * 2, dim=1)[:, 0]
    given = dataclasses.replace(plain, **viewed, bias=bias, quantised=weight)
    assert not given.x.is_contiguous() and not values.is_contiguous() and not bias.is_contiguous()
    for one, other in zip(everything(given), everything(plain), strict=True):
        assert torch.equal(one, other)


def test_only_the_weight_is_kept(device):
    given, kept = inputs(4, 64, 48, Filler(device)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(dataclasses.replace(given, x=given.x.requires_grad_()))
    assert [tensor.shape for tensor in kept] == [(48, 64), (48,)]


def test_the_same_bits_twenty_times(device):
    given = inputs(4, 32, 16, Filler(device), torch.bfloat16)
    first = everything(given)
    for _ in range(19):
        assert all(torch.equal(one, other) for one, other in zip(first, everything(given), strict=True))


def test_torch_s_own_checks(device):
    given = inputs(3, 32, 16, Filler(device))
    x = given.x.detach().requires_grad_()
    # All but the one that compares inputs before and after, which PyTorch cannot do for fp8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (launch.linear_op, (x, *given.quantised, given.bias)),
        (launch.backward_op, (given.upstream, *given.quantised)),
        (launch.dequantise_op, (*given.quantised, torch.bfloat16)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


def model(weights: torch.Tensor, given: Inputs, implementation: str) -> torch.Tensor:
    given = dataclasses.replace(given, x=given.x @ weights)
    return torch.tanh(run(given, implementation)).square().mean()


@pytest.fixture
def step(device):
    given = inputs(12, 32, 16, Filler(device))
    weights = Filler(device, 5).normal(32, 32).requires_grad_()
    loss = model(weights, given, "triton")
    return given, weights, loss.detach(), torch.autograd.grad(loss, weights)[0]


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_without_breaks_under_compile(implementation, step):
    given, weights, _, _ = step
    loss = model(weights, given, implementation)
    gradient = torch.autograd.grad(loss, weights)[0]
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(weights, given, implementation)
    again.backward()
    assert torch.equal(again, loss)
    assert torch.equal(weights.grad, gradient)


def test_recomputed_under_checkpointing(step):
    given, weights, loss, gradient = step
    again = checkpoint(model, weights, given, "triton", use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss) and torch.equal(weights.grad, gradient)


def test_compile_is_the_reference(step):
    """Its dispatch; Inductor's code is for the sweeps."""
    given, weights, _, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(weights, given, "compile"), model(weights, given, "eager"))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weights, _, _ = step
    loss = model(weights, given, "eager")
    gradient = torch.autograd.grad(loss, weights)[0]
    again = model(weights, given, "compile")
    again.backward()
    # Where a sum differs in its last bit, a code of the gradient may be its neighbour.
    assert relative_error(again, loss) <= 1e-5
    assert relative_error(weights.grad, gradient) <= 1e-2


def test_what_does_not_fit_is_refused():
    given = inputs(3, 32, 16, Filler())
    with pytest.raises(ValueError, match=r"not \[..., 32\]"):
        run(dataclasses.replace(given, x=given.x[:, :16]), "eager")
    with pytest.raises(ValueError, match=r"bias is \[15\], not \[16\]"):
        run(dataclasses.replace(given, bias=given.bias[:15]), "eager")
    with pytest.raises(ValueError, match="fp8 weight is"):
        run(dataclasses.replace(given, quantised=fp8.Fp8Weight(given.weight, given.quantised.scale)), "eager")
    with pytest.raises(ValueError, match="both a and b"):
        fp8.fp8_lora_linear(given.x, given.quantised, None, torch.zeros(2, 32), implementation="eager")
    with pytest.raises(ValueError, match="K of at least 1"):
        fp8.quantise(torch.zeros(3, 0))
    assert reference.Fp8Linear.apply(given.x, *given.quantised, None).shape == (3, 16)
