"""A linear layer with a LoRA branch: y = W·x + b + s·B·(A·dropout(x)). (LoRA: arXiv 2106.09685.)

PEFT owns A, B, their names, the scale s, on and off; how the product is computed is the op `lora_linear`. A and B are
float32 masters, cast to the activations' dtype at use, so that small updates are not lost in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ltxforge_kernels.choice import EAGER, Kernels
from ltxforge_kernels.lora_linear import lora_linear
from peft.tuners import lora
from torch import Tensor


class LoraLinear(lora.Linear):
    """PEFT's LoRA linear with an explicit precision rule. Plain LoRA, one active adapter, nothing merged."""

    kernels: Kernels = EAGER

    def forward(self, x: Tensor, *_args: Any, activation: str = "none", **_kwargs: Any) -> Tensor:
        """x: [..., in_features] → [..., out_features], in x's dtype. Disabled, it is the base layer alone.

        Args:
            activation: "gelu" where x is what goes into a GELU (tanh) whose result is this layer's input.
        """
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(F.gelu(x, approximate="tanh") if activation == "gelu" else x)
        (adapter,) = active
        kept, keep = self._kept(x, adapter)
        return lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            kept,
            keep,
            activation,
            implementation=self.kernels.on("lora_linear", x.shape),
        )

    def _kept(self, x: Tensor, adapter: str) -> tuple[Tensor | None, float]:
        """What dropout leaves of x, bool, and the probability of that, from torch's default generator as `nn.Dropout`
        draws; None where it leaves all.
        """
        dropout = getattr(self.lora_dropout[adapter], "p", 0.0)
        if not self.training or not dropout:
            return None, 1.0
        return torch.empty_like(x, requires_grad=False).bernoulli_(1 - dropout).bool(), 1 - dropout
