"""Version and rope from headers and folders; contradictions, wrong VAEs and foreign files refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from ltxforge.errors import WeightsError
from ltxforge.models.detect import plan_model
from ltxforge.models.sources import spec_of
from ltxforge.plan import ModelPlan, from_json, to_json
from ltxforge.specs import SPECS, TINY

OF_2B = ["0.9.5", "0.9.6-dev", "0.9.6-distilled", "0.9.8-2b-distilled"]
OF_13B = ["0.9.7-dev", "0.9.7-distilled", "0.9.8-dev", "0.9.8-distilled"]


@pytest.fixture
def encoder(tiny_folder):
    return str(tiny_folder())


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_wiring_decides_old_versions(tmp_path, published_header, encoder, version):
    file = published_header(tmp_path / "x.safetensors", version)
    plan = plan_model(base=str(file), text_encoder=encoder)
    assert (plan.version, plan.rope) == (version, "plain")
    assert plan.licence_url == SPECS[version].licence.url
    assert any("28 blocks of width 2048 (2B)" in line for line in plan.evidence)


@pytest.mark.parametrize(
    ("version", "distilled", "candidates"),
    [
        ("0.9.5", False, OF_2B),
        ("0.9.6-distilled", True, ["0.9.6-distilled", "0.9.8-2b-distilled"]),
        ("0.9.7-dev", False, OF_13B),
        ("0.9.8-distilled", True, ["0.9.7-distilled", "0.9.8-distilled"]),
    ],
)
def test_what_wiring_leaves_open_must_be_said(tmp_path, published_header, encoder, version, distilled, candidates):
    metadata = {"config": json.dumps({"allowed_inference_steps": [1.0, 0.5]})} if distilled else None
    file = published_header(tmp_path / "x.safetensors", version, metadata=metadata)
    with pytest.raises(WeightsError) as raised:
        plan_model(base=str(file), text_encoder=encoder)
    for known in SPECS:
        assert (known in candidates) == any(
            known == word for word in raised.value.what.replace(",", " ").replace(":", " ").split()
        )
    assert f'version = "{candidates[0]}"' in raised.value.remedy
    for claim in candidates:
        assert plan_model(base=str(file), text_encoder=encoder, version=claim).version == claim


@pytest.mark.parametrize("version", OF_2B + OF_13B)
def test_the_published_file_name_makes_the_suggestion(tmp_path, published_header, encoder, version):
    name = SPECS[version].hub.rpartition(":")[2].rpartition("/")[2].removesuffix(".safetensors") + ".safetensors"
    file = published_header(tmp_path / name, version)
    with pytest.raises(WeightsError, match=f'version = "{version}" \\(the file'):
        plan_model(base=str(file), text_encoder=encoder)


@pytest.mark.parametrize(
    ("version", "claim", "said"),
    [
        ("0.9.7-dev", "0.9.5", "48 blocks of width 4096"),
        ("0.9.5", "0.9.8-dev", "28 blocks of width 2048"),
    ],
)
def test_a_claim_against_the_header_is_refused_with_the_evidence(
    tmp_path, published_header, encoder, version, claim, said
):
    file = published_header(tmp_path / "x.safetensors", version)
    with pytest.raises(WeightsError, match=f"the recipe says version {claim}, but .*{said}") as raised:
        plan_model(base=str(file), text_encoder=encoder, version=claim)
    assert claim not in raised.value.remedy
    assert version in raised.value.remedy


def test_a_claim_against_the_metadata_is_refused(tmp_path, published_header, encoder):
    metadata = {"config": json.dumps({"allowed_inference_steps": [1.0]})}
    file = published_header(tmp_path / "x.safetensors", "0.9.7-distilled", metadata=metadata)
    with pytest.raises(WeightsError, match="distilled"):
        plan_model(base=str(file), text_encoder=encoder, version="0.9.7-dev")


@pytest.mark.parametrize(
    ("version", "vae"), [("0.9.7-dev", "0.9.1"), ("0.9.5", "0.9.0"), ("0.9.0", "0.9.5"), ("0.9.1", "0.9.0")]
)
def test_a_vae_of_another_version_is_refused(tmp_path, published_header, encoder, version, vae):
    file = published_header(tmp_path / "x.safetensors", version)
    other = published_header(tmp_path / "vae.safetensors", vae)
    with pytest.raises(WeightsError, match="not interchangeable") as raised:
        plan_model(base=str(file), vae=str(other), text_encoder=encoder, version=version)
    assert vae in raised.value.what
    assert "vae.safetensors" in raised.value.where


def test_a_vae_of_the_same_family_is_taken(tmp_path, published_header, encoder):
    file = published_header(tmp_path / "x.safetensors", "0.9.8-dev")
    other = published_header(tmp_path / "vae.safetensors", "0.9.5")
    plan = plan_model(base=str(file), vae=str(other), text_encoder=encoder, version="0.9.8-dev")
    assert plan.components["vae"].location == str(other)


def test_rope_by_recipe_metadata_pipeline_and_version(tmp_path, published_header, tiny_folder, tiny_file, encoder):
    bare = published_header(tmp_path / "x.safetensors", "0.9.5")
    metadata = {"config": json.dumps({"transformer": {"causal_temporal_positioning": True}})}
    told = published_header(tmp_path / "y.safetensors", "0.9.5", metadata=metadata)
    asked = {"text_encoder": encoder, "version": "0.9.5"}
    assert plan_model(base=str(bare), **asked).rope == "causal"
    assert plan_model(base=str(bare), rope="plain", **asked).rope == "plain"
    assert plan_model(base=str(told), **asked).rope == "causal"
    folder = tiny_folder()
    assert plan_model(base=str(folder), version="0.9.5").rope == "causal"
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    index = json.loads((plain / "model_index.json").read_text())
    (plain / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    plan = plan_model(base=str(plain), version="0.9.5")
    assert plan.rope == "plain"
    assert any("published with causal" in line for line in plan.evidence)


def test_causal_metadata_excludes_old_versions(tmp_path, published_header, encoder):
    metadata = {"config": json.dumps({"transformer": {"causal_temporal_positioning": True}})}
    file = published_header(tmp_path / "x.safetensors", "0.9.5", vae="0.9.0", metadata=metadata)
    with pytest.raises(WeightsError, match="not interchangeable"):
        plan_model(base=str(file), text_encoder=encoder)


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_folders_are_recognised(tiny_folder, name):
    spec = TINY[name]
    plan = plan_model(base=str(tiny_folder(name)), version=spec.version)
    assert (plan.version, plan.rope) == (spec.version, spec.rope)
    assert spec_of(plan).transformer_config == spec.transformer_config
    assert from_json(ModelPlan, to_json(plan)) == plan


def test_a_vae_that_replaces_the_base_s_own_is_checked_and_not_asked(tiny_folder):
    """It must not turn a 0.9.5 transformer into a 0.9.1."""
    other = tiny_folder("tiny/ltx-video-0.9.1")
    with pytest.raises(WeightsError, match="not interchangeable|they look alike"):
        plan_model(base=str(tiny_folder()), vae=str(other))
    with pytest.raises(WeightsError, match=r"VAE is that of 0\.9\.1"):
        plan_model(base=str(tiny_folder()), vae=str(other), version="0.9.5")
    assert plan_model(base=str(tiny_folder()), vae=str(tiny_folder()), version="0.9.5").version == "0.9.5"


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
@pytest.mark.parametrize("base", ["0.9.0", "0.9.1", "0.9.5"])
def test_transformer_and_vae_of_one_version_fit_over_any_base(base, version, tiny_folder):
    """The base then lends the text encoder alone; its own VAE and pipeline say nothing about the rest."""
    other, folder = tiny_folder(f"tiny/ltx-video-{version}"), tiny_folder(f"tiny/ltx-video-{base}")
    plan = plan_model(base=str(folder), transformer=str(other / "transformer"), vae=str(other / "vae"), version=version)
    assert plan.version == version
    assert plan.rope == SPECS[version].rope


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_parts_of_built_in_models_fit_no_other(part, tiny_folder):
    with pytest.raises(WeightsError, match=f"model.{part} = 'tiny/ltx-video-0.9.0' is a part of a built-in model"):
        plan_model(base=str(tiny_folder()), version="0.9.5", **{part: "tiny/ltx-video-0.9.0"})


def test_everything_wrong_with_the_parts_is_told_at_once(tiny_folder, tmp_path):
    with pytest.raises(WeightsError) as refused:
        plan_model(base=str(tiny_folder()), vae=str(tmp_path / "no-vae"), transformer=str(tmp_path / "no-transformer"))
    assert "no-vae" in str(refused.value) and "no-transformer" in str(refused.value)


def test_components_say_where_they_lie(tiny_folder):
    folder = tiny_folder()
    plan = plan_model(base=str(folder), version="0.9.5")
    for name, part in plan.components.items():
        assert (part.kind, part.inside, part.location) == ("folder", name, str(folder / name))
        assert len(part.digest) == (
            0 if name == "scheduler" else 64
        )  # samples' schedule is no part of a run's identity
    weights = [path.stat().st_size for path in (folder / "transformer").iterdir()]
    assert plan.components["transformer"].bytes == sum(weights)


def test_digests_follow_the_content_and_not_the_place(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    before, after = (plan_model(base=str(folder), version="0.9.5") for folder in (tiny_folder(), copy))
    assert {n: c.digest for n, c in before.components.items()} == {n: c.digest for n, c in after.components.items()}
    file = next((copy / "transformer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = plan_model(base=str(copy), version="0.9.5").components
    assert [n for n, part in changed.items() if part.digest != before.components[n].digest] == ["transformer"]


def test_built_in_models_need_nothing():
    plan = plan_model(base="tiny/ltx-video-13b")
    assert plan.version == "0.9.7-dev"
    assert {part.kind for part in plan.components.values()} == {"builtin"}
    with pytest.raises(WeightsError, match=r"wired as 0\.9\.7-dev"):
        plan_model(base="tiny/ltx-video-13b", version="0.9.0")
    with pytest.raises(WeightsError, match="fits no other"):
        plan_model(base="tiny/ltx-video", vae="tiny/ltx-video-0.9.0")


def test_a_fine_tuned_transformer_beside_the_base(tmp_path, tiny_folder, tiny_file):
    folder = str(tiny_folder())
    own = tmp_path / "mine"
    shutil.copytree(tiny_folder() / "transformer", own / "transformer")
    shutil.copytree(tiny_folder() / "transformer", tmp_path / "bare")
    for source in (own, own / "transformer", tmp_path / "bare", tiny_file(), tiny_file().parent):
        plan = plan_model(base=folder, transformer=str(source), version="0.9.5")
        assert plan.components["transformer"].location.startswith(str(source))
        assert plan.components["vae"].location == f"{folder}/vae"


def test_a_single_file_needs_a_text_encoder(tiny_file, tiny_folder):
    with pytest.raises(WeightsError, match="no T5") as raised:
        plan_model(base=str(tiny_file()), version="0.9.5")
    assert 'text_encoder = "Lightricks/LTX-Video:text_encoder"' in raised.value.remedy
    for source in (tiny_folder(), tiny_folder() / "text_encoder"):
        plan = plan_model(base=str(tiny_file()), version="0.9.5", text_encoder=str(source))
        assert plan.components["tokenizer"].location == str(tiny_folder() / "tokenizer")
        assert plan.components["scheduler"].kind == "builtin"


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("transformer", "no transformer/ folder"),
        ("vae", "no vae/ folder"),
        ("text_encoder", "no text_encoder/ folder"),
        ("tokenizer", "no tokenizer"),
        ("transformer/diffusion_pytorch_model-00002-of-00003.safetensors", "00002-of-00003.safetensors is missing"),
    ],
)
def test_a_missing_part_is_named(tmp_path, tiny_folder, missing, said):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    shutil.rmtree(copy / missing) if (copy / missing).is_dir() else (copy / missing).unlink()
    with pytest.raises(WeightsError, match=said):
        plan_model(base=str(copy), version="0.9.5")


def test_a_missing_path_suggests_its_neighbour(tmp_path):
    (tmp_path / "ltx-video").mkdir()
    with pytest.raises(WeightsError, match="Did you mean 'ltx-video'"):
        plan_model(base=str(tmp_path / "ltx-vidoe"))


def test_pickles_are_refused(tmp_path, tiny_folder):
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match="pickle"):
        plan_model(base=str(pickle))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match="pickle"):
        plan_model(base=str(copy), version="0.9.5")


def test_gguf_files_are_refused_by_name(tmp_path):
    file = tmp_path / "ltx-2.3-22b-dev-Q5_K_S.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(WeightsError, match="packed in few bits"):
        plan_model(base=str(file))


HEADERS = {
    "empty": b"",
    "short": b"\x08\x00",
    "absurd length": (2**60).to_bytes(8, "little") + b"{}",
    "zeros": bytes(4096),
    "no json": (16).to_bytes(8, "little") + b"this is no json!",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "no shape": (18).to_bytes(8, "little") + b'{"a":{"dtype":"F"}}'[:18],
    "deep": (40_000).to_bytes(8, "little") + b"[" * 40_000,
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_told(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="safetensors file|ends early") as raised:
        plan_model(base=str(file), text_encoder="tiny/ltx-video")
    assert str(file) in raised.value.where


def test_an_interrupted_copy_is_told(tmp_path, tiny_file):
    file = tmp_path / "x.safetensors"
    file.write_bytes(tiny_file().read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="ends early"):
        plan_model(base=str(file), text_encoder="tiny/ltx-video", version="0.9.5")


def test_an_unreadable_configuration_is_told(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(WeightsError, match="no JSON"):
        plan_model(base=str(copy), version="0.9.5")


FOREIGN = {
    "lora": ({"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 8)}, "LoRA"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (4, 8)}, "no LTX-Video transformer"),
}


@pytest.mark.parametrize(("shapes", "said"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(tmp_path, shapes, said):
    file = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(WeightsError, match=said):
        plan_model(base=str(file), text_encoder="tiny/ltx-video")


def test_quantised_files_are_refused(tmp_path, published_header):
    file = published_header(tmp_path / "x-fp8.safetensors", "0.9.8-dev", dtype="F8_E4M3")
    with pytest.raises(WeightsError, match="quantised"):
        plan_model(base=str(file), text_encoder="tiny/ltx-video")


def test_folders_of_other_pipelines_are_refused(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    (copy / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(WeightsError, match="is a folder for WanPipeline"):
        plan_model(base=str(copy))
    (copy / "model_index.json").write_text('{"_class_name": "LTX2Pipeline"}')
    with pytest.raises(WeightsError, match=r"holds LTX-Video's transformer, but the base .* is LTX-2"):
        plan_model(base=str(copy))


def test_several_files_and_no_index_are_told(tmp_path, tiny_file):
    for name in ("a", "b"):
        shutil.copy(tiny_file(), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors, b\.safetensors"):
        plan_model(base=str(tmp_path), text_encoder="tiny/ltx-video")
