"""The product with an NF4 weight: against float64, bitsandbytes' Linear4bit, and inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error, require_close
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.nf4 import dequantise, launch, nf4_linear, quantise
from ltxforge_kernels.nf4.inputs import Inputs, LinearShape, empty_weight, inputs
from ltxforge_kernels.nf4.state_dict import from_state_dict
from ltxforge_kernels.nf4.weight import Nf4Weight
from torch.utils.checkpoint import checkpoint

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLEMENTATIONS = ("triton", "eager")
SMALL = LinearShape("small", 10, 24, 64)


def everything(
    given: Inputs, weight: Nf4Weight, implementation: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and the gradients of x and bias, computed in the dtype."""
    dtype = dtype or given.x.dtype
    x, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (given.x, given.bias))
    y = nf4_linear(x, weight, bias, implementation=implementation)
    y.backward(given.upstream.to(dtype))
    return y.detach(), x.grad, bias.grad


LINEARS = [
    LinearShape("more tokens than the small product has", 130, 40, 64),
    LinearShape("rows that blocks run over", 9, 33, 96),
    LinearShape("few tokens", 17, 70, 192),
    LinearShape("sound's tokens, wide", 126, 64, 2048),
    LinearShape("one token", 1, 65, 64),
    LinearShape("no token", 0, 16, 64),
]


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_the_product_and_every_gradient(shape, dtype, double, device):
    """Against float64 over the very weight that the dtype holds, and no worse than eager."""
    given = inputs(shape, Filler(device), dtype)
    weight = quantise(given.weight, double=double, implementation="eager")
    held = dequantise(weight, dtype, implementation="eager").double()
    x, bias, upstream = given.x.double(), given.bias.double(), given.upstream.double()
    truths = (x @ held.T + bias, upstream @ held, upstream.sum(dim=0))
    results, eager = everything(given, weight, "triton"), everything(given, weight, "eager")
    for name, result, other, truth in zip(("y", "x", "bias"), results, eager, truths, strict=True):
        assert result.dtype == dtype
        if dtype != torch.float16:
            require_close(result, truth, name)
        assert relative_error(result, truth) <= 1.1 * relative_error(other, truth) + FLOAT32, name


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
def test_blocks_of_every_size_in_the_small_product(blocksize, double, device):
    """A step of the loop has several blocks, one, or a part of one."""
    given = inputs(LinearShape("", 5, 12, 512), Filler(device), torch.bfloat16)
    weight = quantise(given.weight, blocksize, double, implementation="eager")
    assert launch.fits_small_product(given.x, weight)
    held = dequantise(weight, implementation="eager").double()
    require_close(launch.launch_small_product(given.x, weight, None), given.x.double() @ held.T)


@pytest.mark.parametrize(
    ("tokens", "columns", "dtype", "blocksize", "small"),
    [
        (launch.SMALL_PRODUCT_TOKENS, 2048, torch.bfloat16, 64, True),
        (launch.SMALL_PRODUCT_TOKENS + 1, 2048, torch.bfloat16, 64, False),
        (1, 64, torch.float16, 32, True),
        (1, 2048, torch.float32, 64, False),
        (1, 96, torch.bfloat16, 32, False),
        (1, 192, torch.bfloat16, 128, False),
        (1, 0, torch.bfloat16, 64, False),
    ],
)
def test_where_the_small_product_holds(tokens, columns, dtype, blocksize, small):
    x = torch.empty(1, tokens, columns, dtype=dtype, device="meta")
    weight = empty_weight(LinearShape("", tokens, 8, columns), "meta", dtype, blocksize=blocksize)
    assert launch.fits_small_product(x, weight) is small


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_it_is_linear4bit(dtype, double, device):
    """bitsandbytes' own layer, forward and backward, by its own state."""
    given = inputs(LinearShape("", 12, 24, 128), Filler(), dtype)
    layer = Linear4bit(128, 24, compute_dtype=dtype, compress_statistics=double, quant_type="nf4")
    layer.load_state_dict({"weight": given.weight, "bias": given.bias})
    layer = layer.to("cpu", dtype)
    x = given.x.clone().requires_grad_()
    y = layer(x)
    y.backward(given.upstream)
    weight = from_state_dict(layer.state_dict(), "weight")
    found = everything(given, weight, "eager")
    assert torch.equal(found[0], y) and torch.equal(found[1], x.grad)
    there = Inputs(*(tensor.to(device) for tensor in vars(given).values()))
    for result, truth in zip(everything(there, weight.to(device), "triton"), (y, x.grad), strict=False):
        # Sums in another order, each rounded to its dtype.
        assert relative_error(result, truth) <= (2 * BF16_ROUNDING if dtype == torch.bfloat16 else FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_packed_weight_is_kept(implementation, device):
    """Neither x nor the weight that it is multiplied with, which is four times as large."""
    given = inputs(SMALL, Filler(device))
    weight = quantise(given.weight, double=True, implementation="eager")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        nf4_linear(given.x.requires_grad_(), weight, given.bias, implementation=implementation)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in weight.tensors.values()}


