"""NF4 against bitsandbytes to the bit, both ways."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as theirs
from closeness import relative_error
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.nf4 import dequantise, launch, nf4_linear, quantise
from ltxforge_kernels.nf4.inputs import LinearShape, empty_weight
from ltxforge_kernels.nf4.state_dict import from_state_dict
from ltxforge_kernels.nf4.tables import NF4, dynamic_map
from ltxforge_kernels.nf4.weight import BLOCKSIZES, Nf4Weight
from ltxforge_kernels.precision import FLOORS, sqnr

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLEMENTATIONS = ("triton", "eager")
# Rows that blocks divide, rows that they run over, an odd number of elements, a last block that is not full.
SHAPES = [(33, 128), (5, 64), (9, 96), (7, 33), (3, 30), (1, 1), (16, 2048)]


@pytest.fixture(autouse=True)
def bitsandbytes_uncompiled():
    """It compiles what it does with odd widths, half a minute for each."""
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


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.ones(3), 64, r"not torch.float32 \[3\]"),
        (torch.ones(3, 4, dtype=torch.float64), 64, "not torch.float64"),
        (torch.ones(3, 4), 48, "a block of 48 elements is none of 32, 64"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, blocksize, message):
    with pytest.raises(ValueError, match=message):
        quantise(weight, blocksize, implementation="eager")
