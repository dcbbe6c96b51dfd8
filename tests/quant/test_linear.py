"""A linear layer over few bits: against bitsandbytes and float64, and through everything that moves a module."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from closeness import FLOAT32, relative_error
from ltxforge_kernels.nf4.state_dict import from_state_dict
from ltxforge_kernels.precision import sqnr
from one_block import plan_for
from quantised_block import BASES, KEPT, adapted_model, step
from torch import Tensor

from ltxforge.memory.recompute import recomputed
from ltxforge.models import ltx2, ltx_video
from ltxforge.quant.formats import FORMATS
from ltxforge.quant.linear import IN_8_BITS, STORED, QuantisedLinear

DTYPES = (torch.float32, torch.bfloat16)
IN, OUT, RANK = 192, 80, 4
WHOLE = tuple(kept for kept in KEPT if not FORMATS[kept[0]].quantises_activations)
IN_8 = tuple(kept[0] for kept in KEPT if FORMATS[kept[0]].quantises_activations)
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(format: str, double: bool = False, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    weight = (drawn(OUT, IN, seed=0) / IN**0.5).to(dtype)
    return QuantisedLinear.quantise(weight, drawn(OUT, seed=1, dtype=dtype), format, double)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return drawn(2, 7, IN, seed=2, dtype=dtype).requires_grad_()


def upstream(dtype: torch.dtype = torch.float32) -> Tensor:
    return drawn(2, 7, OUT, seed=3, dtype=dtype)


def factors() -> tuple[Tensor, Tensor]:
    """A and B as masters."""
    return (0.1 * drawn(RANK, IN, seed=4)).requires_grad_(), (0.1 * drawn(OUT, RANK, seed=5)).requires_grad_()


def both_ways(product, x: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the gradient of x."""
    y = product(x)
    return y.detach(), torch.autograd.grad(y, x, upstream(x.dtype))[0]


# --- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_nf4_is_bitsandbytes_own_layer(double, dtype):
    theirs = Linear4bit(IN, OUT, compute_dtype=dtype, compress_statistics=double, quant_type="nf4")
    weight = (drawn(OUT, IN, seed=0) / IN**0.5).to(dtype)
    theirs.load_state_dict({"weight": weight, "bias": drawn(OUT, seed=1, dtype=dtype)})
    theirs = theirs.to("cpu", dtype)
    for ours in (
        layer_of("nf4", double, dtype),
        QuantisedLinear.of_weight(from_state_dict(theirs.state_dict(), "weight"), theirs.bias, "nf4"),
    ):
        assert ours.double_quant is double
        for found, truth in zip(both_ways(ours, tokens(dtype)), both_ways(theirs, tokens(dtype)), strict=True):
            assert torch.equal(found, truth)


@pytest.mark.parametrize(("format", "double"), WHOLE)
def test_products_of_a_weight_made_whole_are_exact(format, double):
    """Against float64 over the very weight that is stored."""
    layer = layer_of(format, double)
    held, bias = layer.dequantised(torch.float64), layer.bias.double()
    y, of_x = both_ways(layer, tokens())
    assert relative_error(y, tokens().detach().double() @ held.T + bias) <= FLOAT32
    assert relative_error(of_x, upstream().double() @ held) <= FLOAT32


@pytest.mark.parametrize("format", IN_8)
def test_products_in_8_bits_are_those_of_rounded_tokens(format):
    """Against float64 over the codes: of each token going in, and of each gradient coming back."""

    def rounded(rows: Tensor) -> Tensor:
        if format == "fp8":
            scale = rows.abs().amax(dim=-1, keepdim=True) / 448
            return (rows / scale).to(torch.float8_e4m3fn).double() * scale.double()
        scale = rows.abs().amax(dim=-1, keepdim=True) / 127
        return torch.round(rows / scale).double() * scale.double()

    layer = layer_of(format)
    codes, scale = layer.values.double(), layer.scale.double()
    y, of_x = both_ways(layer, tokens())
    x = tokens().detach()
    assert relative_error(y, rounded(x) @ (codes * scale[:, None]).T + layer.bias.double()) <= 1e-5
    assert relative_error(of_x, rounded(upstream() * layer.scale) @ codes) <= 1e-5


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_what_is_left_of_gaussian_weights_is_above_the_floor(format, double):
    """Of the weight, of the product, and of the gradient that goes on."""
    weight, layer = drawn(OUT, IN, seed=0) / IN**0.5, layer_of(format, double)
    y, of_x = both_ways(layer, tokens())
    left = (
        sqnr(weight, layer.dequantised()),
        sqnr(tokens().detach() @ weight.T, y - layer.bias),
        sqnr(upstream() @ weight, of_x),
    )
    assert all(FORMATS[format].floor <= each < 60 for each in left), left


