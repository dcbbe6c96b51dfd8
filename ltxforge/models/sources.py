"""Where weights come from: one syntax for every source in a recipe.

    tiny/ltx-video                       a built-in model
    /models/ltx, ./ltx.safetensors       a folder or a single file
    org/name                             a Hub repository
    org/name:path/inside@revision        a folder or file in it, at a branch, tag or commit

Decides what a text means (local wins if it exists or looks like a path), which files a component needs, and fetches
what a plan still lacks. Knows no version. Torch-free.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ltxforge.digests import FileDigests
from ltxforge.errors import Stopped, WeightsError
from ltxforge.events import Emit, Note
from ltxforge.models.hub import fetch_files, open_cached, open_hub
from ltxforge.models.layout import transformer_config, transformer_layout
from ltxforge.models.stated import Stated
from ltxforge.models.stored import measured_spec
from ltxforge.models.trees import LocalTree, Tree, join, weight_files, whole_header
from ltxforge.plan import ComponentPlan, ModelPlan
from ltxforge.signals import StopRequest
from ltxforge.specs import SPECS, TINY, ModelSpec

# ComfyUI's name for the folder of transformers; a file in it has its other parts in folders beside.
SPLIT_FILES = "diffusion_models"
# Components without tensors of their own.
PLAIN_COMPONENTS = ("tokenizer", "scheduler")
_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<inside>[^@\\]+))?(?:@(?P<revision>[\w./-]+))?"
)
_LOOKS_LOCAL = re.compile(r"[./~]|[A-Za-z]:[\\/]|.*\\")


@dataclass(frozen=True)
class Source:
    """A parsed source. `kind` is "builtin", "local" or "hub"; `revision` "" means the repository's default branch."""

    text: str
    kind: str
    path: Path = Path()
    repository: str = ""
    inside: str = ""
    revision: str = ""


def parse_source(text: str) -> Source:
    """Say what a recipe's source means. Raises WeightsError for a text that is none of the forms above."""
    text = text.strip()
    if text in TINY:
        return Source(text, "builtin")
    if text.startswith("tiny/"):
        raise WeightsError(f"there is no built-in model {text!r}", remedy=_nearest(text, list(TINY)))
    if text and (_LOOKS_LOCAL.match(text) or Path(text).exists()):
        return Source(text, "local", path=Path(text).expanduser())
    if match := _HUB.fullmatch(text):
        inside = (match["inside"] or "").strip("/")
        if ".." not in PurePosixPath(inside).parts:
            return Source(text, "hub", repository=match["repository"], inside=inside, revision=match["revision"] or "")
    raise WeightsError(
        f"{text!r} is no source of weights: no such file or folder, and no Hub name",
        remedy="Write a path (./folder, C:/file.safetensors), a Hub repository as org/name, org/name:path/inside or "
        f"org/name@revision, or a built-in model: {', '.join(TINY)}.",
    )


def _nearest(text: str, known: list[str]) -> str:
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known[:12])}."


def open_tree(source: Source, digests: FileDigests, offline: bool = False) -> Tree:
    """The files of a local or Hub source; `offline` asks the Hub's cache alone.

    Raises WeightsError or HubError if they cannot be had.
    """
    assert source.kind != "builtin"
    if source.kind == "hub":
        opened = open_cached if offline else open_hub
        return opened(source.repository, source.inside, source.revision, digests)
    path = source.path.absolute()
    if not path.exists():
        near = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        remedy = _nearest(path.name, near) if near else f"The folder {path.parent} is empty or does not exist."
        raise WeightsError("there is no such file or folder", where=str(path), remedy=remedy)
    if path.parent.name == SPLIT_FILES and path.is_file():  # the other parts lie beside that folder
        return LocalTree(path.parent.parent, f"{SPLIT_FILES}/{path.name}", digests)
    return LocalTree(path.parent, path.name, digests)


def component_files(tree: Tree, inside: str, name: str) -> list[str]:
    """The files that a component needs, as paths in the tree: its weights, and the small files beside them."""
    if tree.is_file(inside):
        return [inside]
    names = tree.files(inside)
    small = [file for file in names if file.endswith((".json", ".model", ".txt"))]
    large = [] if name in PLAIN_COMPONENTS else weight_files(tree, inside)
    return [join(inside, file) for file in dict.fromkeys([*large, *small])]


def fetch(model: ModelPlan, emit: Emit, stop: StopRequest) -> ModelPlan:
    """Download what the plan's components still lack and fill in where everything lies.

    Raises Stopped between components; what was downloaded stays in the Hub's cache.
    """
    fetched = {}
    for name, part in model.components.items():
        if stop.requested:
            raise Stopped(stop.signal_number, "stopped while fetching weights", remedy="What is here already stays.")
        fetched[name] = _fetch_component(name, part, emit)
    return dataclasses.replace(model, components=fetched)


def _fetch_component(name: str, part: ComponentPlan, emit: Emit) -> ComponentPlan:
    if part.kind != "hub" or part.location:
        return part
    emit(Note(f"fetching the {name} from {part.repository} ({part.bytes / 1e9:.2f} GB unless cached)"))
    tree = open_hub(part.repository, part.inside, part.revision, FileDigests())
    snapshot = fetch_files(part.repository, part.revision, component_files(tree, part.inside, name))
    return dataclasses.replace(part, location=str(snapshot / part.inside))


def spec_of(model: ModelPlan) -> ModelSpec:
    """The version's spec, with the parts' real sizes where their files lie here and say otherwise."""
    spec = TINY.get(model.base) or SPECS[model.version]
    if spec.family == "ltx-2":
        return measured_spec(model.components, spec)
    part = model.components["transformer"]
    if not part.location:
        return spec
    tree = LocalTree(Path(part.location).parent, Path(part.location).name, FileDigests())
    header, config = whole_header(tree, tree.inside)
    layout = transformer_layout(header)
    assert layout is not None, "detect.py planned a transformer that is none"
    stated = Stated.of(header, config, "transformer", part.location)
    return dataclasses.replace(spec, transformer_config=transformer_config(layout, stated, spec, part.location))
