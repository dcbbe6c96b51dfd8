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
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging as transformers_logging

from ltxforge.errors import WeightsError
from ltxforge.models.formats import is_companion
from ltxforge.models.layout_ltx2 import PACKED_CONFIG, PACKED_TOKENIZER, language_model
from ltxforge.models.parts import cast
from ltxforge.models.tensors import NAMED_IN_ERRORS, read_tensor, read_tensors
from ltxforge.models.weights import Header, read_header

Gemma = Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration
GEMMA_CLASSES = {"gemma3": Gemma3ForConditionalGeneration, "gemma4_unified": Gemma4UnifiedForConditionalGeneration}
_TOKENIZER_ASSET = "hf_asset__tokenizer_config.json"
# Names in a tokenizer's configuration that its fast class takes as they are.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_t5(
    encoder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """T5's encoder and its tokenizer from their folders."""
    return _from_folder(T5EncoderModel, encoder, device, dtype), load_tokenizer(tokenizer)


def load_gemma(
    encoder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Gemma, PreTrainedTokenizerBase]:
    """Gemma and its tokenizer: two folders, or one packed file that is given for both."""
    if encoder.is_file():
        header = read_header(encoder)
        return _packed_gemma(encoder, header, device, dtype), _packed_tokenizer(encoder, header)
    kind = json.loads((encoder / "config.json").read_bytes()).get("model_type", "")
    if kind not in GEMMA_CLASSES:
        raise WeightsError(f"holds a {kind or 'model of an unknown kind'}, not a Gemma 3 or 4", where=str(encoder))
    return _from_folder(GEMMA_CLASSES[kind], encoder, device, dtype), as_gemma(load_tokenizer(tokenizer))


def _from_folder(kind: type, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    with _quiet_transformers():
        module, told = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, device_map={"": str(device)},
            output_loading_info=True,
        )  # fmt: skip
    _require_whole(told, str(folder))
    if scaled := [name for name in told["unexpected_keys"] if is_companion(name)]:
        raise WeightsError(f"is a quantised text encoder ({scaled[0]})", where=str(folder), remedy="Use the bf16 one.")
    return cast(module.eval(), device, dtype)


def _require_whole(told: Mapping[str, Any], where: str) -> None:
    """Refuse an encoder of which transformers would have made up a part."""
    # Gemma's head is its embedding, which is stored once; nothing asks it anything.
    wrong = sorted({*told["missing_keys"], *(each[0] for each in told["mismatched_keys"])} - {"lm_head.weight"})
    if wrong:
        raise WeightsError(
            f"tensors do not fit the text encoder's configuration: {', '.join(wrong[:NAMED_IN_ERRORS])}",
            where=where,
            remedy="The file is incomplete or of another model; download it again or name another.",
        )


def _packed_gemma(path: Path, header: Header, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The language model of a packed file; its other modalities' towers are neither built nor read."""
    config = Gemma4UnifiedConfig(text_config=_text_config(header.metadata))
    wanted = {original: name for name, original in language_model(header).names.items()}
    tensors = {wanted[name]: value for name, value in read_tensors(path, header, wanted, device, dtype)}
    with _quiet_transformers():
        module, told = Gemma4UnifiedForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    _require_whole(told, str(path))
    return cast(module.eval(), device, dtype)


def _text_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    config = json.loads(metadata[PACKED_CONFIG])
    return {name: value for name, value in config["text_config"].items() if name not in ("dtype", "torch_dtype")}


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
    """No progress bars of its own while ltxforge shows one."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
