"""What the compiler says of our kernels for chips that are not here: registers, spills, shared memory, instructions.

No figure of speed, and told as none. A process of its own compiles: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ltxforge.benchmarks.bench import Told

CHIPS = ("sm_90",)
LIMIT_SECONDS = 1200
MOST = ("registers", "spilled_bytes", "shared_bytes", "narrow")
FEWEST = ("widest_load", "widest_store", "tensor_core", "bulk_copies")


def resources_of(ops: Collection[str], tell: Told) -> list[dict[str, Any]]:
    """A record of each kernel that the ops launch, the worst of its variants; empty without Triton.

    Args:
        ops: as a suite calls them; a part of an op belongs to the launch whose name it begins with.
    """
    tell(f"no GPU: compiling our kernels for {', '.join(CHIPS)} instead, which times nothing")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ltxforge_kernels.compile_only", *CHIPS],
            env=environment, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_SECONDS, check=True,
        )  # fmt: skip
        records = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        tell(f"nothing could be compiled: {why.strip().splitlines()[-1] if why.strip() else type(error).__name__}")
        return []
    return worst_of([record for record in records if _is_of(record["launch"], ops)])


def worst_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for all variants of a kernel on a chip, `ltxforge_kernels.compile_only.Compiled`: the most that one
    takes, the fewest of the good instructions, and of how many variants."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["launch"], record["kernel"], record["chip"]), []).append(record)
    return [
        {
            **same[0],
            **{name: max(record[name] for record in same) for name in MOST},
            **{name: min(record[name] for record in same) for name in FEWEST},
            "variants": len(same),
        }
        for same in groups.values()
    ]


def joined(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of both; a kernel that both have compiled for a chip is the newer one's."""
    return list({(each["launch"], each["kernel"], each["chip"]): dict(each) for each in (*old, *new)}.values())


def _is_of(launch: str, ops: Collection[str]) -> bool:
    """Whether a launch, named op and dtype, is of one of the ops."""
    name = launch.split()[0]
    return any(op == name or op.startswith(f"{name}_") or name.startswith(f"{op}_") for op in ops)
