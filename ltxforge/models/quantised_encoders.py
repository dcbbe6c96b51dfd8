"""Text encoders whose layers are quantised one after the other while they are read: neither the device nor the host
ever holds the whole of one in 16 bits.

transformers builds the module and knows what the tensors of older and newer folders are called; it is given tensors
without memory, each of which tells from which tensor of the file it comes (`markers`). Decides that every linear layer
inside the repeated layers is quantised, whatever it costs it, that tables of words wait on the host, where a lookup
costs nothing, and that what reads no text is not kept at all. Knows no model by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from ltxforge_kernels.choice import EAGER
from torch import Tensor, nn
from transformers import PreTrainedModel

from ltxforge.errors import WeightsError
from ltxforge.models.tensors import Checkpoint
from ltxforge.quant.formats import NARROW
from ltxforge.quant.linear import QuantisedLinear
from ltxforge.quant.weights import Stored, whole

Module = TypeVar("Module", bound=PreTrainedModel)
HOST = torch.device("cpu")
MARKER_BYTES = 4
NOT_QUANTISED = "bf16"
# Part of the key under which prompts are cached: raised by hand when the same words come to mean other numbers.
RULE = "layers, double, 1"
_REPEATED = re.compile(r"\.\d+\.")


def markers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes in the memory of one number, which is the place of the tensor's name among `shapes`."""
    return {
        name: torch.full((), float(place), dtype=torch.float32).expand(shape)
        for place, (name, shape) in enumerate(shapes.items())
    }


def fill_quantised(
    module: Module, source: Path, names: Mapping[str, str], device: torch.device, dtype: torch.dtype, precision: str
) -> Module:
    """Fill a module that transformers has built of `markers(names)` on the host.

    The peak is the module in its few bits and one tensor, which is quantised on the device.

    Args:
        source: a file, or a folder of one or several.
        names: what transformers was told each tensor is called → its name in the file.
        device, dtype: of what is not quantised; tables of words stay on the host.
        precision: "int8" or "nf4".

    Raises:
        WeightsError: transformers makes a tensor of several, or of another shape, and not one by another name.
    """
    language, checkpoint = _text_alone(module), Checkpoint(source)
    originals, homes = list(names.values()), {}
    kept = {id(tensor) for tensor in language.state_dict(keep_vars=True).values()}
    for name, marker in module.state_dict(keep_vars=True).items():
        if id(marker) in kept:
            original = originals[int(marker.detach()[(0,) * marker.ndim])]
            is_marker = marker.untyped_storage().nbytes() == MARKER_BYTES
            if not is_marker or marker.shape != checkpoint.header.tensors[original].shape:
                raise _is_made(name, source)
            homes.setdefault(original, name)
    tensors = ((homes[original], stored) for original, stored in checkpoint.read(homes))
    return _placed(module, tensors, device, dtype, precision)


def _is_made(name: str, source: Path) -> WeightsError:
    return WeightsError(
        f"{name} is not read as it is stored, and cannot be quantised on the way", where=str(source),
        remedy='Leave memory.text_encoder_precision out, or set it to "bf16".',
    )  # fmt: skip


def quantised_module(module: Module, device: torch.device, dtype: torch.dtype, precision: str) -> Module:
    """A whole module likewise; one that needs no file."""
    language = _text_alone(module)
    kept = {id(tensor) for tensor in language.state_dict(keep_vars=True).values()}
    once = {id(tensor): (name, tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    tensors = [(name, tensor.detach()) for key, (name, tensor) in once.items() if key in kept]
    return _placed(module, tensors, device, dtype, precision)


def _text_alone(module: PreTrainedModel) -> nn.Module:
    """The part that reads text, the others of the same model taken away: towers that see and hear, and projections."""
    inner = getattr(module, "model", module)
    language = getattr(inner, "language_model", None)
    if language is None:
        return module
    for name in [name for name, part in inner.named_children() if part is not language]:
        setattr(inner, name, None)
    return language


def _placed(
    module: Module,
    tensors: Iterable[tuple[str, Stored]],
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
) -> Module:
    """Put each tensor where it stays, in all places that share it."""
    owners = _owners(module)
    table = module.get_input_embeddings().weight
    words = [part for part in module.modules() if isinstance(part, nn.Embedding) and part.weight is table]
    for name, stored in tensors:
        places = owners[name]
        layer = module.get_submodule(places[0].rpartition(".")[0])
        if len(places) == 1 and _is_quantised(name, layer):
            weight = whole(stored, _own_dtype(stored), device, EAGER)
            made = QuantisedLinear.quantise(weight, None, precision, double=True)
            made.weight = None  # T5 asks its layers for a weight's dtype, and passes over one that has none
            _set(module, places[0].rpartition(".")[0], made)
            del weight, made
        else:
            at = HOST if layer in words else device
            value: Tensor = whole(stored, dtype, at, EAGER)
            if places[0].rpartition(".")[2] in layer._parameters:
                value = nn.Parameter(value, requires_grad=False)
            for place in places:
                _set(module, place, value)
        del stored
    _move_the_rest(module, words, device)
    return module.requires_grad_(False)


def _owners(module: nn.Module) -> dict[str, list[str]]:
    """Of each tensor's names, the names that it goes by in all."""
    shared: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), []).append(name)
    return {name: names for names in shared.values() for name in names}


def _is_quantised(name: str, layer: nn.Module) -> bool:
    repeated = isinstance(layer, nn.Linear) and name.endswith(".weight") and _REPEATED.search(name) is not None
    return repeated and layer.bias is None and min(layer.weight.shape) >= NARROW


def _own_dtype(stored: Stored) -> torch.dtype:
    """What a weight is quantised from: itself, or float32 of what is neither 16 bits nor whole."""
    narrow = isinstance(stored, Tensor) and stored.dtype in (torch.bfloat16, torch.float16)
    return stored.dtype if narrow else torch.float32


def _set(module: nn.Module, place: str, value: nn.Module | Tensor) -> None:
    parent, _, own = place.rpartition(".")
    setattr(module.get_submodule(parent), own, value)


def _move_the_rest(module: PreTrainedModel, words: list[nn.Embedding], device: torch.device) -> None:
    """What no file holds, such as rotations' frequencies, to the device, as transformers made it; words stay."""
    for part in module.modules():
        for name, buffer in part._buffers.items() if part not in words else ():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    for table in words if device != HOST else ():
        table.register_forward_pre_hook(lambda _module, given: tuple(each.to(HOST) for each in given))
        table.register_forward_hook(lambda _module, _given, found: found.to(device))


def device_of(encoder: nn.Module) -> torch.device:
    """Where an encoder computes, though its words may wait on the host."""
    places: Iterator[torch.device] = (tensor.device for tensor in (*encoder.parameters(), *encoder.buffers()))
    return next((place for place in places if place.type != "cpu"), HOST)
