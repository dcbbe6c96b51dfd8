"""Finds LTX-2's parts: three kinds of sources, and what lies where in each.

A diffusers folder has one folder per part. A single file (2.0, 2.3) has all but the text encoder. The split files of
2.5 have the connectors in the transformer's file, the projections before them in the text encoder's, and audio VAE and
vocoder in one; given the transformer's file in ComfyUI's `diffusion_models/`, the others are looked for beside it.
Decides which of them is a part, never whether it fits the version (`fit_ltx2.py`). Torch-free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from ltxforge.errors import WeightsError
from ltxforge.models import layout_ltx2 as layout
from ltxforge.models.components import (
    Found,
    Sources,
    Told,
    find_encoder_folder,
    find_place,
    find_scheduler,
    find_tokenizer,
    missing_remedy,
)
from ltxforge.models.formats import require_readable
from ltxforge.models.layout import vae_layout
from ltxforge.models.layout_ltx2 import Part
from ltxforge.models.trees import Tree, join, read_json
from ltxforge.specs import TINY
from ltxforge.specs_ltx2 import GEMMA_3

# Where the parts of each generation are published, as a recipe's source: for remedies.
PUBLISHED = {
    "2.0": "Lightricks/LTX-2:{}",
    "2.3": "Lightricks/LTX-2.3:ltx-2.3-22b-dev.safetensors",
    "2.5": "Lightricks/LTX-2.5-Diffusers:{}",
}
TEXT_ENCODERS = {"2.0": GEMMA_3, "2.3": GEMMA_3, "2.5": "Lightricks/LTX-2.5-Diffusers:text_encoder"}
NOUNS = {"vae": "video VAE", "audio_vae": "audio VAE", "vocoder": "vocoder", "connectors": "text connectors"}
# In ComfyUI's layout, next to `diffusion_models/`.
_NEIGHBOURS = {
    "vae": ("vae",), "audio_vae": ("vae",), "vocoder": ("vae",), "connectors": ("text_encoders",),
    "text_encoder": ("text_encoders",),
}  # fmt: skip
_IS_PART: Mapping[str, Callable[[Part], bool]] = {
    "vae": lambda part: layout.vae_family(part) in ("2.0", "2.3"),
    "audio_vae": layout.is_audio_vae,
    "vocoder": layout.is_vocoder,
    "connectors": layout.is_connectors,
}


def published(generation: str, part: str) -> str:
    """A source of one part of a generation, for remedies; "" if the generation is not known."""
    place = (TEXT_ENCODERS if part == "text_encoder" else PUBLISHED).get(generation, "")
    return place.format(part)


def find_parts(
    sources: Sources, base: str, named: Mapping[str, str], transformer: Found | None, told: Told
) -> dict[str, Found]:
    """Every part but the transformer. What is wrong goes to `told`.

    Args:
        named: sources of single parts, by part.
        transformer: where the transformer is, if it was found: its generation gives the remedies their examples.
    """
    wiring = layout.wiring_of(transformer.part("transformer")) if transformer and transformer.header else None
    generation = layout.generation_of(wiring) if wiring else ""
    found: dict[str, Found] = {}
    for name in NOUNS:
        found |= told.attempt((name,), partial(_find_tensors, sources, base, named.get(name), name, generation))
    found |= told.attempt(
        ("text_encoder", "tokenizer"), lambda: _find_gemma(sources, base, named.get("text_encoder"), generation)
    )
    found |= told.attempt(("scheduler",), lambda: find_scheduler(sources, base))
    if "connectors" in found and "text_encoder" in found:
        found |= told.attempt(
            ("connectors",), lambda: _with_projections(found["connectors"], found["text_encoder"], generation)
        )
    return found


def _find_tensors(sources: Sources, base: str, named: str | None, name: str, generation: str) -> Found:
    text, own = named or base, named is not None
    if text in TINY:
        return Found(None, builtin=text)
    tree = sources.open(text) if own else sources.home(text)
    remedy = missing_remedy(name, own, published(generation, name))
    found = sources.found(tree, find_place(tree, name, own, remedy), name)
    if not _IS_PART[name](found.part(name)):
        beside = None if own else _neighbour(sources, tree, name)
        if beside is None:
            raise WeightsError(_why_not(found, name), where=found.where, remedy=remedy)
        found = beside
    require_readable(found.header.tensors, found.part(name).names.values(), found.where)
    return found


def _why_not(found: Found, name: str) -> str:
    """Why a source has not the part, as far as that is known."""
    if name == "vae":
        if layout.vae_family(found.part("vae")) == "diffusion":
            return (
                "has 2.5's diffusion decoder, which diffusers decodes by a pipeline of its own; ltxforge uses the "
                "convolutional VAE of 2.5, whose encoder is the same (ltx-2.5-video-vae-conv-bf16.safetensors)"
            )
        if found.header and vae_layout(found.header):
            return "holds the VAE of LTX-Video 0.9.x, whose latents LTX-2's transformer was not trained on"
    return f"holds no LTX-2 {NOUNS[name]}"


def _neighbour(sources: Sources, tree: Tree, name: str) -> Found | None:
    """The part in the files beside a transformer in `diffusion_models/`, if exactly one of them has it."""
    fitting = []
    for path in _files_beside(tree, name):
        found = sources.found(dataclasses.replace(tree, inside=path), path, name)
        if _IS_PART[name](found.part(name)) and _is_readable(found, found.part(name)):
            fitting.append(found)
    return _the_only(fitting, name)


def _files_beside(tree: Tree, name: str) -> Iterator[str]:
    home, _, folder = tree.inside.rpartition("/")[0].rpartition("/")
    if tree.is_file(tree.inside) and folder == "diffusion_models":
        for neighbour in _NEIGHBOURS[name]:
            place = join(home, neighbour)
            yield from (join(place, file) for file in tree.files(place) if file.endswith(".safetensors"))


def _is_readable(found: Found, part: Part) -> bool:
    try:
        require_readable(found.header.tensors, part.names.values(), found.where)
    except WeightsError:
        return False
    return True


def _the_only(fitting: list[Found], name: str) -> Found | None:
    if len(fitting) > 1:
        places = ", ".join(found.where for found in fitting[:8])
        raise WeightsError(
            f"several files beside the transformer could be its {name}: {places}",
            remedy=f'Name one under [model] in the recipe: {name} = "{fitting[0].where}".',
        )
    return fitting[0] if fitting else None


def _with_projections(connectors: Found, text_encoder: Found, generation: str) -> Found:
    """The connectors with the projections before them, which 2.5's split files keep with the text encoder."""
    if connectors.header is None or layout.has_projections(connectors.part("connectors")):
        return connectors
    if text_encoder.header is not None:
        both = layout.joined(connectors.part("connectors"), text_encoder.part("connectors"))
        if layout.has_projections(both):
            return dataclasses.replace(connectors, beside=text_encoder)
    raise WeightsError(
        "has the text connectors, but not the projections before them (text_embedding_projection.…)",
        where=connectors.where,
        remedy=missing_remedy("connectors", False, published(generation, "connectors"))
        + " 2.5's split files have them in the text encoder's file, gemma4-12b-with-proj-ltx-2.5-bf16.safetensors.",
    )


