"""Sound files written with the standard library, so that what is in them is known exactly."""

from __future__ import annotations

import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

RATE = 16000


@pytest.fixture
def make_wav() -> Callable[..., Path]:
    """Writes 16-bit stereo PCM at 16 kHz: each (seconds, level) is so long a stretch of a 500 Hz square wave."""

    def make(path: Path, stretches: Sequence[tuple[float, float]]) -> Path:
        parts = []
        for seconds, level in stretches:
            time = np.arange(round(seconds * RATE)) / RATE
            parts.append(level * np.where(time * 500 % 1 < 0.5, 1.0, -1.0))
        samples = np.rint(np.concatenate(parts) * 32767).astype("<i2")
        with wave.open(str(path), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(np.repeat(samples, 2).tobytes())
        return path

    return make
