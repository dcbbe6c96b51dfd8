"""NF4: frozen weights in 4 bits, bit for bit as bitsandbytes 0.50.2 writes and reads them.

    absmax[b] = max |w| over block b                    code = the nearest of 16 values to w / absmax[b]
    w = value[code]·absmax[b]                           absmax[b] = value8[code8]·absmax8[b / 256] + mean(absmax)

Blocks of 64 or so run along the weight row by row; the second line's absmax is of a double-quantised weight. Values
and format: QLoRA, arXiv 2305.14314. All arithmetic is float32, each product and sum rounded, and the result once more
to the dtype asked for. On a GPU bitsandbytes picks a nested code in another way than on a CPU; we do as on a CPU.

Bytes moved by `dequantise` for n = N·K elements of e bytes: n/2 + n/64 (double-quantised; 4·n/64 if not) + n·e.
`nf4_linear` adds the product's own; kept for its backward pass: the packed weight, and nothing of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.implementations import HAS_TRITON, pick
from ltxforge_kernels.nf4 import reference
from ltxforge_kernels.nf4.double import compress
from ltxforge_kernels.nf4.tables import nf4_map
from ltxforge_kernels.nf4.weight import BLOCKSIZES, DTYPES, Nf4Weight

if HAS_TRITON:
    from ltxforge_kernels.nf4 import launch
else:
    launch = None


def quantise(weight: Tensor, blocksize: int = 64, double: bool = False, *, implementation: str) -> Nf4Weight:
    """A weight [N, K] of float32, float16 or bf16, in NF4.

    Args:
        weight: finite; any layout.
        blocksize: one of `BLOCKSIZES`.
        double: quantise the blocks' largest values, too: 4.127 bits an element instead of 4.5.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"a weight is [N, K] of 16 or 32 bits, not {weight.dtype} {list(weight.shape)}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"a block of {blocksize} elements is none of {', '.join(map(str, BLOCKSIZES))}")
    pack = pick(implementation, reference.pack, launch and launch.pack)
    packed, absmax = pack(weight.detach(), blocksize)
    known = (nf4_map(weight.device), blocksize, tuple(weight.shape), weight.dtype)
    if not double:
        return Nf4Weight(packed, absmax, *known)
    nested = compress(absmax)
    return Nf4Weight(packed, nested.codes, *known, nested.absmax, nested.quant_map, nested.offset)


def dequantise(weight: Nf4Weight, dtype: torch.dtype | None = None, *, implementation: str) -> Tensor:
    """The weight [N, K] again, of the dtype, or of its own; without a gradient."""
    unpack = pick(implementation, reference.dequantise, launch and launch.dequantise)
    return unpack(weight, dtype or weight.dtype)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None, *, implementation: str) -> Tensor:
    """x·Wᵀ + bias [..., N], with W dequantised to the dtype of x; differentiable in `x` and `bias`.

    Args:
        x: [..., K].
        bias: [N] of the dtype of x, or None.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x is {list(x.shape)}, not [..., {columns}]")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, not {x.dtype} [{rows}]")
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, and the weight on {weight.packed.device}")
    product = pick(implementation, reference.nf4_linear, launch and launch.nf4_linear)
    return product(x, weight, bias)
