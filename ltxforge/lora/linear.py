"""A linear layer with a LoRA branch: y = W·x + b + s·B·(A·dropout(x)). (LoRA: arXiv 2106.09685.)

PEFT owns A, B, their names, the scale s, on and off; this class decides only how the product is computed. A and B are
float32 masters, cast to the activations' dtype at use, so that small updates are not lost in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor


class LoraLinear(lora.Linear):
    """PEFT's LoRA linear with an explicit precision rule. Plain LoRA, one active adapter, nothing merged."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """x: [..., in_features] → [..., out_features], in x's dtype. Disabled, it is the base layer alone."""
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
                branch = torch.nn.functional.linear(self.lora_dropout[adapter](x), a.to(x.dtype))
                result = result + torch.nn.functional.linear(branch, b.to(x.dtype)) * self.scaling[adapter]
        return result
