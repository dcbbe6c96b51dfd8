"""A plan's memory strategies, composed into the one way in which a forward calls its blocks.

Decides the order: compile, then fetch weights, then recompute. What goes together at all is the planner's to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ltxforge.memory.recompute import recomputed
from ltxforge.models.blocks import RunBlock
from ltxforge.plan import MemoryPlan

Result = TypeVar("Result")


def run_block_of(memory: MemoryPlan, device: torch.device) -> RunBlock:
    """How the plan's strategies call a block."""
    again = frozenset(memory.checkpointed)

    def run(number: int, forward: Callable[..., Result], block: nn.Module, hidden: Any, *shared: Any) -> Result:
        call = partial(forward, block, hidden, *shared)
        return recomputed(call, device) if number in again else call()

    return run
