"""Block sizes, warps and stages of every kernel, by (arch, dtype, width bucket): a committed table, never live timing.

Never keyed on token counts, so that another video length changes no kernel. The compile-only tests hold every row
against registers, spills and shared memory of its chip; a figure for speed comes from the bench alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ltxforge_kernels.target import INTERPRETER

# Widths are bucketed by the next power of two, at most this: beyond it, one row is more than one program's.
WIDEST = 16384


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched. `blocks` are its constexpr block sizes by name."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1

    def options(self) -> dict[str, int]:
        """Everything as keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Row:
    """A row of the table; None fits everything. Of the rows that fit, the most specific one holds."""

    kernel: str
    configuration: Configuration
    arch: int | str | None = None
    dtype: torch.dtype | None = None
    width: int | None = None
    specific: int = field(init=False)

    def __post_init__(self) -> None:
        # The chip says more than the dtype, and that more than the width.
        weights = ((self.arch, 4), (self.dtype, 2), (self.width, 1))
        object.__setattr__(self, "specific", sum(weight for value, weight in weights if value is not None))

    def fits(self, kernel: str, arch: int | str, dtype: torch.dtype, width: int) -> bool:
        return (
            self.kernel == kernel
            and self.arch in (None, arch)
            and self.dtype in (None, dtype)
            and self.width in (None, width)
        )


# The interpreter pays for each program, not for registers, so its tiles are large.
TABLE = (
    Row("flow_matching.noise", Configuration({"TOKENS": 8})),
    Row("flow_matching.noise", Configuration({"TOKENS": 64}), arch=INTERPRETER),
    Row("flow_matching.residual", Configuration({"TOKENS": 8})),
    Row("flow_matching.residual", Configuration({"TOKENS": 64}), arch=INTERPRETER),
    Row("flow_matching.finish", Configuration({"PARTS": 1024})),
    # Small, so that tests reach the second pass of its loop.
    Row("flow_matching.finish", Configuration({"PARTS": 16}), arch=INTERPRETER),
    Row("flow_matching.gradient", Configuration({"TOKENS": 8})),
    Row("flow_matching.gradient", Configuration({"TOKENS": 64}), arch=INTERPRETER),
    # One program a row: 16 numbers a thread at the transformers' widths, 32 where the row is wider.
    Row("adaln_rms_norm.forward", Configuration({}, num_warps=4)),
    Row("adaln_rms_norm.forward", Configuration({}, num_warps=8), width=4096),
    Row("adaln_rms_norm.forward", Configuration({}, num_warps=16), width=8192),
    Row("adaln_rms_norm.forward", Configuration({}, num_warps=16), width=16384),
    Row("adaln_rms_norm.backward", Configuration({}, num_warps=4)),
    Row("adaln_rms_norm.backward", Configuration({}, num_warps=8), width=4096),
    Row("adaln_rms_norm.backward", Configuration({}, num_warps=16), width=8192),
    Row("adaln_rms_norm.backward", Configuration({}, num_warps=16), width=16384),
    Row("adaln_rms_norm.table", Configuration({"ROWS": 32, "COLUMNS": 64})),
    Row("adaln_rms_norm.table", Configuration({"ROWS": 8, "COLUMNS": 1024}), arch=INTERPRETER),
    # One program a row, as adaln_rms_norm's.
    *(
        Row(f"gated_residual.{kernel}", Configuration({}, num_warps=warps), width=width)
        for kernel in ("residual_forward", "residual_backward", "norm_forward", "norm_backward")
        for width, warps in ((None, 4), (4096, 8), (8192, 16), (16384, 16))
    ),
    # 16 numbers a thread; of two tensors in the backward pass.
    Row("gelu.forward", Configuration({"BLOCK": 2048})),
    Row("gelu.forward", Configuration({"BLOCK": 16384}), arch=INTERPRETER),
    Row("gelu.backward", Configuration({"BLOCK": 2048})),
    Row("gelu.backward", Configuration({"BLOCK": 16384}), arch=INTERPRETER),
    # 64 lanes a warp: twice the tokens, so that a lane still stores 16 bytes of bf16.
    Row("flow_matching.noise", Configuration({"TOKENS": 16}), arch="gfx942"),
    Row("flow_matching.residual", Configuration({"TOKENS": 16}), arch="gfx942"),
    Row("flow_matching.gradient", Configuration({"TOKENS": 16}), arch="gfx942"),
)


def bucket(width: int) -> int:
    """The power of two at or above a width, at most `WIDEST`."""
    return min(1 << max(width - 1, 0).bit_length(), WIDEST)


@functools.cache
def configuration(kernel: str, arch: int | str, dtype: torch.dtype, width: int) -> Configuration:
    """The configuration of a kernel for rows of this width.

    Raises:
        KeyError: the table has no row for the kernel.
    """
    rows = [row for row in TABLE if row.fits(kernel, arch, dtype, bucket(width))]
    if not rows:
        raise KeyError(f"no configuration of {kernel} for {arch}, {dtype}, width {width}")
    return max(rows, key=lambda row: row.specific).configuration
