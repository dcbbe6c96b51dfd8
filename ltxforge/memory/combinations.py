"""Which memory strategies go together, and in words why others do not. Torch-free.

One table, asked by the planner, which refuses; what is legal is held to the plain run bit for bit by the contract test.
What a recipe cannot even say (two streamers, tiles without a size) is its own rules' part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ltxforge.plan import MemoryPlan


@dataclass(frozen=True)
class Asked:
    """What is judged together.

    `blocks` is how many the transformer has; `compile_lacks` what torch.compile needs and does not find, "" if nothing.
    """

    memory: MemoryPlan
    compile: bool
    blocks: int
    compile_lacks: str = ""


@dataclass(frozen=True)
class Illegal:
    """A combination that is refused, and what is said then. `reason` may name `{lacks}`."""

    name: str
    is_there: Callable[[Asked], bool]
    reason: str


ILLEGAL = (
    Illegal(
        "compile, which cannot run here",
        lambda asked: asked.compile and bool(asked.compile_lacks),
        "training.compile cannot run here: {lacks}",
    ),
    Illegal(
        "compile with leaf_level",
        lambda asked: asked.compile and asked.memory.stream is not None and asked.memory.stream.level == "leaf",
        'training.compile makes one program of a whole block, and memory.group_offload = "leaf_level" brings each'
        ' layer\'s weights in the middle of it; "block_level" and memory.block_swap bring them before',
    ),
    Illegal(
        "double quantisation of another format",
        lambda asked: asked.memory.double_quant and asked.memory.base_precision != "nf4",
        'memory.double_quant quantises the scales of "nf4", and memory.base_precision is another format',
    ),
    Illegal(
        "blocks that are not there",
        lambda asked: max((*asked.memory.checkpointed, *_streamed(asked.memory)), default=0) >= asked.blocks,
        "memory names blocks that this model does not have",
    ),
    Illegal(
        "a block in two groups",
        lambda asked: any(count > 1 for count in Counter(_streamed(asked.memory)).values()),
        "a block's weights come with one group, and memory names it in two",
    ),
    Illegal(
        "a streamer without blocks",
        lambda asked: asked.memory.stream is not None and not _streamed(asked.memory),
        "memory streams weights, and names no block whose weights that are",
    ),
)


def refusal(memory: MemoryPlan, compile: bool, blocks: int, compile_lacks: str = "") -> str:
    """Why these cannot go together, each reason of the table that applies; "" if they can."""
    asked = Asked(memory, compile, blocks, compile_lacks)
    return "; ".join(each.reason.format(lacks=compile_lacks) for each in ILLEGAL if each.is_there(asked))


def remarks(memory: MemoryPlan, kind: str) -> tuple[str, ...]:
    """What a plan says of strategies that do nothing, or less than elsewhere, on a device of this kind."""
    found = []
    if memory.stream is not None and memory.stream.overlapped and kind not in ("cuda", "rocm"):
        found.append(
            "memory.use_stream: copies beside the computation need a CUDA GPU; here weights are copied in turn"
        )
    if kind in ("cpu", "mps"):
        moved = {"swapped or offloaded weights": memory.stream is not None and not memory.stream.disk}
        moved["offloaded activations"] = memory.offload_activations
        found += [
            f"{what} take as much here as others: device and host are one memory"
            for what, is_so in moved.items()
            if is_so
        ]
    return tuple(found)


def _streamed(memory: MemoryPlan) -> tuple[int, ...]:
    return sum(memory.stream.units, ()) if memory.stream else ()
