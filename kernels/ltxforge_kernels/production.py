"""Every launch at the shapes of real training, on meta tensors: what the compile-only harness compiles.

A new op adds its launches here. They call the launch functions themselves, not the torch.library ops, which would
answer meta tensors with their fakes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ltxforge_kernels.adaln_rms_norm import launch as adaln_rms_norm
from ltxforge_kernels.adaln_rms_norm.inputs import inputs as adaln_rms_norm_inputs
from ltxforge_kernels.cases import AUDIO_TOKENS, FEED_FORWARD, HIDDEN, LATENTS, WIDTH_13B, Filler
from ltxforge_kernels.causal_conv3d import launch as causal_conv3d
from ltxforge_kernels.causal_conv3d.inputs import HOT, NARROW
from ltxforge_kernels.causal_conv3d.inputs import inputs as causal_conv3d_inputs
from ltxforge_kernels.flow_matching import launch as flow_matching
from ltxforge_kernels.flow_matching.inputs import inputs as flow_matching_inputs
from ltxforge_kernels.fp8 import launch as fp8
from ltxforge_kernels.fp8.inputs import inputs as fp8_inputs
from ltxforge_kernels.gated_residual import launch as gated_residual
from ltxforge_kernels.gated_residual.inputs import inputs as gated_residual_inputs
from ltxforge_kernels.gelu import launch as gelu
from ltxforge_kernels.gelu.inputs import inputs as gelu_inputs
from ltxforge_kernels.int8 import launch as int8
from ltxforge_kernels.int8.inputs import Inputs as Int8Inputs
from ltxforge_kernels.int8.inputs import inputs as int8_inputs
from ltxforge_kernels.lora_linear import launch as lora_linear
from ltxforge_kernels.lora_linear.inputs import Inputs as LoraInputs
from ltxforge_kernels.lora_linear.inputs import LayerShape
from ltxforge_kernels.lora_linear.inputs import inputs as lora_linear_inputs
from ltxforge_kernels.nf4 import launch as nf4
from ltxforge_kernels.nf4.inputs import SOUND, WIDEST, empty_weight
from ltxforge_kernels.nf4.inputs import inputs as nf4_inputs
from ltxforge_kernels.qk_norm_rope import launch as qk_norm_rope
from ltxforge_kernels.qk_norm_rope.inputs import Inputs as QkNormRopeInputs
from ltxforge_kernels.qk_norm_rope.inputs import inputs as qk_norm_rope_inputs
from ltxforge_kernels.target import architecture


@dataclass(frozen=True)
class Launch:
    """Launches of one op: `run(dtype)` makes them. `dot` says that what multiplies matrices does so on tensor cores."""

    name: str
    run: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    dot: bool = False


def causal_conv3d_chunk(dtype: torch.dtype) -> None:
    """An encoder's first convolution, one with all that can be fused into it, and one of few channels."""
    for shape, residual, eps in ((HOT[0], False, None), (HOT[3], True, 1e-8), (NARROW, False, None)):
        given = causal_conv3d_inputs(shape, Filler("meta"), dtype, residual=residual)
        causal_conv3d.launch_forward(given.x, given.weight, given.bias, given.state, given.residual, eps)


def causal_conv3d_activation(dtype: torch.dtype) -> None:
    """What precedes a convolution, at every width."""
    for shape in HOT[1:]:
        x = causal_conv3d.pixels_first(causal_conv3d_inputs(shape, Filler("meta"), dtype, residual=False).x)
        causal_conv3d.launch_activation(x, x.new_empty(1, shape.frames + 2, *x.shape[2:]), 1e-8)


def flow_matching_step(dtype: torch.dtype) -> None:
    """Noising, loss and gradient of one step; the loss of an evaluation, too."""
    given = flow_matching_inputs(LATENTS[0], Filler("meta"), dtype)
    flow_matching.launch_noise(given.latents, given.draws, given.sigma, dtype)
    loss_of = (given.prediction, given.latents, given.draws, given.weight)
    loss, residual, scale = flow_matching.launch_loss(*loss_of, keep=True)
    flow_matching.launch_loss(*loss_of, keep=False)
    flow_matching.launch_gradient(residual, scale, torch.ones_like(loss), dtype)


def adaln_rms_norm_step(dtype: torch.dtype) -> None:
    """Forward and both gradients at each width: distinct timesteps, one per sample, and the norm alone."""
    for width in sorted({shape.width for shape in HIDDEN}):
        shape = next(shape for shape in HIDDEN if shape.width == width)
        for distinct in (2, None):
            given = adaln_rms_norm_inputs(shape, Filler("meta"), dtype, distinct=distinct)
            _, reciprocal = adaln_rms_norm.launch_forward(given.hidden, given.table, given.index, 0, 1, 1e-6)
            kept = (given.upstream, given.hidden, given.table, given.index, reciprocal)
            adaln_rms_norm.launch_backward(*kept, 1)
            adaln_rms_norm.launch_table_gradient(*kept, 0, 1)
        adaln_rms_norm.launch_forward(given.hidden, None, None, None, None, 1e-6)
        adaln_rms_norm.launch_backward(given.upstream, given.hidden, None, None, reciprocal, None)


