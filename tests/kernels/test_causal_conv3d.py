"""The causal convolution against diffusers' own and float64, piece by piece and whole, by each of its kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from closeness import BF16_ROUNDING, FEW, FLOAT32, relative_error
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.causal_conv3d import causal_conv3d, launch, pack
from ltxforge_kernels.causal_conv3d.inputs import ConvShape, Inputs, inputs
from torch import Tensor

SMALL = ConvShape(16, 24, 2, 4, 8)
SHAPES = [
    ConvShape(48, 128, 1, 4, 8),
    ConvShape(128, 64, 1, 3, 5),
    ConvShape(16, 24, 1, 9, 17, clips=2),
    ConvShape(72, 8, 1, 1, 1),
    ConvShape(5, 7, 3, 5, 4, clips=2),
    ConvShape(24, 129, 1, 2, 3),
    ConvShape(8, 16, 2, 5, 3, kernel=1),
    ConvShape(16, 8, 2, 3, 3, clips=0),
]
# 16-bit results: rounding of exact values, for fp16 an eighth of bf16's.
BOUNDS = {torch.bfloat16: BF16_ROUNDING, torch.float16: BF16_ROUNDING / 8, torch.float32: FLOAT32}
EPS = 1e-8


def run(given: Inputs, implementation: str = "triton", eps: float | None = None) -> tuple[Tensor, Tensor]:
    return causal_conv3d(
        given.x, given.weight, given.bias, given.state, residual=given.residual, norm_eps=eps,
        implementation=implementation,
    )  # fmt: skip


def require_close(result: Tensor, truth: Tensor) -> None:
    bound = BOUNDS[result.dtype]
    # Half a unit in the last place: a few values may all of them be that unlucky.
    assert relative_error(result, truth) <= (bound if truth.numel() > FEW else 2.2 * bound)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_state(shape, dtype, device):
    """In the middle of a clip, and at its start without a residual."""
    given = inputs(shape, Filler(device), dtype)
    for piece in (given, replace(given, state=None, residual=None, bias=None)):
        result, state = run(piece)
        truth, kept = run(piece.double(), "eager")
        assert result.dtype == state.dtype == dtype
        require_close(result, truth)
        assert torch.equal(state.double(), kept)
        if truth.numel() > FEW:
            assert relative_error(result, truth) <= 1.1 * relative_error(run(piece, "eager")[0], truth)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_norm_and_activation_first(shape, dtype, device):
    """The state is normed and activated already. What is convolved is rounded, as between two modules."""
    given = inputs(shape, Filler(device), dtype, residual=False)
    result, state = run(given, eps=EPS)
    exact = given.double()
    activated = F.silu(exact.x / (exact.x.square().mean(dim=1, keepdim=True) + EPS).sqrt())
    require_close(state, torch.cat([exact.state, activated], dim=2)[:, :, -2:])
    between = replace(exact, x=activated.to(dtype).double())
    require_close(result, run(between, "eager")[0])
    assert relative_error(run(given, "eager", EPS)[0], result) <= 3 * BOUNDS[dtype]


@pytest.mark.parametrize("module", [LTXVideoCausalConv3d, LTX2VideoCausalConv3d])
@pytest.mark.parametrize("size", [3, 1])
def test_it_is_diffusers_own_convolution(module, size, device):
    """Bit for bit where it is eager and the clip is whole, however long."""
    convolution = module(16, 24, size).to(device).requires_grad_(False)
    clip = Filler(device).normal(1, 16, 4, 5, 6)
    weights = convolution.conv.weight, convolution.conv.bias
    truth = convolution(clip)
    assert torch.equal(causal_conv3d(clip, *weights, None, implementation="eager")[0], truth)
    assert relative_error(causal_conv3d(clip, *weights, None, implementation="triton")[0], truth) <= FLOAT32


def test_pieces_of_a_clip_are_the_clip(device):
    """By the same kernel the same bits, whatever the pieces."""
    given = inputs(replace(SMALL, frames=6), Filler(device), torch.bfloat16).at_the_start()
    whole, last = run(given, eps=EPS)
    state, results = None, []
    for x, residual in zip(given.x.split([1, 3, 2], dim=2), given.residual.split([1, 3, 2], dim=2), strict=True):
        result, state = run(replace(given, x=x, residual=residual, state=state), eps=EPS)
        results.append(result)
    assert torch.equal(torch.cat(results, dim=2), whole)
    assert torch.equal(state, last)


def test_both_kernels_agree(device):
    """The one for chips without a tensor memory engine, in bf16, which tests on others do not reach."""
    given = inputs(SHAPES[2], Filler(device), torch.bfloat16)
    buffer = launch.launch_buffer(given.x, given.state, 2, None)
    weight, residual = launch.pixels_first(given.weight), launch.pixels_first(given.residual)
    y = torch.empty_like(residual)
    launch.launch_pixels(buffer, weight, given.bias, residual, y)
    require_close(launch.channels_second(y), run(given.double(), "eager")[0])


def test_layouts_do_not_matter(device):
    packed = inputs(SMALL, Filler(device))
    plain = Inputs(*(getattr(packed, name).contiguous() for name in ("x", "weight", "bias", "state", "residual")))
    assert not plain.x.permute(0, 2, 3, 4, 1).is_contiguous()
    for eps in (None, EPS):
        for one, other in zip(run(packed, eps=eps), run(plain, eps=eps), strict=True):
            assert torch.equal(one, other)


def test_a_weight_is_packed_once():
    weight = torch.randn(4, 6, 3, 3, 3)
    packed = pack(weight)
    assert torch.equal(packed, weight)
    assert packed.permute(0, 2, 3, 4, 1).is_contiguous()
    assert pack(packed).data_ptr() == packed.data_ptr()


def test_the_state_keeps_no_frames_alive(device):
    given = inputs(replace(SMALL, frames=6), Filler(device))
    for implementation in ("triton", "eager"):
        _, state = run(given, implementation)
        assert state.untyped_storage().nbytes() == state.numel() * 4


def test_the_same_bits_twenty_times(device):
    given = inputs(SMALL, Filler(device), torch.bfloat16)
    first = run(given, eps=EPS)
    for _ in range(19):
        assert all(torch.equal(one, other) for one, other in zip(first, run(given, eps=EPS), strict=True))


@pytest.mark.parametrize("piece", ["middle", "start"])
def test_torch_s_own_checks(piece, device):
    given = inputs(ConvShape(8, 8, 2, 2, 4), Filler(device))
    given = given if piece == "middle" else given.at_the_start()
    arguments = (given.x, given.weight, given.bias, given.state, given.residual, EPS)
    torch.library.opcheck(launch.forward_op, arguments)


def test_without_breaks_under_compile(device):
    given = inputs(SMALL, Filler(device))

    def twice(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = run(replace(given, x=2 * x, state=state), eps=EPS)
        return y.sum(dim=1), state

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(given.x, given.state), twice(given.x, given.state), strict=True):
        assert torch.equal(one, other)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled(device):
    given = inputs(SMALL, Filler(device))
    for one, other in zip(run(given, "compile", EPS), run(given.double(), "eager", EPS), strict=True):
        assert relative_error(one, other) <= FLOAT32


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_gradients_are_refused(implementation, device):
    given = inputs(SMALL, Filler(device))
    learning = replace(given, weight=given.weight.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"has no gradient: clips are encoded under torch\.no_grad"):
        run(learning, implementation)
    with torch.no_grad():
        assert run(learning, implementation)[0].shape == (1, 24, 2, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 16, 0, 4, 8)}, "with frames of pixels"),
        ({"x": (1, 15, 2, 4, 8)}, r"x is \[1, 15, 2, 4, 8\], not \[1, 16"),
        ({"weight": (24, 16, 2, 3, 3)}, "with odd sizes"),
        ({"bias": (1,)}, r"bias is \[1\], not \[24\]"),
        ({"state": (1, 16, 1, 4, 8)}, r"state is .*, not \[1, 16, 2, 4, 8\]"),
        ({"residual": (1, 1, 2, 4, 8)}, r"residual is .*, not \[1, 24, 2, 4, 8\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    given = replace(inputs(SMALL, Filler()), **{name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match=message):
        run(given, "eager")


def test_mixed_dtypes_are_refused():
    given = inputs(SMALL, Filler())
    with pytest.raises(ValueError, match="one dtype for all, not x torch.bfloat16, weight torch.float32"):
        run(replace(given, x=given.x.bfloat16()), "eager")
