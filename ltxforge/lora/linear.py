"""A linear layer with a LoRA branch: y = W·x + b + s·B·(A·dropout(x)). (LoRA: arXiv 2106.09685.)

PEFT owns A, B, their names, the scale s, on and off; how the product is computed is the op `lora_linear`, or the
quantised base layer's own. A and B are float32 masters, cast to the activations' dtype at use, so that small updates
are not lost in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ltxforge_kernels.choice import EAGER, Kernels
from ltxforge_kernels.gelu import gelu
from ltxforge_kernels.lora_linear import augment, draw_kept, lora_linear, refresh
from peft.tuners import lora
from torch import Tensor, nn

from ltxforge.quant.linear import QuantisedLinear


class LoraLinear(lora.Linear):
    """PEFT's LoRA linear with an explicit precision rule. Plain LoRA, one active adapter, nothing merged.

    `augmented` [N, K + tail] holds W with a rounded copy of B behind it, where our kernels compute a 16-bit layer: then
    the weight is a view of it, so that both are one matrix product. Derived: never saved, and as new as B at each use;
    a compiled forward leaves that to `refresh`. There is none over a base layer that is quantised, or whose weight
    waits elsewhere while this is made, because then it is not W that is stored here.
    """

    kernels: Kernels = EAGER
    augmented: Tensor | None = None
    _copied: tuple[nn.Parameter, int] | None = None

    def compute_with(self, kernels: Kernels) -> None:
        """Take the run's choice, and store W as that wants it. Once, before the layer is first used."""
        self.kernels = kernels
        if isinstance(self.base_layer, QuantisedLinear):
            return
        weight, (b,) = self.base_layer.weight, [each.weight for each in self.lora_B.values()]
        resident = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
        if resident and kernels.of("lora_linear") == "triton":
            self._store(augment(weight, b.shape[1]))

    def forward(self, x: Tensor, *_args: Any, activation: str = "none", **_kwargs: Any) -> Tensor:
        """x: [..., in_features] → [..., out_features], in x's dtype. Disabled, it is the base layer alone.

        Args:
            activation: "gelu" where x is what goes into a GELU (tanh) whose result is this layer's input.
        """
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        base, quantised = self.base_layer, isinstance(self.base_layer, QuantisedLinear)
        if activation == "gelu" and (quantised or not active):
            x, activation = gelu(x, implementation=self.kernels.on("gelu", x.shape)), "none"
        if not active:
            return base(x)
        (adapter,) = active
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        kept, keep = self._kept(x, adapter)
        if quantised:
            return base.with_lora(x, a, b, self.scaling[adapter], kept, keep)
        if not torch.compiler.is_compiling():  # which asks `refresh` before
            self.refresh()
        return lora_linear(
            x,
            base.weight,
            base.bias,
            a,
            b,
            self.scaling[adapter],
            kept,
            keep,
            activation,
            self.augmented,
            implementation=self.kernels.on("lora_linear", x.shape),
        )

    def _kept(self, x: Tensor, adapter: str) -> tuple[Tensor | None, float]:
        """What dropout leaves of x and the probability of that; None where it leaves all."""
        dropout = getattr(self.lora_dropout[adapter], "p", 0.0)
        return (draw_kept(x, 1 - dropout), 1 - dropout) if self.training and dropout else (None, 1.0)

    def refresh(self) -> None:
        """Copy B behind W if its version has changed. Between a forward and its backward it does not.

        What is written through `.data` or a pointer changes no version: `Optimizer.step` raises it itself.
        """
        if self.augmented is None:
            return
        (b,) = [each.weight for each in self.lora_B.values()]
        if self._copied is None or self._copied[0] is not b or self._copied[1] != b._version:
            assert self.base_layer.weight.data_ptr() == self.augmented.data_ptr(), "W is no longer where B's copy is"
            refresh(self.augmented, b)
            self._copied = b, b._version

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Never: W stays what it was, and a merged branch would count twice."""
        raise NotImplementedError("LoraLinear is not merged; export the LoRA and merge it with PEFT")

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """PEFT's own knows no class but its own few."""
        return module.in_features, module.out_features

    def _store(self, augmented: Tensor) -> None:
        self.augmented, self._copied = augmented, None
        self.base_layer.weight = nn.Parameter(augmented[:, : self.in_features], requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLinear:
        """Moves W and what is behind it together, so that neither is there twice."""
        augmented = self.augmented
        if augmented is None:
            return super()._apply(fn, recurse)
        self.base_layer.weight = nn.Parameter(augmented.new_empty(0), requires_grad=False)
        super()._apply(fn, recurse)
        self._store(fn(augmented))
        return self
