"""Finds a model's parts (transformer, VAE, text encoder, tokenizer, scheduler) in the sources of a recipe.

Decides which folder or file is which part, and what is no LTX-Video at all; says what is missing, by name. Reads
headers and small JSON files and digests local weights. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.layout import TransformerLayout, VaeLayout, refuse_foreign, transformer_layout, vae_layout
from ltxforge.models.sources import PLAIN_COMPONENTS, Source, component_files, open_tree, parse_source
from ltxforge.models.trees import Tree, join, read_json, whole_header
from ltxforge.models.weights import refuse_pickle
from ltxforge.plan import ComponentPlan
from ltxforge.specs import TINY, TINY_VERSION, ModelSpec

TEXT_ENCODER_HINT = 'text_encoder = "Lightricks/LTX-Video:text_encoder"'


@dataclass(frozen=True)
class Found:
    """A component: its tree and place in it, or `builtin`; `header`'s verdict for the two parts that have one."""

    tree: Tree | None
    inside: str = ""
    builtin: str = ""
    transformer: TransformerLayout | None = None
    vae: VaeLayout | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return self.tree.describe(self.inside) if self.tree else self.builtin


@dataclass
class Sources:
    """Sources by their text, each opened once."""

    digests: FileDigests
    trees: dict[str, Tree] = field(default_factory=dict)

    def parse(self, text: str) -> Source:
        return parse_source(text)

    def open(self, text: str) -> Tree:
        if text not in self.trees:
            self.trees[text] = open_tree(parse_source(text), self.digests)
        return self.trees[text]


def find_all(
    sources: Sources, base: str, transformer: str | None, vae: str | None, text_encoder: str | None
) -> dict[str, Found]:
    """Every component, from its own source or from the base. All that is wrong is told at once."""
    found: dict[str, Found] = {}
    wrong: list[WeightsError] = []

    def attempt(names: tuple[str, ...], find: Callable[[], tuple[Found, ...]]) -> None:
        try:
            found.update(zip(names, find(), strict=True))
        except WeightsError as error:
            if str(error) not in map(str, wrong):
                wrong.append(error)

    for name, part in (("transformer", transformer), ("vae", vae)):
        if part in TINY and part != base:
            wrong.append(
                WeightsError(
                    f"model.{name} = {part!r} is a part of a built-in model, which fits no other",
                    remedy=f"Leave model.{name} out, or take the whole model: base = {part!r}.",
                )
            )
    own = transformer is not None
    attempt(("transformer",), lambda: (_find_tensors(sources, transformer or base, "transformer", own),))
    attempt(("vae",), lambda: (_find_tensors(sources, vae or base, "vae", vae is not None),))
    attempt(("text_encoder", "tokenizer"), lambda: _find_text_encoder(sources, text_encoder, base))
    attempt(("scheduler",), lambda: (_find_scheduler(sources, base),))
    if len(wrong) > 1:
        raise WeightsError("\n".join(map(str, wrong)))
    if wrong:
        raise wrong[0]
    return found


def own_vae(sources: Sources, base: str) -> Found | None:
    """The VAE that the base itself brings, if it has one."""
    try:
        return _find_tensors(sources, base, "vae", own=False)
    except WeightsError:
        return None


def _find_tensors(sources: Sources, text: str, name: str, own: bool) -> Found:
    """The transformer or VAE of a source: `name/` in a folder, a single file, or (if `own`) the folder itself."""
    if text in TINY:
        return Found(None, builtin=text)
    tree = sources.open(text)
    inside = _place(tree, name, own)
    refuse_pickle(inside, tree.describe(inside))
    header, config = whole_header(tree, inside, name)
    where = tree.describe(inside)
    refuse_foreign(header, where)
    found = Found(
        tree, inside, transformer=transformer_layout(header), vae=vae_layout(header), config=config,
        metadata=header.config,
    )  # fmt: skip
    if (found.transformer if name == "transformer" else found.vae) is None:
        raise WeightsError(
            f"holds no LTX-Video {'VAE' if name == 'vae' else name}",
            where=where,
            remedy=_missing_remedy(name, own),
        )
    return found


def _missing_remedy(name: str, own: bool) -> str:
    if own:
        return f"Check model.{name} in the recipe: it must be a diffusers folder or a single .safetensors file of one."
    return f'Name another source for this part alone under [model] in the recipe: {name} = "…".'