def gated_residual_step(dtype: torch.dtype) -> None:
    """Alone and with the next norm, once and twice, both ways; and as after prompt attention, without gates."""
    for width in sorted({shape.width for shape in HIDDEN}):
        shape = next(shape for shape in HIDDEN if shape.width == width)
        for distinct in (2, None):
            given = gated_residual_inputs(shape, Filler("meta"), dtype, distinct=distinct)
            gate = (given.gates, given.gate_index, 2)
            total = gated_residual.launch_residual(given.hidden, given.branch, *gate)
            gated_residual.launch_residual_backward(given.total_upstream, *gate)
            for gated in (gate, (None, None, None)):
                modulated = (*gated, given.table, given.index)
                for second, arriving in (((None, None), None), ((1, 0), given.second_upstream)):
                    rows = (*modulated, 3, 4, *second)
                    reciprocal = gated_residual.launch_norm(given.hidden, given.branch, *rows, 1e-6)[-1]
                    upstreams = (given.total_upstream, given.upstream, arriving)
                    gated_residual.launch_norm_backward(*upstreams, total, *modulated, 4, second[1], reciprocal)


def gelu_step(dtype: torch.dtype) -> None:
    """Forward and gradient, at each width of a feed-forward."""
    for shape in FEED_FORWARD[:2]:
        given = gelu_inputs(shape, Filler("meta"), dtype)
        gelu.launch_forward(given.x)
        gelu.launch_backward(given.upstream, given.x)


def lora_layer(given: LoraInputs) -> None:
    """Forward and every gradient of one layer."""
    stored = given.weight if given.augmented is None else given.augmented
    settings = (given.scale, given.kept, given.keep, given.activation, given.augmented is not None)
    _, branch = lora_linear.launch_linear(given.x, stored, given.bias, given.a, given.b, *settings)
    kept = (given.upstream, given.x, stored, given.a, given.b, branch, *settings)
    lora_linear.launch_linear_gradients(*kept, of_x=True)


def lora_linear_step(dtype: torch.dtype) -> None:
    """With all that a kernel can do in one, at every rank's bucket; the usual rank in either layout; a bare branch."""
    fill = Filler("meta")
    for rank in (4, 32, 64, 128, 256):
        layer = LayerShape("", 6144, 4096, 4096, rank)
        lora_layer(lora_linear_inputs(layer, fill, dtype, augmented=True, dropout=0.1, activation="gelu"))
    layer = LayerShape("", 6144, 2048, 2048, 32)
    lora_layer(lora_linear_inputs(layer, fill, dtype, augmented=True))
    given = lora_linear_inputs(layer, fill, dtype)
    lora_layer(given)
    of = (given.x, given.a, given.b)
    _, branch = lora_linear.launch_onto(given.x, given.upstream, *of[1:], given.scale, None, 1.0)
    lora_linear.launch_onto_gradients(given.upstream, *of, branch, given.scale, None, 1.0, of_x=True)


def lora_linear_few(dtype: torch.dtype) -> None:
    """The usual rank and a wide one, for the dtypes that training seldom has."""
    for rank in (32, 128):
        layer = LayerShape("", 6144, 4096, 16384, rank)
        lora_layer(lora_linear_inputs(layer, Filler("meta"), dtype, augmented=True, activation="gelu"))


def nf4_weights(dtype: torch.dtype) -> None:
    """The widest weight packed, and unpacked plain and double-quantised, by either lookup."""
    nf4.launch_pack(nf4_inputs(WIDEST, Filler("meta"), dtype).weight, 64)
    for double, gather in itertools.product((False, True), repeat=2):
        nf4.launch_unpack(empty_weight(WIDEST, "meta", dtype, double=double), dtype, gather=gather)


def nf4_product(dtype: torch.dtype) -> None:
    """Few tokens times a weight that is unpacked on the way."""
    given = nf4_inputs(SOUND, Filler("meta"), dtype)
    for double in (False, True):
        nf4.launch_small_product(given.x, empty_weight(SOUND, "meta", dtype, double=double), given.bias)


def qk_norm_rope_step(dtype: torch.dtype) -> None:
    """Self attention of each width and layout, cross attention of unlike lengths by time alone, and without ropes."""
    for shape in (HIDDEN[0], next(shape for shape in HIDDEN if shape.width == WIDTH_13B)):
        for layout in ("interleaved", "split"):
            qk_norm_rope_both_ways(qk_norm_rope_inputs(shape, Filler("meta"), dtype, heads=32, layout=layout))
    qk_norm_rope_both_ways(
        qk_norm_rope_inputs(HIDDEN[0], Filler("meta"), dtype, heads=32, layout="split", axes=1, keys=AUDIO_TOKENS)
    )
    qk_norm_rope_both_ways(qk_norm_rope_inputs(HIDDEN[0], Filler("meta"), dtype, layout=None, keys=128))


