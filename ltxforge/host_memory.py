"""How much memory the host has, and how much of it this process may take: a container's bound counts, as the kernel's.

Facts alone. Reads the system's own files; where they say nothing, the machine's memory is the answer.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

# Where a container's bound stands, by cgroup version: limit, used, and the part of that which is cache, given back.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def host_bytes() -> int:
    """All memory that this process could ever have."""
    bounds = [limit for limit, _ in _bounds()]
    return min([psutil.virtual_memory().total, *bounds])


def free_host_bytes() -> int:
    """How much memory the host can still give without swapping."""
    rest = [max(0, limit - used) for limit, used in _bounds()]
    return min([psutil.virtual_memory().available, *rest])


def locked_limit_bytes() -> int | None:
    """How much memory this process may lock (`ulimit -l`); None where there is no limit, or none is told."""
    if not sys.platform.startswith("linux"):
        return None
    soft, _ = psutil.Process().rlimit(psutil.RLIMIT_MEMLOCK)
    return None if soft == psutil.RLIM_INFINITY else soft


def _bounds() -> list[tuple[int, int]]:
    """(limit, what of it cannot be given back) of each cgroup that says so. Without one the limit is no number."""
    found = []
    for limit, used, stat, cache in _GROUPS:
        with contextlib.suppress(OSError, ValueError):
            facts = dict(line.split(maxsplit=1) for line in _text(stat).splitlines())
            found.append((int(_text(limit)), int(_text(used)) - int(facts.get(cache, 0))))
    return found


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii").strip()
