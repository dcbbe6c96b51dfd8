"""One op at one shape, as the bench sees it: how to make inputs, how to call ours and the peers, what it must move.

Each op's module in `ops/` makes these. The harness does the rest in the same way for all: gradients, upstream
gradients, the truth in float64, rotation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ltxforge_kernels.cases import Filler
from torch import Tensor

Inputs = Any
"""What an op's `inputs.py` gives: a dataclass of tensors."""
Outputs = Tensor | tuple[Tensor, ...]


def _as_is(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Contender:
    """Something that computes the op: `call` is timed, over what `prepare` made of a set of inputs before.

    Attributes:
        is_whole: whether it computes the op itself, which the gate then checks, and not a part of it or a rougher one.
        has_backward: whether it has gradients; if not it is timed without autograd, forward alone.
        wanted: of what `prepare` made, the leaves whose gradients are asked for; None for those of the inputs.
    """

    call: Callable[[Any], Outputs]
    prepare: Callable[[Inputs], Any] = _as_is
    is_whole: bool = True
    has_backward: bool = True
    wanted: Callable[[Any], Sequence[Tensor]] | None = None

    def __call__(self, inputs: Inputs) -> Outputs:
        """Both, where nothing is timed."""
        return self.call(self.prepare(inputs))


def compiled(contender: Contender) -> Contender:
    """The same through torch.compile."""
    return replace(contender, call=torch.compile(contender.call, fullgraph=True))


class PeerMissing(Exception):
    """A peer cannot run here; the message says why. A fact about the machine, not a fault."""


@dataclass(frozen=True)
class Work:
    """The least that one call must do.

    Attributes:
        bytes_moved: operands read once and results written once.
        flops: two for each multiply-add of its matrix products.
        ceiling: the name of the ceiling (`ceilings.py`) that a share is taken of.
    """

    bytes_moved: int
    flops: int = 0
    ceiling: str = "copy bandwidth"


@dataclass(frozen=True)
class Bounds:
    """What the gate demands of ours.

    Attributes:
        output, gradient: the relative error in the Frobenius norm, against float64; None for the dtype's own rounding.
        exact: the bits of `eager`.
        beside_eager: whether the error may be at most 1.1 times eager's own.
    """

    output: float | None = None
    gradient: float | None = None
    exact: bool = False
    beside_eager: bool = True


@dataclass(frozen=True)
class Unquantised:
    """What a quantised op stands for: the same without quantising, and the noise that its format may leave.

    Attributes:
        format: one of `ltxforge_kernels.precision.FLOORS`.
        ideal: what the op would compute of a set of inputs, in float64.
    """

    format: str
    ideal: Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Subject:
    """One op at one shape.

    Attributes:
        inputs: filler → a set of inputs.
        ours: implementation → what it computes of a set of inputs.
        leaves: names of the inputs whose gradients training asks for.
        peers: name → makes the peer, or raises `PeerMissing`.
        bounds: what the gate demands; the truth is eager in float64.
        unquantised: of an op with few bits, what it approximates.
    """

    inputs: Callable[[Filler], Inputs]
    ours: Callable[[str], Contender]
    work: Work
    leaves: tuple[str, ...] = ()
    peers: Mapping[str, Callable[[], Contender]] = field(default_factory=dict)
    bounds: Bounds = Bounds()
    unquantised: Unquantised | None = None


def together(outputs: Outputs) -> tuple[Tensor, ...]:
    """Outputs as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def bytes_of(inputs: Any) -> int:
    """What a set of inputs takes, weights that are stored in parts included."""
    if isinstance(inputs, Tensor):
        return inputs.nbytes
    if dataclasses.is_dataclass(inputs):
        return sum(bytes_of(getattr(inputs, item.name)) for item in dataclasses.fields(inputs))
    return sum(map(bytes_of, inputs)) if isinstance(inputs, tuple) else 0


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among a set's fields."""
    fields = {item.name: getattr(inputs, item.name) for item in dataclasses.fields(inputs)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def asked(inputs: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """The same set with leaves that require gradients."""
    found = tensors_of(inputs)
    return dataclasses.replace(inputs, **{name: found[name].detach().requires_grad_() for name in leaves})


def in_float64(inputs: Inputs) -> Inputs:
    """The same set in float64."""
    found = {name: each.detach().double() for name, each in tensors_of(inputs).items() if each.is_floating_point()}
    return dataclasses.replace(inputs, **found)


class DeviceFiller(Filler):
    """Fills on the device itself: hundreds of millions of numbers would take the host seconds each."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        super().__init__(device, seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, dtype=torch.int32, device=self.device)