@pytest.mark.parametrize("format", IN_8)
def test_a_spared_layer_s_product_is_that_of_the_weight_made_whole(format):
    layer = layer_of(format)
    assert layer.product == IN_8_BITS
    before = layer(tokens())
    layer.product = STORED
    truth = tokens().detach().double() @ layer.dequantised(torch.float64).T + layer.bias.double()
    assert relative_error(layer(tokens()), truth) <= FLOAT32 < relative_error(before, truth)


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_bf16_and_no_bias(format, double):
    layer = QuantisedLinear.quantise(drawn(OUT, IN, seed=0).bfloat16() / IN**0.5, None, format, double)
    x = tokens(torch.bfloat16)
    y, of_x = both_ways(layer, x)
    assert y.dtype == of_x.dtype == torch.bfloat16 and layer.bias is None
    assert sqnr(x.detach().float() @ layer.dequantised().T, y) >= FORMATS[format].floor


# --- a LoRA on top ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [STORED, IN_8_BITS])
@pytest.mark.parametrize(("format", "double"), KEPT)
def test_a_lora_adds_its_product_and_has_its_gradients(format, double, product):
    """Against float64 over the weight that is stored, with dropout; in 8 bits within the format's floor."""
    if product == IN_8_BITS and not FORMATS[format].quantises_activations:
        return
    layer, x, (a, b) = layer_of(format, double), tokens(), factors()
    layer.product = product
    kept, keep, scale = drawn(2, 7, IN, seed=6) > -0.5, 0.7, 1.5
    y = layer.with_lora(x, a, b, scale, kept, keep)
    found = (y, *torch.autograd.grad(y, (x, a, b), upstream()))
    x64, a64, b64 = (each.detach().double().requires_grad_() for each in (x, a, b))
    truth = F.linear(x64, layer.dequantised(torch.float64), layer.bias.double())
    truth = truth + scale * ((x64 * kept / keep) @ a64.T) @ b64.T
    truths = (truth, *torch.autograd.grad(truth, (x64, a64, b64), upstream().double()))
    for one, other in zip(found, truths, strict=True):
        if product == STORED:
            assert relative_error(one, other) <= 4 * FLOAT32
        else:
            assert sqnr(other, one) >= FORMATS[format].floor


def test_a_high_rank_is_added_after_the_product_whatever_the_implementation():
    """Our kernel for W8A8 takes 256; a LoRA beyond that then sees x itself."""
    layer, x = layer_of("int8-w8a8"), tokens().detach()
    a, b = drawn(257, IN, seed=4), drawn(OUT, 257, seed=5)
    assert torch.equal(layer.with_lora(x, a, b, 1.0, None, 1.0), layer(x) + x @ a.T @ b.T)
    a, b = a[:256], b[:, :256]
    assert not torch.equal(layer.with_lora(x, a, b, 1.0, None, 1.0), layer(x) + x @ a.T @ b.T)


# --- moved, parked, saved, computed again, compiled ------------------------------------------------------------------


