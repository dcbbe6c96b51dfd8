"""The one LoRA file that loads everywhere: names of the original checkpoint, alpha folded into B, no `.alpha` keys.

diffusers takes alpha = rank where no metadata says otherwise and rejects `.alpha` keys; Lightricks' loader applies no
alpha at all; ComfyUI takes 1.0 when there is none. With the scale folded into B all three compute the same product.
Keys: `diffusion_model.<module>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R].
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltxforge.durable import commit_file
from ltxforge.errors import WeightsError

PREFIX = "diffusion_model."
# diffusers' names → the original checkpoint's, for layers outside the blocks. Inside they are the same.
ORIGINAL_NAMES = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def original_name(module: str) -> str:
    """A module's name in Lightricks' checkpoints, from its name in diffusers."""
    head, dot, rest = module.partition(".")
    return ORIGINAL_NAMES.get(head, head) + dot + rest


def unread_by(module: str) -> str:
    """Which program cannot read this layer from the file, or "" if all can."""
    return "diffusers (it does not rename this layer)" if original_name(module) != module else ""


def to_file_tensors(adapter: Mapping[str, Tensor], scaling: float, precision: str) -> dict[str, Tensor]:
    """The file's tensors: B times the scale in float32, then one rounding to the file's dtype."""
    tensors = {}
    for name, value in adapter.items():
        folded = value.detach().float().cpu()
        if name.endswith(".lora_B.weight"):
            folded = folded * scaling
        tensors[PREFIX + original_name(name)] = folded.to(DTYPES[precision]).contiguous()
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
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    save_file(to_file_tensors(adapter, scaling, precision), partial, metadata=metadata)
    commit_file(partial, path)
    return path.stat().st_size


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Raises WeightsError when it is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except Exception as error:  # safetensors has one error type per cause
        raise WeightsError(f"not a readable safetensors file ({error})", where=str(path)) from error
    if not tensors or not all(key.startswith(PREFIX) and ".lora_" in key for key in tensors):
        raise WeightsError("this is no LoRA file with ComfyUI's key names", where=str(path))
    return tensors, metadata


def provenance(plan_facts: Mapping[str, object]) -> dict[str, str]:
    """Metadata entries: `modelspec.*` for file managers, `ltxforge` with the rest as JSON."""
    title, architecture = str(plan_facts["name"]), str(plan_facts["version"])
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"ltx-video-{architecture}/lora",
        "modelspec.implementation": "https://github.com/Lightricks/LTX-Video",
        "modelspec.title": title,
        "ltxforge": json.dumps(dict(plan_facts), sort_keys=True),
    }
