"""Block sizes, warps and stages of every kernel, by (arch, dtype, width bucket): a committed table, never live timing.

Never keyed on token counts, so that another video length changes no kernel. The compile-only tests hold every row
against registers, spills and shared memory of its chip; a figure for speed comes from the bench alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ltxforge_kernels.choice import LIKE
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
    # 256 pixels by 128 channels: 128 numbers a thread. An inner step of 64 channels is a line of 128 bytes. The widest
    # layers have few pixels, so that smaller tiles occupy more of the chip.
    Row("causal_conv3d.tile", Configuration({"ROWS": 16, "COLUMNS": 16, "OUT": 128, "IN": 64}, 8, 4)),
    Row("causal_conv3d.tile", Configuration({"ROWS": 16, "COLUMNS": 16, "OUT": 64, "IN": 64}, 8, 4), width=64),
    Row("causal_conv3d.tile", Configuration({"ROWS": 8, "COLUMNS": 8, "OUT": 128, "IN": 64}, 4, 4), width=2048),
    Row("causal_conv3d.tile", Configuration({"ROWS": 8, "COLUMNS": 16, "OUT": 64, "IN": 64}, 8, 3), arch=120),
    Row("causal_conv3d.tile", Configuration({"ROWS": 8, "COLUMNS": 16, "OUT": 64, "IN": 64}), arch=INTERPRETER),
    Row("causal_conv3d.pixel", Configuration({"PIXELS": 128, "OUT": 128, "IN": 64}, 8, 3)),
    Row("causal_conv3d.pixel", Configuration({"PIXELS": 128, "OUT": 128, "IN": 32}, 8, 2), arch="gfx942"),
    # On plain arithmetic units, since float32 stays float32.
    Row("causal_conv3d.pixel", Configuration({"PIXELS": 64, "OUT": 32, "IN": 16}, 8, 2), dtype=torch.float32),
    Row("causal_conv3d.pixel", Configuration({"PIXELS": 64, "OUT": 32, "IN": 16}, 8, 2), "gfx942", torch.float32),
    Row("causal_conv3d.pixel", Configuration({"PIXELS": 512, "OUT": 64, "IN": 64}), arch=INTERPRETER),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 8})),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 16}), arch="gfx942", width=128),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 4}), width=512),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 2}), width=1024),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 1}), width=2048),
    Row("causal_conv3d.activate", Configuration({"PIXELS": 256}), arch=INTERPRETER),
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
    # By rank: wide ranks take more of a program, and longer chunks, whose partial sums are as wide.
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 64}, 4, 4)),
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 128}, 2, 3), width=16),
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 64}, 8, 3), width=64),
    Row("lora_linear.forward", Configuration({"ROWS": 64, "COLUMNS": 64}, 8, 3), width=128),
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 32}, 8, 2), width=256),
    Row("lora_linear.backward", Configuration({"ROWS": 64, "COLUMNS": 64, "CHUNK": 512}, 8, 2)),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 64, "CHUNK": 512}, 4, 2), width=16),
    Row("lora_linear.backward", Configuration({"ROWS": 64, "COLUMNS": 32, "CHUNK": 512}, 8, 2), width=64),
    Row("lora_linear.backward", Configuration({"ROWS": 64, "COLUMNS": 32, "CHUNK": 1024}, 8, 2), width=128),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 32, "CHUNK": 1024}, 8, 2), width=256),
    # What spills there in larger tiles.
    Row("lora_linear.forward", Configuration({"ROWS": 16, "COLUMNS": 128}, 4, 3), arch=120, width=64),
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 64}, 4, 2), arch=120, width=128),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 64, "CHUNK": 512}, 4, 2), arch=100, width=32),
    Row("lora_linear.forward", Configuration({"ROWS": 32, "COLUMNS": 64}, 4, 2), arch="gfx942"),
    Row("lora_linear.backward", Configuration({"ROWS": 64, "COLUMNS": 32, "CHUNK": 512}, 4, 2), arch="gfx942"),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 32, "CHUNK": 1024}, 4), "gfx942", width=128),
    Row("lora_linear.backward", Configuration({"ROWS": 16, "COLUMNS": 32, "CHUNK": 1024}, 8), "gfx942", width=256),
    # On plain arithmetic units, since float32 stays float32.
    Row("lora_linear.forward", Configuration({"ROWS": 16, "COLUMNS": 32}, 4, 2), dtype=torch.float32),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 32, "CHUNK": 512}, 8, 2), dtype=torch.float32),
    Row("lora_linear.backward", Configuration({"ROWS": 16, "COLUMNS": 32, "CHUNK": 512}, 8), None, torch.float32, 128),
    Row("lora_linear.backward", Configuration({"ROWS": 16, "COLUMNS": 16, "CHUNK": 512}, 8), None, torch.float32, 256),
    # Small, so that tests reach more than one chunk and more than one pass of each loop.
    Row("lora_linear.forward", Configuration({"ROWS": 64, "COLUMNS": 1024}), arch=INTERPRETER),
    Row("lora_linear.backward", Configuration({"ROWS": 32, "COLUMNS": 1024, "CHUNK": 64}), arch=INTERPRETER),
    # One program a row, as adaln_rms_norm's.
    Row("fp8.quantise", Configuration({}, num_warps=4)),
    Row("fp8.quantise", Configuration({}, num_warps=8), width=4096),
    Row("fp8.quantise", Configuration({}, num_warps=16), width=8192),
    Row("fp8.quantise", Configuration({}, num_warps=16), width=16384),
    Row("fp8.dequantise", Configuration({"ROWS": 16, "COLUMNS": 256})),
    Row("fp8.dequantise", Configuration({"ROWS": 64, "COLUMNS": 256}), arch=INTERPRETER),
    # One program a row, as adaln_rms_norm's.
    Row("int8.quantise", Configuration({}, num_warps=4)),
    Row("int8.quantise", Configuration({}, num_warps=8), width=4096),
    Row("int8.quantise", Configuration({}, num_warps=16), width=8192),
    Row("int8.quantise", Configuration({}, num_warps=16), width=16384),
    # 64 lanes a warp: half the warps, so that a lane stores 16 codes.
    Row("int8.quantise", Configuration({}, num_warps=2), arch="gfx942"),
    Row("int8.quantise", Configuration({}, num_warps=4), arch="gfx942", width=4096),
    Row("int8.quantise", Configuration({}, num_warps=8), arch="gfx942", width=8192),
    Row("int8.quantise", Configuration({}, num_warps=16), arch="gfx942", width=16384),
    Row("int8.dequantise", Configuration({"ROWS": 16, "COLUMNS": 256})),
    Row("int8.dequantise", Configuration({"ROWS": 64, "COLUMNS": 256}), arch=INTERPRETER),
    Row("int8.forward", Configuration({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, num_warps=8, num_stages=3)),
    Row("int8.forward", Configuration({"BM": 64, "BN": 128, "BK": 128, "GROUP": 2}), arch=INTERPRETER),
    # Twice as wide where it fits: on others it spills, on sm_100 by Triton 3.6 and 3.9.
    Row(
        "int8.forward",
        Configuration({"BM": 128, "BN": 256, "BK": 128, "GROUP": 8}, num_warps=8, num_stages=3),
        arch=90,
    ),
    Row("int8.backward", Configuration({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, num_warps=8, num_stages=3)),
    Row("int8.backward", Configuration({"BM": 64, "BN": 128, "BK": 128, "GROUP": 2}), arch=INTERPRETER),
    Row("int8.project", Configuration({"BM": 32, "BK": 64}, num_stages=3)),
    Row("int8.project", Configuration({"BM": 64, "BK": 128}), arch=INTERPRETER),
    Row("int8.over_tokens", Configuration({"PARTS": 8, "BM": 64, "BK": 128}, num_warps=8, num_stages=3)),
    # A third stage spills there at rank 128, by Triton 3.9.
    Row("int8.over_tokens", Configuration({"PARTS": 8, "BM": 64, "BK": 128}, num_warps=8, num_stages=2), arch=120),
    # So that tests reach parts of several tiles, and parts without tokens.
    Row("int8.over_tokens", Configuration({"PARTS": 2, "BM": 32, "BK": 128}), arch=INTERPRETER),
    # 64 KB of shared memory hold two stages.
    Row(
        "int8.forward",
        Configuration({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, num_warps=8, num_stages=2),
        arch="gfx942",
    ),
    Row(
        "int8.backward",
        Configuration({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, num_warps=8, num_stages=2),
        arch="gfx942",
    ),
    Row("int8.project", Configuration({"BM": 32, "BK": 128}, num_stages=2), arch="gfx942"),
    Row("int8.over_tokens", Configuration({"PARTS": 8, "BM": 64, "BK": 128}, num_warps=8, num_stages=2), arch="gfx942"),
    # One program a row, as adaln_rms_norm's: its pairs, and two numbers of a table for each.
    *(
        Row(f"qk_norm_rope.{kernel}", Configuration({}, num_warps=warps), width=width)
        for kernel in ("forward", "backward")
        for width, warps in ((None, 4), (4096, 8), (8192, 16), (16384, 16))
    ),
    # 64 lanes a warp: fewer of them, so that a lane still has 16 bytes of bf16 of either half of a head.
    *(
        Row(f"qk_norm_rope.{kernel}", Configuration({}, num_warps=warps), arch="gfx942", width=width)
        for kernel in ("forward", "backward")
        for width, warps in ((None, 2), (4096, 4), (8192, 8), (16384, 8))
    ),
    # 64 lanes a warp: twice the tokens, so that a lane still stores 16 bytes of bf16.
    Row("flow_matching.noise", Configuration({"TOKENS": 16}), arch="gfx942"),
    Row("flow_matching.residual", Configuration({"TOKENS": 16}), arch="gfx942"),
    Row("flow_matching.gradient", Configuration({"TOKENS": 16}), arch="gfx942"),
    # 16 bytes of codes a thread, which are 32 elements.
    Row("nf4.unpack", Configuration({"BYTES": 2048, "GATHER": 0})),
    Row("nf4.unpack", Configuration({"BYTES": 65536, "GATHER": 0}), arch=INTERPRETER),
    Row("nf4.pack", Configuration({"ELEMENTS": 1024})),
    Row("nf4.pack", Configuration({"ELEMENTS": 65536}), arch=INTERPRETER),
    # One tile of tokens: each weight is unpacked once.
    Row("nf4.small_product", Configuration({"ROWS": 64, "TOKENS": 128, "DEPTH": 64}, 4, 3)),
    Row("nf4.small_product", Configuration({"ROWS": 64, "TOKENS": 64, "DEPTH": 128}), arch=INTERPRETER),
    Row("nf4.unpack", Configuration({"BYTES": 4096, "GATHER": 0}), arch="gfx942"),
    Row("nf4.pack", Configuration({"ELEMENTS": 2048}), arch="gfx942"),
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
    rows = [row for row in TABLE if row.fits(kernel, LIKE.get(arch, arch), dtype, bucket(width))]
    if not rows:
        raise KeyError(f"no configuration of {kernel} for {arch}, {dtype}, width {width}")
    return max(rows, key=lambda row: row.specific).configuration
