"""Rules about the model: what the text says of its family and version, and which keys that makes senseless.

Judges by names alone (`model.base`, `model.version`); where they leave the family open, the planner judges by the
weights. Everything about video, sound and prompts that depends on the family stands here.
"""

from __future__ import annotations

from collections.abc import Iterator

from ltxforge.modalities import has
from ltxforge.recipe.faults import Fault
from ltxforge.recipe.rulebook import key_of, rule, warning
from ltxforge.recipe.schema import Model, Recipe
from ltxforge.recipe.suggest import nearest
from ltxforge.specs import SPECS, TINY, ModelSpec, specs_of

PUBLISHED = {spec.hub: spec for spec in SPECS.values()}
FAMILY_NAMES = {"ltx-video": "LTX-Video", "ltx-2": "LTX-2"}
# How the names of Lightricks' repositories begin.
REPOSITORIES = {"lightricks/ltx-video": "ltx-video", "lightricks/ltx-2": "ltx-2"}
WITH_SOUND = "LTX-2 makes sound: Lightricks/LTX-2, tiny/ltx2, …"
MOST_T5_TOKENS = 512
SOUND_PARTS = ("audio_vae", "vocoder", "connectors")
LTX2_SAMPLING = ("audio_guidance", "stg", "modality_guidance", "rescale", "frugal")


def spec_named(model: Model) -> ModelSpec | None:
    """The version, where the text alone says which it is."""
    if model.base in TINY:
        return TINY[model.base]
    if model.version:
        return SPECS[model.version]
    return None if model.transformer else PUBLISHED.get(model.base.partition("@")[0])


def family_named(model: Model) -> str | None:
    """The family, "ltx-video" or "ltx-2", where the text alone says which it is."""
    if spec := spec_named(model):
        return spec.family
    begins = (family for name, family in REPOSITORIES.items() if model.base.lower().startswith(name))
    return next(begins, None)


def _is_silent(recipe: Recipe) -> bool:
    return family_named(recipe.model) == "ltx-video"


# --- base, version, parts --------------------------------------------------------------------------------------------


@rule("model.base")
def _base_is_known(recipe: Recipe) -> Iterator[Fault]:
    base = recipe.model.base
    if base.startswith("tiny/") and base not in TINY:
        near = nearest(base, TINY)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(TINY)}"
        yield Fault(key_of("model.base"), f'there is no built-in model "{base}"', hint)


@rule("model.base", "model.version", "model.rope", "model.transformer")
def _rope_of_version(recipe: Recipe) -> Iterator[Fault]:
    spec, rope, key = spec_named(recipe.model), recipe.model.rope, key_of("model.rope")
    if rope == "plain" and family_named(recipe.model) == "ltx-2":
        yield Fault(key, 'rope = "plain" is refused: LTX-2 counts time in one way only', "leave it out")
    elif rope == "causal" and family_named(recipe.model) == "ltx-2":
        yield warning(key, 'rope = "causal" means nothing here: LTX-2 counts time in one way only', "leave it out")
    elif spec and rope not in ("auto", spec.rope):
        what = f'rope = "{rope}": LTX-Video {spec.version} was trained with "{spec.rope}"'
        yield warning(key, what, '"auto" follows the weights')


@rule("model.base", "model.version", *(f"model.{name}" for name in SOUND_PARTS))
def _parts_exist(recipe: Recipe) -> Iterator[Fault]:
    for name in SOUND_PARTS:
        if _is_silent(recipe) and getattr(recipe.model, name) is not None:
            what = f"LTX-Video has no {name.replace('audio_vae', 'audio VAE')}"
            yield Fault(key_of(f"model.{name}"), what, "leave it out", other=key_of("model.base"))


# --- what is trained -------------------------------------------------------------------------------------------------


@rule("model.base", "model.version", "training.modalities")
def _model_makes_what_is_trained(recipe: Recipe) -> Iterator[Fault]:
    yield from _no_sound(recipe, "training.modalities", recipe.training.modalities)


def _no_sound(recipe: Recipe, key: str, modalities: str | None) -> Iterator[Fault]:
    if modalities is not None and has(modalities, "audio") and _is_silent(recipe):
        what = f'modalities = "{modalities}": LTX-Video makes no sound'
        yield Fault(key_of(key), what, WITH_SOUND, other=key_of("model.base"))


@rule("model.base", "model.version", "training.modalities", "lora.modalities")
def _lora_within_training(recipe: Recipe) -> Iterator[Fault]:
    said, trained = recipe.lora.modalities, recipe.training.modalities
    yield from _no_sound(recipe, "lora.modalities", said)
    if said is not None and trained in ("video", "audio") and said != trained and not _is_silent(recipe):
        what = f'the LoRA\'s modalities = "{said}" go beyond the training\'s, which are "{trained}"'
        yield Fault(key_of("lora.modalities"), what, "leave it out", other=key_of("training.modalities"))


@rule("model.base", "model.version", "training.modalities", "lora.targets")
def _cross_modal_has_two_sides(recipe: Recipe) -> Iterator[Fault]:
    trained = _trained(recipe)
    for place, target in enumerate(recipe.lora.targets):
        if target == "cross_modal" and trained in ("video", "audio"):
            what = f'the target "cross_modal" is attention between video and sound, and only {trained} is computed'
            yield Fault(("lora", "targets", place), what, "leave it out", other=_why_trained(recipe))


@rule("model.base", "model.version", "training.modalities", "audio.sigma", "audio.loss_weight")
def _sound_is_trained(recipe: Recipe) -> Iterator[Fault]:
    if _trained(recipe) == "video":
        for name in sorted(recipe.audio.model_fields_set):
            what = f"{name} means nothing here: no sound is trained"
            yield warning(key_of(f"audio.{name}"), what, other=_why_trained(recipe))