def _place(tree: Tree, name: str, own: bool) -> str:
    """Where in the source a part lies. The one file of a folder without subfolders counts as a single file."""
    if tree.is_file(tree.inside):
        return tree.inside
    subfolder, here = join(tree.inside, name), tree.files(tree.inside)
    if tree.files(subfolder):
        return subfolder
    lone = [file for file in here if file.endswith(".safetensors")]
    if "model_index.json" not in here and (lone or (own and here)):
        return join(tree.inside, lone[0]) if len(lone) == 1 and "config.json" not in here else tree.inside
    for file in here:
        refuse_pickle(file, tree.describe(join(tree.inside, file)))
    raise WeightsError(
        f"has no {name}/ folder and no .safetensors file",
        where=tree.describe(tree.inside),
        remedy=_missing_remedy(name, own),
    )


def _find_text_encoder(sources: Sources, text: str | None, base: str) -> tuple[Found, Found]:
    """T5 and its tokenizer: two folders of one source, or a T5 folder with the tokenizer in or beside it."""
    text = text or base
    if text in TINY:
        return Found(None, builtin=text), Found(None, builtin=text)
    tree = sources.open(text)
    if tree.is_file(tree.inside):
        raise WeightsError(
            "a single file has no T5 text encoder in it, nor a tokenizer",
            where=tree.describe(tree.inside),
            remedy=f"Write under [model] in the recipe, for example: {TEXT_ENCODER_HINT}",
        )
    encoder = next(
        (f for f in (join(tree.inside, "text_encoder"), tree.inside) if "config.json" in tree.files(f)), None
    )
    if encoder is None or "t5" not in str(read_json(tree, join(encoder, "config.json")).get("model_type", "")):
        raise WeightsError(
            "has no text_encoder/ folder with a T5 in it",
            where=tree.describe(tree.inside),
            remedy=f"Write under [model] in the recipe, for example: {TEXT_ENCODER_HINT}",
        )
    parent = encoder.rpartition("/")[0]
    places = [encoder, join(parent, "tokenizer"), join(tree.inside, "tokenizer")]
    tokenizer = next((place for place in places if {"tokenizer.json", "spiece.model"} & set(tree.files(place))), None)
    if tokenizer is None:
        raise WeightsError(
            "there is no tokenizer (spiece.model or tokenizer.json) in or beside the text encoder",
            where=tree.describe(encoder),
            remedy="Put the tokenizer's folder beside it, as `tokenizer`, or name another source.",
        )
    return Found(tree, encoder), Found(tree, tokenizer)


def _find_scheduler(sources: Sources, base: str) -> Found:
    """The base's own scheduler; single files carry none and get the version's."""
    if base not in TINY:
        tree = sources.open(base)
        place = join(tree.inside, "scheduler")
        if "scheduler_config.json" in tree.files(place):
            return Found(tree, place, config=read_json(tree, join(place, "scheduler_config.json")))
    return Found(None, builtin=base if base in TINY else "version")


def pipeline_class(sources: Sources, base: str) -> str:
    """The pipeline that a diffusers folder names, or "". Refuses pipelines of other models."""
    if base in TINY:
        return ""
    tree = sources.open(base)
    if tree.is_file(tree.inside) or "model_index.json" not in tree.files(tree.inside):
        return ""
    name = str(read_json(tree, join(tree.inside, "model_index.json")).get("_class_name", ""))
    if not name.startswith("LTX") or name.startswith("LTX2"):
        raise WeightsError(
            f"is a folder for {name or 'an unnamed pipeline'}, not for LTX-Video 0.9.x",
            where=tree.describe(tree.inside),
        )
    return name


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
        # How samples are scheduled does not change what is trained: it is no part of a run's identity.
        digest="" if name == "scheduler" else _digest(tree, files, name),
        inside=_inside_source(tree, found.inside),
        repository=tree.repository,
        revision=tree.revision,
        location=location,
        bytes=sum(tree.size(path) for path in files),
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


def _digest(tree: Tree, files: list[str], name: str) -> str:
    """SHA-256 of a single file, or of the sorted digests of what makes up a folder: weights and their config.json."""
    if len(files) == 1:
        return tree.digest(files[0])
    if name not in PLAIN_COMPONENTS:
        files = [path for path in files if path.endswith((".safetensors", "/config.json")) or path == "config.json"]
    return hashlib.sha256("\n".join(sorted(tree.digest(path) for path in files)).encode()).hexdigest()
