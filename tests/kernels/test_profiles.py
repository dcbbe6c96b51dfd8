"""From a bench result to rows of the table: who is the fastest where, without gaps."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys

import pytest
from ltxforge_kernels import profiles
from ltxforge_kernels.choice import OPS, QUANTISED_OPS
from ltxforge_kernels.profiles import Measured, rows_of


def case(tokens, triton, compile_=1.0, eager=2.0, **changes):
    medians = {"triton": triton, "compile": compile_, "eager": eager}
    usual = {"op": "gelu", "arch": "sm_90", "dtype": "bf16", "width": 8192}
    return {**usual, "tokens": tokens, "medians": medians, **changes}


def rows(*cases):
    return rows_of({"cases": cases}, (*OPS, *QUANTISED_OPS), "h200/kernels.json")


def ranges(*cases):
    return [(row.least, row.most, row.implementation) for row in rows(*cases)]


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([(126, 0.5), (6144, 0.5)], [(0, None, "triton")]),
        ([(126, 3.0), (6144, 3.0)], [(0, None, "compile")]),
        # Between a defeat and a victory nothing was measured: the fallback holds up to the victory, and after the last.
        ([(126, 3.0), (1120, 3.0), (6144, 0.5)], [(0, 6143, "compile"), (6144, None, "triton")]),
        ([(126, 0.5), (6144, 3.0)], [(0, 126, "triton"), (127, None, "compile")]),
        ([(1, 3.0), (9, 0.5), (99, 3.0)], [(0, 8, "compile"), (9, 9, "triton"), (10, None, "compile")]),
    ],
)
def test_ranges_have_no_gaps_and_ours_is_not_used_where_it_was_not_seen_to_win(cases, expected):
    assert ranges(*(case(*each) for each in reversed(cases))) == expected


def test_the_faster_fallback_is_taken():
    found = ranges(case(10, 3.0, 1.0, 0.9), case(20, 3.0, 0.9, 1.0), case(30, 0.1))
    assert found == [(0, 19, "eager"), (20, 29, "compile"), (30, None, "triton")]


def test_a_twentieth_more_is_not_called_slower():
    assert ranges(case(10, 1 / 0.951)) == [(0, None, "triton")]
    assert ranges(case(10, 1 / 0.949)) == [(0, None, "compile")]


def test_all_that_an_op_does_at_a_shape_counts_together():
    parts = (case(126, 1.1, op="flow_matching_noise"), case(126, 0.5, op="flow_matching_loss"))
    assert [(row.op, row.implementation) for row in rows(*parts)] == [("flow_matching", "triton")]
    parts = (case(126, 1.2, op="flow_matching_noise"), case(126, 0.95, op="flow_matching_loss"))
    assert [(row.op, row.implementation) for row in rows(*parts)] == [("flow_matching", "compile")]
    assert rows(case(126, 0.5, op="gated_residual_norm"))[0].op == "gated_residual"


def test_chips_dtypes_and_widths_have_rows_of_their_own():
    found = rows(case(126, 0.5), case(126, 3.0, arch="gfx942"), case(126, 3.0, dtype="fp32"), case(126, 3.0, width=96))
    assert found == (
        Measured("gelu", 90, "bf16", 8192, 0, None, "triton", "h200/kernels.json"),
        Measured("gelu", "gfx942", "bf16", 8192, 0, None, "compile", "h200/kernels.json"),
        Measured("gelu", 90, "fp32", 8192, 0, None, "compile", "h200/kernels.json"),
        Measured("gelu", 90, "bf16", 96, 0, None, "compile", "h200/kernels.json"),
    )


def test_samples_of_a_batch_count_and_an_op_may_have_no_tokens():
    assert ranges(case(100, 3.0, case={"batch": 2}), case(300, 0.1)) == [(0, 299, "compile"), (300, None, "triton")]
    (row,) = rows(case(None, 3.0, op="nf4_dequantise", width=128))
    assert (row.op, row.width, row.least, row.most, row.implementation) == ("nf4", 128, 0, None, "compile")


@pytest.mark.parametrize(
    "changes",
    [
        {"medians": {}},
        {"medians": {"triton": 1.0}},
        {"medians": {"compile": 1.0, "eager": 1.0}},
        {"op": "matmul"},
        {"width": None},
    ],
)
def test_what_decides_nothing_is_left_out(changes):
    assert rows(case(126, 0.5, **changes)) == ()


def test_the_command_prints_rows_as_the_table_holds_them(tmp_path):
    path = tmp_path / "some-gpu" / "kernels.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"cases": [case(126, 3.0), case(6144, 0.5)]}), encoding="utf-8")
    command = [sys.executable, "-m", "ltxforge_kernels.profiles", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    calls = ast.parse(f"({printed})", mode="eval").body.elts
    table = [Measured(**{word.arg: ast.literal_eval(word.value) for word in call.keywords}) for call in calls]
    assert table == [
        Measured("gelu", 90, "bf16", 8192, 0, 6143, "compile", "some-gpu/kernels.json"),
        Measured("gelu", 90, "bf16", 8192, 6144, None, "triton", "some-gpu/kernels.json"),
    ]


def test_the_table_itself_holds_known_ops_and_no_overlap():
    held = sorted(profiles.TABLE, key=lambda row: (row.op, str(row.arch), row.dtype, row.width, row.least))
    assert {row.op for row in held} <= {*OPS, *QUANTISED_OPS}
    for row, following in itertools.pairwise(held):
        if (row.op, row.arch, row.dtype, row.width) == (following.op, following.arch, following.dtype, following.width):
            assert row.most is not None and row.most < following.least
