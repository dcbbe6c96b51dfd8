"""The plot of ratios: valid XML, a bar for each ratio, floors where they belong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ltxforge.ui.ratio_chart import ratio_chart_svg

HEAD = {"suite": "kernels", "device": {"kind": "cuda", "name": "NVIDIA <H200> & co"}}
SVG = "{http://www.w3.org/2000/svg}"


def entry(ratios: dict[str, float], floors: dict[str, float] | None = None, outcome: str = "measured") -> dict:
    return {"name": "adaln", "outcome": outcome, "ratios": ratios, "case": {"floors": floors or {}}}


def drawn(*entries: dict) -> ElementTree.Element:
    return ElementTree.fromstring(ratio_chart_svg(HEAD, entries))


def test_faster_bars_go_right_of_even_and_slower_ones_left():
    svg = drawn(
        entry({"eager": 4.0, "compile": 0.5}, {"eager": 3.0}),
        {**entry({"PEFT": 1.0}), "name": "gelu", "ours": "compile"},
    )
    bars = {bar.get("class"): bar for bar in svg.iter(f"{SVG}rect")}
    even = next(float(line.get("x1")) for line in svg.iter(f"{SVG}line") if line.get("class") == "even")
    assert len(list(svg.iter(f"{SVG}rect"))) == 3
    assert float(bars["slower"].get("x")) + float(bars["slower"].get("width")) == pytest.approx(even, abs=0.02)
    (floor,) = [float(line.get("x1")) for line in svg.iter(f"{SVG}line") if line.get("class") == "floor"]
    first = next(bar for bar in svg.iter(f"{SVG}rect"))
    assert even < floor < even + float(first.get("width")), "4 times is beyond a floor of 3"
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"eager", "compile", "PEFT", "4.00", "0.50", "adaln"} <= set(texts)
    assert "gelu, ours: compile" in texts, "what our kernel did not compute is told"
    assert texts[0] == "kernels on NVIDIA <H200> & co"


@pytest.mark.parametrize("ratio", [1e-4, 0.03, 1.0, 30.0, 1e4])
def test_every_bar_lies_within_the_picture(ratio):
    svg = drawn(entry({"eager": ratio}))
    (bar,) = svg.iter(f"{SVG}rect")
    assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= float(svg.get("width"))


def test_nothing_is_drawn_of_nothing():
    assert ratio_chart_svg(HEAD, [entry({}), entry({"a": 2.0}, outcome="gate failed")]) is None
