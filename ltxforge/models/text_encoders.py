"""T5, Gemma 3 and Gemma 4 with their tokenizers, from folders or from one packed file; from disk only.

Weights are safetensors and nothing else. Gemma reads captions as LTX-2 was trained: with <bos> in front and padded on
the left, whatever the tokenizer's files say (2.5's say neither). Decides no version: `fit_ltx2.py` has refused what
does not belong.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging as transformers_logging

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.formats import is_companion
from ltxforge.models.layout_ltx2 import PACKED_TOKENIZER, language_model, packed_config
from ltxforge.models.parts import cast_weights
from ltxforge.models.quantised_encoders import NOT_QUANTISED, fill_quantised, markers
from ltxforge.models.tensors import DTYPES, NAMED_IN_ERRORS, read_tensor, read_tensors
from ltxforge.models.trees import LocalTree, whole_header
from ltxforge.models.weights import Header, TensorEntry, read_header

Gemma = Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration
GEMMA_CLASSES = {"gemma3": Gemma3ForConditionalGeneration, "gemma4_unified": Gemma4UnifiedForConditionalGeneration}
_TOKENIZER_ASSET = "hf_asset__tokenizer_config.json"
# Names in a tokenizer's configuration that its fast class takes as they are.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_t5(
    encoder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype, precision: str = NOT_QUANTISED
) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """T5's encoder and its tokenizer from their folders; `precision` as in `quantised_encoders.py`."""
    return _from_folder(T5EncoderModel, encoder, device, dtype, precision), load_tokenizer(tokenizer)


def load_gemma(
    encoder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype, precision: str = NOT_QUANTISED
) -> tuple[Gemma, PreTrainedTokenizerBase]:
    """Gemma and its tokenizer: two folders, or one packed file that is given for both; `precision` as for `load_t5`."""
    if encoder.is_file():
        header = read_header(encoder)
        return _packed_gemma(encoder, header, device, dtype, precision), _packed_tokenizer(encoder, header)
    gemma = _from_folder(_gemma_class(encoder), encoder, device, dtype, precision)
    return gemma, as_gemma(load_tokenizer(tokenizer))


def require_whole_t5(encoder: Path) -> None:
    """Refuse a T5 whose tensors do not fit its configuration. Reads headers alone."""
    _require_whole_folder(T5EncoderModel, encoder)


def require_whole_gemma(encoder: Path) -> None:
    """Refuse a Gemma, in a folder or packed, whose tensors do not fit its configuration. Reads headers alone."""
    if encoder.is_file():
        header = read_header(encoder)
        tensors = _without_memory(language_model(header).entries)
        _packed_model(header, tensors, torch.bfloat16, str(encoder), device_map="meta")
    else:
        _require_whole_folder(_gemma_class(encoder), encoder)


def _gemma_class(encoder: Path) -> type[Gemma]:
    kind = json.loads((encoder / "config.json").read_bytes()).get("model_type", "")
    if kind not in GEMMA_CLASSES:
        raise WeightsError(f"holds a {kind or 'model of an unknown kind'}, not a Gemma 3 or 4", where=str(encoder))
    return GEMMA_CLASSES[kind]


def _require_whole_folder(kind: type[PreTrainedModel], folder: Path) -> None:
    """transformers' own comparison, over tensors without memory: it knows the names of older folders."""
    _built_of(kind, folder, _without_memory(_entries(folder)), torch.bfloat16, "meta")


def _entries(folder: Path) -> Mapping[str, TensorEntry]:
    return whole_header(LocalTree(folder.parent, folder.name, FileDigests()), folder.name)[0].tensors


def _built_of(
    kind: type[PreTrainedModel], folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, place: str
) -> Any:
    """The module that a folder's configuration describes, made of these tensors in the place of the folder's."""
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    return _built(kind, None, str(folder), dtype, config=config, state_dict=tensors, device_map=place)


def _without_memory(entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in entries.items()
    }


