"""LoRA layers against float64, against stock PEFT, and inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.lora_linear import augment, draw_kept, launch, lora_branch, lora_linear, refresh, tail_width
from ltxforge_kernels.lora_linear.inputs import Inputs, LayerShape, inputs
from peft import LoraConfig
from peft.tuners import lora
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Gradients of A and B in bf16, which are made of ∂/∂h or h, rounded.
BF16_LEARNED = 2.5e-3
# fp16 has three bits more; bf16's highest bound here, in those.
FLOAT16 = 3**0.5 * BF16_ROUNDING / 8
# Fewer numbers than this need not have the mean rounding error: three times it, for a few unlucky ones.
FEW = 512
REAL = LayerShape("2B", 72, 2048, 256, 32)
SHAPES = [
    REAL,
    LayerShape("13B, rank 128", 40, 4096, 128, 128),
    LayerShape("no power of two", 150, 96, 80, 12),
    LayerShape("odd, rank 4", 67, 101, 37, 4),
    LayerShape("rank 160", 70, 130, 96, 160),
    LayerShape("rank 256", 33, 64, 128, 256),
    LayerShape("one of each", 1, 1, 1, 1),
    LayerShape("no token", 0, 32, 16, 8),
]
LAYOUTS = {
    "augmented": {"augmented": True},
    "plain, dropout": {"dropout": 0.3},
    "augmented, GELU, dropout": {"augmented": True, "activation": "gelu", "dropout": 0.3},
    "plain, GELU": {"activation": "gelu", "bias": False},
}
SMALL = LayerShape("small", 24, 16, 8, 4)
both_layouts = pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])


def in_float64(given: Inputs) -> Inputs:
    """The same numbers, A and B rounded as they are at use."""
    wide = {name: getattr(given, name).double() for name in ("x", "weight", "upstream")}
    learned = {name: getattr(given, name).to(given.x.dtype).double() for name in ("a", "b")}
    bias = None if given.bias is None else given.bias.double()
    return dataclasses.replace(given, **wide, **learned, bias=bias, augmented=None)


def everything(given: Inputs, implementation: str = "triton") -> dict[str, torch.Tensor]:
    """y, and the gradients of x, a and b."""
    learning = {name: getattr(given, name).detach().requires_grad_() for name in ("x", "a", "b")}
    output = lora_linear(*dataclasses.replace(given, **learning).layer, implementation=implementation)
    output.backward(given.upstream)
    return {"y": output.detach(), **{name: tensor.grad for name, tensor in learning.items()}}


def bounds(given: Inputs) -> dict[str, float]:
    """Augmented, y is rounded once; else the base is, then y; the base's ∂/∂x is, then the whole; GELU rounds first."""
    if given.x.dtype != torch.bfloat16:
        return dict.fromkeys(("y", "x", "a", "b"), FLOAT32 if given.x.dtype == torch.float32 else FLOAT16)
    twice, thrice = 2**0.5 * BF16_ROUNDING, 3**0.5 * BF16_ROUNDING
    gelu = given.activation == "gelu"
    single, double = (BF16_ROUNDING, twice) if given.augmented is not None else (twice, thrice)
    learned = twice if gelu else BF16_LEARNED
    return {"y": double if gelu else single, "x": twice, "a": learned, "b": learned}


def require_true(given: Inputs) -> None:
    """Inside the bounds, and hardly further from the truth than eager."""
    results, truths, eager = everything(given), everything(in_float64(given), "eager"), everything(given, "eager")
    for name, bound in bounds(given).items():
        result, truth = results[name], truths[name]
        assert result.dtype == (torch.float32 if name in "ab" else given.x.dtype)
        few = given.x.dtype != torch.float32 and truth.numel() < FEW
        error = relative_error(result, truth)
        assert error <= (3 * bound if few else bound), name
        if given.x.dtype != torch.float32 and not few:
            assert error <= 1.1 * relative_error(eager[name], truth), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_in_fp16(layout, device):
    require_true(inputs(LayerShape("", 40, 512, 64, 16), Filler(device), torch.float16, **layout))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, layout, device):
    require_true(inputs(shape, Filler(device), dtype, **layout))


