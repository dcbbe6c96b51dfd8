"""A family's block compiled as a whole, once for all blocks: `torch.compile(block_forward, fullgraph=True)`.

A block is the function's argument, so that its weights are inputs of the graph and the next block finds it made, and
views of a streamer's slots are as good as others. Decides that shapes are compiled as they are, and that the first
block, whose input needs no gradient, has it computed for nothing rather than a graph of its own. A graph that breaks or
one too many is an error and never quietly eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltxforge.lora.linear import LoraLinear

Result = TypeVar("Result")
# Beyond what is counted: blocks of different layers, samples of one noise level, windows whose sound fails to decode.
SPARE_GRAPHS = 24


class CompiledBlocks:
    """Stands in for a family's `block_forward`."""

    def __init__(self, graphs: int, backend: str | Callable[..., Any] = "inductor") -> None:
        """`graphs` is how many a run may need (`graphs.block_graphs`); `backend` torch.compile's."""
        self._backend = backend
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._layers: dict[nn.Module, list[LoraLinear]] = {}
        self._graphs = graphs
        self.allow_kinds(1)

    def allow_kinds(self, kinds: int) -> None:
        """Blocks may be of so many kinds: of a quantised base each may have other layers that stay as they were."""
        _allow(self._graphs * kinds + SPARE_GRAPHS)

    def of(self, forward: Callable[..., Result]) -> Callable[..., Result]:
        """The compiled forward, to be called as `forward` is."""
        if forward not in self._compiled:
            self._compiled[forward] = torch.compile(forward, fullgraph=True, dynamic=False, backend=self._backend)
        compiled = self._compiled[forward]

        def call(block: nn.Module, hidden: Any, *shared: Any) -> Result:
            for layer in self._lora_layers(block):
                layer.refresh()  # of what is behind W, which a compiled block leaves to its caller
            return compiled(block, _with_gradient(hidden), *shared)

        return call

    def _lora_layers(self, block: nn.Module) -> list[LoraLinear]:
        if block not in self._layers:
            self._layers[block] = [module for module in block.modules() if isinstance(module, LoraLinear)]
        return self._layers[block]


def _with_gradient(hidden: Any) -> Any:
    if isinstance(hidden, Mapping):
        return {name: _with_gradient(each) for name, each in hidden.items()}
    assert isinstance(hidden, Tensor)
    if hidden.requires_grad or not torch.is_grad_enabled():
        return hidden
    return hidden.detach().requires_grad_()


def _allow(graphs: int) -> None:
    """Dynamo's own limit is 8 graphs of a function."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * graphs)
