"""Tables of results: the same rows on the screen and in Markdown, and what became of the cases without figures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ltxforge.benchmarks.against import Compared
from ltxforge.suites.case import Gate, Timing
from ltxforge.suites.kernels import KernelResult
from ltxforge.ui.results_table import against_table, brief, markdown, resources_table, results_table

HEAD = {
    "suite": "kernels", "command": "ltxforge bench kernels", "date": "2026-01-02T03:04:05+00:00",
    "device": {"kind": "cuda", "name": "Some GPU"}, "versions": {"torch": "2.13.0"},
    "ceilings": {"copy bandwidth": 4.3e12, "bf16 matmul": 7.9e14}, "clocks": {"clocks.sm": "1980 MHz"},
}  # fmt: skip


def entry(**changes: object) -> dict:
    result = KernelResult(
        name="adaln", outcome="measured", case={"floors": {"eager": 3.0}}, ratios={"eager": 2.5, "a|b": 1.25},
        ours="triton", medians={"triton": 2.5e-5},
        times={"triton": Timing(2.5e-5, 2.4e-5, 2.6e-5, 8e-5, False, 2.2e-5, 1, 50_000_000)},
        gates=(Gate("triton", "output 0", True, 1.6e-3, 1.8e-3), Gate("eager", "output 0", True, 2e-3, 1.8e-3)),
        shares={"copy bandwidth": 0.93}, unavailable={"Liger": "not installed"},
    )  # fmt: skip
    return {**result.entry(), "faults": ["too slow"], **changes}


def shown(table: object, width: int = 240) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def on_a_gpu() -> list[dict]:
    """Cases as an H200 would give them, the suite's longest name among them."""
    names = ("qk-norm-rope-interleaved-2048-backward", "gated-residual-norm-4096-both-batch-2", "gelu")
    times = {"triton": Timing(1.23e-4, 1.22e-4, 1.24e-4, 8.76e-5, False, 1.09e-4, 12, 50_000_000)}
    return [entry(name=name, times={k: vars(each) for k, each in times.items()}, faults=[]) for name in names]


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (80, ["case", "ours", "median", "host", "graph"]),
        (120, ["case", "ours", "median", "host", "graph", "of ceiling", "launches", "peak", "error"]),
        (160, ["case", "ours", "median", "p20", "p80", "host", "graph", "of ceiling", "launches", "peak", "error"]),
    ],
)
def test_figures_are_whole_or_left_out_at_every_width(width, titles):
    head, *lines = shown(results_table("kernels", on_a_gpu()), width).splitlines()
    assert head.split() == " ".join(titles).split()
    for line, name in zip(lines, ("qk-norm-rope-interleaved-2048-backward", "gated", "gelu"), strict=False):
        assert line.startswith(name) and "123 µs" in line and "109 µs" in line and "…" not in line
        assert len(line) <= width


def test_a_screen_too_narrow_for_names_breaks_those():
    text = shown(results_table("kernels", on_a_gpu()), 30)
    assert "median" in text and text.count("123 µs") == 3 and "…" not in text


def test_a_median_with_the_host_s_time_in_it_is_marked():
    late = entry(times={"triton": vars(Timing(2.5e-5, 2.4e-5, 2.6e-5, is_late=True))})
    text = shown(results_table("kernels", [late]))
    assert "25 µs *" in text and "adaln: * the GPU waited for the host" in text


def test_peers_that_are_not_there_are_told_at_the_end_with_floors_that_nobody_checked():
    reason = "liger_kernel is not installed"
    entries = [
        entry(name=f"case-{k}", unavailable={"Liger": reason, "other": "no GPU"}, case={"floors": {"Liger": 1.3}})
        for k in range(6)
    ]
    told = [
        f"not measured: peer Liger: {reason} (case-0 and 5 more), so that its floor is not checked",
        "not measured: peer other: no GPU (case-0 and 5 more)",
    ]
    assert shown(results_table("kernels", entries)).splitlines()[-2:] == told
    assert markdown(HEAD, entries).splitlines()[-2:] == [f"- {line}" for line in told]


def test_a_kernel_s_row():
    text = shown(results_table("kernels", [entry()]))
    for cell in (
        "25 µs",
        "24 µs",
        "22 µs",
        "93% copy",
        "50.0 MB",
        "1.6e-03",
        "eager 2.50; a|b 1.25",
    ):
        assert cell in text, cell
    assert "not measured: peer Liger: not installed (adaln)" in text and "adaln: too slow" in text


def test_cases_without_figures_are_told_below():
    red = entry(outcome="gate failed", reason="output 0: wrong", faults=[], unavailable={})
    text = shown(results_table("kernels", [red]))
    assert text.strip() == "adaln: gate failed. output 0: wrong"


def test_markdown_says_the_same_with_command_device_and_ceilings():
    text = markdown({**HEAD, "resources": []}, [entry()])
    assert text.startswith("# `kernels` on Some GPU\n\n`ltxforge bench kernels`, 2026-01-02")
    assert "Ceilings: copy bandwidth 4.3 TB/s, bf16 matmul 790 TFLOP/s" in text and "clocks.sm 1980 MHz" in text
    assert "eager 2.50; a\\|b 1.25 |" in text and "\n| --- | ---: |" in text
    assert "- adaln: too slow\n" in text
    assert "without a GPU" in markdown({**HEAD, "device": {"kind": "cpu", "name": "x"}}, [])


def test_what_was_compiled_is_no_figure_of_speed():
    record = {"launch": "gelu bfloat16", "kernel": "forward_kernel", "variants": 2, "chip": "sm_90", "registers": 32,
              "spilled_bytes": 0, "shared_bytes": 147456, "shared_limit": 232448, "tensor_core": 8, "bulk_copies": 3,
              "widest_load": 16, "widest_store": 16}  # fmt: skip
    assert "144 KiB" in shown(resources_table([record]))
    assert "nothing was run" in shown(resources_table([record]))
    assert "## Compiled, not run" in markdown({**HEAD, "resources": [record]}, [])


def test_old_and_new():
    text = shown(against_table([Compared("adaln", "triton", 1e-3, 2e-3)]))
    assert "1 ms" in text and "2 ms" in text and "0.50 slower" in text
    assert "none of these cases" in shown(against_table([]))


@pytest.mark.parametrize(
    ("seconds", "told"), [(1.234e-6, "1.23 µs"), (9.999e-4, "1 ms"), (0.0456, "45.6 ms"), (1.5, "1.50 s")]
)
def test_short_times(seconds, told):
    assert brief(seconds) == told
