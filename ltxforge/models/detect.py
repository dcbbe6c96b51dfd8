"""Which version the files are: proven by headers and configurations, or asked for; contradictions refused.

Decides version and rope, never from hopes: what the files leave open must be said in the recipe, and what the recipe
says must not contradict them. `components.py` finds the files. Loads nothing. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.models.components import Found, Sources, component_plan, find_all, own_vae, pipeline_class
from ltxforge.models.sources import Source
from ltxforge.plan import ModelPlan
from ltxforge.specs import SPECS, TINY, ModelSpec

PIPELINE_ROPES = {"LTXPipeline": "plain", "LTXImageToVideoPipeline": "plain", "LTXConditionPipeline": "causal"}


@dataclass(frozen=True)
class Clue:
    """Something that the files say and that only some versions agree with."""

    text: str
    allows: Callable[[ModelSpec], bool]


def plan_model(
    *,
    base: str,
    version: str | None = None,
    rope: str = "auto",
    transformer: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    memo_directory: Path | None = None,
) -> ModelPlan:
    """Decide the base model of a plan.

    Args:
        base: a source (`sources.py`): folder, single file, Hub name or built-in model.
        version: the recipe's claim, or None.
        rope: "auto", "plain" or "causal".
        transformer, vae, text_encoder: sources that replace the base's own part, or None.
        memo_directory: where digests of local files are remembered, or None.

    Raises:
        WeightsError: files that are missing, damaged, of another model, or that leave the version open.
        HubError: a Hub source that cannot be had.
    """
    with FileDigests(memo_directory and memo_directory / "weights.json") as digests:
        sources = Sources(digests)
        found = find_all(sources, base, transformer, vae, text_encoder)
        pipeline = pipeline_class(sources, base)
        if base in TINY:
            spec, evidence = TINY[base], [f"{base} is built in"]
            _require_claim_of_tiny(spec, version)
            if not found["transformer"].builtin:
                _require_consistent(spec, transformer_clues(found["transformer"]))
            _require_fitting_vae(spec, found["vae"])
        else:
            # A VAE that replaces the base's own says nothing about the base's transformer: it is checked, not asked.
            own = own_vae(sources, base) if vae else found["vae"]
            witness = own if own and not transformer else found["vae"]
            spec, evidence = decide_version(found["transformer"], witness, sources.parse(base), version)
            _require_fitting_vae(spec, found["vae"])
            if transformer and own and own.vae and own.vae.family != spec.vae_family:
                pipeline = ""  # the base is of another version than the transformer, and so is its pipeline
        chosen_rope, rope_reason = decide_rope(rope, found["transformer"], pipeline, spec)
        components = {name: component_plan(name, part, spec) for name, part in found.items()}
    return ModelPlan(
        base=base, version=spec.version, rope=chosen_rope, components=components,
        licence=spec.licence.name, licence_url=spec.licence.url, evidence=(*evidence, rope_reason),
    )  # fmt: skip


def transformer_clues(found: Found) -> list[Clue]:
    """What the transformer's shapes and metadata say about its version."""
    layout, where, clues = found.transformer, found.where, []
    assert layout is not None
    size = f"{layout.blocks} blocks of width {layout.width}"
    named = {spec.parameters for spec in SPECS.values() if (spec.blocks, spec.width) == (layout.blocks, layout.width)}
    if named:
        text = f"the transformer has {size} ({named.pop()}): {where}"
        clues.append(Clue(text, lambda spec: (spec.blocks, spec.width) == (layout.blocks, layout.width)))
    causal = found.config.get("causal_temporal_positioning")
    if isinstance(causal, bool):
        text = f"its metadata says causal_temporal_positioning = {str(causal).lower()}: {where}"
        clues.append(Clue(text, lambda spec: (spec.rope == "causal") is causal))
    if found.metadata.get("allowed_inference_steps"):
        clues.append(Clue(f"its metadata lists the steps of a distilled model: {where}", lambda spec: spec.distilled))
    return clues


def vae_clue(found: Found) -> Clue:
    """What the VAE's wiring says about the version."""
    layout = found.vae
    assert layout is not None
    return Clue(f"the VAE is wired as in {layout.family}: {found.where}", lambda spec: spec.vae_family == layout.family)


