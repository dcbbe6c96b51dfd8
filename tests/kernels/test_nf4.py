"""NF4 against bitsandbytes to the bit, its product against float64, and both inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes import functional as theirs
from bitsandbytes.nn import Linear4bit
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error, require_close
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.nf4 import dequantise, launch, nf4_linear, quantise
from ltxforge_kernels.nf4.inputs import Inputs, LinearShape, empty_weight, inputs
from ltxforge_kernels.nf4.state_dict import from_state_dict
from ltxforge_kernels.nf4.tables import NF4, dynamic_map
from ltxforge_kernels.nf4.weight import BLOCKSIZES, Nf4Weight
from ltxforge_kernels.precision import FLOORS, sqnr
from torch.utils.checkpoint import checkpoint

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLEMENTATIONS = ("triton", "eager")
# Rows that blocks divide, rows that they run over, an odd number of elements, a last block that is not full.
SHAPES = [(33, 128), (5, 64), (9, 96), (7, 33), (3, 30), (1, 1), (16, 2048)]
SMALL = LinearShape("small", 10, 24, 64)


@pytest.fixture(autouse=True)
def bitsandbytes_uncompiled():
    """It compiles what it does with odd widths, half a minute for each; fullgraph tests of ours lift it."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """As a layer's, with a block of zeros, one of a single value, and one that is a thousand times larger."""
    weight = 0.03 * Filler(seed=seed).normal(*shape)
    flat = weight.view(-1)
    flat[64:128] = 0
    flat[128:192] = -0.25
    flat[192:256] *= 1000
    return weight.to(dtype)


def bitsandbytes_of(
    weight: torch.Tensor, blocksize: int, double: bool
) -> tuple[torch.Tensor, theirs.QuantState, torch.Tensor]:
    """Its codes, its state, and its weight again."""
    packed, state = theirs.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4")
    return packed, state, bitsandbytes_again(packed, state)


def bitsandbytes_again(packed: torch.Tensor, state: theirs.QuantState) -> torch.Tensor:
    """Its dequantised weight. As one long row: on CPUs with AVX-512 it takes other blocks' absmax where a row of
    several ends within a block."""
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    weight = theirs.dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return weight


def ours_of(packed: torch.Tensor, state: theirs.QuantState, device: str) -> Nf4Weight:
    tensors = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    return from_state_dict({"w": packed, **tensors}, "w").to(device)


