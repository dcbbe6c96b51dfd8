"""The torch-free list of linear layers against diffusers' modules built without memory, and the names in between."""

import dataclasses

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers

from ltxforge.lora.layers import diffusers_name, linear_layers, modality_of, original_name
from ltxforge.specs import SPECS, TINY, ModelSpec

EVERY = {**SPECS, **TINY}
WITH_SOUND = [name for name, spec in EVERY.items() if spec.has_audio]


def real_layers(spec: ModelSpec) -> list[tuple[str, tuple[int, int]]]:
    """diffusers' own linear layers, in module order."""
    kind = LTX2VideoTransformer3DModel if spec.has_audio else LTXVideoTransformer3DModel
    with torch.device("meta"):
        modules = kind(**spec.transformer_config).named_modules()
    return [(n, (m.in_features, m.out_features)) for n, m in modules if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("name", EVERY)
def test_the_torch_free_list_is_the_model_s_in_its_order(name):
    assert list(linear_layers(EVERY[name]).items()) == real_layers(EVERY[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_prompt_adaln_single": False},
        {"audio_cross_attn_mod": False},
        {"cross_attn_mod": False, "audio_cross_attn_mod": False},
        {"audio_gated_attn": False},
        {"use_prompt_embeddings": True},
    ],
    ids=str,
)
def test_switches_that_no_published_version_sets_so(changes):
    spec = TINY["tiny/ltx2.5"]
    changed = dataclasses.replace(spec, transformer_config={**spec.transformer_config, **changes})
    assert list(linear_layers(changed).items()) == real_layers(changed) != real_layers(spec)


@pytest.mark.parametrize("name", WITH_SOUND)
def test_diffusers_own_loader_undoes_the_renaming(name):
    """Its LTX-2 converter, given the file's names, gives back every layer's name in diffusers."""
    layers = linear_layers(EVERY[name])
    file = {f"diffusion_model.{original_name(layer)}.lora_A.weight": layer for layer in layers}
    assert len(file) == len(layers)
    converted = _convert_non_diffusers_ltx2_lora_to_diffusers(file)
    assert converted == {f"transformer.{layer}.lora_A.weight": layer for layer in layers}


@pytest.mark.parametrize("name", EVERY)
def test_names_go_there_and_back(name):
    for layer in linear_layers(EVERY[name]):
        assert diffusers_name(original_name(layer)) == diffusers_name(layer) == layer


def test_every_layer_is_the_picture_s_the_sound_s_or_between():
    """Told apart by what runs: the parts of diffusers' block that either modality computes when it is alone."""
    layers = linear_layers(TINY["tiny/ltx2.3"])
    inside = {name.split(".")[2]: modality_of(name) for name in layers if name.startswith("transformer_blocks.0.")}
    assert inside == {
        "attn1": "video", "attn2": "video", "ff": "video", "audio_attn1": "audio", "audio_attn2": "audio",
        "audio_ff": "audio", "audio_to_video_attn": "both", "video_to_audio_attn": "both",
    }  # fmt: skip
    outside = {name.split(".")[0]: modality_of(name) for name in layers if not name.startswith("transformer_blocks.")}
    assert {name for name, whose in outside.items() if whose == "both"} == {
        "av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift", "av_cross_attn_video_a2v_gate",
        "av_cross_attn_audio_v2a_gate",
    }  # fmt: skip
    assert {name for name, whose in outside.items() if whose == "audio"} == {
        "audio_proj_in", "audio_time_embed", "audio_prompt_adaln", "audio_proj_out",
    }  # fmt: skip
