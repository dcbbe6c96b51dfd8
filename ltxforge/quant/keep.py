"""How a transformer's frozen weights are kept: where, in which dtype, in which format. What loading is told.

Data; decides nothing. The planner decides, `memory/` gives `park`, whoever loads a transformer follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from ltxforge_kernels.choice import EAGER, Kernels
from torch import Tensor, nn

from ltxforge.events import Emit, ignore

# The number of a block, a tensor's name within it ("attn1.to_q.weight"), and the tensor as it is stored, on the host.
Park = Callable[[int, str, Tensor], None]


def none_of(_module: nn.Module) -> Collection[nn.Module]:
    """No module of it."""
    return ()


@dataclass(frozen=True)
class Keep:
    """Where loading puts each tensor of a transformer.

    Attributes:
        device, dtype: of everything that is not quantised and not parked.
        base_precision: "bf16" (not quantised: `dtype`), "fp8", "int8", "int8-w8a8" or "nf4".
        double_quant: nf4 with its scales quantised too.
        quantise_on: the device that quantises, layer by layer.
        parked: blocks whose linear layers' frozen weights never go to the device: each stored tensor is given to
            `park`, on the host, and its module has None in its place until the streamer puts a slot's view there.
        park: takes a parked tensor.
        kernels: with what quantised weights are made and multiplied.
        cache: the cache directory, where quantised weights are kept for the next start; None for nowhere.
        waiting: which modules of the transformer wait on the host, where they are not parked.
        emit: hears what became of the layers.
    """

    device: torch.device
    dtype: torch.dtype
    base_precision: str = "bf16"
    double_quant: bool = True
    quantise_on: torch.device = torch.device("cpu")
    parked: frozenset[int] = frozenset()
    park: Park | None = None
    kernels: Kernels = EAGER
    cache: Path | None = None
    waiting: Callable[[nn.Module], Collection[nn.Module]] = none_of
    emit: Emit = ignore
