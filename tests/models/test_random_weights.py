"""Models at full size by their shapes alone, and what random weights are filled with."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from ltxforge.models.ltx2_tiny import tiny_connectors
from ltxforge.models.random_weights import WEIGHT_STD, prompt_widths, random_model, random_prompt
from ltxforge.specs import SPECS, TINY

META, CPU = torch.device("meta"), torch.device("cpu")
# Transformers alone: 2B, 13B and 19B are theirs. 22B is what 2.3's transformer and connectors have together.
BILLIONS = {"0.9.5": 1.92, "0.9.8-dev": 13.04, "2.0-dev": 18.9, "2.3-dev": 19.0, "2.5-dev": 19.0}


def both(version: str) -> str:
    return "both" if SPECS[version].has_audio else "video"


@pytest.mark.parametrize("version", BILLIONS)
def test_full_size_models_are_built_without_memory(version, record_property):
    model = random_model(SPECS[version], META, torch.bfloat16, both(version))
    model.load_transformer()
    parameters = list(model.transformer.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    record_property("count", f"{version}: {count / 1e9:.3f} billion parameters in the transformer")
    assert abs(count / 1e9 - BILLIONS[version]) <= 0.01 * BILLIONS[version]
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert len(model.blocks()) == SPECS[version].blocks


def test_connectors_make_the_22_billion_of_ltx_2_3():
    spec = SPECS["2.3-dev"]
    with META:
        parts = LTX2TextConnectors(**spec.connectors_config), LTX2VideoTransformer3DModel(**spec.transformer_config)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert abs(count / 1e9 - 22) <= 0.22


@pytest.mark.parametrize("base", ["tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"])
def test_every_weight_is_filled(base):
    """`to_empty` leaves whatever lay in memory: no tensor may be forgotten, and twice the same comes out."""
    spec = TINY[base]
    made = []
    for _ in range(2):
        model = random_model(spec, CPU, torch.float32, "both" if spec.has_audio else "video")
        model.load_transformer()
        made.append(dict(model.transformer.named_parameters()))
    for name, parameter in made[0].items():
        assert torch.equal(parameter, made[1][name]), name
        assert parameter.isfinite().all(), name
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(WEIGHT_STD, rel=0.15), name
        else:
            assert parameter.abs().sum() > 0, name


@pytest.mark.parametrize("base", ["tiny/ltx2", "tiny/ltx2.3"])
def test_captions_are_as_wide_as_the_connectors_make_them(base):
    """Against the connectors' own output."""
    spec = TINY[base]
    connectors = tiny_connectors(spec)
    tokens, factor = spec.default_prompt_tokens, spec.connectors_config["text_proj_in_factor"]
    states = torch.randn(1, tokens, spec.caption_channels, factor)
    with torch.no_grad():
        video, audio, _ = connectors(states, torch.ones(1, tokens, dtype=torch.int64))
    prompt = random_prompt(spec, tokens, "both", torch.float32)
    assert prompt.tensors["video"].shape == video.shape[1:]
    assert prompt.tensors["audio"].shape == audio.shape[1:]
    assert list(prompt_widths(spec, "video")) == ["video"]


def test_a_full_size_caption_weighs_what_the_cache_says():
    """15.7 MB for 2.0 and 12.6 MB for 2.3 in bf16."""
    for version, megabytes in (("2.0-dev", 15.7), ("2.3-dev", 12.6)):
        prompt = random_prompt(SPECS[version], 1024, "both", torch.bfloat16)
        assert sum(tensor.nbytes for tensor in prompt.tensors.values()) / 1e6 == pytest.approx(megabytes, abs=0.05)
