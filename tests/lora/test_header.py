"""Real LoRA files, written by our exporter and by diffusers, and what their headers are said to be."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ltxforge.errors import WeightsError
from ltxforge.lora import files
from ltxforge.lora.header import describe, require_fitting
from ltxforge.lora.layers import linear_layers, original_name
from ltxforge.lora.targets import match
from ltxforge.models.weights import read_header
from ltxforge.specs import SPECS, TINY

LTX2 = ["2.0-dev", "2.0-distilled", "2.3-dev", "2.3-distilled", "2.5-dev", "2.5-distilled"]
OF_13B = [name for name, spec in SPECS.items() if spec.parameters == "13B"]
OF_23 = ["2.3-dev", "2.3-distilled", "2.5-dev", "2.5-distilled"]


def shapes_of(version: str, targets=("attention",), modalities="video", rank=8, prefix="diffusion_model.") -> dict:
    """Names and shapes of a LoRA on a published version, in a file's spelling, without any tensor."""
    spec = {**SPECS, **TINY}[version]
    layers = match(targets, spec, modalities, "both" if spec.has_audio else "video").layers
    spelled = {(original_name(name) if prefix == "diffusion_model." else name): size for name, size in layers.items()}
    return {f"{prefix}{n}.lora_A.weight": (rank, size[0]) for n, size in spelled.items()} | {
        f"{prefix}{n}.lora_B.weight": (size[1], rank) for n, size in spelled.items()
    }


def metadata(version: str) -> dict[str, str]:
    return files.provenance({"name": "mine", "version": version})


@pytest.fixture
def exported(tmp_path):
    """`exported(base, targets, modalities)`: a file of our own, with its metadata, read back from the disk."""

    def make(base: str, targets=("attention",), modalities="video"):
        spec, adapter = TINY[base], {}
        computed = "both" if spec.has_audio else "video"
        for name, (inner, outer) in match(targets, spec, modalities, computed).layers.items():
            adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"] = (
                torch.ones(4, inner),
                torch.ones(outer, 4),
            )
        path = tmp_path / "lora.safetensors"
        files.export(path, adapter, 1.0, "bf16", metadata(spec.version))
        header = read_header(path)
        return describe({n: entry.shape for n, entry in header.tensors.items()}, header.metadata, str(path))

    return make


@pytest.mark.parametrize("base", TINY)
def test_our_own_files_fit_the_model_that_they_were_trained_on(base, exported):
    header = exported(base, ("re:.",), "both" if TINY[base].has_audio else "video")
    assert header.layers == linear_layers(TINY[base])
    assert header.ranks == (4,) and header.version == TINY[base].version and base in header.fits
    require_fitting(header, TINY[base], "x")


@pytest.mark.parametrize(
    ("version", "targets", "fits"),
    [
        # The 13B model is as wide and deep as LTX-2's video half, and its layers have the same names.
        ("2.0-dev", ("attention", "feed_forward"), [*OF_13B, *LTX2]),
        ("0.9.7-dev", ("attention", "time_embed.linear"), [*OF_13B, *LTX2[:2]]),
        ("2.3-dev", ("attention", "audio_attn1.to_q"), LTX2),
        ("2.3-dev", ("all",), OF_23),
        ("2.5-distilled", ("prompt_adaln.linear",), OF_23),
        ("2.0-dev", ("attention", "caption_projection.linear_1"), LTX2[:2]),
        ("0.9.8-dev", ("attention", "caption_projection.linear_1"), OF_13B),
        ("0.9.5", ("attention",), [name for name, spec in SPECS.items() if spec.parameters == "2B"]),
    ],
)
def test_names_and_sizes_may_fit_several_versions_and_then_all_are_named(version, targets, fits):
    header = describe(shapes_of(version, targets), {}, "x")
    assert [name for name in header.fits if name in SPECS] == fits
    assert "rank 8" in str(header) and all(name in str(header) for name in fits)
    for name in SPECS:
        if name in fits:
            require_fitting(header, SPECS[name], "x")
        else:
            with pytest.raises(WeightsError):
                require_fitting(header, SPECS[name], "x")


@pytest.mark.parametrize(
    ("trained", "wanted", "reason"),
    [
        ("2.0-dev", "2.3-dev", r"trained on 2.0-dev, and 2.3-dev differs in wiring and latents"),
        ("2.3-dev", "2.5-dev", r"trained on 2.3-dev, and 2.5-dev differs in wiring and text encoder"),
        ("0.9.1", "0.9.5", r"trained on 0.9.1, and 0.9.5 differs in .*latents"),
        ("0.9.0", "0.9.1", r"trained on 0.9.0, and 0.9.1 differs in latents"),
    ],
)
def test_metadata_decides_where_names_and_sizes_do_not(trained, wanted, reason):
    shapes = shapes_of(trained)
    require_fitting(describe(shapes, {}, "x"), SPECS[wanted], "x")
    with pytest.raises(WeightsError, match=reason) as refused:
        require_fitting(describe(shapes, metadata(trained), "mine.safetensors"), SPECS[wanted], "mine.safetensors")
    assert str(refused.value).startswith("mine.safetensors: this LoRA")
    assert f"a LoRA of {len(shapes) // 2} layers and rank 8, trained on {trained}" in str(refused.value)