def _from_folder(
    kind: type[PreTrainedModel], folder: Path, device: torch.device, dtype: torch.dtype, precision: str
) -> Any:
    if precision != NOT_QUANTISED:
        shapes = {name: entry.shape for name, entry in _entries(folder).items()}
        module = _built_of(kind, folder, markers(shapes), torch.float32, "cpu")
        return fill_quantised(module, folder, {name: name for name in shapes}, device, dtype, precision)
    module = _built(
        kind, folder, str(folder), dtype, local_files_only=True, use_safetensors=True, device_map={"": str(device)}
    )
    return cast_weights(module, device, dtype)


def _built(kind: type[PreTrainedModel], source: Path | None, where: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A module by transformers' own loading, refused where transformers would have made up a part."""
    with _quiet_transformers():
        module, told = kind.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    _require_fit(told, where)
    if scaled := [name for name in told["unexpected_keys"] if is_companion(name)]:
        raise WeightsError(f"is a quantised text encoder ({scaled[0]})", where=where, remedy="Use the bf16 one.")
    return module.eval()


def _require_fit(told: Mapping[str, Any], where: str) -> None:
    # Gemma's head is its embedding, which is stored once; nothing asks it anything.
    wrong = sorted({*told["missing_keys"], *(each[0] for each in told["mismatched_keys"])} - {"lm_head.weight"})
    if wrong:
        raise WeightsError(
            f"tensors do not fit the text encoder's configuration: {', '.join(wrong[:NAMED_IN_ERRORS])}",
            where=where,
            remedy="The file is incomplete or of another model; download it again or name another.",
        )


def _packed_gemma(path: Path, header: Header, device: torch.device, dtype: torch.dtype, precision: str) -> nn.Module:
    """The language model of a packed file; its other modalities' towers are neither built nor read.

    The peak is the module's own size in `dtype` and one tensor: a bf16 file in float32, as on a CPU, takes twice its
    size.
    """
    if precision != NOT_QUANTISED:
        part = language_model(header)
        told = markers({name: entry.shape for name, entry in part.entries.items()})
        module = _packed_model(header, told, torch.float32, str(path), device_map="cpu")
        return fill_quantised(module, path, {name: part.names[name] for name in told}, device, dtype, precision)
    wanted = {original: name for name, original in language_model(header).names.items()}
    tensors = {wanted[name]: value for name, value in read_tensors(path, wanted, device, dtype)}
    return cast_weights(_packed_model(header, tensors, dtype, str(path)), device, dtype)


def _packed_model(
    header: Header, tensors: dict[str, torch.Tensor], dtype: torch.dtype, where: str, **settings: Any
) -> nn.Module:
    """The language model that a packed file's metadata describes, made of these tensors."""
    config = Gemma4UnifiedConfig(text_config=_text_config(header.metadata))
    kind = Gemma4UnifiedForConditionalGeneration
    return _built(kind, None, where, dtype, config=config, state_dict=tensors, **settings)


def _text_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    config = packed_config(metadata)
    return {
        name: value for name, value in config.get("text_config", config).items() if name not in ("dtype", "torch_dtype")
    }


def _packed_tokenizer(path: Path, header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer of a packed file: tokenizer.json and tokenizer_config.json, bytes in tensors."""
    settings = json.loads(
        _packed_bytes(path, header, _TOKENIZER_ASSET) or header.metadata.get("tokenizer_config.json", "{}")
    )
    specials = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name)}
    words = Tokenizer.from_buffer(_packed_bytes(path, header, PACKED_TOKENIZER))
    names = {name: value["content"] if isinstance(value, dict) else value for name, value in specials.items()}
    return as_gemma(PreTrainedTokenizerFast(tokenizer_object=words, **names))


def _packed_bytes(path: Path, header: Header, name: str) -> bytes:
    if name not in header.tensors:
        return b""
    with path.open("rb") as file:
        return read_tensor(file, header.tensors[name], f"{path}: {name}").to(torch.uint8).numpy().tobytes()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the folder's own configuration names; a bare `spiece.model` is T5's."""
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else T5Tokenizer
    return kind.from_pretrained(folder, local_files_only=True)


def as_gemma(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left, and puts <bos> first if it does not already."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    first = tokenizer("a").input_ids[:1]
    if tokenizer.bos_token_id is not None and first != [tokenizer.bos_token_id]:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars while ltxforge shows one, and no report of what does not fit: an error says that."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
