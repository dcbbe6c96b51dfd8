"""How much quantisation leaves: decibels of known noise, and the edges."""

from __future__ import annotations

import math

import pytest
import torch
from ltxforge_kernels.precision import FLOORS, sqnr


@pytest.mark.parametrize(("noise", "decibels"), [(0.1, 20), (0.01, 40), (1.0, 0), (10.0, -20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tenth_is_20_dB(noise, decibels, dtype):
    reference = torch.full((4, 300), 2.0, dtype=dtype)
    assert sqnr(reference, reference * (1 + noise)) == pytest.approx(decibels, abs=1e-4)
    assert sqnr(reference, reference * (1 - noise)) == pytest.approx(decibels, abs=1e-4)


def test_bf16_s_own_rounding():
    """1.66e-3 relative, whichever of the two is rounded."""
    reference = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert sqnr(reference, reference.bfloat16()) == pytest.approx(-20 * math.log10(1.66e-3), abs=0.2)


def test_the_edges():
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert sqnr(ones, ones) == sqnr(zeros, zeros) == math.inf
    assert sqnr(zeros, ones) == -math.inf
    assert math.isnan(sqnr(ones, zeros.fill_(math.nan)))
    with pytest.raises(ValueError, match=r"\[1\] is not one of \[3\]"):
        sqnr(ones, torch.ones(1))


def test_floors_are_those_of_the_issue():
    assert FLOORS == {"w8a8": 35.0, "fp8": 27.0, "nf4": 20.0}