def peft_layer(given: Inputs, dropout: float, dtype: torch.dtype) -> lora.Linear:
    """Stock PEFT over the same numbers, alpha = R·scale."""
    rank, inward = given.a.shape
    base = torch.nn.Linear(inward, len(given.weight), bias=given.bias is not None)
    config = LoraConfig(r=rank, lora_alpha=rank * given.scale, lora_dropout=dropout)
    layer = lora.Linear(base, "default", config=config, r=rank, lora_alpha=rank * given.scale)
    values = {"weight": given.weight, "bias": given.bias}
    base.load_state_dict({name: value for name, value in values.items() if value is not None})
    for part, value in ((layer.lora_A, given.a), (layer.lora_B, given.b)):
        part["default"].load_state_dict({"weight": value})
    return layer.to(given.x.device, dtype).requires_grad_(False)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@both_layouts
def test_it_is_what_peft_computes(augmented, dropout, device):
    """In float64, output and every gradient, with the mask that PEFT's dropout draws."""
    given = inputs(REAL, Filler(device), augmented=augmented)
    layer = peft_layer(given, dropout, torch.float64)
    theirs = {"x": given.x.double(), "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    for tensor in theirs.values():
        tensor.requires_grad_()
    torch.manual_seed(3)
    output = layer(theirs["x"])
    output.backward(given.upstream.double())
    if dropout:
        torch.manual_seed(3)
        given = dataclasses.replace(given, kept=draw_kept(theirs["x"], 1 - dropout), keep=1 - dropout)
    ours = everything(given)
    assert relative_error(ours["y"], output) <= FLOAT32
    for name, tensor in theirs.items():
        assert relative_error(ours[name], tensor.grad) <= FLOAT32, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eager_has_the_bits_of_peft(dtype, dropout, device):
    given = inputs(SMALL, Filler(device))
    layer = peft_layer(given, dropout, dtype)
    wide = {name: getattr(given, name).to(dtype) for name in ("x", "weight", "bias")}
    given = dataclasses.replace(given, **wide, keep=1 - dropout)
    torch.manual_seed(4)
    theirs = layer(given.x)
    if dropout:
        torch.manual_seed(4)
        given = dataclasses.replace(given, kept=draw_kept(given.x, given.keep))
    assert torch.equal(lora_linear(*given.layer, implementation="eager"), theirs)
    base = functional.linear(given.x, given.weight, given.bias)
    assert torch.equal(lora_branch(given.x, base, *branch_of(given), implementation="eager"), theirs)


def branch_of(given: Inputs) -> tuple:
    return given.a, given.b, given.scale, given.kept, given.keep


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_onto_a_base_of_any_kind(dtype, dropout, device):
    """One rounding of y, and of ∂/∂x; the base's gradient is y's."""
    given = inputs(REAL, Filler(device), dtype, dropout=dropout)
    exact = in_float64(given)
    base = Filler(device, 1).normal(*given.upstream.shape, dtype=dtype)
    results, truths = [], []
    for into, of, start, which in ((results, given, base, "triton"), (truths, exact, base.double(), "eager")):
        learning = [tensor.detach().requires_grad_() for tensor in (of.x, start, of.a, of.b)]
        output = lora_branch(*learning, of.scale, of.kept, of.keep, implementation=which)
        output.backward(of.upstream)
        into += [output.detach(), *(tensor.grad for tensor in learning)]
    rounding = FLOAT32 if dtype == torch.float32 else BF16_ROUNDING
    learned = FLOAT32 if dtype == torch.float32 else BF16_LEARNED
    # ∂/∂x is rounded twice: ∂/∂h before it.
    for result, truth, bound in zip(results, truths, (rounding, 2 * rounding, 0, learned, learned), strict=True):
        assert relative_error(result, truth) <= bound


@both_layouts
def test_without_the_branch_it_is_the_plain_layer(augmented, device):
    """B = 0: inside the plain layer's own rounding, and without a tail to the bit."""
    given = inputs(REAL, Filler(device), torch.bfloat16, augmented=augmented)
    given.b.zero_()
    if augmented:
        refresh(given.augmented, given.b)
    truth = functional.linear(given.x.double(), given.weight.double(), given.bias.double())
    plain = functional.linear(given.x, given.weight, given.bias)
    output = lora_linear(*given.layer, implementation="triton")
    assert relative_error(output, truth) <= BF16_ROUNDING
    assert augmented or torch.equal(output, plain)


def test_disabled_it_is_the_layer_as_stored(device):
    """What a caller does without the LoRA: the stock bits where W is alone, the stock error where B stands behind."""
    given = inputs(REAL, Filler(device), torch.bfloat16, augmented=True)
    assert not given.weight.is_contiguous()
    truth = functional.linear(given.x.double(), given.weight.double(), given.bias.double())
    assert relative_error(functional.linear(given.x, given.weight, given.bias), truth) <= BF16_ROUNDING
    stock = peft_layer(dataclasses.replace(given, weight=given.weight.contiguous()), 0.0, torch.bfloat16)
    stock.enable_adapters(False)
    alone = inputs(REAL, Filler(device), torch.bfloat16)
    assert torch.equal(alone.weight, given.weight)
    assert torch.equal(functional.linear(alone.x, alone.weight, alone.bias), stock(given.x))


@pytest.mark.parametrize(("rank", "tail"), [(1, 64), (32, 64), (64, 64), (65, 128), (160, 192), (256, 256)])
def test_w_and_b_in_one_matrix(rank, tail, device):
    weight, b = Filler(device).normal(6, 10, dtype=torch.bfloat16), Filler(device, 1).normal(6, rank)
    wide = augment(weight, rank)
    assert tail_width(rank) == tail and wide.shape == (6, 10 + tail)
    assert torch.equal(wide[:, :10], weight) and not wide[:, 10:].any()
    refresh(wide, b.requires_grad_())
    assert torch.equal(wide[:, :10], weight) and not wide.requires_grad
    assert torch.equal(wide[:, 10 : 10 + rank], b.to(torch.bfloat16)) and not wide[:, 10 + rank :].any()


def test_a_refresh_before_the_backward_is_refused(device):
    given = inputs(SMALL, Filler(device), augmented=True)
    output = lora_linear(given.x.requires_grad_(), *given.layer[1:], implementation="triton")
    refresh(given.augmented, given.b + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_dropout_is_on_the_branch_alone(device):
    """Nothing kept: the base's y and ∂/∂x, and A and B learn nothing."""
    given = dataclasses.replace(inputs(SMALL, Filler(device), dropout=0.5), keep=0.5)
    given.kept.zero_()
    results = everything(given)
    assert relative_error(results["y"], functional.linear(given.x, given.weight, given.bias)) <= FLOAT32
    assert relative_error(results["x"], given.upstream @ given.weight) <= FLOAT32
    assert not results["a"].any() and not results["b"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_torch_s(dtype):
    x = Filler().normal(5, 67, dtype=dtype)
    torch.manual_seed(5)
    theirs = functional.dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(draw_kept(x, 1 - 0.3), theirs != 0)


@both_layouts
def test_layouts_do_not_matter(augmented, device):
    plain = inputs(SMALL, Filler(device), augmented=augmented, dropout=0.3, leading=(2, 3, 4))
    names = ("x", "a", "b", "kept", "upstream") + (() if augmented else ("weight",))
    given = dataclasses.replace(plain, **{name: getattr(plain, name).mT.contiguous().mT for name in names})
    assert not any(getattr(given, name).is_contiguous() for name in names)
    one, other = everything(given), everything(plain)
    assert one["y"].shape == (2, 3, 4, SMALL.outward) and one["x"].shape == plain.x.shape
    # A matrix product of another layout may add in another order.
    assert all(relative_error(one[name], other[name]) <= FLOAT32 for name in one)


@both_layouts
def test_an_x_that_learns_nothing(augmented, device):
    """The first layer: A and B learn the same, and there is no large product on the way back."""
    given = inputs(SMALL, Filler(device), augmented=augmented)
    a, b = (tensor.detach().requires_grad_() for tensor in (given.a, given.b))
    replaced = dataclasses.replace(given, a=a, b=b)
    lora_linear(*replaced.layer, implementation="triton").backward(given.upstream)
    whole = everything(given)
    assert relative_error(a.grad, whole["a"]) <= FLOAT32 and relative_error(b.grad, whole["b"]) <= FLOAT32


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_is_kept_for_backward(layout, device):
    """Of [.., K]: x itself, and the mask. Neither act(x) nor the packed matrix."""
    given = inputs(SMALL, Filler(device), **layout)
    x = given.x.requires_grad_()
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(x, *given.layer[1:], implementation="triton")
    wide = [tensor for tensor in kept if tensor.shape[0] == SMALL.tokens and tensor.shape[1] >= SMALL.inward]
    expected = {x.data_ptr(), *([given.kept.data_ptr()] if given.kept is not None else [])}
    # h has 16 columns, as x has here.
    assert {tensor.data_ptr() for tensor in wide if tensor.shape != (SMALL.tokens, 16)} <= expected
    assert {tensor.data_ptr() for tensor in wide} > expected and len(wide) == len(expected) + 1


@both_layouts
def test_the_same_bits_twenty_times(augmented, device):
    given = inputs(SMALL, Filler(device), torch.bfloat16, augmented=augmented, dropout=0.3, activation="gelu")
    first = everything(given)
    for _ in range(19):
        again = everything(given)
        assert all(torch.equal(again[name], first[name]) for name in first)


@both_layouts
def test_torch_s_own_checks(augmented, device):
    given = inputs(LayerShape("", 5, 8, 6, 3), Filler(device), augmented=augmented, dropout=0.3)
    x, a, b = (tensor.detach().requires_grad_() for tensor in (given.x, given.a, given.b))
    stored = given.augmented if augmented else given.weight
    settings = (given.scale, given.kept, given.keep)
    torch.library.opcheck(launch.linear_op, (x, stored, given.bias, a, b, *settings, "gelu", augmented))
    _, branch = launch.linear_op(given.x, stored, None, given.a, given.b, *settings, "gelu", augmented)
    kept = (given.upstream, given.x, stored, given.a, given.b, branch, *settings, "gelu", augmented)
    for of_x in (True, False):
        torch.library.opcheck(launch.linear_gradients_op, (*kept, of_x))


def test_torch_s_own_checks_of_the_branch(device):
    given = inputs(LayerShape("", 5, 8, 6, 3), Filler(device))
    x, base, a, b = (tensor.detach().requires_grad_() for tensor in (given.x, given.upstream, given.a, given.b))
    torch.library.opcheck(launch.branch_op, (x, base, a, b, 0.5, None, 1.0))
    _, branch = launch.branch_op(given.x, given.upstream, given.a, given.b, 0.5, None, 1.0)
    kept = (given.upstream, given.x, given.a, given.b, branch, 0.5, None, 1.0)
    torch.library.opcheck(launch.branch_gradients_op, (*kept, True))


def feed_forward(x: torch.Tensor, first: Inputs, second: Inputs, implementation: str = "triton") -> torch.Tensor:
    """Two layers with dropout: augmented, then plain with GELU in front."""
    for given in (first, second):
        kept = draw_kept(x, 0.75)
        settings = (given.scale, kept, 0.75, given.activation, given.augmented)
        x = lora_linear(x, given.weight, given.bias, given.a, given.b, *settings, implementation=implementation)
    return (x * second.upstream).square().mean()


@pytest.fixture
def step(device):
    """The layers, their loss and every gradient, for one seed."""
    up = inputs(LayerShape("", 24, 16, 32, 4), Filler(device), augmented=True)
    down = inputs(LayerShape("", 24, 32, 16, 4), Filler(device, 1), activation="gelu")
    learning = [tensor.requires_grad_() for tensor in (up.x, up.a, up.b, down.a, down.b)]
    torch.manual_seed(6)
    loss = feed_forward(up.x, up, down)
    gradients = torch.autograd.grad(loss, learning)
    torch.manual_seed(6)
    return up, down, learning, loss.detach(), gradients


def require_same(step: tuple, loss: torch.Tensor) -> None:
    *_, learning, expected, gradients = step
    assert torch.equal(loss.detach(), expected)
    for gradient, other in zip(torch.autograd.grad(loss, learning), gradients, strict=True):
        assert torch.equal(gradient, other)


def test_without_breaks_under_compile(step):
    torch._dynamo.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    require_same(step, compiled(step[0].x, *step[:2]))


def test_recomputed_under_checkpointing(step):
    """Dropout's masks are drawn anew, and are the same."""
    require_same(step, checkpoint(feed_forward, step[0].x, *step[:2], use_reentrant=False))


def test_compile_is_the_reference(step):
    """Its dispatch; what Inductor makes of it takes a C++ compiler half a minute, in the sweeps."""
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(feed_forward(step[0].x, *step[:2], "compile"), step[3]) <= 2 * FLOAT32


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    loss = feed_forward(step[0].x, *step[:2], "compile")
    assert relative_error(loss, step[3]) <= 2 * FLOAT32
    for gradient, other in zip(torch.autograd.grad(loss, step[2]), step[4], strict=True):
        assert relative_error(gradient, other) <= 2 * FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 15)}, r"a is \[4, 16\], not \[R, 15\]"),
        ({"a": torch.zeros(0, 16)}, r"a is \[0, 16\]"),
        ({"b": torch.zeros(8, 5)}, r"b is \[8, 5\], not \[N, 4\]"),
        ({"kept": torch.ones(24, 16)}, "kept is .* not .* torch.bool"),
        ({"keep": 0.0}, "probability 0.0"),
        ({"weight": torch.zeros(8, 17)}, r"not \[8, 16\]"),
        ({"weight": torch.zeros(8, 16, dtype=torch.bfloat16)}, "of torch.float32"),
        ({"weight": torch.zeros(8, 16, requires_grad=True)}, "frozen"),
        ({"bias": torch.zeros(1)}, r"not \[8\]"),
        ({"augmented": torch.zeros(8, 20)}, r"not frozen \[8, 80\]"),
        ({"activation": "relu"}, "'relu' is none of none, gelu"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = dataclasses.replace(inputs(SMALL, Filler()), **change)
    with pytest.raises(ValueError, match=message):
        lora_linear(*given.layer, implementation="eager")


def test_a_rank_beyond_the_kernel_s_is_eager_s():
    given = inputs(dataclasses.replace(SMALL, rank=257), Filler())
    assert lora_linear(*given.layer, implementation="eager").shape == given.upstream.shape
    with pytest.raises(ValueError, match="a rank of 256 at most, not 257: choose eager"):
        lora_linear(*given.layer, implementation="triton")


def test_a_base_that_does_not_fit_is_refused():
    given = inputs(SMALL, Filler())
    with pytest.raises(ValueError, match=r"base is \[24, 1\]"):
        lora_branch(given.x, given.upstream[:, :1], given.a, given.b, 1.0, implementation="eager")
