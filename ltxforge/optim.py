"""Optimisers by name, over the adapter's float32 parameters. The learning rate is given at each step; there is no
scheduler object. State goes in and out as named tensors, so that a checkpoint needs no pickle.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltxforge.plan import OptimizerPlan


class Optimizer:
    """One optimiser over named parameters.

    A parameter's moments are saved as `<parameter name>/<moment>`; plain numbers (a step count) likewise, as 0-d
    tensors of float64.
    """

    def __init__(self, plan: OptimizerPlan, parameters: Mapping[str, nn.Parameter]) -> None:
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values()), "adapters train in float32"
        self.parameters = dict(parameters)
        self._engine = _build(plan, list(self.parameters.values()))

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
        """Put back what `state` gave: same names, dtypes and bits."""
        by_parameter: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for name, value in saved.items():
            owner, _, key = name.rpartition("/")
            by_parameter[owner][key] = value
        for name, parameter in self.parameters.items():
            self._engine.state[parameter] = {
                key: self._restored(key, value, parameter) for key, value in by_parameter[name].items()
            }

    def _restored(self, key: str, value: Tensor, parameter: nn.Parameter) -> Any:
        if key == "step":  # torch keeps a tensor on the host, bitsandbytes an int
            return int(value.item()) if value.dtype == torch.float64 else value.clone()
        return value.to(parameter.device, copy=True)


def _build(plan: OptimizerPlan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": plan.learning_rate, "betas": tuple(plan.betas), "eps": plan.epsilon, "weight_decay": plan.weight_decay,
    }  # fmt: skip
    if plan.name == "adamw":
        # A LoRA is hundreds of small tensors: on a GPU they are updated in a few launches instead of thousands.
        on_gpu = any(parameter.device.type != "cpu" for parameter in parameters)
        return torch.optim.AdamW(parameters, foreach=on_gpu, fused=False, **options)
    assert plan.name == "adamw8bit", plan.name
    return bitsandbytes_optim().AdamW8bit(parameters, **options)


def bitsandbytes_optim() -> Any:
    """bitsandbytes' optimisers, which not every platform has; the planner refuses where they are missing."""
    return importlib.import_module("bitsandbytes.optim")
