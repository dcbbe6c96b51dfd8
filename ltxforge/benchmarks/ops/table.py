"""Which module shows an op to the bench: the name of an op in a suite → what makes its `Subject`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltxforge.benchmarks.ops import (
    adaln_rms_norm,
    causal_conv3d,
    flow_matching,
    fp8,
    gated_residual,
    gelu,
    int8,
    lora_linear,
    nf4,
    pytorch,
    qk_norm_rope,
)
from ltxforge.benchmarks.subject import Subject
from ltxforge.suites.kernels import KernelCase

SUBJECTS: dict[str, Callable[[KernelCase, torch.device], Subject]] = {
    "flow_matching_noise": flow_matching.noise_subject,
    "flow_matching_loss": flow_matching.loss_subject,
    "flow_matching_noise_and_loss": flow_matching.noise_and_loss_subject,
    "adaln_rms_norm": adaln_rms_norm.subject,
    "gated_residual": gated_residual.alone_subject,
    "gated_residual_norm": gated_residual.norm_subject,
    "gated_residual_norm_twice": gated_residual.twice_subject,
    "qk_norm_rope": qk_norm_rope.subject,
    "gelu": gelu.subject,
    "lora_linear": lora_linear.subject,
    "nf4_dequantise": nf4.dequantise_subject,
    "nf4_linear": nf4.linear_subject,
    "nf4_lora": nf4.lora_subject,
    "int8_dequantise": int8.dequantise_subject,
    "int8_linear": int8.linear_subject,
    "int8_w8a8": int8.w8a8_subject,
    "fp8_linear": fp8.linear_subject,
    "causal_conv3d": causal_conv3d.subject,
    "causal_conv3d_activated": causal_conv3d.activated_subject,
    "attention": pytorch.attention_subject,
    "matmul": pytorch.product_subject,
}
