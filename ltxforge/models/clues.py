"""What files say about their version, one clue at a time: shapes, wiring, metadata, schedulers and published names.

Decides what counts as a clue and which versions agree with it; `detect.py` weighs them. Loads nothing. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ltxforge.models import layout_ltx2
from ltxforge.models.components import Found
from ltxforge.models.sources import Source
from ltxforge.models.trees import join
from ltxforge.specs import ModelSpec, specs_of

# The start of the names of all repositories where LTX-2 is published: whole files, split files and folders.
_PUBLISHER = "Lightricks/LTX-2"
_KINDS = {"dev": False, "distilled": True}


@dataclass(frozen=True)
class Clue:
    """Something that the files say and that only some versions agree with; `subject` names it where it has a name."""

    text: str
    allows: Callable[[ModelSpec], bool]
    subject: str = ""


def transformer_clues(found: Found) -> list[Clue]:
    """What the transformer's tensors and metadata say about its version."""
    clues = [*(_ltx2_clues(found) if found.family == "ltx-2" else _ltx_video_clues(found))]
    if found.metadata.get("allowed_inference_steps"):
        text = f"its metadata lists the steps of a distilled model: {found.where}"
        clues.append(Clue(text, lambda spec: spec.distilled))
    return clues


def _ltx_video_clues(found: Found) -> Iterable[Clue]:
    layout, where = found.transformer, found.where
    assert layout is not None
    size = (layout.blocks, layout.width)
    named = {spec.parameters for spec in specs_of("ltx-video").values() if (spec.blocks, spec.width) == size}
    if named:
        text = f"the transformer has {layout.blocks} blocks of width {layout.width} ({named.pop()}): {where}"
        yield Clue(text, lambda spec: spec.family == "ltx-video" and (spec.blocks, spec.width) == size)
    else:
        yield Clue(f"the transformer is LTX-Video's: {where}", lambda spec: spec.family == "ltx-video")
    causal = found.config.get("causal_temporal_positioning")
    if isinstance(causal, bool):
        text = f"its metadata says causal_temporal_positioning = {str(causal).lower()}: {where}"
        yield Clue(text, lambda spec: (spec.rope == "causal") is causal)


def _ltx2_clues(found: Found) -> Iterable[Clue]:
    part, where = found.part("transformer"), found.where
    wiring = layout_ltx2.wiring_of(part)
    size = f"{part.count('transformer_blocks.')} blocks of width {part.shape('proj_in.weight')[0]}"
    text = f"the transformer has audio modules, {size}, {wiring.said}: {where}"
    yield Clue(
        text,
        lambda spec: spec.family == "ltx-2" and layout_ltx2.wiring_of_config(spec.transformer_config) == wiring,
    )
    stated = found.header.metadata.get("model_version", "") if found.header else ""
    for kind in _kinds_in(stated):
        text = f"its metadata says model_version {stated}: {where}"
        yield Clue(text, lambda spec, kind=kind: spec.distilled is _KINDS[kind])


def vae_clue(found: Found) -> Clue:
    """What the VAE's wiring says about the version."""
    family = found.vae.family if found.vae else layout_ltx2.vae_family(found.part("vae"))
    text = f"the VAE is wired as in {family}: {found.where}"
    return Clue(text, lambda spec: spec.vae_family == family, subject=family)


def scheduler_clue(scheduler: Found, transformer: Found | None) -> Clue | None:
    """Whether a pipeline's scheduler is that of LTX-2's dev or distilled weights; None if it cannot tell.

    Args:
        scheduler: the pipeline's.
        transformer: with it, nothing is said where the pipeline's folder has a second transformer: 2.5 is published
            with both kinds and one scheduler.
    """
    shifts = scheduler.config.get("use_dynamic_shifting")
    if scheduler.tree is None or not isinstance(shifts, bool):
        return None
    if transformer is not None and (transformer.tree is None or _has_two_transformers(transformer)):
        return None
    kind = "dev weights: it shifts with the resolution" if shifts else "distilled weights: it shifts nothing"
    text = f"the scheduler is that of {kind}: {scheduler.where}"
    return Clue(text, lambda spec: bool(spec.scheduler_config.get("use_dynamic_shifting")) is shifts)


def _has_two_transformers(found: Found) -> bool:
    assert found.tree is not None
    home, _, name = found.inside.rpartition("/")
    return name.startswith("transformer") and all(
        found.tree.files(join(home, folder)) for folder in ("transformer", "transformer_full")
    )


def published_clue(candidates: list[ModelSpec], base: Source) -> Clue | None:
    """Which of LTX-Video's versions a published name stands for, if exactly one."""
    published = [spec for spec in candidates if spec.hub == _published_name(base)]
    if len(published) != 1:
        return None
    only = published[0]
    return Clue(f"the Hub's {only.hub} is where {only.version} is published", lambda spec: spec is only)


def _published_name(base: Source) -> str:
    if base.kind != "hub":
        return ""
    return f"{base.repository}:{base.inside}" if base.inside else base.repository


def published_ltx2_clue(found: Found) -> Clue | None:
    """Dev or distilled, by the name where LTX-2 is published, or by which of a pipeline's two transformers it is."""
    tree = found.tree
    if tree is None:
        return None
    name = found.inside.rpartition("/")[2]
    if tree.repository.startswith(_PUBLISHER):
        named = {f"{tree.repository}:{found.inside}"} | ({tree.repository} if found.inside == "transformer" else set())
        for only in specs_of("ltx-2").values():
            if only.hub in named:
                text = f"the Hub's {only.hub} is where {only.version} is published"
                return Clue(text, lambda spec, only=only: spec.distilled is only.distilled)
        for kind in _kinds_in(name) if tree.is_file(found.inside) else ():
            text = f"it is published as {found.where}"
            return Clue(text, lambda spec, kind=kind: spec.distilled is _KINDS[kind])
    if not tree.is_file(found.inside) and _has_two_transformers(found):
        text = f"of a pipeline's two transformers this is the {'full' if name != 'transformer' else 'distilled'} one"
        return Clue(f"{text}: {found.where}", lambda spec: spec.distilled is (name == "transformer"))
    return None


def _kinds_in(name: str) -> list[str]:
    """The one of "dev" and "distilled" that a name has as a word of its own."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [kind for kind in _KINDS if kind in words]
    return found if len(found) == 1 else []


def suggested(candidates: list[ModelSpec], spoken: str) -> list[ModelSpec]:
    """The versions that a file's own name speaks of."""
    if candidates[0].family == "ltx-2":
        kinds = _kinds_in(re.split(r"[/\\: ]", spoken)[-1])
        return [spec for spec in candidates for kind in kinds if spec.distilled is _KINDS[kind]]
    return [spec for spec in candidates if _file_stem(spec) in spoken or f"v{spec.version}." in spoken]


def _file_stem(spec: ModelSpec) -> str:
    """The published name without folder and ending: unique per version."""
    return spec.hub.rpartition("/")[2].rpartition(":")[2].removesuffix(".safetensors")