def require_same(weight: Nf4Weight, packed: torch.Tensor, state: theirs.QuantState) -> None:
    """Every number of the two, to the bit."""
    found = {name: tensor.cpu() for name, tensor in weight.tensors.items()}
    expected = {"packed": packed, "absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        expected |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        expected |= {"nested_offset": state.offset}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (weight.blocksize, weight.shape, weight.dtype) == (state.blocksize, tuple(state.shape), state.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_is_bitsandbytes_both_ways(shape, dtype, implementation, device):
    for blocksize in (64, 128):
        packed, state, again = bitsandbytes_of(weights(shape, dtype), blocksize, double=False)
        weight = quantise(weights(shape, dtype).to(device), blocksize, implementation=implementation)
        require_same(weight, packed, state)
        assert torch.equal(dequantise(weight, implementation=implementation).cpu(), again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_is_bitsandbytes_both_ways(shape, implementation, device):
    for blocksize, dtype in zip((64, 128, 64), ALL_DTYPES, strict=True):
        packed, state, again = bitsandbytes_of(weights(shape, dtype), blocksize, double=True)
        weight = ours_of(packed, state, device)
        assert torch.equal(dequantise(weight, implementation=implementation).cpu(), again)
        if device == "cpu":
            # Elsewhere the mean may round otherwise.
            own = quantise(weights(shape, dtype), blocksize, double=True, implementation=implementation)
            require_same(own, packed, state)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_size_of_a_block(blocksize, device):
    """Whole blocks and 77 elements more."""
    source = weights((1, 2 * blocksize + 77), torch.bfloat16)
    packed, state, again = bitsandbytes_of(source, blocksize, double=False)
    for implementation in IMPLEMENTATIONS:
        weight = quantise(source.to(device), blocksize, implementation=implementation)
        require_same(weight, packed, state)
        assert torch.equal(dequantise(weight, implementation=implementation).cpu(), again)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_another_dtype_than_the_weight_s_own(dtype, double, device):
    packed, state, _ = bitsandbytes_of(weights((4, 256), torch.float32), 64, double)
    weight = ours_of(packed, state, device)
    state.dtype = dtype
    again = bitsandbytes_again(packed, state)
    for implementation in IMPLEMENTATIONS:
        found = dequantise(weight, dtype, implementation=implementation)
        assert found.dtype == dtype and torch.equal(found.cpu(), again)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_largest_and_the_smallest_numbers(dtype, device):
    numbers = torch.finfo(dtype)
    # bitsandbytes flushes what is below the normal numbers of bf16, on CPUs that convert in hardware.
    smallest = numbers.smallest_normal * (2 if dtype == torch.bfloat16 else 2**-6)
    blocks = torch.linspace(-1, 1, 64)[None, :] * torch.tensor([[numbers.max], [1.0], [2 * smallest], [0.0]])
    source = blocks.to(dtype)
    source[3, 5], source[2, 5] = -0.0, smallest
    packed, state, again = bitsandbytes_of(source, 64, double=False)
    for implementation in IMPLEMENTATIONS:
        weight = quantise(source.to(device), implementation=implementation)
        require_same(weight, packed, state)
        found = dequantise(weight, implementation=implementation).cpu()
        assert found.isfinite().all()
        held = again.abs() >= numbers.smallest_normal if dtype == torch.bfloat16 else slice(None)
        assert torch.equal(found[held], again[held])


def test_many_codes_of_scales_and_many_scales_of_those(device):
    """More than one block of blocks, the last one not full; random codes through both lookups of the kernel."""
    source = Filler(seed=3).normal(300, 64) * torch.logspace(-4, 1, 300)[:, None]
    packed, state, again = bitsandbytes_of(source, 64, double=True)
    assert state.state2.absmax.numel() == 2 and state.absmax.unique().numel() > 60
    weight = ours_of(packed, state, device)
    assert torch.equal(dequantise(weight, implementation="eager").cpu(), again)
    for gather in (False, True):
        assert torch.equal(launch.launch_unpack(weight, torch.float32, gather=gather).cpu(), again)


def test_tables_are_bitsandbytes_own():
    assert list(NF4) == theirs.get_4bit_type("nf4", device="cpu").tolist()
    assert torch.equal(dynamic_map(), theirs.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_how_much_it_leaves_of_a_gaussian(double):
    source = Filler(seed=4).normal(512, 1024)
    again = dequantise(quantise(source, double=double, implementation="eager"), implementation="eager")
    assert relative_error(again, source) == pytest.approx(0.092, abs=0.002)
    assert sqnr(source, again) >= FLOORS["nf4"]


def test_into_memory_that_is_there(device):
    weight = quantise(weights((8, 128), torch.bfloat16).to(device), implementation="triton")
    out = torch.empty(8, 128, dtype=torch.bfloat16, device=device)
    assert launch.launch_unpack(weight, torch.bfloat16, out) is out
    assert torch.equal(out, dequantise(weight, implementation="eager"))
    for wrong in (out.float(), out[:, :64], out.view(4, 256), out.mT.contiguous().mT):
        with pytest.raises(ValueError, match="out is"):
            launch.launch_unpack(weight, torch.bfloat16, wrong)


def test_streamed_into_other_memory(device):
    """Room for a weight, filled with another's tensors, is that weight."""
    weight = quantise(weights((8, 128), torch.bfloat16).to(device), double=True, implementation="triton")
    room = empty_weight(LinearShape("", 0, 8, 128), device, torch.bfloat16, double=True)
    for name, tensor in weight.tensors.items():
        room.tensors[name].copy_(tensor)
    assert room.nbytes == weight.nbytes == 512 + 16 + 4 * (16 + 1 + 256 + 1)
    moved = weight.to("cpu").to(device)
    for implementation in IMPLEMENTATIONS:
        expected = dequantise(weight, implementation=implementation)
        assert torch.equal(dequantise(room, implementation=implementation), expected)
        assert torch.equal(dequantise(moved, implementation=implementation), expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_weight_without_elements(shape, implementation, device):
    weight = quantise(torch.ones(shape, device=device), implementation=implementation)
    assert weight.packed.shape == (0, 1) and weight.absmax.shape == (0,)
    assert dequantise(weight, implementation=implementation).shape == shape
    x, bias = torch.ones(2, shape[1], device=device), torch.arange(float(shape[0]), device=device)
    assert torch.equal(nf4_linear(x, weight, bias, implementation=implementation), bias.expand(2, -1))


# The product.


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
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        again = compiled(first, given, weight, implementation)
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
    assert relative_error(model(first, given, weight, "compile"), loss) <= FLOAT32
    assert torch.equal(quantise(given.weight, implementation="compile").packed, weight.packed)
    assert torch.equal(dequantise(weight, implementation="compile"), dequantise(weight, implementation="eager"))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weight, first, loss, gradient = step
    with torch.compiler.set_stance("default"):
        again = model(first, given, weight, "compile")
        again.backward()
        packed = quantise(given.weight, double=True, implementation="compile")
        values = dequantise(weight, implementation="compile")
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(first.grad, gradient) <= FLOAT32
    assert torch.equal(packed.packed, weight.packed)
    assert relative_error(values, dequantise(weight, implementation="eager")) <= FLOAT32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda weight: quantise(torch.ones(3), implementation="eager"), r"not torch.float32 \[3\]"),
        (lambda weight: quantise(torch.ones(3, 4).double(), implementation="eager"), "not torch.float64"),
        (
            lambda weight: quantise(torch.ones(3, 4), 48, implementation="eager"),
            "a block of 48 elements is none of 32,",
        ),
        (lambda weight: nf4_linear(torch.ones(3, 63), weight, None, implementation="eager"), r"not \[\.\.\., 64\]"),
        (
            lambda weight: nf4_linear(torch.ones(3, 64), weight, torch.ones(23), implementation="eager"),
            r"bias is torch.float32 \[23\], not torch.float32 \[24\]",
        ),
        (
            lambda weight: nf4_linear(torch.ones(3, 64, device="meta"), weight, None, implementation="eager"),
            "x is on meta, and the weight on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    weight = quantise(torch.ones(24, 64), implementation="eager")
    with pytest.raises(ValueError, match=message):
        call(weight)
