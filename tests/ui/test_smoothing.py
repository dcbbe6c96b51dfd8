"""The two smoothings against their defining formulas."""

import random

import numpy as np
import pytest

from ltxforge.ui.smoothing import RunningMean, centred_mean

VALUES = [random.Random(7).gauss(0.5, 0.3) for _ in range(200)]


def test_the_running_mean_is_the_weighted_mean_of_all_values_so_far():
    mean, beta = RunningMean(steps=20), 1 - 1 / 20
    for count, value in enumerate(VALUES, 1):
        weights = beta ** np.arange(count - 1, -1, -1.0)
        assert mean(value) == pytest.approx(np.average(VALUES[:count], weights=weights), rel=1e-12)


@pytest.mark.parametrize("window", [1, 3, 21, 999])
def test_the_centred_mean_averages_the_values_that_exist_around_each(window):
    ones = np.convolve(np.ones(len(VALUES)), np.ones(window), "full")[window // 2 :][: len(VALUES)]
    sums = np.convolve(VALUES, np.ones(window), "full")[window // 2 :][: len(VALUES)]
    assert centred_mean(VALUES, window) == pytest.approx(list(sums / ones), rel=1e-9)
    assert centred_mean([], window) == []
