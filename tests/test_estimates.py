"""What things weigh: the real sizes' figures by formula, the small models' against what their modules really give."""

import dataclasses
import math

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from ltxforge.estimates import caption_bytes, connector_widths, estimate, feature_widths, rough_tokens, sample_bytes
from ltxforge.plan import CachePlan, DevicePlan, PromptPlan, TrainingPlan, ValidationPlan
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS, TINY

LTX2 = {name: spec for name, spec in {**SPECS, **TINY}.items() if spec.has_audio}
SENTENCE = "A woman walks along a pier at dusk."


@pytest.mark.parametrize(
    ("version", "both", "video", "audio"),
    [("2.0-dev", 15.7, 7.9, 7.9), ("2.3-dev", 12.6, 8.4, 4.2), ("2.5-distilled", 12.6, 8.4, 4.2)],
)
def test_a_caption_of_the_real_models(version, both, video, audio):
    """The issue's figures: 1024 positions in bf16; one modality keeps its half only."""
    for modalities, megabytes in (("both", both), ("video", video), ("audio", audio)):
        weighs = caption_bytes(SPECS[version], 1024, 2, modalities, [SENTENCE])
        assert weighs["connectors"] / 1e6 == pytest.approx(megabytes, abs=0.05)
        assert weighs["features"] < weighs["connectors"] / 50


@pytest.mark.parametrize("name", LTX2)
def test_widths_are_those_of_diffusers_connectors(name):
    spec = LTX2[name]
    with torch.device("meta"):
        connectors = LTX2TextConnectors(**spec.connectors_config)
    outputs, inputs = connector_widths(spec), feature_widths(spec)
    assert outputs.video == connectors.video_connector.inner_dim
    assert outputs.audio == connectors.audio_connector.inner_dim
    projections = [module for name, module in connectors.named_children() if "text_proj_in" in name]
    assert [width for _, width in inputs.items()] == [projection.out_features for projection in projections]


def test_features_grow_with_the_caption_and_stop_at_the_limit():
    assert [rough_tokens("x" * count, 128) for count in (0, 4, 400, 4000)] == [2, 3, 102, 128]
    short, long = (
        caption_bytes(TINY["tiny/ltx2"], 128, 4, "both", [text])["features"] for text in ("hello", SENTENCE * 9)
    )
    assert short < long <= 128 * 64 * 4


def test_a_shared_projection_is_kept_for_any_modality():
    sizes = {m: caption_bytes(SPECS["2.0-dev"], 1024, 2, m, [SENTENCE])["features"] for m in ("video", "audio", "both")}
    assert len(set(sizes.values())) == 1
    sizes = {m: caption_bytes(SPECS["2.3-dev"], 1024, 2, m, [SENTENCE])["features"] for m in ("video", "audio", "both")}
    assert sizes["video"] + sizes["audio"] == sizes["both"] and sizes["video"] == 2 * sizes["audio"]


def test_latents_of_a_sample():
    """121 frames at 24 fps, 768x512: 16 · 16 · 24 tokens of 128 numbers, and 126 of sound; float32."""
    tokens = ClipShape(768, 512, 121).latent().tokens
    assert sample_bytes(tokens, 128, "mean") == 16 * 16 * 24 * 128 * 4
    assert sample_bytes(126, 128, "sample") == 126 * 128 * 4 * 2


def ltx2_plan(plan_maker, **changes):
    """Six samples of two shapes, two of them with sound."""
    plan = plan_maker("tiny/ltx2", training=TrainingPlan(2, 2, 1.0, None, "both"), **changes)
    samples = [dataclasses.replace(s, sound="own" if n in (0, 5) else "") for n, s in enumerate(plan.data.samples)]
    buckets = [
        dataclasses.replace(b, audio_tokens=9, video_bytes=1000 * (n + 1), audio_bytes=7)
        for n, b in enumerate(plan.data.buckets)
    ]
    return dataclasses.replace(
        plan, data=dataclasses.replace(plan.data, samples=tuple(samples), buckets=tuple(buckets))
    )


def test_the_cache_holds_latents_captions_and_validation_prompts(plan_maker):
    prompt = PromptPlan("a", "seen", "worst", "", ClipShape(64, 64, 9), 24.0, 8, 3.0, 1, audio_guidance=7.0)
    unguided = dataclasses.replace(prompt, guidance=1.0, audio_guidance=1.0, prompt="heard", negative_prompt="never")
    plan = ltx2_plan(plan_maker, validation=ValidationPlan(0, False, (prompt, unguided)))
    found = estimate(plan, TINY["tiny/ltx2"], [1000])
    caption = plan.conditioning.prompt_tokens * (64 + 64) * 4
    texts = 6 + 1  # the empty one
    assert found.caption_bytes == found.text_bytes["connectors"] == caption
    assert found.cache_bytes == 4 * 1000 + 2 * 2000 + 2 * 7 + texts * caption + 3 * caption
    alone = dataclasses.replace(plan, training=TrainingPlan(2, 2, 1.0, None, "video"))
    assert estimate(alone, TINY["tiny/ltx2"], [1]).caption_bytes == caption / 2, "samples are joint, captions are not"


def test_features_are_chosen_by_the_cache(plan_maker):
    plan = ltx2_plan(plan_maker)
    features = dataclasses.replace(plan, cache=CachePlan("x", "mean", "features"))
    found, usual = (estimate(each, TINY["tiny/ltx2"], [1]) for each in (features, plan))
    assert found.text_bytes == usual.text_bytes and found.caption_bytes == found.text_bytes["features"]
    assert found.cache_bytes < usual.cache_bytes
    lengths = [rough_tokens(text, 32) for text in ("", *(s.caption for s in plan.data.samples))]
    assert found.caption_bytes == round(sum(lengths) / len(lengths)) * 64 * 4


def test_half_the_precision_is_half_the_text(plan_maker):
    plan = ltx2_plan(plan_maker)
    half = dataclasses.replace(plan, device=DevicePlan("bf16", "bf16", "cuda", "x", "statistical", "x"))
    found, usual = (estimate(each, TINY["tiny/ltx2"], [1]) for each in (half, plan))
    assert found.caption_bytes * 2 == usual.caption_bytes


def test_ltx_video_has_one_way_to_keep_a_caption(plan_maker):
    plan = plan_maker()
    found = estimate(plan, TINY["tiny/ltx-video"], [200, 300])
    assert found.text_bytes == {} and found.caption_bytes == 32 * 64 * 4
    assert found.checkpoint_bytes == 500 * (4 + 8) + 2 * 4 + 500 * 4 and math.isclose(found.lora_bytes, 2000)
