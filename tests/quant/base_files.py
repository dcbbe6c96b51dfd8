"""Transformers as files, for the tests of loading, and how their models are loaded. Writes with diffusers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ltxforge.models import ltx2_tiny, tiny
from ltxforge.models.detect import plan_model
from ltxforge.models.load import load_model
from ltxforge.specs import TINY

CPU = torch.device("cpu")
CLASSES = {"tiny/ltx-video": LTXVideoTransformer3DModel, "tiny/ltx2": LTX2VideoTransformer3DModel}


def transformer_of(base: str) -> nn.Module:
    """The built-in model's transformer, float32."""
    return (ltx2_tiny if TINY[base].has_audio else tiny).tiny_transformer(TINY[base])


def folder_of(path: Path, base: str, dtype: torch.dtype = torch.bfloat16, shard: str = "10GB") -> Path:
    """A diffusers folder of the transformer alone."""
    transformer_of(base).to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def stored_as(path: Path, base: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A diffusers folder with the transformer's configuration and these tensors."""
    transformer_of(base).save_config(path)
    save_file(tensors, path / "diffusion_pytorch_model.safetensors", metadata=metadata or {"format": "pt"})
    return path


def loaded(base: str, folder: Path | None, **keep: Any) -> Any:
    """The model with its transformer from a folder (None: built in), all else built in; kept as said, in bf16."""
    plan = plan_model(base=base, transformer=folder and str(folder), version=TINY[base].version)
    model = load_model(plan, CPU, torch.bfloat16, modalities="both" if TINY[base].has_audio else "video")
    model.keep = dataclasses.replace(model.keep, **keep)
    model.load_transformer()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two transformers hold the same bits under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(_bytes(ours[name]), _bytes(theirs[name]))
        for name in ours
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
