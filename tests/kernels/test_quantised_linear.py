"""The layer over few bits on our kernels: it is the eager one, alone, with a LoRA, and in both directions."""

from __future__ import annotations

import pytest
import torch
from closeness import BF16_ROUNDING, relative_error
from ltxforge_kernels.cases import Filler
from ltxforge_kernels.choice import EAGER, Kernels, everything
from quantised_block import KEPT

from ltxforge.quant.linear import QuantisedLinear

IN, OUT, RANK = 192, 80, 4


def results(format: str, double: bool, kernels: Kernels, device: str) -> list[torch.Tensor]:
    """The product, that with a LoRA under dropout, and the gradients of x, A and B."""
    fill = Filler(device)
    layer = QuantisedLinear.quantise(fill.normal(OUT, IN) / IN**0.5, fill.normal(OUT), format, double).to(device)
    layer.kernels = kernels
    x, a, b = (fill.normal(*shape).requires_grad_() for shape in ((2, 7, IN), (RANK, IN), (OUT, RANK)))
    alone, adapted = layer(x), layer.with_lora(x, a, b, 0.5, fill.normal(2, 7, IN) > 0, 0.5)
    upstream = fill.normal(2, 7, OUT)
    return [alone, adapted, *torch.autograd.grad(((alone + adapted) * upstream).sum(), (x, a, b))]


@pytest.mark.parametrize(("format", "double"), KEPT)
def test_on_our_kernels_it_is_the_eager_one(format, double, device):
    """But for fp8's product, which PyTorch's own kernel rounds to bf16."""
    bound = 2 * BF16_ROUNDING if format == "fp8" else 1e-5
    ours, eager = (results(format, double, kernels, device) for kernels in (everything("triton"), EAGER))
    for one, other in zip(ours, eager, strict=True):
        assert relative_error(one, other) <= bound
