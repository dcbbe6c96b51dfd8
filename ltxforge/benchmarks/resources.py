"""What the compiler says of our kernels for chips that are not here: registers, spills, shared memory, instructions.

No figure of speed, and told as none. A process of its own compiles: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from ltxforge.benchmarks.bench import Told

CHIPS = ("sm_90", "sm_86")
LIMIT_SECONDS = 1200


def resources_of(ops: Collection[str], tell: Told) -> list[dict[str, Any]]:
    """A record of each kernel that the ops launch, see `ltxforge_kernels.compile_only.Compiled`; empty without Triton.

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
    return [record for record in records if _is_of(record["launch"], ops)]


def _is_of(launch: str, ops: Collection[str]) -> bool:
    """Whether a launch, named op and dtype, is of one of the ops."""
    name = launch.split()[0]
    return any(op == name or op.startswith(f"{name}_") or name.startswith(f"{op}_") for op in ops)