def decide_version(transformer: Found, vae: Found, base: Source, claim: str | None) -> tuple[ModelSpec, list[str]]:
    """The version, and the evidence for it.

    A claim must agree with what headers and configs say. Without one, they must leave a single version, or the base
    must be exactly where one of those that are left is published.
    """
    clues = [] if transformer.builtin else transformer_clues(transformer)
    told = [] if vae.builtin else [vae_clue(vae)]
    if claim is not None:
        _require_consistent(SPECS[claim], clues)
        _require_fitting_vae(SPECS[claim], vae)
        return SPECS[claim], [clue.text for clue in clues + told] + [f"the recipe says {claim}"]
    of_transformer = [spec for spec in SPECS.values() if all(clue.allows(spec) for clue in clues)]
    if not of_transformer:
        raise WeightsError("the file's shapes and metadata contradict each other: " + "; ".join(c.text for c in clues))
    candidates = [spec for spec in of_transformer if all(clue.allows(spec) for clue in told)]
    if not candidates:
        _require_fitting_vae(of_transformer[0], vae)
    evidence = [clue.text for clue in clues + told]
    published = [spec for spec in candidates if spec.hub == _published_name(base)]
    if len(candidates) > 1 and len(published) == 1:
        evidence.append(f"{spec_source(published[0])} is where {published[0].version} is published")
        candidates = published
    if len(candidates) > 1:
        raise _undecided(candidates, base, transformer, evidence)
    return candidates[0], evidence


def _published_name(base: Source) -> str:
    if base.kind != "hub":
        return ""
    return f"{base.repository}:{base.inside}" if base.inside else base.repository


def spec_source(spec: ModelSpec) -> str:
    """Where a version is published, for a sentence."""
    return f"the Hub's {spec.hub}"


def _require_consistent(spec: ModelSpec, clues: list[Clue]) -> None:
    if against := [clue.text for clue in clues if not clue.allows(spec)]:
        fitting = [other.version for other in SPECS.values() if all(clue.allows(other) for clue in clues)]
        raise WeightsError(
            f"the recipe says version {spec.version}, but " + "; and ".join(against),
            remedy=f"Leave model.version out, or write one of: {', '.join(fitting)}." if fitting else "",
        )


def _require_fitting_vae(spec: ModelSpec, vae: Found) -> None:
    """Refuse a VAE whose latents the transformer was not trained on."""
    family = TINY[vae.builtin].vae_family if vae.builtin else vae.vae.family if vae.vae else ""
    if family != spec.vae_family:
        raise WeightsError(
            f"the VAE is that of {family}, but the transformer ({spec.version}) was trained on latents of the "
            f"{spec.vae_family} VAE; latents of different VAEs are not interchangeable",
            where=vae.where,
            remedy=f"Leave model.vae out, or name the VAE of {spec.version}, for example from {spec.hub}.",
        )


def _require_claim_of_tiny(spec: ModelSpec, claim: str | None) -> None:
    if claim not in (None, spec.version):
        fitting = [name for name, other in TINY.items() if other.version == claim]
        raise WeightsError(
            f"{spec.hub} is wired as {spec.version}, but the recipe says version {claim}",
            remedy=f"Leave model.version out{', or use ' + fitting[0] if fitting else ''}.",
        )


def _undecided(candidates: list[ModelSpec], base: Source, transformer: Found, evidence: list[str]) -> WeightsError:
    names = [spec.version for spec in candidates]
    spoken = f"{base.text} {transformer.where}"
    suggested = [spec for spec in candidates if _file_stem(spec) in spoken or f"v{spec.version}." in spoken]
    example = (suggested or candidates)[0].version
    reason = " (the file's name suggests it)" if suggested else ""
    return WeightsError(
        f"these weights can be {', '.join(names[:-1])} or {names[-1]}: they look alike and do not say which they are",
        where=base.text,
        remedy=f'Write under [model] in the recipe, for example: version = "{example}"{reason}.\n  '
        f"Seen: {'; '.join(evidence)}.",
    )


def _file_stem(spec: ModelSpec) -> str:
    """The published name without folder and ending: unique per version."""
    return spec.hub.rpartition("/")[2].rpartition(":")[2].removesuffix(".safetensors")


def decide_rope(asked: str, transformer: Found, pipeline: str, spec: ModelSpec) -> tuple[str, str]:
    """The rope convention and its reason: recipe, then metadata, then pipeline class, then version."""
    if asked != "auto":
        return asked, f"rope {asked}: the recipe says so"
    causal = transformer.config.get("causal_temporal_positioning")
    if isinstance(causal, bool):
        rope = "causal" if causal else "plain"
        return rope, f"rope {rope}: metadata of {transformer.where}"
    if pipeline in PIPELINE_ROPES:
        rope = PIPELINE_ROPES[pipeline]
        note = "" if rope == spec.rope else f" ({spec.version} was published with {spec.rope})"
        return rope, f"rope {rope}: model_index.json names {pipeline}{note}"
    return spec.rope, f"rope {spec.rope}: that of {spec.version}"
