"""Norm and rotation of queries and keys: against complex numbers in float64, diffusers' attention, and PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import DTYPES, FLOAT32, relative_error, require_close
from diffusers.models.transformers import transformer_ltx, transformer_ltx2
from ltxforge_kernels.cases import AWKWARD, FEW_HIDDEN, Filler, TokenShape
from ltxforge_kernels.qk_norm_rope import launch, qk_norm_rope
from ltxforge_kernels.qk_norm_rope.inputs import Inputs, inputs
from ltxforge_kernels.qk_norm_rope.rope import Rope, compact
from torch.utils.checkpoint import checkpoint

EPS = 1e-6
SMALL = TokenShape("small", 2, 3, 24)
# (layout, heads, axes, keys): self attention of LTX-Video and LTX-2, cross attention by time alone, and by nothing.
KINDS = {
    "interleaved": ("interleaved", 4, 3, None),
    "split": ("split", 4, 3, None),
    "by time": ("split", 4, 1, 2),
    "neighbours by time": ("interleaved", 4, 1, 2),
    "no rope": (None, 4, 3, 5),
}


def made(shape: TokenShape, kind: str, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    layout, heads, axes, keys = KINDS[kind]
    return inputs(shape, Filler(device), dtype, layout=layout, heads=heads, axes=axes, keys=keys)


def ours(given: Inputs, implementation: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
    sides = (given.query, given.key, given.query_weight, given.key_weight, given.query_rope, given.key_rope)
    return qk_norm_rope(*sides, given.heads, EPS, implementation=implementation)


def as_complex_numbers(given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64: pairs as complex numbers, times e^(i·angle)."""

    def side(x: torch.Tensor, weight: torch.Tensor | None, rope: Rope | None) -> torch.Tensor:
        x = x.double()
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed = normed if weight is None else normed * weight.double()
        if rope is None:
            return normed
        cos, sin = (table[0].double() for table in rope.full)
        if rope.heads is None:
            numbers = torch.view_as_complex(normed.unflatten(2, (-1, 2)))
            return torch.view_as_real(numbers * torch.complex(cos[:, ::2], sin[:, ::2])).flatten(2)
        first, second = normed.unflatten(2, (rope.heads, 2, -1)).unbind(3)
        turned = torch.complex(first, second) * torch.complex(cos, sin).transpose(0, 1)
        return torch.stack([turned.real, turned.imag], dim=3).flatten(2)

    return (
        side(given.query, given.query_weight, given.query_rope),
        side(given.key, given.key_weight, given.key_rope),
    )


def everything(given: Inputs, compute) -> dict[str, torch.Tensor]:
    """q, k, and the gradients of query and key."""
    query, key = (tensor.detach().requires_grad_() for tensor in (given.query, given.key))
    q, k = compute(replace(given, query=query, key=key))
    torch.autograd.backward([q, k], [given.query_upstream.to(q.dtype), given.key_upstream.to(k.dtype)])
    return {"q": q.detach(), "k": k.detach(), "query": query.grad, "key": key.grad}


def exactly(given: Inputs) -> dict[str, torch.Tensor]:
    return everything(replace(given, query=given.query.double(), key=given.key.double()), as_complex_numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["interleaved", "split"])
@pytest.mark.parametrize("shape", [replace(shape, tokens=4) for shape in FEW_HIDDEN], ids=str)
def test_forward_and_gradients_at_real_widths(shape, kind, dtype, device):
    layout, _, axes, keys = KINDS[kind]
    given = inputs(shape, Filler(device), dtype, layout=layout, heads=32, axes=axes, keys=keys)
    results, truths, eager = everything(given, ours), exactly(given), everything(given, lambda g: ours(g, "eager"))
    for name, truth in truths.items():
        assert results[name].dtype == dtype
        require_close(results[name], truth, name)
        if dtype == torch.bfloat16:
            assert relative_error(results[name], truth) <= 1.1 * relative_error(eager[name], truth), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_every_kind(kind, weights, device):
    given = made(SMALL, kind, device)
    given = given if weights else replace(given, query_weight=None, key_weight=None)
    results, truths = everything(given, ours), exactly(given)
    for name, truth in truths.items():
        assert relative_error(results[name], truth) <= FLOAT32, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [replace(shape, tokens=min(shape.tokens, 7)) for shape in AWKWARD], ids=str)