def test_layouts_do_not_matter(device):
    given = inputs(SMALL, Filler(device), torch.bfloat16)
    weight = quantise(given.weight, implementation="triton")
    assert torch.equal(quantise(given.weight.mT.contiguous().mT, implementation="triton").packed, weight.packed)
    viewed = dataclasses.replace(given, x=given.x.mT.contiguous().mT, upstream=given.upstream.mT.contiguous().mT)
    strided = weight.replace(packed=torch.stack([weight.packed] * 2, dim=-1)[..., 0])
    assert not viewed.x.is_contiguous() and not strided.packed.is_contiguous()
    for one, other in zip(everything(given, weight, "triton"), everything(viewed, strided, "triton"), strict=True):
        assert torch.equal(one, other)
    batched = nf4_linear(given.x.view(2, 5, 64), weight, given.bias, implementation="triton")
    assert torch.equal(batched.view(10, 24), nf4_linear(given.x, weight, given.bias, implementation="triton"))


def test_the_same_bits_twenty_times(device):
    given = inputs(SMALL, Filler(device), torch.bfloat16)
    first = (quantise(given.weight, double=True, implementation="triton")).tensors
    weight = quantise(given.weight, double=True, implementation="triton")
    results = everything(given, weight, "triton")
    for _ in range(19):
        again = quantise(given.weight, double=True, implementation="triton")
        assert all(torch.equal(first[name], tensor) for name, tensor in again.tensors.items())
        assert all(
            torch.equal(one, other) for one, other in zip(results, everything(given, again, "triton"), strict=True)
        )


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_torch_s_own_checks(double, device):
    given = inputs(SMALL, Filler(device))
    weight = quantise(given.weight, double=double, implementation="eager")
    torch.library.opcheck(launch.pack_op, (given.weight, 64))
    torch.library.opcheck(launch.unpack_op, (torch.bfloat16, *weight.arguments))
    torch.library.opcheck(launch.linear_op, (given.x.requires_grad_(), given.bias.requires_grad_(), *weight.arguments))
    torch.library.opcheck(launch.backward_op, (given.upstream, *weight.arguments))


def model(first: torch.Tensor, given: Inputs, weight: Nf4Weight, implementation: str = "triton") -> torch.Tensor:
    """A learned layer, and the frozen one behind it."""
    y = nf4_linear(torch.tanh(given.x @ first), weight, given.bias, implementation=implementation)
    return (y * given.upstream).mean()


@pytest.fixture
def step(device):
    given = inputs(SMALL, Filler(device))
    weight = quantise(given.weight, double=True, implementation="eager")
    first = (0.1 * Filler(device, 5).normal(64, 64)).requires_grad_()
    loss = model(first, given, weight)
    return given, weight, first, loss.detach(), torch.autograd.grad(loss, first)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_breaks_under_compile(step, implementation):
    """Eager's own gradient, too, which `compile` traces."""
    given, weight, first, loss, gradient = step
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(first, given, weight, implementation)
    again.backward()
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(first.grad, gradient) <= FLOAT32
    if implementation == "triton":
        assert torch.equal(again.detach(), loss) and torch.equal(first.grad, gradient)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputed_under_checkpointing(step, implementation):
    given, weight, first, loss, gradient = step
    again = checkpoint(model, first, given, weight, implementation, use_reentrant=False)
    again.backward()
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(first.grad, gradient) <= FLOAT32


def test_compile_is_the_reference(step):
    """Its dispatch; what Inductor makes of it is in the sweeps."""
    given, weight, first, loss, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(model(first, given, weight, "compile"), loss) <= FLOAT32
        assert torch.equal(quantise(given.weight, implementation="compile").packed, weight.packed)
        again = dequantise(weight, implementation="compile")
    assert torch.equal(again, dequantise(weight, implementation="eager"))


def test_a_vector(device):
    given = inputs(SMALL, Filler(device))
    weight = quantise(given.weight, implementation="eager")
    whole = everything(given, weight, "triton")
    vector = dataclasses.replace(given, x=given.x[3], upstream=given.upstream[3])
    for implementation in IMPLEMENTATIONS:
        y, of_x, of_bias = everything(vector, weight, implementation)
        assert y.shape == (24,) and torch.equal(of_bias, vector.upstream)
        assert relative_error(y, whole[0][3]) <= FLOAT32 and relative_error(of_x, whole[1][3]) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weight, first, loss, gradient = step
    again = model(first, given, weight, "compile")
    again.backward()
    packed = quantise(given.weight, double=True, implementation="compile")
    values = dequantise(weight, implementation="compile")
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(first.grad, gradient) <= FLOAT32
    assert torch.equal(packed.packed, weight.packed)
    assert relative_error(values, dequantise(weight, implementation="eager")) <= FLOAT32


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(3, 63), None, r"x is \[3, 63\], not \[\.\.\., 64\]"),
        (torch.tensor(1.0), None, r"not \[\.\.\., 64\]"),
        (torch.ones(3, 64), torch.ones(23), r"bias is torch.float32 \[23\], not torch.float32 \[24\]"),
        (torch.ones(3, 64).half(), torch.ones(24), r"not torch.float16 \[24\]"),
        (torch.ones(3, 64, device="meta"), None, "x is on meta, and the weight on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(x, bias, message):
    weight = quantise(torch.ones(24, 64), implementation="eager")
    with pytest.raises(ValueError, match=message):
        nf4_linear(x, weight, bias, implementation="eager")
