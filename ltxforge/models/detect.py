"""Which version the files are: proven by headers and configurations, or asked for; contradictions refused.

Decides version and rope, never from hopes: what the files leave open must be said in the recipe, and what the recipe
says must not contradict them. The family comes first, by the transformer's tensors: LTX-2's has audio. `components.py`
and `components_ltx2.py` find the files, `clues.py` reads them. Loads nothing. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ltxforge.digests import FileDigests, NoDigests
from ltxforge.errors import WeightsError
from ltxforge.models import components_ltx2
from ltxforge.models.clues import (
    Clue,
    published_clue,
    published_ltx2_clue,
    scheduler_clue,
    suggested,
    transformer_clues,
    vae_clue,
)
from ltxforge.models.components import (
    FAMILY_NAMES,
    Found,
    Sources,
    Told,
    base_family,
    component_plan,
    find_ltx_video_tensors,
    find_scheduler,
    find_t5,
    find_transformer,
    own_vae,
    pipeline_class,
    stored_format_of,
)
from ltxforge.models.fit_ltx2 import require_fit
from ltxforge.models.sources import Source
from ltxforge.plan import ModelPlan
from ltxforge.specs import SPECS, TINY, ModelSpec

PIPELINE_ROPES = {"LTXPipeline": "plain", "LTXImageToVideoPipeline": "plain", "LTXConditionPipeline": "causal"}
# Parts of built-in models that fit no other model; their text encoders are as good as any of their size.
_OWN_PARTS = ("transformer", "vae", "audio_vae", "vocoder", "connectors")
_SOUND_PARTS = ("audio_vae", "vocoder", "connectors")


def plan_model(
    *,
    base: str,
    version: str | None = None,
    rope: str = "auto",
    transformer: str | None = None,
    vae: str | None = None,
    audio_vae: str | None = None,
    vocoder: str | None = None,
    connectors: str | None = None,
    text_encoder: str | None = None,
    memo_directory: Path | None = None,
    only_here: bool = False,
) -> ModelPlan:
    """Decide the base model of a plan.

    Args:
        base: a source (`sources.py`): folder, single file, Hub name or built-in model.
        version: the recipe's claim, or None.
        rope: "auto", "plain" or "causal".
        transformer, vae, audio_vae, vocoder, connectors, text_encoder: sources that replace the base's own part, or
            None. Audio VAE, vocoder and connectors are LTX-2's alone.
        memo_directory: where digests of local files are remembered, or None.
        only_here: ask nobody but this machine's files and the Hub's cache, and hash nothing: for a plan that no run
            follows.

    Raises:
        WeightsError: files that are missing, damaged, of another model, or that leave the version open.
        HubError: a Hub source that cannot be had.
    """
    parts = {
        "transformer": transformer, "vae": vae, "audio_vae": audio_vae, "vocoder": vocoder, "connectors": connectors,
        "text_encoder": text_encoder,
    }  # fmt: skip
    named = {name: source for name, source in parts.items() if source is not None}
    remembered = FileDigests(memo_directory and memo_directory / "weights.json")
    with NoDigests() if only_here else remembered as digests:
        sources = Sources(digests, only_here)
        found = find_all(sources, base, named)
        decide = _decide_ltx2 if found["transformer"].family == "ltx-2" else _decide_ltx_video
        spec, evidence, pipeline = decide(sources, base, named, found, version)
        if spec.family == "ltx-2":
            found = {**found, "scheduler": _fitting_scheduler(found["scheduler"], spec)}
        chosen_rope, rope_reason = decide_rope(rope, found["transformer"], pipeline, spec)
        if stored := stored_format_of(found["transformer"]):
            evidence = [*evidence, f"the transformer's blocks come in {stored}: {found['transformer'].where}"]
        components = {name: component_plan(name, part, spec) for name, part in found.items()}
    return ModelPlan(
        base=base, version=spec.version, rope=chosen_rope, components=components,
        licence=spec.licence.name, licence_url=spec.licence.url, evidence=(*evidence, rope_reason),
    )  # fmt: skip


def find_all(sources: Sources, base: str, named: Mapping[str, str]) -> dict[str, Found]:
    """Every component, from its own source or from the base. All that is wrong is told at once."""
    told = Told()
    for name in _OWN_PARTS:
        if named.get(name) in TINY and named[name] != base:
            told.add(
                WeightsError(
                    f"model.{name} = {named[name]!r} is a part of a built-in model, which fits no other",
                    remedy=f"Leave model.{name} out, or take the whole model: base = {named[name]!r}.",
                )
            )
    found = told.attempt(("transformer",), lambda: find_transformer(sources, base, named.get("transformer")))
    transformer = found.get("transformer")
    family = base_family(sources, base)
    if transformer and family and transformer.family != family:
        raise WeightsError(
            f"holds {FAMILY_NAMES[transformer.family]}'s transformer, but the base {base} is {FAMILY_NAMES[family]}: "
            "the two share no part",
            where=transformer.where,
            remedy="Name a transformer of the base's own family, or another base.",
        )
    if not transformer and not family:
        told.raise_all()  # what the other parts would have to be is not known
    if (transformer.family if transformer else family) == "ltx-2":
        found |= components_ltx2.find_parts(sources, base, named, transformer, told)
    else:
        found |= _find_ltx_video(sources, base, named, told)
    told.raise_all()
    return found


def _find_ltx_video(sources: Sources, base: str, named: Mapping[str, str], told: Told) -> dict[str, Found]:
    for name in _SOUND_PARTS:
        if name in named:
            told.add(WeightsError(f"LTX-Video has no {name}", remedy=f"Leave model.{name} out of the recipe."))
    vae = named.get("vae")
    return {
        **told.attempt(("vae",), lambda: find_ltx_video_tensors(sources, vae or base, "vae", own=vae is not None)),
        **told.attempt(("text_encoder", "tokenizer"), lambda: find_t5(sources, named.get("text_encoder"), base)),
        **told.attempt(("scheduler",), lambda: find_scheduler(sources, base)),
    }


def _decide_ltx_video(
    sources: Sources, base: str, named: Mapping[str, str], found: Mapping[str, Found], claim: str | None
) -> tuple[ModelSpec, list[str], str]:
    """Version, evidence and pipeline of an LTX-Video model."""
    pipeline = pipeline_class(sources, base)
    if base in TINY:
        spec = _decide_tiny(base, found, claim)
        _require_fitting_vae(spec, found["vae"])
        return spec, [f"{base} is built in"], pipeline
    # A VAE that replaces the base's own says nothing about the base's transformer: it is checked, not asked.
    own = own_vae(sources, base) if "vae" in named else found["vae"]
    witness = own if own and "transformer" not in named else found["vae"]
    spec, evidence = decide_version(found["transformer"], witness, sources.parse(base), claim, [])
    _require_fitting_vae(spec, found["vae"])
    if "transformer" in named and own and own.vae and own.vae.family != spec.vae_family:
        pipeline = ""  # the base is of another version than the transformer, and so is its pipeline
    return spec, evidence, pipeline


def _decide_ltx2(
    sources: Sources, base: str, named: Mapping[str, str], found: Mapping[str, Found], claim: str | None
) -> tuple[ModelSpec, list[str], str]:
    """Version, evidence and pipeline of an LTX-2 model.

    Wiring tells 2.0, 2.3 and 2.5 apart; dev and distilled only a published name, the pipeline's scheduler or metadata.
    """
    if base in TINY:
        spec, evidence = _decide_tiny(base, found, claim), [f"{base} is built in"]
    else:
        transformer = found["transformer"]
        of_scheduler = None if "transformer" in named else scheduler_clue(found["scheduler"], transformer)
        more = [clue for clue in (published_ltx2_clue(transformer), of_scheduler) if clue]
        spec, evidence = decide_version(transformer, found["vae"], sources.parse(base), claim, more)
    require_fit(spec, found)
    return spec, evidence, pipeline_class(sources, base)


def _decide_tiny(base: str, found: Mapping[str, Found], claim: str | None) -> ModelSpec:
    spec = TINY[base]
    _require_claim_of_tiny(spec, claim)
    if not found["transformer"].builtin:
        _require_consistent(spec, transformer_clues(found["transformer"]))
    return spec


def _fitting_scheduler(found: Found, spec: ModelSpec) -> Found:
    """The base's scheduler; the version's own where the base's is for the other kind of weights, dev or distilled.

    A folder with both kinds of transformers, as 2.5's is published, has one scheduler.
    """
    clue = scheduler_clue(found, None)
    return found if clue is None or clue.allows(spec) else Found(None, builtin="version")


def decide_version(
    transformer: Found, vae: Found, base: Source, claim: str | None, more: list[Clue]
) -> tuple[ModelSpec, list[str]]:
    """The version, and the evidence for it.

    A claim must agree with what headers and configs say. Without one, they must leave a single version, or the base
    must be exactly where one of those that are left is published.
    """
    clues = [] if transformer.builtin else [*transformer_clues(transformer), *more]
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
    if len(candidates) > 1 and (clue := published_clue(candidates, base)):
        evidence.append(clue.text)
        candidates = [spec for spec in candidates if clue.allows(spec)]
    if len(candidates) > 1:
        raise _undecided(candidates, base, transformer, evidence)
    return candidates[0], evidence


def _require_consistent(spec: ModelSpec, clues: list[Clue]) -> None:
    if against := [clue.text for clue in clues if not clue.allows(spec)]:
        fitting = [other.version for other in SPECS.values() if all(clue.allows(other) for clue in clues)]
        raise WeightsError(
            f"the recipe says version {spec.version}, but " + "; and ".join(against),
            remedy=f"Leave model.version out, or write one of: {', '.join(fitting)}." if fitting else "",
        )


def _require_fitting_vae(spec: ModelSpec, vae: Found) -> None:
    """Refuse a VAE whose latents the transformer was not trained on."""
    family = TINY[vae.builtin].vae_family if vae.builtin else vae_clue(vae).subject
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
    likely = suggested(candidates, f"{base.text} {transformer.where}")
    example = (likely or candidates)[0].version
    reason = " (the file's name suggests it)" if likely else ""
    return WeightsError(
        f"these weights can be {', '.join(names[:-1])} or {names[-1]}: they look alike and do not say which they are",
        where=base.text,
        remedy=f'Write under [model] in the recipe, for example: version = "{example}"{reason}.\n  '
        f"Seen: {'; '.join(evidence)}.",
    )


def decide_rope(asked: str, transformer: Found, pipeline: str, spec: ModelSpec) -> tuple[str, str]:
    """The rope convention and its reason: recipe, then metadata, then pipeline class, then version.

    LTX-2 was trained with causal positions alone, whatever its metadata says of other parts.
    """
    if spec.family == "ltx-2":
        return _rope_of_ltx2(asked, spec)
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


def _rope_of_ltx2(asked: str, spec: ModelSpec) -> tuple[str, str]:
    if asked not in ("auto", spec.rope):
        raise WeightsError(
            f"the recipe says rope {asked}, but every LTX-2 version has {spec.rope} positions",
            remedy="Leave model.rope out of the recipe.",
        )
    return spec.rope, f"rope {spec.rope}: every LTX-2 version has it"
