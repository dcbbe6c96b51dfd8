"""Int8 products: codes to the bit, sums exactly, gradients against float64, and inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error, require_close
from ltxforge_kernels import int8
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.int8 import launch, reference
from ltxforge_kernels.int8.inputs import KEEP, LORA_SCALE, Inputs, inputs
from ltxforge_kernels.int8.weight import quantise_rows
from ltxforge_kernels.precision import FLOORS, sqnr
from ltxforge_kernels.scaled_rows import dequantise_rows
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# Tokens, K, N, R: a real width with few tokens, nothing that divides anything, the extreme ranks, one token.
SHAPES = [(24, 2048, 256, 32), (70, 131, 75, 5), (40, 256, 130, 128), (1, 96, 64, 4)]
# A and B rounded to bf16, and h, meet sums of exact products: one rounding each, of a tenth of y.
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: 2.5e-3}


def ids(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def given_for(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """A and B hold what the dtype can, so that float64 sees the same ones."""
    given = inputs(*shape, Filler(device), dtype)
    return dataclasses.replace(given, a=given.a.to(dtype).float(), b=given.b.to(dtype).float())


def run(given: Inputs, implementation: str = "triton", *, lora: bool = True, masked: bool = True) -> torch.Tensor:
    factors = (given.a, given.b, LORA_SCALE) if lora else (None, None, 1.0)
    mask = (given.kept, KEEP) if masked and lora else (None, 1.0)
    return int8.w8a8_lora_linear(given.x, given.quantised, given.bias, *factors, *mask, implementation=implementation)


def everything(given: Inputs, implementation: str = "triton", **how: bool) -> tuple[torch.Tensor, ...]:
    """y, and the gradients of x, A and B."""
    learning = {name: getattr(given, name).detach().clone().requires_grad_() for name in ("x", "a", "b")}
    y = run(dataclasses.replace(given, **learning), implementation, **how)
    y.backward(given.upstream.to(y.dtype))
    return y.detach(), *(tensor.grad for tensor in learning.values())


def in_float64(given: Inputs) -> Inputs:
    names = ("x", "weight", "bias", "a", "b", "upstream")
    return dataclasses.replace(given, **{name: getattr(given, name).double() for name in names})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["activations", "gradients"])
def test_codes_are_the_reference_s_to_the_bit(dtype, folded, device):
    """Ties included, of which bf16 has many; rows of zeros, of nearly nothing, and of one value are codes, too."""
    given = inputs(48, 300, 64, 4, Filler(device), dtype)
    x = given.x
    x[3], x[4], x[5] = 0, 1e-34, 0.1
    factor = Filler(device, 1).uniform(300) if folded else None
    codes, scale = launch.launch_quantise(x, factor)
    true_codes, true_scale = quantise_rows(x, factor)
    assert torch.equal(codes, true_codes) and torch.equal(scale, true_scale)
    assert codes.abs().amax(dim=1).tolist() == [0 if row in (3, 4) else 127 for row in range(48)]
    assert not codes[3:5].any()
    # Half a code is the most that rounding may cost.
    exact = x.double() if factor is None else x.double() * factor
    assert ((codes * scale.double()[:, None] - exact).abs() <= (0.5 + 1e-5) * scale[:, None] + 1e-30).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_so(device):
    given = given_for((4, 64, 32, 4), device)
    given.x[1, 7], given.x[2, 9] = torch.nan, torch.inf
    y = run(given, lora=False)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert y[[0, 3]].isfinite().all()


def test_integer_sums_are_exact(device):
    """The largest codes, and as many as the widest layer has: beyond what float32 counts."""
    codes = torch.full((2, 16384), 127, dtype=torch.int8, device=device)
    codes[1, ::2] = -127
    one, w = torch.ones(2, device=device), codes[:1].repeat(32, 1)
    y = launch.launch_product("forward", codes, one, w.t(), None, None, None, None, torch.float32)
    assert y[0].tolist() == [float(127 * 127 * 16384)] * 32 and not y[1].any()
    assert torch.equal(reference.exact_product(codes, w.t()), y.to(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_forward_and_every_gradient(shape, dtype, device):
    """Against the same codes in float64."""
    given = given_for(shape, device, dtype)
    results, truths = everything(given), everything(in_float64(given), "eager")
    for result, truth in zip(results[:2], truths[:2], strict=True):
        assert result.dtype == dtype
        require_close(result, truth)
    for result, truth in zip(results[2:], truths[2:], strict=True):
        assert result.dtype == torch.float32
        assert relative_error(result, truth) <= GRADIENT[dtype]


def test_float64_is_the_formula(device):
    """The reference in float64 against dropout, linear layers and autograd over dequantised x, W and gradient."""
    given = in_float64(given_for(SHAPES[1], device))
    codes, scale = quantise_rows(given.x)
    x = (codes * scale.double()[:, None]).requires_grad_()
    a, b = given.a.detach().requires_grad_(), given.b.detach().requires_grad_()
    w = dequantise_rows(*given.quantised, torch.float64)
    branch = LORA_SCALE * linear(linear(x * given.kept / KEEP, a), b)
    (linear(x, w, given.bias) + branch).backward(given.upstream)
    folded, folded_scale = quantise_rows(given.upstream, given.quantised.scale)
    through_lora = torch.autograd.grad(LORA_SCALE * linear(linear(x * given.kept / KEEP, a), b), x, given.upstream)[0]
    of_x = folded.double() @ given.quantised.values.double() * folded_scale.double()[:, None] + through_lora
    truths = (linear(x, w, given.bias) + branch, of_x, a.grad, b.grad)
    for result, truth in zip(everything(given, "eager"), truths, strict=True):
        assert relative_error(result, truth) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_the_plain_layer(dtype, device):
    """1.2 % on Gaussian data, both ways: above the floor, in dB."""
    given = given_for((32, 1024, 128, 8), device, dtype)
    exact = in_float64(given)
    x = exact.x.requires_grad_()
    y = linear(x, exact.weight)
    y.backward(exact.upstream)
    mine = given.x.detach().requires_grad_()
    result = int8.w8a8_lora_linear(mine, given.quantised, implementation="triton")
    result.backward(given.upstream)
    for truth, found in ((y.detach(), result.detach()), (x.grad, mine.grad)):
        assert sqnr(truth, found) >= FLOORS["w8a8"]
        assert 0.005 < relative_error(found, truth) < 0.013


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [{"lora": False}, {"masked": False}], ids=["no LoRA", "no dropout"])
def test_what_is_left_out(how, dtype, device):
    given = given_for(SHAPES[1], device, dtype)
    results, truths = everything(given, **how), everything(in_float64(given), "eager", **how)
    assert [result is None for result in results] == [truth is None for truth in truths]
    for result, truth in zip(results[:2], truths[:2], strict=True):
        require_close(result, truth)


def test_a_lora_of_nothing_is_none(device):
    """B = 0: the bits of the base alone."""
    given = given_for(SHAPES[1], device, torch.bfloat16)
    given.b.zero_()
    assert torch.equal(run(given), run(given, lora=False))


def test_kept_for_backward_is_int8(device):
    """Not x itself: half the memory of bf16."""
    given = given_for(SHAPES[0], device, torch.bfloat16)
    x, kept = given.x.detach().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(dataclasses.replace(given, x=x), masked=False)
    large = [tensor.dtype for tensor in kept if tensor.shape == x.shape]
    assert large == [torch.int8]


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_no_token_and_leading_dimensions(implementation, device):
    given = given_for((6, 64, 48, 4), device)
    plain = everything(given, implementation)
    names = ("x", "kept", "upstream")
    apart = {name: getattr(given, name).reshape(2, 3, -1) for name in names}
    for one, other in zip(everything(dataclasses.replace(given, **apart), implementation), plain, strict=True):
        assert torch.equal(one.reshape(other.shape), other)
    none = {name: getattr(given, name)[:0] for name in names}
    y, of_x, of_a, of_b = everything(dataclasses.replace(given, **none), implementation)
    assert y.shape == (0, 48) and of_x.shape == (0, 64)
    assert of_a.shape == given.a.shape and not of_a.any() and not of_b.any()


def test_layouts_do_not_matter(device):
    plain = given_for((20, 48, 40, 6), device)
    names = ("x", "a", "b", "kept", "upstream")
    viewed = {name: getattr(plain, name).mT.contiguous().mT for name in names}
    bias = torch.stack([plain.bias] * 2, dim=1)[:, 0]
    weight = int8.Int8Weight(plain.quantised.values.mT.contiguous().mT, plain.quantised.scale.repeat(2, 1).t()[:, 0])
    given = dataclasses.replace(plain, **viewed, bias=bias, quantised=weight)
    assert not given.x.is_contiguous() and not weight.values.is_contiguous() and not bias.is_contiguous()
    for one, other in zip(everything(given), everything(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_dequantised_to_the_bit(dtype, device):
    quantised = inputs(1, 300, 70, 4, Filler(device)).quantised
    result = int8.dequantise(quantised, dtype, implementation="triton")
    assert result.dtype == dtype
    assert torch.equal(result, int8.dequantise(quantised, dtype, implementation="eager"))
    truth = quantised.values.double() * quantised.scale.double()[:, None]
    assert relative_error(result, truth) <= {torch.float32: FLOAT32}.get(dtype, BF16_ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only(dtype, device):
    """Bit-equal to a linear layer over the dequantised weight; within 0.9 % of the one it came from."""
    given = given_for((16, 1024, 96, 4), device, dtype)
    whole = int8.dequantise(given.quantised, dtype, implementation="eager")
    results = []
    for product in (
        lambda x: int8.int8_linear(x, given.quantised, given.bias, implementation="triton"),
        lambda x: int8.int8_linear(x, given.quantised, given.bias, implementation="eager"),
        lambda x: linear(x, whole, given.bias),
    ):
        x = given.x.detach().requires_grad_()
        y = product(x)
        y.backward(given.upstream)
        results.append((y.detach(), x.grad))
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))
    exact = linear(given.x.double(), given.weight.double(), given.bias.double())
    assert relative_error(results[0][0], exact) < 0.009
    assert sqnr(given.weight.double(), dequantise_rows(*given.quantised, torch.float64)) > 40


def test_weight_only_keeps_no_whole_weight(device):
    given, kept = given_for((4, 64, 48, 4), device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        int8.int8_linear(given.x.requires_grad_(), given.quantised, implementation="triton")
    assert sorted(str(tensor.dtype) for tensor in kept) == ["torch.float32", "torch.int8"]
    assert max(tensor.numel() for tensor in kept if tensor.dtype == torch.float32) == 48


def test_the_same_bits_twenty_times(device):
    given = given_for((4, 32, 16, 4), device, torch.bfloat16)
    first = everything(given)
    for _ in range(19):
        assert all(torch.equal(one, other) for one, other in zip(first, everything(given), strict=True))


@pytest.mark.parametrize("lora", [True, False])
def test_torch_s_own_checks(lora, device):
    given = given_for((3, 16, 8, 2), device)
    x, a, b = (tensor.detach().requires_grad_() for tensor in (given.x, given.a, given.b))
    factors = (a, b, 0.5, given.kept) if lora else (None, None, 1.0, None)
    arguments = (x, *given.quantised, given.bias, *factors)
    torch.library.opcheck(launch.forward_op, arguments)
    with torch.no_grad():
        _, codes, row_scale, h = launch.forward_op(*arguments)
        kept_for = (*given.quantised, *factors, codes, row_scale, h)
        torch.library.opcheck(launch.backward_op, (given.upstream, *kept_for, True, lora))
    torch.library.opcheck(launch.dequantise_op, (*given.quantised, torch.bfloat16))


def model(weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor, given: Inputs, implementation: str) -> torch.Tensor:
    """A layer, W8A8 with LoRA, and weight-only int8 the other way."""
    given = dataclasses.replace(given, x=given.x @ weights, a=a, b=b)
    hidden = torch.tanh(run(given, implementation))
    return int8.int8_linear(hidden, given.quantised, given.bias, implementation=implementation).square().mean()


@pytest.fixture
def step(device):
    given = given_for((12, 32, 32, 4), device)
    learning = [tensor.requires_grad_() for tensor in (Filler(device, 5).normal(32, 32), given.a, given.b)]
    loss = model(*learning, given, "triton")
    return given, learning, loss.detach(), torch.autograd.grad(loss, learning)


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_without_breaks_under_compile(implementation, step):
    given, learning, loss, gradients = step
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(*learning, given, implementation)
    again.backward()
    assert relative_error(again, loss) <= FLOAT32
    for tensor, gradient in zip(learning, gradients, strict=True):
        assert relative_error(tensor.grad, gradient) <= FLOAT32 * 10
        assert implementation == "eager" or torch.equal(tensor.grad, gradient)


def test_recomputed_under_checkpointing(step):
    given, learning, loss, gradients = step
    again = checkpoint(model, *learning, given, "triton", use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(learning, gradients, strict=True))


def test_compile_is_the_reference(step):
    """Its dispatch; Inductor's code is for the sweeps."""
    given, learning, loss, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(model(*learning, given, "compile"), loss) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, learning, loss, gradients = step
    again = model(*learning, given, "compile")
    again.backward()
    assert relative_error(again, loss) <= 1e-5
    for tensor, gradient in zip(learning, gradients, strict=True):
        assert relative_error(tensor.grad, gradient) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (3, 15)}, r"not \[..., 16\]"),
        ({"bias": (7,)}, r"bias is \[7\], not \[8\]"),
        ({"a": (2, 15)}, r"not \[R, 16\]"),
        ({"b": (8, 3)}, r"not \[8, 2\]"),
        ({"kept": (3, 16)}, "kept is torch.float32"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    given = given_for((3, 16, 8, 2), "cpu")
    wrong = dataclasses.replace(given, **{name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match=message):
        run(wrong, "eager")


def test_half_a_lora_and_other_weights_are_refused():
    given = given_for((3, 16, 8, 2), "cpu")
    with pytest.raises(ValueError, match="both a and b"):
        int8.w8a8_lora_linear(given.x, given.quantised, None, given.a, implementation="eager")
    with pytest.raises(ValueError, match="int8 weight"):
        int8.int8_linear(given.x, int8.Int8Weight(given.weight, given.quantised.scale), implementation="eager")
    with pytest.raises(ValueError, match=r"K from 1 to 133144, not \[1, 200000\]"):
        int8.quantise(torch.empty(1, 200_000))