@pytest.mark.parametrize(
    ("trained", "wanted"),
    [("2.3-dev", "2.3-distilled"), ("2.0-distilled", "2.0-dev"), ("0.9.5", "0.9.6-distilled")],
)
def test_a_distilled_model_takes_the_lora_of_its_dev_model(trained, wanted):
    require_fitting(describe(shapes_of(trained), metadata(trained), "x"), SPECS[wanted], "x")


@pytest.mark.parametrize(
    ("shapes", "wanted", "reason"),
    [
        (shapes_of("2.3-dev", ("all",)), "2.0-dev", r"layers that 2.0-dev does not have, such as .*to_gate_logits"),
        (
            shapes_of("2.3-dev", modalities="audio"),
            "0.9.5",
            r"384 layers that 0.9.5 does not have, .*audio_attn1",
        ),
        (shapes_of("0.9.5"), "2.0-dev", r"attn1.to_q goes from 2048 to 2048, and from 4096 to 4096 in 2.0-dev"),
        (shapes_of("2.0-dev", ("re:time_embed.linear",)), "2.3-dev", r"from 4096 to 24576, and from 4096 to 36864"),
        (shapes_of("tiny/ltx2"), "2.0-dev", r"from 128 to 128, and from 4096 to 4096"),
        (shapes_of("0.9.7-dev"), "0.9.8-2b-distilled", r"160 layers that 0.9.8-2b-distilled does not have"),
    ],
)
def test_other_layers_and_sizes_are_refused_with_the_first_of_them(shapes, wanted, reason):
    with pytest.raises(WeightsError, match=reason):
        require_fitting(describe(shapes, {}, "x"), SPECS[wanted], "x")


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
def test_other_programs_spelling_is_read_too(prefix):
    targets = ("attention", "proj_in", "av_cross_attn_video_a2v_gate.linear")
    ours = describe(shapes_of("2.0-dev", targets), {}, "x")
    assert describe(shapes_of("2.0-dev", targets, prefix=prefix), {}, "x") == ours
    down_up = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): shape
        for name, shape in shapes_of("2.0-dev", targets).items()
    }
    alphas = {name.replace(".lora_down.weight", ".alpha"): () for name in down_up if "lora_down" in name}
    assert describe(down_up | alphas, {}, "x") == ours


def test_a_file_written_by_diffusers_is_understood(tmp_path):
    from_diffusers = {f"transformer.transformer_blocks.{n}.attn1.to_q" for n in range(3)}
    tensors = {f"{name}.lora_A.weight": torch.ones(2 + n, 4096) for n, name in enumerate(sorted(from_diffusers))}
    tensors |= {f"{name}.lora_B.weight": torch.ones(4096, 2 + n) for n, name in enumerate(sorted(from_diffusers))}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"ltxforge": "not json"})
    header = read_header(tmp_path / "lora.safetensors")
    found = describe({n: entry.shape for n, entry in header.tensors.items()}, header.metadata, "x")
    assert found.ranks == (2, 3, 4) and found.version == "" and "3 layers and rank 2 to 4" in str(found)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"version": 3}', '{"name": "x"}', "{"])
def test_metadata_that_says_nothing_is_as_none(text):
    assert describe(shapes_of("0.9.5"), {"ltxforge": text}, "x").version == ""


def test_a_version_of_a_later_release_is_told():
    later = {"ltxforge": json.dumps({"version": "3.1"})}
    with pytest.raises(WeightsError, match=r"trained on 3.1, which this release does not know"):
        require_fitting(describe(shapes_of("2.3-dev"), later, "x"), SPECS["2.3-dev"], "x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {}, "holds no LoRA"),
        (lambda s: {"transformer_blocks.0.attn1.to_q.weight": (8, 8)}, "holds no LoRA"),
        (lambda s: {n: shape for n, shape in s.items() if "0.attn1.to_q.lora_B" not in n}, "attn1.to_q has A"),
        (lambda s: {n: (3, shape[1]) if "lora_A" in n else shape for n, shape in s.items()}, r"A of shape \[3, 4096\]"),
        (lambda s: {n: (*shape, 1, 1) for n, shape in s.items()}, "no whole LoRA of linear layers"),
        (lambda s: s | {n.replace("A.weight", "magnitude_vector"): (1,) for n in s if "lora_A" in n}, "no plain LoRA"),
        (
            lambda s: s | {n.replace("weight", "bias"): (1,) for n in s if "lora_B" in n},
            r"384 tensors beside A, B.*bias",
        ),
        (lambda s: s | {"diffusion_model.transformer_blocks.0.attn9.alpha": ()}, "no plain LoRA.*attn9.alpha"),
        (lambda s: s | {n.replace("lora_A.weight", "alpha"): (3,) for n in s if "lora_A" in n}, "no plain LoRA"),
        (lambda s: s | {n.replace("diffusion_model", "transformer"): shape for n, shape in s.items()}, "no plain LoRA"),
    ],
)
def test_what_is_no_lora_is_refused(change, reason):
    with pytest.raises(WeightsError, match=reason):
        describe(change(shapes_of("2.0-dev")), {}, "x")