def qk_norm_rope_both_ways(given: QkNormRopeInputs) -> None:
    """Forward, and the gradients of both."""
    ropes = (*qk_norm_rope.flat(given.query_rope), *qk_norm_rope.flat(given.key_rope))
    half = qk_norm_rope.half_of(given.query, given.heads, given.query_rope, given.key_rope)
    kept = (given.query, given.key, given.query_weight, given.key_weight, *ropes, half)
    _, _, *reciprocals = qk_norm_rope.launch_forward(*kept, 1e-6)
    qk_norm_rope.launch_backward(given.query_upstream, given.key_upstream, *kept, *reciprocals, True, True)


def int8_rows(dtype: torch.dtype) -> None:
    """Quantising tokens and gradients, and dequantising weights, at the least and the largest width."""
    for width in (2048, 16384):
        given = int8_inputs(6144, width, 4096, 32, Filler("meta"), dtype)
        int8.launch_quantise(given.x, None)
        int8.launch_quantise(given.x, given.x.new_empty(width, dtype=torch.float32))
        int8.launch_dequantise(*given.quantised, dtype)


def w8a8_step(dtype: torch.dtype) -> None:
    """The products of W8A8, forward and backward: common and highest rank, dropout and none, no LoRA."""
    meta = Filler("meta")
    for rank, kept in ((32, False), (128, True)):
        given = int8_inputs(6144, 4096, 16384, rank, meta, dtype)
        codes = torch.empty(given.x.shape, dtype=torch.int8, device="meta")
        row_scale = given.x.new_empty(len(codes), dtype=torch.float32)
        mask = given.kept if kept else None
        of_b, of_a = given.b.to(dtype), given.a.to(dtype)
        _, h = int8.launch_project(codes, row_scale, mask, of_a.t(), 1.0, plain_too=False)
        of_h, _ = int8.launch_project(given.upstream, row_scale, None, of_b, 1.0, plain_too=True)
        int8.launch_over_tokens(h, codes, mask)
        int8.launch_over_tokens(h, given.upstream, None)
        w8a8_products(given, codes, row_scale, (h, of_b.t()), (of_h, of_a), mask)
    w8a8_products(given, codes, row_scale, None, None, None)


def w8a8_products(
    given: Int8Inputs,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    forward: tuple[torch.Tensor, torch.Tensor] | None,
    backward: tuple[torch.Tensor, torch.Tensor] | None,
    kept: torch.Tensor | None,
) -> None:
    """Both directions with these factors of a LoRA. Quantising is `int8_rows`': it needs no tensor cores."""
    (values, column_scale), dtype = given.quantised, given.x.dtype
    folded = torch.empty(given.upstream.shape, dtype=torch.int8, device="meta")
    int8.launch_product("forward", codes, row_scale, values.t(), column_scale, given.bias, forward, None, dtype)
    int8.launch_product("backward", folded, row_scale, values, None, None, backward, kept, dtype)


def fp8_rows(dtype: torch.dtype) -> None:
    """As `int8_rows`; before sm_89 and on AMD, where fp8 is only stored, dequantising alone."""
    for width in (2048, 16384):
        given = fp8_inputs(6144, width, 4096, Filler("meta"), dtype)
        fp8.launch_dequantise(*given.quantised, dtype)
        if fp8.has_fp8(architecture(given.x)):
            fp8.launch_quantise(given.x, None)
            fp8.launch_quantise(given.x, given.x.new_empty(width, dtype=torch.float32))


LAUNCHES = (
    Launch("causal_conv3d", causal_conv3d_chunk, (torch.bfloat16, torch.float16), dot=True),
    Launch("causal_conv3d", causal_conv3d_chunk, (torch.float32,)),
    Launch("causal_conv3d", causal_conv3d_activation),
    Launch("flow_matching", flow_matching_step),
    Launch("adaln_rms_norm", adaln_rms_norm_step),
    Launch("gated_residual", gated_residual_step),
    Launch("gelu", gelu_step),
    Launch("qk_norm_rope", qk_norm_rope_step),
    Launch("lora_linear", lora_linear_step, (torch.bfloat16,), dot=True),
    Launch("lora_linear", lora_linear_few, (torch.float16,), dot=True),
    Launch("lora_linear", lora_linear_few, (torch.float32,)),
    Launch("nf4 weights", nf4_weights, (torch.bfloat16,)),
    Launch("nf4 product", nf4_product, (torch.bfloat16,), dot=True),
    Launch("fp8", fp8_rows),
    Launch("int8 rows", int8_rows),
    Launch("int8 w8a8", w8a8_step, (torch.bfloat16,), dot=True),
)
