"""The two smoothings of a loss that displays may show. Logs hold the raw values; nothing here reaches training."""

from __future__ import annotations

from collections.abc import Sequence


class RunningMean:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3): the live display's loss.

    After n values it is Σ βⁿ⁻ⁱ·xᵢ / Σ βⁿ⁻ⁱ, so the first value shows as itself. `steps` is the constant 1 / (1 − β).
    """

    def __init__(self, steps: int = 50) -> None:
        self._beta = 1 - 1 / max(1, steps)
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Take one value in and return the mean so far."""
        self._sum = self._beta * self._sum + value
        self._weight = self._beta * self._weight + 1
        return self._sum / self._weight


def centred_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to `window` (odd) values around each one; near the ends, of those of them that exist.

    Unlike a moving average it has no lag, so a bend in the curve stands where it happened.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        first, end = max(0, index - window // 2), min(len(values), index + window // 2 + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means