def test_awkward_shapes(shape, dtype, device):
    layouts = (None,) if shape.width % 2 else ("interleaved", "split", None)
    for layout in layouts:
        given = inputs(shape, Filler(device), dtype, layout=layout, heads=1 if shape.width % 2 else 2)
        results, truths = everything(given, ours), exactly(given)
        for name, truth in truths.items():
            # Over one channel a norm gives ±1, and its gradient is what rounding leaves of 1 − 1.
            if shape.width > 1 or name in "qk":
                require_close(results[name], truth, f"{layout} {name}")


def test_both_sides_have_ropes_of_their_own(device):
    """None on one side, and unlike axes and padding on both."""
    given = made(SMALL, "by time", device)
    padded = inputs(SMALL, Filler(device, 3), layout="split", heads=4, axes=5).query_rope
    for changed in (replace(given, key_rope=None), replace(given, query_rope=None), replace(given, query_rope=padded)):
        results, truths = everything(changed, ours), exactly(changed)
        assert all(relative_error(results[name], truth) <= FLOAT32 for name, truth in truths.items())


def neighbours_of_diffusers(dim: int) -> tuple:
    """LTX-Video's attention, tables and rotation."""
    table = transformer_ltx.LTXVideoRotaryPosEmbed(dim)
    tables = table(torch.empty(1, 0), 3, 2, 2, rope_interpolation_scale=(8 / 24, 32, 32))
    attention = transformer_ltx.LTXAttention(dim, heads=4, kv_heads=4, dim_head=dim // 4)
    return attention, tables, transformer_ltx.apply_rotary_emb


def halves_of_diffusers(dim: int) -> tuple:
    """LTX-2's."""
    table = transformer_ltx2.LTX2AudioVideoRotaryPosEmbed(dim, rope_type="split", num_attention_heads=4)
    tables = table(table.prepare_video_coords(1, 3, 2, 2, "cpu"))
    attention = transformer_ltx2.LTX2Attention(dim, heads=4, kv_heads=4, dim_head=dim // 4, rope_type="split")
    return attention, tables, transformer_ltx2.apply_split_rotary_emb


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stock", [neighbours_of_diffusers, halves_of_diffusers])
def test_eager_has_diffusers_bits(stock, dtype):
    """Its norms and rotation as its attention applies them, with its own tables."""
    attention, tables, rotated = stock(32)
    attention = attention.to(dtype).requires_grad_(False)
    torch.nn.init.normal_(attention.norm_q.weight)
    query, key = (Filler("cpu", seed).normal(1, 12, 32, dtype=dtype) for seed in (0, 1))
    expected = rotated(attention.norm_q(query), tables), rotated(attention.norm_k(key), tables)
    rope = compact(*tables, (3, 2, 2))
    weights = (attention.norm_q.weight, attention.norm_k.weight)
    results = qk_norm_rope(query, key, *weights, rope, rope, 4, attention.norm_q.eps, implementation="eager")
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize("kind", ["interleaved", "split"])
def test_layouts_do_not_matter(kind, device):
    plain = made(SMALL, kind, device)
    tensors = ("query", "key", "query_upstream", "key_upstream")
    given = replace(plain, **{name: getattr(plain, name).mT.contiguous().mT for name in tensors})
    assert not any(getattr(given, name).is_contiguous() for name in tensors)
    one, other = everything(given, ours), everything(plain, ours)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("learning", ["query", "key"])
def test_what_needs_no_gradient_gets_none(learning, device):
    given = made(SMALL, "split", device)
    leaf = getattr(given, learning).detach().requires_grad_()
    q, k = ours(replace(given, **{learning: leaf}))
    torch.autograd.backward([q, k], [given.query_upstream, given.key_upstream])
    assert torch.equal(leaf.grad, everything(given, ours)[learning])


def test_the_same_bits_twenty_times(device):
    given = made(TokenShape("", 1, 2, 24), "split", device, torch.bfloat16)
    first = everything(given, ours)
    for _ in range(19):
        again = everything(given, ours)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["interleaved", "no rope"])
def test_torch_s_own_checks(kind, device):
    given = made(TokenShape("", 1, 2, 8), kind, device)
    query, key = (tensor.detach().requires_grad_() for tensor in (given.query, given.key))
    ropes = (*launch.flat(given.query_rope), *launch.flat(given.key_rope))
    rest = (given.query_weight, given.key_weight, *ropes, 0)
    torch.library.opcheck(launch.forward_op, (query, key, *rest, EPS))
    _, _, *reciprocals = launch.forward_op(given.query, given.key, *rest, EPS)
    upstreams = (given.query_upstream, given.key_upstream, given.query, given.key)
    torch.library.opcheck(launch.backward_op, (*upstreams, *rest, *reciprocals, True, False))


def model(weights: torch.Tensor, given: Inputs, implementation: str = "triton") -> torch.Tensor:
    """Scores of an attention with one projection."""
    q, k = ours(replace(given, query=given.query @ weights, key=given.key @ weights), implementation)
    return (q @ k.mT).square().mean()


@pytest.fixture(params=["interleaved", "by time"])
def step(request, device):
    given = made(SMALL, request.param, device)
    weights = Filler(device, 5).normal(24, 24).requires_grad_()
    loss = model(weights, given)
    return given, weights, loss.detach(), torch.autograd.grad(loss, weights)[0]


@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_without_breaks_under_compile(step, implementation):
    given, weights, loss, gradient = step
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(weights, given, implementation)
    again.backward()
    assert relative_error(again, loss) <= 1e-5
    assert relative_error(weights.grad, gradient) <= 1e-5


def test_recomputed_under_checkpointing(step):
    given, weights, loss, gradient = step
    again = checkpoint(model, weights, given, use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_compile_is_the_reference(step):
    """Its dispatch; what Inductor makes of it is in the sweeps."""
    given, weights, loss, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(model(weights, given, "compile"), loss) <= 1e-5


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weights, loss, gradient = step
    again = model(weights, given, "compile")
    again.backward()
    assert relative_error(again, loss) <= 1e-5
    assert relative_error(weights.grad, gradient) <= 1e-5


def test_full_tables_are_never_made(device):
    given = made(SMALL, "split", device)
    everything(given, ours)
    assert not given.query_rope._full


def test_a_weight_s_gradient_is_refused_not_dropped(device):
    given = made(SMALL, "no rope", device)
    given.key_weight.requires_grad_()
    with pytest.raises(ValueError, match="key_weight wants a gradient"):
        ours(given)
    with torch.no_grad():
        ours(given)
    sum(each.sum() for each in ours(given, "eager")).backward()
    assert given.key_weight.grad is not None


def wrong(given: Inputs) -> dict[str, tuple[Inputs, str]]:
    other = made(SMALL, "interleaved", "cpu")
    return {
        "length": (replace(given, query=given.query[:, :2]), r"rope of query is of 3 x 24, not \[2, 24\]"),
        "width": (replace(given, key=given.key[..., :12]), "key is 12 wide, not 24 of 4 heads"),
        "heads": (replace(given, heads=5), "query is 24 wide, not 24 of 5 heads"),
        "rope's heads": (replace(given, heads=2), "rope of query is of 4 heads, not 2"),
        "weight": (replace(given, query_weight=given.query_weight[:3]), r"query_weight is \[3\], not \[24\]"),
        "layouts": (replace(given, key_rope=other.key_rope), "query's pairs are split and key's interleaved"),
    }


@pytest.mark.parametrize("what", ["length", "width", "heads", "rope's heads", "weight", "layouts"])
def test_wrong_shapes_are_refused(what):
    given, message = wrong(made(SMALL, "split", "cpu"))[what]
    with pytest.raises(ValueError, match=message):
        ours(given, "eager")