def _find_gemma(sources: Sources, base: str, named: str | None, generation: str) -> tuple[Found, Found]:
    """The text encoder, of whichever kind, and its tokenizer: folders, or one packed file."""
    text = named or base
    if text in TINY:
        return Found(None, builtin=text), Found(None, builtin=text)
    tree = sources.open(text) if named else sources.home(text)
    example = published(generation, "text_encoder") or GEMMA_3
    remedy = f'Write under [model] in the recipe, for example: text_encoder = "{example}"'
    if tree.is_file(tree.inside):
        return _find_packed(sources, tree, named is not None, remedy)
    encoder = find_encoder_folder(tree)
    if encoder is None:
        raise WeightsError("has no text_encoder/ folder", where=tree.describe(tree.inside), remedy=remedy)
    config = read_json(tree, join(encoder, "config.json"))
    if "quantization_config" in config:
        raise WeightsError("is a quantised text encoder", where=tree.describe(encoder), remedy=remedy)
    return Found(tree, encoder, config=config), find_tokenizer(tree, encoder)


def _find_packed(sources: Sources, tree: Tree, own: bool, remedy: str) -> tuple[Found, Found]:
    found = _packed(sources, tree, tree.inside)
    if found is None and not own:
        beside = (_packed(sources, tree, path) for path in _files_beside(tree, "text_encoder"))
        usable = [each for each in beside if each and _is_readable(each, packed_language_model(each))]
        found = _the_only(usable, "text_encoder")
    if found is None:
        bare = [tree.inside] if own else [tree.inside, *_files_beside(tree, "text_encoder")]
        lacking = next((error for path in bare if (error := _not_packed(sources, tree, path, remedy))), None)
        raise lacking or WeightsError(
            "a single file has no text encoder in it, nor a tokenizer",
            where=tree.describe(tree.inside),
            remedy=remedy,
        )
    require_readable(found.header.tensors, packed_language_model(found).names.values(), found.where)
    return found, found


def _packed(sources: Sources, tree: Tree, path: str) -> Found | None:
    """A text encoder with its configuration and tokenizer in one file, as 2.5's are published."""
    found = sources.found(dataclasses.replace(tree, inside=path), path, "text_encoder")
    assert found.header is not None
    config = layout.packed_config(found.header.metadata)
    if not config or layout.PACKED_TOKENIZER not in found.header.tensors:
        return None
    return dataclasses.replace(found, config=config)


def _not_packed(sources: Sources, tree: Tree, path: str, remedy: str) -> WeightsError | None:
    """What a file of a Gemma's weights alone lacks, as ComfyUI's of Gemma 3 do; None for a file without a Gemma."""
    header = sources.found(dataclasses.replace(tree, inside=path), path, "text_encoder").header
    assert header is not None
    if not layout.has_language_model(header):
        return None
    lacks = [] if layout.packed_config(header.metadata) else [f"its configuration ({layout.PACKED_CONFIG} in metadata)"]
    if layout.PACKED_TOKENIZER not in header.tensors:
        lacks.append(f"its tokenizer ({layout.PACKED_TOKENIZER})")
    return WeightsError(
        f"has a Gemma's weights, but lacks {' and '.join(lacks)}",
        where=tree.describe(path),
        remedy=f"Use the folder, which has both. {remedy}",
    )


def packed_language_model(found: Found) -> Part:
    """The language model's tensors of a packed text encoder, by transformers' names."""
    assert found.header is not None
    return layout.language_model(found.header)
