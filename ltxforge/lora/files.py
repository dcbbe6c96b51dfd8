"""The one LoRA file that loads everywhere: names of the original checkpoint, alpha folded into B, no `.alpha` keys.

diffusers takes alpha = rank where no metadata says otherwise and rejects `.alpha` keys; Lightricks' loader applies no
alpha at all; ComfyUI takes 1.0 when there is none. With the scale folded into B all three compute the same product.
Keys: `diffusion_model.<module>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]. Only what was trained is in it: no
layer of a modality that was left out, and never LTX-2's connectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ltxforge.durable import staged_file
from ltxforge.hardware import torch_dtype
from ltxforge.lora.layers import original_name
from ltxforge.specs import SPECS

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
    """Write the LoRA file whole or not at all.

    Args:
        adapter: `adapter_parameters` of the transformer.
        scaling: PEFT's scale, folded into B.
        facts: provenance for the file's metadata.

    Returns:
        The file's size in bytes.
    """
    metadata = {"format": "pt", **{key: str(value) for key, value in sorted(facts.items())}}
    with staged_file(path) as partial:
        save_file(to_file_tensors(adapter, scaling, precision), partial, metadata=metadata)
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