@rule("training.modalities", "audio.sigma")
def _sigma_has_someone_to_share(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.modalities == "audio" and recipe.audio.sigma == "shared":
        what = 'sigma = "shared" means nothing here: sound is trained alone, there is no video to share with'
        yield warning(key_of("audio.sigma"), what, other=key_of("training.modalities"))


@rule("training.modalities", "audio.loss_weight")
def _something_is_learnt(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.modalities == "audio" and recipe.audio.loss_weight == 0:
        what = "loss_weight = 0 with sound alone leaves nothing to learn from"
        hint = 'above 0, or modalities = "both"'
        yield Fault(key_of("audio.loss_weight"), what, hint, other=key_of("training.modalities"))


@rule("model.base", "model.version", "training.modalities", "lora.modalities", "audio.loss_weight")
def _sound_s_layers_learn_from_sound(recipe: Recipe) -> Iterator[Fault]:
    joint = recipe.training.modalities in (None, "both") and not _is_silent(recipe)
    if joint and recipe.lora.modalities == "audio" and recipe.audio.loss_weight == 0:
        what = 'modalities = "audio" with loss_weight = 0: nothing of the LoRA would learn from sound'
        hint = "leave it out, or set loss_weight above 0"
        yield Fault(key_of("lora.modalities"), what, hint, other=key_of("audio.loss_weight"))


@rule("training.modalities", "conditioning.first_frame")
def _first_frame_is_seen(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.modalities == "audio" and recipe.conditioning.first_frame > 0:
        what = "first_frame means nothing here: sound is trained alone, no frame is seen"
        yield warning(key_of("conditioning.first_frame"), what, other=key_of("training.modalities"))


@rule("training.modalities", "kernels.causal_conv3d")
def _pictures_are_encoded(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.modalities == "audio" and recipe.kernels.causal_conv3d is not None:
        what = "causal_conv3d means nothing here: sound is trained alone, no picture is encoded"
        yield warning(key_of("kernels.causal_conv3d"), what, other=key_of("training.modalities"))


def _trained(recipe: Recipe) -> str | None:
    """The modalities that will be trained, as far as the text says it."""
    return recipe.training.modalities or {"ltx-video": "video", "ltx-2": "both"}.get(family_named(recipe.model) or "")


def _why_trained(recipe: Recipe) -> tuple[str, ...]:
    return key_of("training.modalities" if recipe.training.modalities else "model.base")


# --- prompts and samples ---------------------------------------------------------------------------------------------


@rule("model.base", "model.version", "model.transformer", "conditioning.prompt_tokens")
def _prompts_fit_the_encoder(recipe: Recipe) -> Iterator[Fault]:
    tokens, key = recipe.conditioning.prompt_tokens, key_of("conditioning.prompt_tokens")
    if tokens is None:
        return
    if _is_silent(recipe) and tokens > MOST_T5_TOKENS:
        what = f"prompt_tokens = {tokens}: LTX-Video's prompts have at most {MOST_T5_TOKENS} tokens"
        yield Fault(key, what, f"nearest: {MOST_T5_TOKENS}")
    registers = _registers(recipe.model)
    if registers and tokens % registers:
        below, above = tokens // registers * registers, -(-tokens // registers) * registers
        hint = " or ".join(str(count) for count in (below, above) if 0 < count <= 1024)
        what = f"prompt_tokens = {tokens} is no multiple of {registers}: so many registers fill up a prompt in LTX-2"
        yield Fault(key, what, f"nearest: {hint}")


def _registers(model: Model) -> int:
    """How many registers the connectors have; 0 where the text leaves it open, or there are none."""
    spec, family = spec_named(model), family_named(model)
    specs = [spec] if spec else list(specs_of(family).values()) if family else []
    counts = {each.prompt_multiple for each in specs}
    return counts.pop() if len(counts) == 1 else 0


@rule("model.base", "model.version", "cache.text_cache")
def _connectors_exist(recipe: Recipe) -> Iterator[Fault]:
    if _is_silent(recipe) and "text_cache" in recipe.cache.model_fields_set:
        what = "text_cache means nothing here: LTX-Video has no connectors, T5's output is kept"
        yield warning(key_of("cache.text_cache"), what, other=key_of("model.base"))


@rule("model.base", "model.version", *(f"validation.{name}" for name in LTX2_SAMPLING))
def _samples_have_sound(recipe: Recipe) -> Iterator[Fault]:
    for name in LTX2_SAMPLING:
        if _is_silent(recipe) and name in recipe.validation.model_fields_set:
            what = f"{name} means nothing here: only LTX-2 reads it"
            yield warning(key_of(f"validation.{name}"), what, other=key_of("model.base"))


@rule(
    "model.base", "model.version", "model.transformer", "validation.guidance", "validation.audio_guidance",
    "validation.negative_prompt",
)  # fmt: skip
def _negative_is_used(recipe: Recipe) -> Iterator[Fault]:
    section, spec = recipe.validation, spec_named(recipe.model)
    sound = section.audio_guidance or (spec.sampling.audio_guidance if spec else None)
    only_video = _is_silent(recipe) or (sound == 1 if sound else family_named(recipe.model) != "ltx-2")
    if section.guidance == 1 and only_video and "negative_prompt" in section.model_fields_set:
        what = "negative_prompt is not used: guidance = 1 is off"
        yield warning(key_of("validation.negative_prompt"), what, other=key_of("validation.guidance"))
