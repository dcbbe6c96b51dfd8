"""Every launch at the shapes of real training, on meta tensors: what the compile-only harness compiles.

A new op adds its launches here. They call the launch functions themselves, not the torch.library ops, which would
answer meta tensors with their fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ltxforge_kernels.adaln_rms_norm import launch as adaln_rms_norm
from ltxforge_kernels.adaln_rms_norm.inputs import inputs as adaln_rms_norm_inputs
from ltxforge_kernels.cases import FEED_FORWARD, HIDDEN, LATENTS, Filler
from ltxforge_kernels.flow_matching import launch as flow_matching
from ltxforge_kernels.flow_matching.inputs import inputs as flow_matching_inputs
from ltxforge_kernels.gated_residual import launch as gated_residual
from ltxforge_kernels.gated_residual.inputs import inputs as gated_residual_inputs
from ltxforge_kernels.gelu import launch as gelu
from ltxforge_kernels.gelu.inputs import inputs as gelu_inputs


@dataclass(frozen=True)
class Launch:
    """Launches of one op: `run(dtype)` makes them. `dot` says that its kernels multiply matrices on tensor cores."""

    name: str
    run: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    dot: bool = False


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
    """Alone and with the next norm, both ways at each width; and as after prompt attention, without gates."""
    for width in sorted({shape.width for shape in HIDDEN}):
        shape = next(shape for shape in HIDDEN if shape.width == width)
        for distinct in (2, None):
            given = gated_residual_inputs(shape, Filler("meta"), dtype, distinct=distinct)
            gate = (given.gates, given.gate_index, 2)
            total = gated_residual.launch_residual(given.hidden, given.branch, *gate)
            gated_residual.launch_residual_backward(given.total_upstream, *gate)
            for gated in (gate, (None, None, None)):
                modulated = (*gated, given.table, given.index)
                _, _, reciprocal = gated_residual.launch_norm(given.hidden, given.branch, *modulated, 3, 4, 1e-6)
                upstream = (given.total_upstream, given.upstream)
                gated_residual.launch_norm_backward(*upstream, total, *modulated, 4, reciprocal)


def gelu_step(dtype: torch.dtype) -> None:
    """Forward and gradient, at each width of a feed-forward."""
    for shape in FEED_FORWARD[:2]:
        given = gelu_inputs(shape, Filler("meta"), dtype)
        gelu.launch_forward(given.x)
        gelu.launch_backward(given.upstream, given.x)


LAUNCHES = (
    Launch("flow_matching", flow_matching_step),
    Launch("adaln_rms_norm", adaln_rms_norm_step),
    Launch("gated_residual", gated_residual_step),
    Launch("gelu", gelu_step),
)
