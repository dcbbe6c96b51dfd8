"""Finds a model's parts in the sources of a recipe: transformer, VAEs, text encoder and the rest.

Decides which folder or file is which part, and what is no model of ours at all; says what is missing, by name. What is
LTX-2's alone stands in `components_ltx2.py`. Reads headers and small JSON files and digests local weights. Torch-free.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.formats import require_readable, stored_format
from ltxforge.models.layout import (
    TransformerLayout,
    VaeLayout,
    family_of,
    refuse_adapter,
    refuse_quantised,
    refuse_rotated,
    transformer_layout,
    transformer_originals,
    vae_layout,
    vae_tensors,
)
from ltxforge.models.layout_ltx2 import Part, part_of, vae_family
from ltxforge.models.sources import PLAIN_COMPONENTS, Source, component_files, open_tree, parse_source
from ltxforge.models.trees import Tree, join, read_json, whole_header
from ltxforge.models.weights import Header, refuse_format
from ltxforge.plan import ComponentPlan
from ltxforge.specs import TINY, TINY_VERSION, ModelSpec

PIPELINE_FAMILIES = {"LTX2": "ltx-2", "LTX": "ltx-video"}
FAMILY_NAMES = {"ltx-2": "LTX-2", "ltx-video": "LTX-Video"}


@dataclass(frozen=True)
class Found:
    """A component: its tree and place in it, or `builtin`; with the header of its tensors, where it has any.

    `config` is a folder's `config.json`, or what a single file's metadata says under the part's name. `beside` is
    where the rest of the tensors lies, if they are in two files.
    """

    tree: Tree | None
    inside: str = ""
    builtin: str = ""
    header: Header | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: Found | None = None

    @property
    def where(self) -> str:
        return self.tree.describe(self.inside) if self.tree else self.builtin

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The `config` of a single file's metadata; empty for a folder."""
        return self.header.config if self.header else {}

    @property
    def folder_config(self) -> Mapping[str, Any]:
        """The folder's `config.json`; empty for a single file."""
        return {} if self.tree is None or self.tree.is_file(self.inside) else self.config

    @property
    def family(self) -> str:
        """ "ltx-video" or "ltx-2" by the transformer in it, or ""."""
        return TINY[self.builtin].family if self.builtin in TINY else family_of(self.header) if self.header else ""

    @property
    def transformer(self) -> TransformerLayout | None:
        """LTX-Video's transformer."""
        return transformer_layout(self.header) if self.header else None

    @property
    def vae(self) -> VaeLayout | None:
        """LTX-Video's VAE."""
        return vae_layout(self.header) if self.header else None

    def part(self, name: str) -> Part:
        """An LTX-2 part's tensors."""
        return part_of(self.header or Header({}), name, self.where)


@dataclass
class Sources:
    """Sources by their text, each opened once, and headers by their place, each read once. `offline` asks no Hub."""

    digests: FileDigests
    offline: bool = False
    trees: dict[str, Tree] = field(default_factory=dict)
    headers: dict[tuple[str, str], tuple[Header, dict[str, Any]]] = field(default_factory=dict)

    def parse(self, text: str) -> Source:
        return parse_source(text)

    def open(self, text: str) -> Tree:
        if text not in self.trees:
            self.trees[text] = open_tree(parse_source(text), self.digests, self.offline)
        return self.trees[text]

    def home(self, text: str) -> Tree:
        """The whole model's folder: that of the pipeline, where the source is one of its transformers' folders."""
        tree = self.open(text)
        parent, _, name = tree.inside.rpartition("/")
        if name.startswith("transformer") and "model_index.json" in tree.files(parent):
            return dataclasses.replace(tree, inside=parent)
        return tree

    def found(self, tree: Tree, inside: str, part: str) -> Found:
        """What lies at a place, by its header."""
        refuse_format(inside, tree.describe(inside))
        place = (tree.describe(inside), "" if tree.is_file(inside) else part)
        if place not in self.headers:
            self.headers[place] = whole_header(tree, inside)
        header, config = self.headers[place]
        refuse_adapter(header, tree.describe(inside))
        stated = header.config.get(part) if tree.is_file(inside) else config
        return Found(tree, inside, header=header, config=stated if isinstance(stated, dict) else {})


def base_family(sources: Sources, base: str) -> str:
    """ "ltx-video" or "ltx-2" by what the base says of itself, or ""."""
    if base in TINY:
        return TINY[base].family
    tree = sources.home(base)
    if tree.is_file(tree.inside):
        return family_of(tree.header(tree.inside)) if tree.inside.endswith(".safetensors") else ""
    return _family_of_pipeline(pipeline_class(sources, base))


def pipeline_class(sources: Sources, base: str) -> str:
    """The pipeline that a diffusers folder names, or "". Refuses pipelines of other models."""
    if base in TINY:
        return ""
    tree = sources.home(base)
    if tree.is_file(tree.inside) or "model_index.json" not in tree.files(tree.inside):
        return ""
    name = str(read_json(tree, join(tree.inside, "model_index.json")).get("_class_name", ""))
    if not _family_of_pipeline(name):
        raise WeightsError(
            f"is a folder for {name or 'an unnamed pipeline'}, not for LTX-Video or LTX-2",
            where=tree.describe(tree.inside),
        )
    return name


