"""Whether LTX-2's parts belong together: refused with the reason, before anything is loaded.

Decides by wiring and sizes, and by where a part comes from: audio VAE, vocoder and connectors of 2.3 and 2.5 look
alike, but a file or folder that also holds a transformer says whose they are. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltxforge.errors import WeightsError
from ltxforge.models.components import Found, Told
from ltxforge.models.components_ltx2 import NOUNS, published
from ltxforge.models.layout_ltx2 import (
    Part,
    generation,
    generation_of,
    is_extended,
    is_transformer,
    joined,
    vae_family,
    wiring_of,
    wiring_of_config,
)
from ltxforge.models.stored import builtin_text_sizes, text_encoder_sizes
from ltxforge.models.trees import join, read_json
from ltxforge.specs import TINY, ModelSpec

TEXT_ENCODER_NAMES = {"t5": "T5", "gemma3": "Gemma 3", "gemma4_unified": "Gemma 4"}
MODEL_TYPES = {"t5": "t5", "gemma-3": "gemma3", "gemma-4": "gemma4_unified"}


def require_fit(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    """Refuse parts that do not belong to the version or to each other. Tells all of it at once."""
    told = Told()
    checks = (_fit_vae, _fit_audio_vae, _fit_vocoder, _fit_connectors, _fit_text_encoder)
    for check in checks:
        try:
            check(spec, found)
        except WeightsError as error:
            told.add(error)
    told.raise_all()


def _refused(what: str, found: Found, spec: ModelSpec, name: str) -> WeightsError:
    example = published(generation(spec), name)
    return WeightsError(
        what,
        where=found.where,
        remedy=f'Name the one of {generation(spec)} under [model] in the recipe, for example: {name} = "{example}".',
    )


def _require_same_generation(name: str, found: Found, spec: ModelSpec) -> None:
    """Refuse a part of a file or folder whose own transformer is of another generation."""
    its = _generation_at(found)
    if its and its != generation(spec):
        raise _refused(
            f"the {NOUNS[name]} is that of LTX-2 {its}, but the transformer is {spec.version}", found, spec, name
        )


def _generation_at(found: Found) -> str:
    if found.tree is None:
        return generation(TINY[found.builtin])
    transformer = found.part("transformer")
    if is_transformer(transformer):
        return generation_of(wiring_of(transformer))
    home = found.inside.rpartition("/")[0]
    path = join(home, "transformer/config.json")
    if found.tree.is_file(found.inside) or "config.json" not in found.tree.files(join(home, "transformer")):
        return ""
    config = read_json(found.tree, path)
    return generation_of(wiring_of_config(config)) if config.get("_class_name", "").startswith("LTX2") else ""


def _channels(found: Mapping[str, Found], name: str, setting: str) -> int:
    """Channels at one of the transformer's entrances."""
    transformer = found["transformer"]
    if transformer.tree is None:
        return TINY[transformer.builtin].transformer_config[setting]
    return transformer.part("transformer").size(name, 1)


