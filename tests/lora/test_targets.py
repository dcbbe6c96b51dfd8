"""Which layers targets mean, in both families, and what is refused with the reason."""

import pytest

from ltxforge.errors import PlanError
from ltxforge.lora.layers import linear_layers
from ltxforge.lora.targets import PRESETS, match
from ltxforge.specs import TINY

VIDEO_BASE = TINY["tiny/ltx-video"]
LTX2 = TINY["tiny/ltx2"]
LTX23 = TINY["tiny/ltx2.3"]
SOUND = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]
BETWEEN = ("audio_to_video_attn", "video_to_audio_attn")


def ends(layers) -> set[str]:
    """What was matched of a block, without its number."""
    return {name.split(".", 2)[2] for name in layers}


def attention(*modules: str) -> set[str]:
    return {f"{module}.{end}" for module in modules for end in ("to_q", "to_k", "to_v", "to_out.0")}


def feed_forward(*modules: str) -> set[str]:
    return {f"{module}.{end}" for module in modules for end in ("net.0.proj", "net.2")}


@pytest.mark.parametrize(("preset", "per_block"), [("attention", 8), ("feed_forward", 2), ("all", 10)])
def test_presets_stay_inside_the_blocks(preset, per_block):
    layers = match([preset], VIDEO_BASE).layers
    assert len(layers) == per_block * VIDEO_BASE.blocks
    assert all(name.startswith("transformer_blocks.") for name in layers)


PRESET_LAYERS = {
    ("attention", "video"): attention("attn1", "attn2"),
    ("attention", "audio"): attention("audio_attn1", "audio_attn2"),
    ("attention", "both"): attention("attn1", "attn2", "audio_attn1", "audio_attn2", *BETWEEN),
    ("feed_forward", "video"): feed_forward("ff"),
    ("feed_forward", "audio"): feed_forward("audio_ff"),
    ("feed_forward", "both"): feed_forward("ff", "audio_ff"),
    ("cross_modal", "video"): attention(*BETWEEN),
    ("cross_modal", "audio"): attention(*BETWEEN),
    ("cross_modal", "both"): attention(*BETWEEN),
}


@pytest.mark.parametrize("base", SOUND)
@pytest.mark.parametrize(("preset", "modalities"), PRESET_LAYERS)
def test_what_presets_mean_for_each_modality(preset, modalities, base):
    spec = TINY[base]
    matched = match([preset], spec, modalities, "both")
    assert ends(matched.layers) == PRESET_LAYERS[preset, modalities]
    assert len(matched.layers) == spec.blocks * len(PRESET_LAYERS[preset, modalities])
    assert matched.by_target == {preset: len(matched.layers)}


@pytest.mark.parametrize("base", SOUND)
def test_gates_are_in_all_alone(base):
    spec = TINY[base]
    gates = {name for name in linear_layers(spec) if name.endswith("to_gate_logits")}
    assert bool(gates) == (base != "tiny/ltx2")
    everything = match(["all"], spec, "both", "both").layers
    assert everything == {n: size for n, size in linear_layers(spec).items() if n.startswith("transformer_blocks.")}
    assert gates <= everything.keys()
    others = [preset for preset in PRESETS if preset != "all"]
    assert not gates & match(others, spec, "both", "both").layers.keys()
    video = {name for name in gates if ".attn" in name}
    assert {name for name in match(["all"], spec).layers if "gate" in name} == video


@pytest.mark.parametrize("computed", ["video", "both"])
@pytest.mark.parametrize("targets", [["attention"], ["attention", "feed_forward"], ["all"], ["to_q"], ["re:attn"]])
def test_a_video_adapter_has_nothing_of_the_sound(targets, computed):
    layers = match(targets, LTX23, "video", computed).layers
    assert layers and not [name for name in layers if "audio" in name or "av_cross" in name]


