"""A plan's memory strategies, composed into the one way in which a forward calls its blocks.

Decides the order: a block is compiled, its weights are fetched around that, it is computed again around that, and its
activations wait on the host outside of all. What goes together at all is `combinations.py`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ltxforge.events import Emit, ignore
from ltxforge.memory.activations import LEAST_BYTES, ActivationOffload, storages_of
from ltxforge.memory.combinations import refusal
from ltxforge.memory.compiled import CompiledBlocks
from ltxforge.memory.graphs import block_graphs
from ltxforge.memory.recompute import Around, keep, nothing_around, recomputed
from ltxforge.memory.streaming import Handle, Streamer
from ltxforge.memory.transfers import Transfers
from ltxforge.models.blocks import RunBlock
from ltxforge.models.interface import VideoModel
from ltxforge.plan import MemoryPlan, Plan
from ltxforge.quant.keep import Keep

Result = TypeVar("Result")


class Strategy:
    """The memory strategies of one run: made before its transformer is loaded, closed after its last step.

    `keep` says how to load, `apply` takes the model once its adapter is injected.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        *,
        transfers: Transfers | None = None,
        backend: str | Callable[..., Any] = "inductor",
        least_bytes: int = LEAST_BYTES,
    ) -> None:
        """
        Args:
            transfers: how weights and activations are copied, by default as the plan and the device say.
            backend: torch.compile's.
            least_bytes: the smallest saved activation that is sent to the host.

        Raises:
            PlanError: nothing can be written in the folder where weights shall wait.
        """
        self._memory, self._device, self._plan = plan.memory, device, plan
        self._transfers, self._least_bytes = transfers, least_bytes
        stream = plan.memory.stream
        self.streamer = Streamer(stream, device, transfers) if stream is not None else None
        self.compiled = CompiledBlocks(block_graphs(plan), backend) if plan.training.compile else None
        self.offload: ActivationOffload | None = None

    def keep(self, dtype: torch.dtype, emit: Emit = ignore) -> Keep:
        """How the transformer's weights are kept, for whoever loads it."""
        memory, stream = self._memory, self._memory.stream
        return Keep(
            device=self._device,
            dtype=dtype,
            base_precision=memory.base_precision,
            double_quant=memory.double_quant,
            quantise_on=self._device if memory.quantise_on == "device" else torch.device("cpu"),
            parked=stream.blocks if stream is not None else frozenset(),
            park=self.streamer.park if self.streamer is not None else None,
            kernels=self._plan.kernels,
            cache=Path(self._plan.cache.directory),
            emit=emit,
        )

    def apply(self, model: VideoModel) -> None:
        """Have the model call its blocks in this way from here on."""
        blocks = model.blocks()
        assert not (reason := refusal(self._memory, self.compiled is not None, len(blocks))), reason
        if self.streamer is not None:
            self.streamer.attach(model.transformer, model.unused_modules())
        if self._memory.offload_activations:
            self.offload = ActivationOffload(self._device, len(blocks) - 1, self._transfers, self._least_bytes)
        model.run_block = self.run_block
        if self.compiled is not None and self._memory.base_precision != "bf16":
            self.compiled.allow_kinds(len(blocks))
        model.make_room = self.make_room

    def make_room(self) -> None:
        """Give up what is held only to be there sooner, until the next step: slots, and buffers that nothing is in."""
        if self.streamer is not None:
            self.streamer.clear()
        if self.offload is not None:
            self.offload.buffers.clear()

    @property
    def run_block(self) -> RunBlock:
        return run_block_of(self._memory, self._device, self.streamer, self.offload, self.compiled)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, once the model is loaded."""
        return self.streamer.notes if self.streamer is not None else ()

    def close(self) -> None:
        """Let go of what waits. A model whose weights were streamed cannot be computed any more."""
        if self.streamer is not None:
            self.streamer.close()


def run_block_of(
    memory: MemoryPlan,
    device: torch.device,
    streamer: Streamer | None = None,
    offload: ActivationOffload | None = None,
    compiled: CompiledBlocks | None = None,
) -> RunBlock:
    """How these strategies call a block; `streamer` and `offload` are those of the plan, where it has them."""
    again = frozenset(memory.checkpointed)
    pack, unpack = (streamer.pack, streamer.unpack) if streamer is not None else (keep, keep)

    def run(number: int, forward: Callable[..., Result], block: nn.Module, hidden: Any, *shared: Any) -> Result:
        forward = compiled.of(forward) if compiled is not None else forward
        around: Around[Any] = partial(streamer.run, number) if streamer is not None else nothing_around
        if number in again and torch.is_grad_enabled():
            given = offload.inputs(number, hidden) if offload is not None else lambda: hidden
            return recomputed(lambda: forward(block, given(), *shared), device, pack, unpack, around)

        def call() -> Result:
            with _keeping(number, block, shared, streamer, offload):
                return forward(block, hidden, *shared)

        return around(call)

    return run


def _keeping(
    number: int, block: nn.Module, shared: tuple[Any, ...], streamer: Streamer | None, offload: ActivationOffload | None
) -> AbstractContextManager[Any]:
    """What autograd keeps of a block that is not computed again: places of streamed weights, activations elsewhere."""
    if not torch.is_grad_enabled() or (streamer is None and offload is None):
        return nullcontext()
    if offload is None:
        assert streamer is not None
        return saved_tensors_hooks(streamer.pack, streamer.unpack)
    send, give = offload.saved(number, storages_of(block) | storages_of(shared))
    if streamer is None:
        return saved_tensors_hooks(send, give)
    pack, unpack = streamer.pack, streamer.unpack

    def kept(tensor: Tensor) -> Any:
        packed = pack(tensor)
        return packed if isinstance(packed, Handle) else send(tensor)

    return saved_tensors_hooks(kept, lambda packed: unpack(packed) if isinstance(packed, Handle) else give(packed))
