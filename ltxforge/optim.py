"""Optimisers by name, over the adapter's float32 parameters. The learning rate is given at each step; there is no
scheduler object. State goes in and out as named tensors, so that a checkpoint needs no pickle.

Those in 8 bits are bitsandbytes'. Decides what a recipe cannot say of them: its defaults, and that on a CPU, which has
no pages, a paged one is the plain one, with the same numbers. How much each keeps is in `moments.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltxforge.errors import RunError
from ltxforge.moments import MOMENTS
from ltxforge.plan import OptimizerPlan

BITSANDBYTES = {
    "adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit",
    "paged_lion8bit": "PagedLion8bit", "ademamix8bit": "AdEMAMix8bit",
}  # fmt: skip
# AdEMAMix's decay of its slow average, and that average's weight: bitsandbytes' defaults, both from the first step on.
# The paper warms them up over the run, for which bitsandbytes has a setting that is off by default.
SLOW_BETA, SLOW_WEIGHT = 0.9999, 5.0


class Optimizer:
    """One optimiser over named parameters.

    A parameter's moments are saved as `<parameter name>/<moment>`; plain numbers (a step count) likewise, as 0-d
    tensors of float64.
    """

    def __init__(self, plan: OptimizerPlan, parameters: Mapping[str, nn.Parameter]) -> None:
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values()), "adapters train in float32"
        self.parameters = dict(parameters)
        self._engine: Any = _build(plan, list(self.parameters.values()))
        self._makes_state = plan.name in BITSANDBYTES

    def step(self, learning_rate: float) -> None:
        """One update at this rate; gradients are cleared after it."""
        for group in self._engine.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        # bitsandbytes writes through pointers, which PyTorch does not see; who keeps a copy asks for the version.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        self._engine.zero_grad(set_to_none=True)

    def clear_gradients(self) -> None:
        """Drop gradients of an unfinished step."""
        self._engine.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All moments as named tensors (references, not copies)."""
        found = {}
        for name, parameter in self.parameters.items():
            for key, value in self._engine.state.get(parameter, {}).items():
                is_tensor = isinstance(value, Tensor)
                found[f"{name}/{key}"] = value if is_tensor else torch.tensor(float(value), dtype=torch.float64)
        return found

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave: same names, dtypes and bits. A parameter without any begins anew.

        Raises:
            RunError: it is not this optimiser's state.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for name, value in saved.items():
            owner, _, key = name.rpartition("/")
            if owner not in by_parameter:
                raise _not_ours(name)
            by_parameter[owner][key] = value
        for number, (name, parameter) in enumerate(self.parameters.items()):
            if by_parameter[name]:
                self._fresh_state(number, parameter, by_parameter[name])
                self._fill(name, self._engine.state[parameter], by_parameter[name])

    def _fresh_state(self, number: int, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
        """A parameter's state with the numbers still to come.

        bitsandbytes makes its own, paged where it pages and registered as such: tensors put in its place would be
        plain ones. torch's AdamW has no such function; what it keeps is on the device, its count of steps on the host.
        """
        if self._makes_state:
            self._engine.init_state(self._engine.param_groups[0], parameter, 0, number)
            return
        self._engine.state[parameter] = {
            key: torch.empty_like(value, device="cpu" if key == "step" else parameter.device)
            for key, value in saved.items()
        }

    @staticmethod
    def _fill(name: str, state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
        if state.keys() != saved.keys():
            raise _not_ours(f"{name}/{min(state.keys() ^ saved.keys())}")
        for key, value in saved.items():
            own = state[key]
            if not isinstance(own, Tensor):
                state[key] = int(value.item())
                continue
            if (own.shape, own.dtype) != (value.shape, value.dtype):
                raise _not_ours(f"{name}/{key}")
            own.copy_(value)


def _not_ours(name: str) -> RunError:
    return RunError(
        f"the optimiser's saved state does not fit the optimiser: {name}",
        remedy="Another version of torch or bitsandbytes saved it; the run goes on with that one.",
    )


def _build(plan: OptimizerPlan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # A LoRA is hundreds of small tensors: on a GPU they are updated in a few launches instead of thousands.
    on_gpu = any(parameter.device.type != "cpu" for parameter in parameters)
    options: dict[str, Any] = {
        "lr": plan.learning_rate, "betas": tuple(plan.betas), "weight_decay": plan.weight_decay,
    }  # fmt: skip
    if MOMENTS[plan.name].has_epsilon:
        options["eps"] = plan.epsilon
    if plan.name == "adamw":
        return torch.optim.AdamW(parameters, foreach=on_gpu, fused=False, **options)
    if plan.name == "ademamix8bit":
        options |= {"betas": (*plan.betas, SLOW_BETA), "alpha": SLOW_WEIGHT}
    name = plan.name if on_gpu else plan.name.removeprefix("paged_")
    return getattr(bitsandbytes_optim(), BITSANDBYTES[name])(parameters, **options)


def bitsandbytes_optim() -> Any:
    """bitsandbytes' optimisers, which not every platform has; the planner refuses where they are missing."""
    return importlib.import_module("bitsandbytes.optim")