def _family_of_pipeline(name: str) -> str:
    return next((family for start, family in PIPELINE_FAMILIES.items() if name.startswith(start)), "")


def find_place(tree: Tree, name: str, own: bool, remedy: str) -> str:
    """Where in a source a part lies. The one file of a folder without subfolders counts as a single file.

    Args:
        tree: the source.
        name: the part.
        own: whether the source was named for this part alone; it may then be the part's folder itself.
        remedy: what to do if it is not there.
    """
    if tree.is_file(tree.inside):
        return tree.inside
    subfolder, here = join(tree.inside, name), tree.files(tree.inside)
    if tree.files(subfolder):
        return subfolder
    lone = [file for file in here if file.endswith(".safetensors")]
    if "model_index.json" not in here and (lone or (own and here)):
        return join(tree.inside, lone[0]) if len(lone) == 1 and "config.json" not in here else tree.inside
    for file in here:
        refuse_format(file, tree.describe(join(tree.inside, file)))
    raise WeightsError(
        f"has no {name}/ folder and no .safetensors file",
        where=tree.describe(tree.inside),
        remedy=_split_files_remedy(tree) or remedy,
    )


def _split_files_remedy(tree: Tree) -> str:
    """A folder in ComfyUI's layout holds one file per part and, usually, several transformers."""
    folder = join(tree.inside, "diffusion_models")
    files = [name for name in tree.files(folder) if name.endswith(".safetensors")]
    if not files:
        return ""
    separator = "/" if not tree.repository or tree.inside else ":"
    named = f"{tree.describe(tree.inside).rstrip(':')}{separator}diffusion_models/"
    return f"Name one transformer as the base: {named}{{{', '.join(files[:8])}}}."


def missing_remedy(name: str, own: bool, example: str = "") -> str:
    """What to do about a part that is not where it was looked for."""
    if own:
        return f"Check model.{name} in the recipe: it must be a diffusers folder or a single .safetensors file of one."
    return f'Name another source for this part alone under [model] in the recipe: {name} = "{example or "…"}".'


def find_transformer(sources: Sources, base: str, named: str | None) -> Found:
    """The transformer, of whichever family: `transformer/` in a folder, a single file, or the folder itself."""
    text = named or base
    if text in TINY:
        return Found(None, builtin=text)
    tree = sources.open(text)
    own = named is not None or tree != sources.home(text)
    found = sources.found(tree, find_place(tree, "transformer", own, missing_remedy("transformer", own)), "transformer")
    if not found.family:
        raise WeightsError(
            "holds no LTX-Video transformer, and none of LTX-2",
            where=found.where,
            remedy=missing_remedy("transformer", named is not None),
        )
    assert found.header is not None
    require_readable(found.header.tensors, _transformer_originals(found), found.where)
    if found.family == "ltx-video":
        refuse_rotated(found.header, found.where)
    return found


def _transformer_originals(found: Found) -> list[str]:
    """The transformer's tensors in the file's words."""
    assert found.header is not None
    if found.family == "ltx-video":
        return transformer_originals(found.header)
    return list(found.part("transformer").names.values())


def stored_format_of(transformer: Found) -> str:
    """In which format the transformer's blocks come, "nf4" or "fp8"; "" where they are whole."""
    if transformer.header is None:
        return ""
    return stored_format(transformer.header.tensors, _transformer_originals(transformer))


def find_scheduler(sources: Sources, base: str) -> Found:
    """The base's own scheduler; single files carry none and get the version's."""
    if base not in TINY:
        tree = sources.home(base)
        place = join(tree.inside, "scheduler")
        if "scheduler_config.json" in tree.files(place):
            return Found(tree, place, config=read_json(tree, join(place, "scheduler_config.json")))
    return Found(None, builtin=base if base in TINY else "version")


def find_tokenizer(tree: Tree, encoder: str) -> Found:
    """The tokenizer in or beside a text encoder's folder."""
    parent = encoder.rpartition("/")[0]
    places = [encoder, join(parent, "tokenizer"), join(tree.inside, "tokenizer")]
    kinds = {"tokenizer.json", "spiece.model", "tokenizer.model"}
    tokenizer = next((place for place in places if kinds & set(tree.files(place))), None)
    if tokenizer is None:
        raise WeightsError(
            "there is no tokenizer (spiece.model, tokenizer.model or tokenizer.json) in or beside the text encoder",
            where=tree.describe(encoder),
            remedy="Put the tokenizer's folder beside it, as `tokenizer`, or name another source.",
        )
    return Found(tree, tokenizer)


def find_encoder_folder(tree: Tree) -> str | None:
    """The folder of a text encoder: `text_encoder/` of the source, or the source itself."""
    places = (join(tree.inside, "text_encoder"), tree.inside)
    return next((place for place in places if "config.json" in tree.files(place)), None)


