"""The table of launch configurations: every kernel has a row, the most specific one holds, no row is dead."""

from __future__ import annotations

from pathlib import Path

import ltxforge_kernels
import pytest
import torch
from ltxforge_kernels import choice, configurations
from ltxforge_kernels.compile_only import CHIPS
from ltxforge_kernels.configurations import TABLE, Configuration, Row, bucket, configuration
from ltxforge_kernels.target import INTERPRETER

ARCHES = {chip.target.arch for chip in CHIPS.values()}
OPS = {path.parent.name for path in Path(ltxforge_kernels.__file__).parent.glob("*/kernel.py")}


def test_rows_name_ops_and_chips_that_exist():
    assert {row.kernel.partition(".")[0] for row in TABLE} == OPS
    assert {row.arch for row in TABLE} <= ARCHES | {INTERPRETER, None}
    assert {row.width for row in TABLE if row.width} <= {1 << power for power in range(15)}


def test_chips_that_are_chosen_for_are_those_that_are_compiled_for():
    assert set(choice.CHIPS) == ARCHES and set(choice.LIKE.values()) <= ARCHES
    for chip, other in choice.LIKE.items():
        assert configuration("causal_conv3d.tile", chip, torch.bfloat16, 512) == configuration(
            "causal_conv3d.tile", other, torch.bfloat16, 512
        )


@pytest.mark.parametrize("kernel", sorted({row.kernel for row in TABLE}))
@pytest.mark.parametrize("arch", [*sorted(ARCHES, key=str), INTERPRETER, 87, 103])
def test_every_kernel_has_one_on_every_chip(kernel, arch):
    """Chips that nobody wrote a row for, too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 128, 2048, 4096, 16384, 50_000):
            assert configuration(kernel, arch, dtype, width).num_warps in (1, 2, 4, 8, 16)


def test_the_most_specific_row_holds(monkeypatch):
    blocks = [Configuration({"BLOCK": number}) for number in range(4)]
    table = (
        Row("op.kernel", blocks[0]),
        Row("op.kernel", blocks[1], dtype=torch.bfloat16, width=2048),
        Row("op.kernel", blocks[2], arch=90),
        Row("op.kernel", blocks[3], arch=90, width=4096),
    )
    monkeypatch.setattr(configurations, "TABLE", table)
    configuration.cache_clear()
    try:
        chosen = [
            configuration("op.kernel", arch, dtype, width).blocks["BLOCK"]
            for arch, dtype, width in (
                (80, torch.float32, 2048),
                (80, torch.bfloat16, 2000),
                (90, torch.bfloat16, 2048),
                (90, torch.float32, 2049),
            )
        ]
    finally:
        configuration.cache_clear()
    assert chosen == [0, 1, 2, 3]


def test_no_two_rows_are_equally_specific():
    keys = [(row.kernel, row.arch, row.dtype, row.width) for row in TABLE]
    assert len(keys) == len(set(keys))


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(KeyError, match="no configuration of op.nothing"):
        configuration("op.nothing", 90, torch.float32, 128)


@pytest.mark.parametrize(("width", "expected"), [(0, 1), (1, 1), (5, 8), (2048, 2048), (2049, 4096), (50_000, 16384)])
def test_buckets(width, expected):
    assert bucket(width) == expected
