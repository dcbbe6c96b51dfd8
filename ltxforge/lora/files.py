"""Writes the one LoRA file that loads everywhere, and reads any that is known, to go on from it.

Ours has the original checkpoint's names, alpha folded into B, and no `.alpha` keys. diffusers takes alpha = rank where
no metadata says otherwise and rejects `.alpha` keys; Lightricks' loader applies no alpha at all; ComfyUI takes 1.0 when
there is none. With the scale folded into B all three compute the same product.
Keys: `diffusion_model.<module>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]. Only what was trained is in it: no
layer of a modality that was left out, and never LTX-2's connectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ltxforge.digests import FileDigests
from ltxforge.durable import staged_file
from ltxforge.errors import WeightsError
from ltxforge.hardware import torch_dtype
from ltxforge.lora.header import ALPHA, DOWN, UP, by_layer
from ltxforge.lora.init_from import digest_of, peft_scale
from ltxforge.lora.layers import original_name
from ltxforge.specs import SPECS
from ltxforge.tensor_files import save_tensors

PREFIX = "diffusion_model."
# What file managers are told of each family: the architecture, completed by the version, and whose code it is.
ARCHITECTURES = {"ltx-video": "ltx-video-{}", "ltx-2": "ltx-{}"}
IMPLEMENTATIONS = {
    "ltx-video": "https://github.com/Lightricks/LTX-Video",
    "ltx-2": "https://github.com/Lightricks/LTX-2",
}


def to_file_tensors(adapter: Mapping[str, Tensor], scaling: float, precision: str) -> dict[str, Tensor]:
    """The file's tensors: B times the scale in float32, then one rounding to the file's dtype."""
    tensors = {}
    for name, value in adapter.items():
        folded = value.detach().float().cpu()
        if name.endswith(".lora_B.weight"):
            folded = folded * scaling
        tensors[PREFIX + original_name(name)] = folded.to(torch_dtype(precision)).contiguous()
    return tensors


def export(path: Path, adapter: Mapping[str, Tensor], scaling: float, precision: str, facts: Mapping[str, str]) -> int:
    """Write the LoRA file whole or not at all; equal adapters and facts give equal bytes.

    Args:
        adapter: `adapter_parameters` of the transformer.
        scaling: PEFT's scale, folded into B.
        facts: provenance for the file's metadata.

    Returns:
        The file's size in bytes.
    """
    metadata = {"format": "pt", **{key: str(value) for key, value in facts.items()}}
    with staged_file(path) as partial:
        save_tensors(partial, to_file_tensors(adapter, scaling, precision), metadata)
    return path.stat().st_size


def provenance(facts: Mapping[str, object]) -> dict[str, str]:
    """Metadata entries: `modelspec.*` for file managers, `ltxforge` with all facts as JSON.

    Args:
        facts: at least the run's `name` and the base's `version`; `lora/header.py` reads the latter back.
    """
    version = str(facts["version"])
    family = SPECS[version].family
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES[family].format(version)}/lora",
        "modelspec.implementation": IMPLEMENTATIONS[family],
        "modelspec.title": str(facts["name"]),
        "ltxforge": json.dumps(dict(facts), sort_keys=True),
    }


def read(path: Path, digest: str, scaling: float) -> dict[str, Tensor]:
    """The adapter of a LoRA file, float32, under the names of `adapter_parameters`: A as it is, B so that
    scaling · B · A is the file's product.

    Args:
        path: a file that the plan was made with.
        digest: its content then.
        scaling: PEFT's scale of the adapter that is to take it.

    Raises:
        WeightsError: the file is gone, or no longer the one that was planned with.
    """
    if not path.is_file() or digest_of(path, FileDigests()) != digest:
        raise WeightsError(
            "is gone, or has changed since the plan was made", where=str(path), remedy="Start the command again."
        )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        stated = peft_scale(path, file.metadata() or {})
    up, alphas = by_layer(tensors, UP), by_layer(tensors, ALPHA)
    adapter = {}
    for layer, name in by_layer(tensors, DOWN).items():
        a, b = tensors[name], tensors[up[layer]]
        scale = stated.of(layer, len(a)) if stated else 1.0
        if layer in alphas:
            scale = tensors[alphas[layer]].item() / len(a)
        adapter[f"{layer}.lora_A.weight"] = a.float()
        adapter[f"{layer}.lora_B.weight"] = (b.double() * (scale / scaling)).float()
    return adapter