@pytest.mark.parametrize("computed", ["audio", "both"])
@pytest.mark.parametrize("targets", [["attention"], ["all"], ["to_q"], ["re:attn"]])
def test_an_audio_adapter_has_nothing_of_the_picture(targets, computed):
    layers = match(targets, LTX23, "audio", computed).layers
    assert layers and {name.split(".")[2].split("_")[0] for name in layers} == {"audio"}
    assert not [name for name in layers if "to_video" in name]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cross_modal", attention(*BETWEEN)),
        ("audio_to_video_attn.to_q", {"audio_to_video_attn.to_q"}),
        ("re:audio_attn1\\.to_[qk]$", {"audio_attn1.to_q", "audio_attn1.to_k"}),
        ("audio_ff.net.2", {"audio_ff.net.2"}),
    ],
)
def test_what_is_asked_for_by_name_is_trained_beside_the_picture(target, expected):
    layers = match(["feed_forward", target], LTX2, "video", "both").layers
    assert ends(layers) == feed_forward("ff") | expected


@pytest.mark.parametrize(
    "target", ["audio_proj_in", "av_cross_attn_video_scale_shift.linear", "re:a2v_gate", "re:v2a_gate.linear"]
)
def test_layers_outside_the_blocks_are_reached_by_name(target):
    layers = match([target], LTX2, "video", "both").layers
    assert layers and not [name for name in layers if name.startswith("transformer_blocks.")]


@pytest.mark.parametrize(
    ("targets", "modalities", "computed", "said"),
    [
        (["attention", "to_qq", "toq"], "video", "video", r"'to_qq', 'toq' match no linear layer"),
        (["cross_modal"], "video", "video", r"'cross_modal' name layers .*never computed.*\"video\".*between"),
        (["to_q", "audio_attn1.to_q"], "video", "video", r"'audio_attn1.to_q' name layers .*the sound's"),
        (["re:audio|attn1"], "video", "video", r"never computed .*the sound's and between picture and sound"),
        (["audio_proj_out"], "video", "video", r"never computed .*audio_proj_out \(the sound's\)"),
        (["re:av_cross"], "audio", "audio", r"never computed .* \"audio\""),
        (
            ["attention", "proj_in"],
            "audio",
            "audio",
            r"'proj_in' match no layer of .* \"audio\".*picture's",
        ),
        (["attn1.to_q"], "audio", "both", r"'attn1.to_q' match no layer of lora.modalities = \"audio\".*picture's"),
        (["attention"], "both", "video", r"lora.modalities: \"both\" means layers that are never computed"),
        (["attention"], "audio", "video", r"lora.modalities: \"audio\" means layers that are never computed"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(targets, modalities, computed, said):
    with pytest.raises(PlanError, match=said):
        match(targets, LTX23, modalities, computed)


def test_a_refusal_lists_what_there_is():
    with pytest.raises(PlanError) as of_video:
        match(["cross_modal"], VIDEO_BASE)
    assert "attn1.to_q" in str(of_video.value) and "proj_in" in str(of_video.value)
    assert "Presets: attention, feed_forward, all." in str(of_video.value)
    with pytest.raises(PlanError) as of_sound:
        match(["cross_modals"], LTX23)
    for known in ("cross_modal,", "video_to_audio_attn.to_gate_logits", "audio_prompt_adaln.linear"):
        assert known in str(of_sound.value)


@pytest.mark.parametrize(("modalities", "computed"), [("audio", "video"), ("both", "both"), ("video", "both")])
def test_a_model_without_sound_trains_video_alone(modalities, computed):
    with pytest.raises(PlanError, match=r"modalities: .*makes no sound"):
        match(["attention"], VIDEO_BASE, modalities, computed)


def test_layers_that_diffusers_does_not_rename_are_named_for_ltx_video_alone():
    names = ["proj_in", "proj_out", "time_embed.linear", "caption_projection.linear_1", "attention"]
    assert match(names, VIDEO_BASE).unread.keys() == {"proj_in", "time_embed.linear"}
    assert all("diffusers" in why for why in match(names, VIDEO_BASE).unread.values())
    assert match([*names, "re:."], LTX2, "both", "both").unread == {}  # held against diffusers in test_files.py