def bits(layer: QuantisedLinear) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (part.dtype, part.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, part in layer.named_buffers()
    }


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_a_cast_reaches_the_bias_alone(format, double):
    layer = layer_of(format, double)
    before = bits(layer)
    for cast in (layer.half, layer.double, layer.bfloat16, lambda: layer.to("cpu", torch.float16)):
        cast()
        assert layer.bias.is_floating_point() and layer.bias.dtype != torch.float32
        assert bits(layer) == before
    assert layer.to(torch.float32)(tokens()).isfinite().all()


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_a_move_takes_all_of_it(format, double):
    layer = layer_of(format, double).to("meta")
    assert {part.device.type for part in (*layer.buffers(), layer.bias)} == {"meta"}
    assert layer(tokens().detach().to("meta")).shape == (2, 7, OUT)
    again = layer.to_empty(device="cpu")
    assert {part.device.type for part in (*again.buffers(), again.bias)} == {"cpu"}


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_its_state_fills_an_empty_one(format, double):
    layer = layer_of(format, double)
    state = layer.state_dict()
    assert state.keys() == {"bias", *QuantisedLinear.stored_names(format, double)}
    again = QuantisedLinear.empty(IN, OUT, True, format, double, device="cpu", dtype=torch.float32)
    again.load_state_dict(state)
    other = QuantisedLinear.of_stored(layer.stored, IN, OUT, layer.bias, format, double)
    for each in (again, other):
        assert torch.equal(each(tokens()), layer(tokens())) and bits(each) == bits(layer)
        assert not any(part.requires_grad for part in (*each.parameters(), *each.buffers()))


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_parked_and_given_views_of_other_memory(format, double):
    """As a streamer does: one buffer of bytes behind all of a layer's tensors."""
    layer = layer_of(format, double)
    truth = both_ways(layer, tokens())
    parked = layer.park()
    assert parked.keys() == set(QuantisedLinear.stored_names(format, double)) and not layer.stored
    assert layer.to(torch.float32).bias is not None, "a parked layer moves"
    slot, start = torch.empty(sum(16 + part.nbytes for part in parked.values()), dtype=torch.uint8), 0
    for name, part in parked.items():
        start += -start % 16
        view = slot[start : start + part.nbytes].view(part.dtype).view(part.shape)
        view.copy_(part)
        layer._buffers[name], start = view, start + part.nbytes
    for one, other in zip(both_ways(layer, tokens()), truth, strict=True):
        assert torch.equal(one, other)


def test_what_is_not_the_format_s_is_refused():
    layer = layer_of("nf4")
    stored = {**layer.stored, "absmax": layer.absmax.half()}
    with pytest.raises(ValueError, match="a weight in nf4 is stored as .*absmax.*float32.*not .*float16"):
        QuantisedLinear.of_stored(stored, IN, OUT, None, "nf4")
    with pytest.raises(ValueError, match="a weight in int8 is stored as"):
        QuantisedLinear.of_stored(layer.stored, IN, OUT, None, "int8")
    weight = from_state_dict(doubled_state(), "weight")
    with pytest.raises(ValueError, match="codes that stand for other numbers than ours"):
        other = weight.replace(nested_quant_map=weight.nested_quant_map.flip(0))
        QuantisedLinear.of_weight(other, None, "nf4")


def doubled_state() -> dict[str, Tensor]:
    theirs = Linear4bit(IN, OUT, compress_statistics=True, quant_type="nf4").to("cpu")
    return theirs.state_dict()


def twice(layer: QuantisedLinear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The layer with a LoRA, and alone where nothing wants a gradient, as in the first block."""
    return F.silu(layer.with_lora(x, a, b, 0.5, None, 1.0)) * layer(x.detach())


def through(layer: QuantisedLinear, x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """What `twice` gives, and all its gradients."""
    y = twice(layer, x, a, b)
    return [y, *torch.autograd.grad((y * upstream()).sum(), (x, a, b))]


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_computed_again_it_is_the_same_to_the_bit(format, double):
    layer, x, (a, b) = layer_of(format, double), tokens(), factors()
    truth = through(layer, x, a, b)
    y = recomputed(partial(twice, layer, x, a, b), CPU)
    for one, other in zip((y, *torch.autograd.grad((y * upstream()).sum(), (x, a, b))), truth, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "backend", ["aot_eager", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("eager", "inductor"))]
)
@pytest.mark.parametrize(("format", "double"), KEPT)
def test_one_graph_under_compile(format, double, backend):
    layer, x, (a, b) = layer_of(format, double), tokens(), factors()
    truth = through(layer, x, a, b)
    torch._dynamo.reset()
    y = torch.compile(twice, fullgraph=True, backend=backend)(layer, x, a, b)
    for one, other in zip((y, *torch.autograd.grad((y * upstream()).sum(), (x, a, b))), truth, strict=True):
        if backend == "inductor":
            assert relative_error(one, other) <= 1e-5
        else:
            assert torch.equal(one, other)


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("format", "double"), KEPT)
@pytest.mark.parametrize("base", BASES)
def test_a_block_over_it_is_one_graph(base, format, double, backend, plan_maker, monkeypatch):
    plan = plan_for(base, plan_maker)
    plain = step(adapted_model(base, plan, format, double), base, plan)
    family = ltx2 if "ltx2" in base else ltx_video
    torch._dynamo.reset()
    monkeypatch.setattr(family, "block_forward", torch.compile(family.block_forward, fullgraph=True, backend=backend))
    compiled = step(adapted_model(base, plan, format, double), base, plan)
    assert torch.equal(plain[0], compiled[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, compiled[1][name]), name
