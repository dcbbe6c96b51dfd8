"""Launches of norm and rotation: what is allocated, which blocks, and the torch.library ops.

Ops take a `Rope` as its parts, `flat`: torch.library knows tensors and numbers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.qk_norm_rope import kernel
from ltxforge_kernels.qk_norm_rope.rope import Rope
from ltxforge_kernels.target import architecture, launching_on

# Triton 3.10 changes the default.
FUSED = {"enable_fp_fusion": True}
Context = torch.autograd.function.FunctionCtx


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_rope: Rope | None,
    key_rope: Rope | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU."""
    half = half_of(query, heads, query_rope, key_rope)
    return forward_op(query, key, query_weight, key_weight, *flat(query_rope), *flat(key_rope), half, eps)[:2]


def flat(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """cos, sin, rows and padding."""
    return (None, None, None, 0) if rope is None else (rope.cos, rope.sin, rope.rows, rope.padding)


def half_of(query: Tensor, heads: int, *ropes: Rope | None) -> int:
    """Half a head where pairs are split, else 0."""
    split = any(rope is not None and rope.heads is not None for rope in ropes)
    return query.shape[2] // heads // 2 if split else 0


def launch_forward(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_cos: Tensor | None,
    query_sin: Tensor | None,
    query_rows: Tensor | None,
    query_padding: int,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    key_rows: Tensor | None,
    key_padding: int,
    half: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [B, T, D], k [B, P, D], and the reciprocals of their norms, [B, T] and [B, P] float32."""
    outputs = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key)]
    reciprocals = [tensor.new_empty(tensor.shape[:2], dtype=torch.float32) for tensor in (query, key)]
    queries, keys = (reciprocal.numel() for reciprocal in reciprocals)
    of_query = contiguous(query, query_weight, query_cos, query_sin, query_rows)
    of_key = contiguous(key, key_weight, key_cos, key_sin, key_rows)
    if queries + keys:
        with launching_on(query):
            kernel.forward_kernel[(queries + keys,)](
                *of_query, outputs[0], reciprocals[0],
                *of_key, outputs[1], reciprocals[1],
                queries, query.shape[1], key.shape[1], eps,
                **side_options("QUERY", query_weight, query_cos, query_rows, query_padding),
                **side_options("KEY", key_weight, key_cos, key_rows, key_padding),
                **token_options("forward", query, half),
            )  # fmt: skip
    return *outputs, *reciprocals


def launch_backward(
    query_upstream: Tensor,
    key_upstream: Tensor,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_cos: Tensor | None,
    query_sin: Tensor | None,
    query_rows: Tensor | None,
    query_padding: int,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    key_rows: Tensor | None,
    key_padding: int,
    half: int,
    query_reciprocal: Tensor,
    key_reciprocal: Tensor,
    wants_query: bool,
    wants_key: bool,
) -> tuple[Tensor, Tensor]:
    """∂/∂query and ∂/∂key; empty and not computed where not wanted."""
    outputs = [wanted(query, wants_query), wanted(key, wants_key)]
    queries, keys = wants_query * query_reciprocal.numel(), wants_key * key_reciprocal.numel()
    of_query = contiguous(query_upstream, query, query_weight, query_cos, query_sin, query_rows, query_reciprocal)
    of_key = contiguous(key_upstream, key, key_weight, key_cos, key_sin, key_rows, key_reciprocal)
    if queries + keys:
        with launching_on(query):
            kernel.backward_kernel[(queries + keys,)](
                *of_query, outputs[0],
                *of_key, outputs[1],
                queries, query.shape[1], key.shape[1],
                **side_options("QUERY", query_weight, query_cos, query_rows, query_padding),
                **side_options("KEY", key_weight, key_cos, key_rows, key_padding),
                **token_options("backward", query, half),
            )  # fmt: skip
    return outputs[0], outputs[1]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def wanted(tensor: Tensor, is_wanted: bool) -> Tensor:
    """Room for its gradient, or an empty tensor."""
    return tensor.new_empty(tensor.shape if is_wanted else 0)


def side_options(
    name: str, weight: Tensor | None, cos: Tensor | None, rows: Tensor | None, padding: int
) -> dict[str, int]:
    """What the kernels are compiled for of queries or keys; no axes without a rope."""
    axes, columns = (0, 0) if cos is None or rows is None else (rows.shape[1], cos.shape[1])
    rope = {f"{name}_AXES": axes, f"{name}_COLUMNS": columns, f"{name}_PADDING": padding}
    return {**rope, f"HAS_{name}_WEIGHT": weight is not None}


def token_options(name: str, query: Tensor, half: int) -> dict[str, int]:
    """Options of both: the row, and how a program holds it."""
    width = query.shape[2]
    chosen = configuration(f"qk_norm_rope.{name}", architecture(query), query.dtype, width).options()
    return {"D": width, "HALF": half, "PAIRS": max(triton.next_power_of_2(width) // 2, 1), **chosen, **FUSED}


@torch.library.custom_op("ltxforge::qk_norm_rope", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_cos: Tensor | None,
    query_sin: Tensor | None,
    query_rows: Tensor | None,
    query_padding: int,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    key_rows: Tensor | None,
    key_padding: int,
    half: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_query = (query_cos, query_sin, query_rows, query_padding)
    of_key = (key_cos, key_sin, key_rows, key_padding)
    return launch_forward(query, key, query_weight, key_weight, *of_query, *of_key, half, eps)


@forward_op.register_fake
def _(query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (tensor.new_empty(tensor.shape[:2], dtype=torch.float32) for tensor in (query, key))
    return query.new_empty(query.shape), key.new_empty(key.shape), *rows


@torch.library.custom_op("ltxforge::qk_norm_rope_backward", mutates_args=())
def backward_op(
    query_upstream: Tensor,
    key_upstream: Tensor,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    query_cos: Tensor | None,
    query_sin: Tensor | None,
    query_rows: Tensor | None,
    query_padding: int,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    key_rows: Tensor | None,
    key_padding: int,
    half: int,
    query_reciprocal: Tensor,
    key_reciprocal: Tensor,
    wants_query: bool,
    wants_key: bool,
) -> tuple[Tensor, Tensor]:
    of_query = (query_cos, query_sin, query_rows, query_padding)
    of_key = (key_cos, key_sin, key_rows, key_padding)
    kept = (query, key, query_weight, key_weight, *of_query, *of_key, half, query_reciprocal, key_reciprocal)
    return launch_backward(query_upstream, key_upstream, *kept, wants_query, wants_key)


@backward_op.register_fake
def _(_: Tensor, __: Tensor, query: Tensor, key: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    wants_query, wants_key = rest[-2:]
    return wanted(query, wants_query), wanted(key, wants_key)


def keep_for_gradient(ctx: Context, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.half, _ = inputs
    ctx.query_padding, ctx.key_padding = tensors.pop(7), tensors.pop(-1)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def gradient(ctx: Context, query_upstream: Tensor, key_upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    query, key, query_weight, key_weight, *ropes, query_reciprocal, key_reciprocal = ctx.saved_tensors
    wants = ctx.needs_input_grad[:2]
    gradients = backward_op(
        query_upstream, key_upstream, query, key, query_weight, key_weight,
        *ropes[:3], ctx.query_padding, *ropes[3:], ctx.key_padding, ctx.half,
        query_reciprocal, key_reciprocal, *wants,
    )  # fmt: skip
    of_query, of_key = (each if want else None for each, want in zip(gradients, wants, strict=True))
    return of_query, of_key, *[None] * 12


forward_op.register_autograd(gradient, setup_context=keep_for_gradient)