def _fit_vae(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    vae = found["vae"]
    family = TINY[vae.builtin].vae_family if vae.tree is None else vae_family(vae.part("vae"))
    if family != spec.vae_family:
        raise _refused(
            f"the VAE is that of LTX-2 {family}, but the transformer ({spec.version}) was trained on latents of the "
            f"{spec.vae_family} VAE; latents of different VAEs are not interchangeable",
            vae, spec, "vae",
        )  # fmt: skip
    own = TINY[vae.builtin].latent_channels if vae.tree is None else vae.part("vae").size("latents_mean", 0)
    wanted = _channels(found, "proj_in.weight", "in_channels")
    if own != wanted:
        raise _refused(f"the VAE has {own} latent channels, but the transformer {wanted}", vae, spec, "vae")


def _fit_audio_vae(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    vae = found["audio_vae"]
    _require_same_generation("audio_vae", vae, spec)
    if vae.tree is None:
        own = TINY[vae.builtin].transformer_config["audio_in_channels"]
    else:
        own = vae.part("audio_vae").size("latents_mean", 0)
    wanted = _channels(found, "audio_proj_in.weight", "audio_in_channels")
    if own != wanted:
        what = f"the audio VAE makes {own} numbers per latent frame, but the transformer takes {wanted}"
        raise _refused(what, vae, spec, "audio_vae")


def _fit_vocoder(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    vocoder = found["vocoder"]
    _require_same_generation("vocoder", vocoder, spec)
    if vocoder.tree is None:
        return
    assert spec.vocoder_config is not None
    wanted = "bwe_in_channels" in spec.vocoder_config
    if is_extended(vocoder.part("vocoder")) != wanted:
        raise _refused(
            f"the vocoder has {'no' if wanted else 'a'} bandwidth extension, but that of {spec.version} has "
            f"{'one' if wanted else 'none'}",
            vocoder, spec, "vocoder",
        )  # fmt: skip


def _fit_connectors(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    connectors = found["connectors"]
    _require_same_generation("connectors", connectors, spec)
    if connectors.tree is None:
        return
    assert spec.connectors_config is not None
    part = connector_part(connectors)
    apart = not part.shape("text_proj_in.weight")
    if apart != spec.connectors_config["per_modality_projections"]:
        kinds = {True: "one projection per modality", False: "one projection for both modalities"}
        raise _refused(
            f"the connectors have {kinds[apart]}, but those of {spec.version} {kinds[not apart]}",
            connectors, spec, "connectors",
        )  # fmt: skip
    for side, prefix in (("video", ""), ("audio", "audio_")):
        made = part.size(f"{side}_connector.transformer_blocks.0.attn1.to_q.weight", 0)
        taken = _prompt_width(found["transformer"], prefix)
        if made != taken:
            raise _refused(
                f"the {side} connector makes prompts of width {made}, but the transformer takes {taken}",
                connectors, spec, "connectors",
            )  # fmt: skip


def _prompt_width(transformer: Found, prefix: str) -> int:
    """How wide the prompts are that the transformer takes, for one modality."""
    if transformer.tree is None:
        config = TINY[transformer.builtin].transformer_config
        name = "caption_channels" if config["use_prompt_embeddings"] else f"{prefix}cross_attention_dim"
        return config[name]
    part = transformer.part("transformer")
    projected = f"{prefix}caption_projection.linear_1.weight"
    return part.size(projected if projected in part.entries else f"transformer_blocks.0.{prefix}attn2.to_k.weight", 1)


def connector_part(connectors: Found) -> Part:
    """The connectors' tensors from both of their files."""
    own = connectors.part("connectors")
    return joined(own, connectors.beside.part("connectors")) if connectors.beside else own


def _fit_text_encoder(spec: ModelSpec, found: Mapping[str, Found]) -> None:
    encoder, connectors = found["text_encoder"], found["connectors"]
    kind, sizes = _text_encoder(encoder)
    if kind != MODEL_TYPES[spec.text_encoder]:
        wanted = TEXT_ENCODER_NAMES[MODEL_TYPES[spec.text_encoder]]
        tuned = ", tuned for it" if spec.text_encoder == "gemma-4" else ""
        raise _refused(
            f"the text encoder is a {TEXT_ENCODER_NAMES.get(kind, kind or 'model of an unknown kind')}, but "
            f"{spec.version} was trained with {wanted}{tuned}",
            encoder, spec, "text_encoder",
        )  # fmt: skip
    if sizes is None:
        raise _refused("the text encoder's config.json states no sizes", encoder, spec, "text_encoder")
    width, layers = sizes
    taken = _projected_width(connectors)
    if taken != width * (layers + 1):
        raise _refused(
            f"the text encoder is {width} wide and {layers} layers deep, which makes {width * (layers + 1)} numbers "
            f"per token, but the connectors take {taken}",
            encoder, spec, "text_encoder",
        )  # fmt: skip


def _text_encoder(encoder: Found) -> tuple[str, tuple[int, int] | None]:
    """What kind of model a text encoder is, and its (width, layers)."""
    if encoder.tree is None:
        own = TINY[encoder.builtin]
        return MODEL_TYPES[own.text_encoder], None if own.text_encoder == "t5" else builtin_text_sizes(own)
    config: Mapping[str, Any] = encoder.config
    return str(config.get("model_type", "")), text_encoder_sizes(config)


def _projected_width(connectors: Found) -> int:
    """How many numbers per token the projections take."""
    if connectors.tree is None:
        config = TINY[connectors.builtin].connectors_config
        assert config is not None
        return config["caption_channels"] * config["text_proj_in_factor"]
    part = connector_part(connectors)
    shared = "text_proj_in.weight"
    return part.size(shared if shared in part.entries else "video_text_proj_in.weight", 1)