def find_ltx_video_tensors(sources: Sources, text: str, name: str, own: bool) -> Found:
    """The VAE of an LTX-Video model."""
    if text in TINY:
        return Found(None, builtin=text)
    tree = sources.open(text) if own else sources.home(text)
    found = sources.found(tree, find_place(tree, name, own, missing_remedy(name, own)), name)
    assert found.header is not None
    if found.vae is None:
        of_ltx2 = " (it is one of LTX-2's)" if vae_family(found.part("vae")) else ""
        raise WeightsError(f"holds no LTX-Video VAE{of_ltx2}", where=found.where, remedy=missing_remedy(name, own))
    refuse_quantised(vae_tensors(found.header), found.where)
    return found


def find_t5(sources: Sources, named: str | None, base: str) -> tuple[Found, Found]:
    """T5 and its tokenizer: two folders of one source, or a T5 folder with the tokenizer in or beside it."""
    text = named or base
    if text in TINY:
        return Found(None, builtin=text), Found(None, builtin=text)
    tree = sources.open(text) if named else sources.home(text)
    remedy = 'Write under [model] in the recipe, for example: text_encoder = "Lightricks/LTX-Video:text_encoder"'
    if tree.is_file(tree.inside):
        where = tree.describe(tree.inside)
        raise WeightsError("a single file has no T5 text encoder in it, nor a tokenizer", where=where, remedy=remedy)
    encoder = find_encoder_folder(tree)
    if encoder is None or "t5" not in str(read_json(tree, join(encoder, "config.json")).get("model_type", "")):
        where = tree.describe(tree.inside)
        raise WeightsError("has no text_encoder/ folder with a T5 in it", where=where, remedy=remedy)
    return Found(tree, encoder), find_tokenizer(tree, encoder)


def own_vae(sources: Sources, base: str) -> Found | None:
    """The VAE that an LTX-Video base itself brings, if it has one."""
    try:
        return find_ltx_video_tensors(sources, base, "vae", own=False)
    except WeightsError:
        return None


class Told:
    """Collects what is wrong with several parts, so that all of it is told at once."""

    def __init__(self) -> None:
        self.wrong: list[WeightsError] = []

    def attempt(self, names: tuple[str, ...], find: Callable[[], Found | tuple[Found, ...]]) -> dict[str, Found]:
        """What `find` finds, by name; or its error kept, and nothing."""
        try:
            found = find()
        except WeightsError as error:
            self.add(error)
            return {}
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    def add(self, error: WeightsError) -> None:
        if str(error) not in map(str, self.wrong):
            self.wrong.append(error)

    def raise_all(self) -> None:
        """One error as it is, several as one."""
        if len(self.wrong) > 1:
            raise WeightsError("\n".join(map(str, self.wrong)))
        if self.wrong:
            raise self.wrong[0]


def component_plan(name: str, found: Found, spec: ModelSpec) -> ComponentPlan:
    """The plan's entry for a part, with its digest."""
    if found.tree is None:
        if found.builtin in TINY:
            return ComponentPlan(found.builtin, "builtin", f"builtin:{found.builtin}:{TINY_VERSION}")
        return ComponentPlan(spec.version, "builtin", f"builtin:{name}:{spec.vae_family}")
    tree, files = found.tree, component_files(found.tree, found.inside, name)
    lying = [tree.local(path) for path in files]
    location = str(_common_place(lying[0], files[0], found.inside)) if all(lying) else ""
    return ComponentPlan(
        source=tree.repository or tree.describe(tree.inside),
        kind="hub" if tree.repository else _kind(tree, found.inside),
        # What only samples are made with does not change what is trained: it is no part of a run's identity.
        digest="" if name in ("scheduler", "vocoder") else _digest_of(found, files, name),
        inside=_inside_source(tree, found.inside),
        repository=tree.repository,
        revision=tree.revision,
        location=location,
        bytes=sum(tree.size(path) for path in files),
        stored_format=stored_format_of(found) if name == "transformer" else "",
    )


def _inside_source(tree: Tree, path: str) -> str:
    """The place within what the user named: local trees are rooted one folder above it."""
    return path if tree.repository else path.removeprefix(tree.inside).removeprefix("/")


def _kind(tree: Tree, inside: str) -> str:
    return "file" if tree.is_file(inside) else "folder"


def _common_place(local: Path | None, path: str, inside: str) -> Path:
    """The component's own path, from one of its files'."""
    assert local is not None
    return local if path == inside else local.parent


def _digest_of(found: Found, files: list[str], name: str) -> str:
    assert found.tree is not None
    own = _digest(found.tree, files, name)
    if found.beside is None or found.beside.tree is None:
        return own
    other = _digest(found.beside.tree, component_files(found.beside.tree, found.beside.inside, name), name)
    return hashlib.sha256(f"{own}\n{other}".encode()).hexdigest()


def _digest(tree: Tree, files: list[str], name: str) -> str:
    """SHA-256 of a single file, or of the sorted digests of what makes up a folder: weights and their config.json."""
    if len(files) == 1:
        return tree.digest(files[0])
    if name not in PLAIN_COMPONENTS:
        files = [path for path in files if path.endswith((".safetensors", "/config.json")) or path == "config.json"]
    return hashlib.sha256("\n".join(sorted(tree.digest(path) for path in files)).encode()).hexdigest()
