"""The numbers that NF4's codes stand for, and those that stand for a block's largest value once that is 8 bits, too.

NormalFloat: QLoRA, arXiv 2305.14314, appendix E. The signed dynamic type: arXiv 1511.04561, as bitsandbytes builds it.
Data, and the same bits as bitsandbytes' own.
"""

from __future__ import annotations

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Decades of the dynamic type: 2^d numbers of either sign between 10^(d−7) and 10^(d−6).
DECADES = 7


def nf4_map(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values, ascending, float32."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values, ascending from −0.993 to 1, float32."""
    decades = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES))
    found = torch.cat(decades)
    return torch.cat([-found, found, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def midpoints(values: Tensor) -> Tensor:
    """Half way between neighbours: how many of them a number exceeds is the code of the value nearest to it."""
    return (values[:-1] + values[1:]) / 2
