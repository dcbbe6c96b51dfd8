"""Which module shows an op to the bench: the name of an op in a suite → what makes its `Subject`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltxforge.benchmarks.ops import adaln_rms_norm, flow_matching, gated_residual, gelu, lora_linear, pytorch
from ltxforge.benchmarks.subject import Subject
from ltxforge.suites.kernels import KernelCase

SUBJECTS: dict[str, Callable[[KernelCase, torch.device], Subject]] = {
    "flow_matching_noise": flow_matching.noise_subject,
    "flow_matching_loss": flow_matching.loss_subject,
    "adaln_rms_norm": adaln_rms_norm.subject,
    "gated_residual": gated_residual.alone_subject,
    "gated_residual_norm": gated_residual.norm_subject,
    "gelu": gelu.subject,
    "lora_linear": lora_linear.subject,
    "attention": pytorch.attention_subject,
    "matmul": pytorch.product_subject,
}
