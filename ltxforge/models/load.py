"""Weights to modules: each part is built without memory, then filled by one tensor after the other.

Decides that every tensor of a module must be in the file, in its shape, and nothing else; says which are not. Asks no
network: `sources.fetch` has brought the files. What is planned is loaded, nothing is guessed (`detect.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.convert import transformer_names, vae_config, vae_names
from ltxforge.models.layout import transformer_config, transformer_layout
from ltxforge.models.ltx_video import LTXVideo, Parts
from ltxforge.models.parts import cast
from ltxforge.models.sources import spec_of
from ltxforge.models.tiny import tiny_parts
from ltxforge.models.trees import LocalTree, weight_files, whole_header
from ltxforge.models.weights import Header, read_header
from ltxforge.plan import ComponentPlan, ModelPlan
from ltxforge.specs import TINY, ModelSpec

Module = TypeVar("Module", bound=nn.Module)
NAMED_IN_ERRORS = 6


def load_model(
    plan: ModelPlan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae_dtype: torch.dtype | None = None,
    text_dtype: torch.dtype | None = None,
) -> LTXVideo:
    """The plan's model. Nothing is read before a part is asked for.

    Args:
        plan: with every component's location filled in (`sources.fetch`).
        device, dtype: where the transformer goes, and in which dtype.
        vae_dtype, text_dtype: the encoders' dtypes; by default float32 on a CPU, bfloat16 elsewhere.
    """
    spec = spec_of(plan)
    return LTXVideo(spec, plan.rope, _parts(plan, spec), device, dtype, vae_dtype=vae_dtype, text_dtype=text_dtype)


def _parts(plan: ModelPlan, spec: ModelSpec) -> Parts:
    """How each part is made: from its files, or built in."""
    components = plan.components

    def made(name: str, from_files: Callable) -> Callable:
        component = components[name]
        if component.kind == "builtin":
            return getattr(tiny_parts(TINY[component.source]), name)
        return partial(from_files, _located(component, name))

    def text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        return load_text_encoder(folder, _located(components["tokenizer"], "tokenizer"), device, dtype)

    return Parts(
        transformer=made("transformer", lambda path, device, dtype: load_transformer(path, spec, device, dtype)),
        vae=made("vae", load_vae),
        text_encoder=made("text_encoder", text_encoder),
        scheduler=partial(load_scheduler, components["scheduler"], spec),
    )


def _located(component: ComponentPlan, name: str) -> Path:
    if component.kind != "builtin" and not component.location:
        raise WeightsError(f"the {name} has not been fetched", where=component.source)
    return Path(component.location)


def load_transformer(
    path: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> LTXVideoTransformer3DModel:
    """A transformer from a folder or single file, on the device and in the dtype."""
    header, config = _header_at(path, "transformer")
    layout = transformer_layout(header)
    if layout is None:
        raise WeightsError("holds no LTX-Video transformer", where=str(path))
    settings = transformer_config(layout, config, spec, str(path))
    module = _unfilled(lambda: LTXVideoTransformer3DModel(**settings))
    return fill(module, path, transformer_names(header), device, dtype)


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLLTXVideo:
    """A VAE from a folder or single file, on the device and in the dtype."""
    header, config = _header_at(path, "vae")
    settings = vae_config(header, config)
    module = _unfilled(lambda: AutoencoderKLLTXVideo(**settings))
    return fill(module, path, vae_names(header), device, dtype)


def load_text_encoder(
    encoder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """T5 and its tokenizer from their folders; safetensors only, from disk only."""
    with _quiet_transformers():
        module = T5EncoderModel.from_pretrained(
            encoder, dtype=dtype, local_files_only=True, use_safetensors=True, device_map={"": str(device)}
        )
    return cast(module.eval(), device, dtype), load_tokenizer(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the folder's own configuration names; a bare `spiece.model` is T5's."""
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else T5Tokenizer
    return kind.from_pretrained(folder, local_files_only=True)


def load_scheduler(component: ComponentPlan, spec: ModelSpec) -> FlowMatchEulerDiscreteScheduler:
    """The base's own sampling schedule, else the version's."""
    if component.kind == "builtin":
        return FlowMatchEulerDiscreteScheduler(**spec.scheduler_config)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(component.location, local_files_only=True)


def _header_at(path: Path, part: str) -> tuple[Header, dict[str, Any]]:
    return whole_header(LocalTree(path.parent, path.name, FileDigests()), path.name, part)


def _unfilled(make: Callable[[], Module]) -> Module:
    """The module with shapes and no memory."""
    with torch.device("meta"):
        return make().eval()


def fill(module: Module, path: Path, names: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> Module:
    """Put a file's or folder's tensors into a module that has none.

    Each tensor is copied off the file's memory map by itself, so that the peak is the module's own size and a file that
    changes later changes nothing.

    Args:
        module: on the meta device.
        path: a single file, or a folder of one or several.
        names: the module's name → the file's own name, of all tensors that belong to it.
    """
    files = [path] if path.is_file() else [path / name for name in _files_of(path)]
    _require_same_tensors(module, files, names, str(path))
    wanted = {original: name for name, original in names.items()}
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device=_safetensors_device(device)) as stored:
            for original in stored.offset_keys():  # in the file's order
                if (name := wanted.get(original)) is not None:
                    tensors[name] = stored.get_tensor(original).to(device, dtype, copy=device.type == "cpu")
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def _files_of(folder: Path) -> list[str]:
    return weight_files(LocalTree(folder.parent, folder.name, FileDigests()), folder.name)


def _safetensors_device(device: torch.device) -> str:
    """Where safetensors reads to: straight to CUDA, by way of the CPU elsewhere."""
    return str(device) if device.type == "cuda" else "cpu"


def _require_same_tensors(module: nn.Module, files: list[Path], names: Mapping[str, str], where: str) -> None:
    """Compare names and shapes before a byte of data is read."""
    stored = {name: entry.shape for file in files for name, entry in read_header(file).tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in names],
        "not part of the model": [original for name, original in names.items() if name not in expected],
        "of another shape": [
            f"{original} {stored[original]} for {expected[name]}"
            for name, original in names.items()
            if name in expected and stored[original] != expected[name]
        ],
    }
    if found := [_said(kind, tensors) for kind, tensors in problems.items() if tensors]:
        raise WeightsError(
            "tensors do not fit the model: " + "; ".join(found),
            where=where,
            remedy="The file is incomplete or of another model; download it again or name another.",
        )


def _said(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
    return f"{kind}: {', '.join(sorted(names)[:NAMED_IN_ERRORS])}{more}"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of its own while ltxforge shows one."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
