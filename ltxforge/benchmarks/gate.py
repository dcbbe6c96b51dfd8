"""The gate: an op is true before it is fast, on fresh data, output and every gradient. A red one reports no speed.

Two criteria of kernels that sum in float32: the error against float64 is within the dtype's own rounding, and at most
1.1 times eager's. Where bits are promised, bits; on a GPU also the same bits twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from ltxforge_kernels.precision import FLOORS, sqnr
from torch import Tensor

from ltxforge.benchmarks.subject import (
    Bounds,
    Contender,
    DeviceFiller,
    Inputs,
    Subject,
    Unquantised,
    asked,
    in_float64,
    together,
)
from ltxforge.suites.case import Gate

SEED = 1_000_003
"""Of the gate's data: none that is timed."""
BESIDE_EAGER = 1.1
# One rounding of exact values to bf16 is 1.66e-3; sums of float32 products, in whatever order, stay below 1e-6.
ROUNDING = {torch.bfloat16: 1.8e-3, torch.float16: 2.3e-4, torch.float32: 1e-6, torch.float64: 1e-12}
# Below this an error is rounding alone, and its ratio to eager's says nothing.
PURE = {torch.bfloat16: 1.7e-3, torch.float16: 2.2e-4, torch.float32: 3e-7, torch.float64: 1e-13}
# How far a peer may be from the truth before it is said to compute something else.
PEER_ERROR = 0.02
GRADIENT_ROUNDING = {torch.bfloat16: 2.5e-3, torch.float32: 1.5e-6}


def gates_of(
    subject: Subject, implementations: Sequence[str], device: torch.device, gradients: bool
) -> tuple[list[Gate], Callable[[str, Contender], Gate]]:
    """Every check of ours, and what checks a peer against the same truth.

    Args:
        gradients: whether gradients are part of what is timed.
    """
    given = subject.inputs(DeviceFiller(device, SEED))
    leaves = subject.leaves if gradients else ()
    upstream = upstream_of(subject, given)
    eager = _everything(subject.ours("eager"), given, leaves, upstream)
    exact = subject.bounds.exact
    truth = eager if exact else _everything(subject.ours("eager"), in_float64(given), leaves, upstream)
    found = []
    for name in implementations:
        values = eager if name == "eager" else _everything(subject.ours(name), given, leaves, upstream)
        found += _checked(name, values, truth, eager, subject.bounds)
        if subject.unquantised:
            found.append(_noise(name, values["output 0"], subject.unquantised, given))
        if device.type == "cuda" and name == "triton":
            again = _everything(subject.ours(name), given, leaves, upstream)
            same = all(torch.equal(values[what], again[what]) for what in values)
            found.append(Gate(name, "the same bits twice", same))

    def check_peer(name: str, contender: Contender) -> Gate:
        if not contender.is_whole:
            return Gate(name, "computes another thing, and is not held against ours", True)
        with torch.no_grad():
            values = {f"output {k}": each for k, each in enumerate(together(contender(given)))}
        error = max(relative_error(each, truth[what]) for what, each in values.items() if what in truth)
        return Gate(name, "output", error <= PEER_ERROR, error, PEER_ERROR)

    return found, check_peer


def upstream_of(subject: Subject, given: Inputs, seed: int = SEED) -> tuple[Tensor, ...]:
    """Gradients that arrive at the outputs, drawn anew for each set of inputs."""
    with torch.no_grad():
        outputs = together(subject.ours("eager")(given))
    fill = DeviceFiller(outputs[0].device, seed + 1)
    return tuple(fill.normal(*each.shape, dtype=each.dtype) for each in outputs)


def _everything(
    contender: Contender, given: Inputs, leaves: tuple[str, ...], upstream: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Name → output, and gradient of each leaf."""
    if not leaves:
        with torch.no_grad():
            return {f"output {k}": each for k, each in enumerate(together(contender(given)))}
    given = asked(given, leaves)
    outputs = together(contender(given))
    wanted = [getattr(given, name) for name in leaves]
    gradients = torch.autograd.grad(outputs, wanted, [up.to(out.dtype) for up, out in zip(upstream, outputs)])  # noqa: B905
    found = {f"output {k}": each.detach() for k, each in enumerate(outputs)}
    return found | {f"gradient of {name}": each for name, each in zip(leaves, gradients, strict=True)}


def _checked(
    name: str, values: Mapping[str, Tensor], truth: Mapping[str, Tensor], eager: Mapping[str, Tensor], bounds: Bounds
) -> list[Gate]:
    """A gate for each output and gradient of one implementation."""
    found, computed = [], values["output 0"].dtype
    for what, value in values.items():
        if bounds.exact and name != "compile":  # Inductor may contract a product and a sum
            found.append(Gate(name, f"{what}, the bits of eager", torch.equal(value, eager[what])))
            continue
        is_gradient = what.startswith("gradient")
        stated = bounds.gradient if is_gradient else bounds.output
        rounding = {**ROUNDING, **GRADIENT_ROUNDING} if is_gradient else ROUNDING
        # A float32 gradient of what was computed in bf16 is as good as bf16.
        dtype = max(value.dtype, computed, key=lambda each: torch.finfo(each).eps)
        bound = rounding[dtype] if stated is None else stated
        error, beside = relative_error(value, truth[what]), relative_error(eager[what], truth[what])
        # In bf16 the fallbacks may round more than once: eager is held against what would be a mistake, compile against
        # eager, ours against both.
        if name == "eager":
            bound = max(bound, PEER_ERROR)
        elif name == "compile":
            bound = max(bound, BESIDE_EAGER * beside)
        passed = error <= bound
        if name == "triton" and bounds.beside_eager:
            passed = passed and (error <= BESIDE_EAGER * beside or error <= PURE[dtype])
        found.append(Gate(name, what, passed, error, bound, beside))
    return found


def _noise(name: str, value: Tensor, unquantised: Unquantised, given: Inputs) -> Gate:
    """Whether quantising leaves what its format must leave, on this data, which is Gaussian."""
    with torch.no_grad():
        left, floor = sqnr(unquantised.ideal(in_float64(given)), value.double()), FLOORS[unquantised.format]
    return Gate(name, f"{left:.1f} dB of signal to quantisation noise, at least {floor:.0f}", left >= floor)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in float64. NaN anywhere gives NaN, and no bound holds."""
    if result.shape != truth.shape:
        return float("inf")
    truth = truth.detach().double()
    apart = (result.detach().double() - truth).norm().item()
    return 0.0 if apart == 0 else apart / max(truth.norm().item(), 1e-300)


def told(gate: Gate) -> str:
    """A red gate in words."""
    if gate.error is None:
        return f"{gate.implementation}: {gate.what}: {'so' if gate.passed else 'not so'}"
    beside = "" if gate.eager_error is None else f", eager {gate.eager_error:.2e}"
    return f"{gate.implementation}: {gate.what}: relative error {gate.error:.2e}, at most {gate.bound:.2e}{beside}"
