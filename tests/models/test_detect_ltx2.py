"""LTX-2's versions from headers, folders and names; parts of other versions and packed weights refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from safetensors.torch import load_file, save_file

from ltxforge.digests import FileDigests
from ltxforge.errors import WeightsError
from ltxforge.lora.files import export, provenance
from ltxforge.lora.targets import match
from ltxforge.models.clues import published_ltx2_clue
from ltxforge.models.components import Sources
from ltxforge.models.detect import plan_model
from ltxforge.models.sources import spec_of
from ltxforge.models.trees import LocalTree
from ltxforge.plan import ModelPlan, from_json, to_json
from ltxforge.specs import SPECS, TINY
from ltxforge.specs_ltx2 import GEMMA_3

NAMES = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]


def version(name: str) -> str:
    return TINY[name].version


def kept(folder, to, change=lambda place: None):
    """A copy of a folder, changed."""
    shutil.copytree(folder, to)
    change(to)
    return to


def edited(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_wiring_tells_the_generation_and_the_scheduler_the_kind(tmp_path, tiny_folder, name):
    plan = plan_model(base=str(tiny_folder(name)))
    assert (plan.version, plan.rope) == (version(name), "causal")
    assert set(plan.components) == {
        "transformer", "vae", "audio_vae", "vocoder", "connectors", "text_encoder", "tokenizer", "scheduler",
    }  # fmt: skip
    assert any("audio modules" in line for line in plan.evidence) and any("scheduler" in line for line in plan.evidence)
    assert from_json(ModelPlan, to_json(plan)) == plan
    distilled = kept(tiny_folder(name), tmp_path / "distilled")
    edited(distilled / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift_terminal=None)
    assert plan_model(base=str(distilled)).version == version(name).replace("dev", "distilled")
    with pytest.raises(WeightsError, match=f"the recipe says version {version(name)}, but the scheduler is that of"):
        plan_model(base=str(distilled), version=version(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_does_not_say_dev_or_distilled(tiny_folder, ltx2_file, name):
    asked = {"base": str(ltx2_file(name)), "text_encoder": str(tiny_folder(name))}
    dev, distilled = version(name), version(name).replace("dev", "distilled")
    with pytest.raises(WeightsError, match=f"can be {dev} or {distilled}"):
        plan_model(**asked)
    for claim in (dev, distilled):
        plan = plan_model(**asked, version=claim)
        assert (plan.version, plan.components["scheduler"].kind) == (claim, "builtin")
    with pytest.raises(WeightsError, match=r"the recipe says version 0\.9\.7-dev, but the transformer has audio"):
        plan_model(**asked, version="0.9.7-dev")


@pytest.mark.parametrize(("stem", "kind"), [("ltx-2-19b-dev-fp8", "dev"), ("ltx-2-19b-distilled", "distilled")])
def test_a_local_name_suggests_and_decides_nothing(tmp_path, tiny_folder, ltx2_file, stem, kind):
    file = tmp_path / f"{stem}.safetensors"
    shutil.copy(ltx2_file(), file)
    with pytest.raises(WeightsError, match=f'version = "2.0-{kind}" \\(the file'):
        plan_model(base=str(file), text_encoder=str(tiny_folder("tiny/ltx2")))


def test_metadata_may_say_distilled(tiny_folder, ltx2_file):
    file = ltx2_file("tiny/ltx2", model_version="2.0-distilled")
    asked = {"base": str(file), "text_encoder": str(tiny_folder("tiny/ltx2"))}
    assert plan_model(**asked).version == "2.0-distilled"
    with pytest.raises(WeightsError, match="model_version 2.0-distilled"):
        plan_model(**asked, version="2.0-dev")


def test_a_wiring_that_no_version_has_is_refused(tmp_path, tiny_folder, ltx2_file):
    tensors = {
        name: value for name, value in load_file(ltx2_file()).items() if ".ff.net." not in name or "bias" not in name
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="contradict each other.*plain attention.*without biases"):
        plan_model(base=str(file), text_encoder=str(tiny_folder("tiny/ltx2")), connectors=str(tiny_folder("tiny/ltx2")))


def test_rope_is_causal_and_nothing_else(tiny_folder):
    with pytest.raises(WeightsError, match="the recipe says rope plain, but every LTX-2 version"):
        plan_model(base=str(tiny_folder("tiny/ltx2")), rope="plain")
    assert plan_model(base=str(tiny_folder("tiny/ltx2")), rope="causal").rope == "causal"


def test_two_transformers_and_one_scheduler(tmp_path, tiny_folder):
    """As 2.5's pipeline is published: `transformer/` is distilled, `transformer_full/` is not."""
    home = kept(tiny_folder("tiny/ltx2.5"), tmp_path / "both")
    shutil.copytree(home / "transformer", home / "transformer_full")
    edited(home / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift_terminal=None)
    distilled, full = plan_model(base=str(home)), plan_model(base=str(home / "transformer_full"))
    assert (distilled.version, full.version) == ("2.5-distilled", "2.5-dev")
    assert full.components["transformer"].location == str(home / "transformer_full")
    assert full.components["vae"].location == str(home / "vae")
    assert distilled.components["scheduler"].kind == "folder" and full.components["scheduler"].kind == "builtin"
    with pytest.raises(
        WeightsError, match=r"says version 2\.5-dev, but of a pipeline's two transformers this is the dis"
    ):
        plan_model(base=str(home), version="2.5-dev")
    named = plan_model(base=str(home), transformer=str(home / "transformer_full"))
    assert (named.version, named.components["scheduler"].kind) == ("2.5-dev", "builtin")


WRONG = {
    "vae of 2.0": ("tiny/ltx2.3", {"vae": "tiny/ltx2"}, r"VAE is that of LTX-2 2\.0|VAE is that of 2\.0"),
    "vae of 2.3": ("tiny/ltx2", {"vae": "tiny/ltx2.3"}, r"VAE is that of 2\.3.*not interchangeable"),
    "vae of 0.9.5": ("tiny/ltx2", {"vae": "tiny/ltx-video"}, r"holds the VAE of LTX-Video 0\.9\.x"),
    "audio vae of 2.0": ("tiny/ltx2.3", {"audio_vae": "tiny/ltx2"}, r"audio VAE is that of LTX-2 2\.0"),
    "audio vae of 2.3": ("tiny/ltx2.5", {"audio_vae": "tiny/ltx2.3"}, r"audio VAE is that of LTX-2 2\.3"),
    "vocoder of 2.0": ("tiny/ltx2.5", {"vocoder": "tiny/ltx2"}, r"vocoder is that of LTX-2 2\.0"),
    "connectors of 2.3": ("tiny/ltx2.5", {"connectors": "tiny/ltx2.3"}, r"text connectors is that of LTX-2 2\.3"),
    "t5": ("tiny/ltx2", {"text_encoder": "tiny/ltx-video"}, r"text encoder is a T5, but 2\.0-dev .* Gemma 3"),
    "gemma 3 for 2.5": ("tiny/ltx2.5", {"text_encoder": "tiny/ltx2"}, r"is a Gemma 3, but 2\.5-dev .* Gemma 4"),
    "gemma 4 for 2.3": ("tiny/ltx2.3", {"text_encoder": "tiny/ltx2.5"}, r"is a Gemma 4, but 2\.3-dev .* Gemma 3"),
    "ltx-video": ("tiny/ltx2", {"transformer": "tiny/ltx-video"}, r"LTX-Video's transformer, but the base .* LTX-2"),
    "ltx-2": ("tiny/ltx-video", {"transformer": "tiny/ltx2"}, r"LTX-2's transformer, but the base .* LTX-Video"),
    "sound": ("tiny/ltx-video", {"vocoder": "tiny/ltx2"}, r"LTX-Video has no vocoder"),
}


@pytest.mark.parametrize(("base", "named", "said"), WRONG.values(), ids=WRONG)
def test_parts_of_another_model_are_refused(tiny_folder, base, named, said):
    parts = {name: str(tiny_folder(source)) for name, source in named.items()}
    with pytest.raises(WeightsError, match=said):
        plan_model(base=str(tiny_folder(base)), version=version(base), **parts)


def test_wiring_and_sizes_are_checked_where_a_part_comes_alone(tmp_path, tiny_folder):
    """Without a transformer beside it, a part does not say whose it is."""
    alone = {
        name: kept(tiny_folder(base) / name, tmp_path / f"{base.replace('/', '-')}-{name}")
        for base, name in (("tiny/ltx2", "vocoder"), ("tiny/ltx2", "connectors"), ("tiny/ltx2", "audio_vae"))
    }
    base = {"base": str(tiny_folder("tiny/ltx2.3")), "version": "2.3-dev"}
    with pytest.raises(WeightsError, match="vocoder has no bandwidth extension"):
        plan_model(**base, vocoder=str(alone["vocoder"]))
    with pytest.raises(WeightsError, match="connectors have one projection for both modalities"):
        plan_model(**base, connectors=str(alone["connectors"]))
    assert plan_model(**base, audio_vae=str(alone["audio_vae"])).version == "2.3-dev"


def test_a_text_encoder_of_another_width_or_depth_is_refused(tmp_path, tiny_folder):
    encoder = kept(tiny_folder("tiny/ltx2.3"), tmp_path / "copy") / "text_encoder"
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    edited(encoder / "config.json", text_config={**config["text_config"], "num_hidden_layers": 7})
    said = "64 wide and 7 layers deep, which makes 512 numbers per token, but the connectors take 256"
    with pytest.raises(WeightsError, match=said):
        plan_model(base=str(encoder.parent), version="2.3-dev")


@pytest.mark.parametrize("part", ["transformer", "vae", "audio_vae", "vocoder", "connectors"])
def test_parts_of_built_in_models_fit_no_other(tiny_folder, part):
    with pytest.raises(WeightsError, match=f"model.{part} = 'tiny/ltx2' is a part of a built-in model"):
        plan_model(base=str(tiny_folder("tiny/ltx2")), version="2.0-dev", **{part: "tiny/ltx2"})


@pytest.mark.parametrize("name", NAMES)
def test_built_in_models_need_nothing(name):
    plan = plan_model(base=name)
    assert plan.version == version(name) and {part.kind for part in plan.components.values()} == {"builtin"}
    with pytest.raises(WeightsError, match="is wired as"):
        plan_model(base=name, version="2.3-distilled")


def test_a_file_without_parts_names_each_and_where_it_is(ltx2_file):
    with pytest.raises(WeightsError) as raised:
        plan_model(base=str(ltx2_file("tiny/ltx2.3", ("transformer",))), version="2.3-dev")
    said = str(raised.value)
    for noun in ("video VAE", "audio VAE", "vocoder", "text connectors"):
        assert f"holds no LTX-2 {noun}" in said
    assert 'audio_vae = "Lightricks/LTX-2.3:ltx-2.3-22b-dev.safetensors"' in said
    assert 'text_encoder = "google/gemma-3-12b-it-qat-q4_0-unquantized"' in said
    with pytest.raises(WeightsError, match='text_encoder = "Lightricks/LTX-2.5-Diffusers:text_encoder"'):
        plan_model(base=str(ltx2_file("tiny/ltx2.5")), version="2.5-dev")


def test_the_diffusion_decoder_is_refused_with_the_reason(tmp_path, tiny_folder, ltx2_file):
    tensors = {name: value for name, value in load_file(ltx2_file("tiny/ltx2.5")).items() if ".decoder." not in name}
    tensors["vae.decoder.t_embedder.mlp.0.weight"] = torch.zeros(4, 4)
    file = tmp_path / "ltx-2.5-video-vae-bf16.safetensors"
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"2\.5's diffusion decoder.*ltx-2\.5-video-vae-conv-bf16"):
        plan_model(base=str(tiny_folder("tiny/ltx2.5")), version="2.5-dev", vae=str(file))


def test_a_lora_is_no_base(tmp_path, tiny_folder):
    file = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.zeros(4, 8)}, file)
    for named in ({"base": str(file)}, {"base": str(tiny_folder("tiny/ltx2")), "transformer": str(file)}):
        with pytest.raises(WeightsError, match="is a LoRA or another adapter, not a model"):
            plan_model(**named)


def test_a_whole_lora_in_a_model_s_place_is_described(tmp_path, tiny_folder):
    file = tmp_path / "lora.safetensors"
    layers = match(["attention"], TINY["tiny/ltx2.3"], "both", "both").layers
    adapter = {f"{name}.lora_A.weight": torch.ones(4, inner) for name, (inner, _) in layers.items()}
    adapter |= {f"{name}.lora_B.weight": torch.ones(outer, 4) for name, (_, outer) in layers.items()}
    export(file, adapter, 1.0, "bf16", provenance({"name": "mine", "version": "2.3-dev"}))
    for named in ({"base": str(file)}, {"base": str(tiny_folder("tiny/ltx2")), "transformer": str(file)}):
        with pytest.raises(WeightsError) as refused:
            plan_model(**named)
        told = f"is a LoRA of {len(layers)} layers and rank 4, trained on 2.3-dev, not a model"
        assert told in refused.value.what and refused.value.where.endswith("lora.safetensors")
        assert "lora.init_from" in refused.value.remedy


HEAVY = "model.diffusion_model.transformer_blocks.0.attn1.to_q."
PACKED = {
    "nvfp4": (
        {"weight": torch.zeros(128, 64, dtype=torch.uint8), "weight_scale": torch.zeros(128, 8).to(torch.float8_e4m3fn),
         "weight_scale_2": torch.tensor(1.0)}, "packed in 4 bits",
    ),
    "int8": (
        {"weight": torch.zeros(128, 128, dtype=torch.int8), "weight_scale": torch.zeros(128, 1)}, "8-bit integers",
    ),
    "blocks": (
        {"weight": torch.zeros(128, 128).to(torch.float8_e4m3fn), "weight_scale": torch.zeros(4, 4)}, "scale per block",
    ),
    "packed": ({"weight": torch.zeros(128, 64, dtype=torch.uint8)}, "packed as U8"),
}  # fmt: skip


@pytest.mark.parametrize(("stored", "said"), PACKED.values(), ids=PACKED)
def test_packed_weights_are_refused_with_the_reason(tmp_path, tiny_folder, ltx2_file, stored, said):
    tensors = load_file(ltx2_file()) | {HEAVY + name: value for name, value in stored.items()}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=f"{said}.*attn1.to_q.weight") as raised:
        plan_model(base=str(file), version="2.0-dev", text_encoder=str(tiny_folder("tiny/ltx2")))
    assert "bf16" in raised.value.remedy


def comfy(root, ltx2_file, packed_gemma):
    """2.5 as published for ComfyUI; gives the transformers' folder."""
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (root / folder).mkdir(parents=True)
    both = load_file(ltx2_file("tiny/ltx2.5", ("transformer", "connectors")))
    kept = {name: value for name, value in both.items() if not name.startswith("text_embedding_projection.")}
    for kind in ("dev", "distilled"):
        save_file(kept, root / "diffusion_models" / f"ltx-2.5-22b-{kind}-transformer-bf16.safetensors")
    shutil.copy(packed_gemma, root / "text_encoders" / "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors")
    vae = load_file(ltx2_file("tiny/ltx2.5", ("vae",)))
    diffusion = {name: value for name, value in vae.items() if ".decoder." not in name}
    save_file(
        diffusion | {"vae.decoder.t_embedder.mlp.0.weight": torch.zeros(4, 4)}, root / "vae" / "video.safetensors"
    )
    bare = {name.removeprefix("vae."): value for name, value in vae.items()}
    save_file(bare, root / "vae" / "ltx-2.5-video-vae-conv-bf16.safetensors")
    shutil.copy(ltx2_file("tiny/ltx2.5", ("audio_vae", "vocoder")), root / "vae" / "ltx-2.5-audio-vae-bf16.safetensors")
    return root / "diffusion_models"


def test_the_other_parts_lie_beside_a_split_transformer(tmp_path, ltx2_file, packed_gemma):
    folder = comfy(tmp_path / "models", ltx2_file, packed_gemma)
    file = folder / "ltx-2.5-22b-dev-transformer-bf16.safetensors"
    plan = plan_model(base=str(file), version="2.5-dev")
    places = {name: part.location.rpartition("/")[2] for name, part in plan.components.items()}
    assert places["vae"] == "ltx-2.5-video-vae-conv-bf16.safetensors"
    assert places["audio_vae"] == places["vocoder"] == "ltx-2.5-audio-vae-bf16.safetensors"
    assert places["text_encoder"] == places["tokenizer"] == "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors"
    assert places["connectors"] == file.name
    # The connectors are two files' tensors, and so is their digest.
    assert plan.components["connectors"].digest != plan.components["transformer"].digest
    with pytest.raises(WeightsError, match="diffusion_models") as raised:
        plan_model(base=str(folder.parent))
    assert "diffusion_models/{ltx-2.5-22b-dev-transformer-bf16.safetensors, ltx-2.5-22b-dist" in raised.value.remedy
    vaes = folder.parent / "vae"
    shutil.copy(vaes / "ltx-2.5-video-vae-conv-bf16.safetensors", vaes / "mine.safetensors")
    with pytest.raises(WeightsError, match="several files beside the transformer could be its vae"):
        plan_model(base=str(file), version="2.5-dev")


PUBLISHED = {
    "Lightricks/LTX-2:transformer": "2.0-dev",
    "Lightricks/LTX-2:ltx-2-19b-dev-fp8.safetensors": "2.0-dev",
    "Lightricks/LTX-2:ltx-2-19b-distilled.safetensors": "2.0-distilled",
    "Lightricks/LTX-2.3:ltx-2.3-22b-distilled-1.1.safetensors": "2.3-distilled",
    "Lightricks/LTX-2.5:diffusion_models/ltx-2.5-22b-dev-transformer-bf16.safetensors": "2.5-dev",
    "Lightricks/LTX-2.5-Diffusers:transformer": "2.5-distilled",
    "Lightricks/LTX-2.5-Diffusers:transformer_full": "2.5-dev",
    "someone/LTX-2:ltx-2-19b-dev.safetensors": None,
    "Lightricks/LTX-2.5-Pre-Trained:ltx-2.5-22b-pre-trained.safetensors": None,
}


@pytest.mark.parametrize(("source", "decided"), PUBLISHED.items())
def test_where_it_is_published_decides_the_kind(tmp_path, tiny_folder, ltx2_file, source, decided):
    """In a snapshot in the Hub's cache, whose repository is known."""
    repository, _, inside = source.partition(":")
    generation = repository.partition("LTX-2")[2][:2]
    name = {"": "tiny/ltx2", ".3": "tiny/ltx2.3", ".5": "tiny/ltx2.5"}[generation]
    place = tmp_path / inside
    place.parent.mkdir(parents=True, exist_ok=True)
    if inside.endswith(".safetensors"):
        shutil.copy(ltx2_file(name), place)
    else:
        shutil.copytree(tiny_folder(name) / "transformer", place)
    tree = LocalTree(tmp_path, inside, repository=repository, revision="0" * 40)
    found = Sources(FileDigests()).found(tree, inside, "transformer")
    candidates = [spec for spec in SPECS.values() if spec.version[:3] == version(name)[:3]]
    clue = published_ltx2_clue(found)
    assert [spec.version for spec in candidates if clue and clue.allows(spec)] == ([decided] if decided else [])


@pytest.fixture
def gemma_folder(tmp_path):
    """`gemma_folder(kind)`: a text encoder of the published size, by its configuration; no weights behind it."""

    def write(kind: str):
        folder = tmp_path / kind
        folder.mkdir()
        sizes = {"hidden_size": 3840, "num_hidden_layers": 48}
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": sizes}), encoding="utf-8")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        save_file({}, folder / "model.safetensors")
        return folder

    return write


CLASSES = {
    "transformer": LTX2VideoTransformer3DModel,
    "vae": AutoencoderKLLTX2Video,
    "audio_vae": AutoencoderKLLTX2Audio,
    "connectors": LTX2TextConnectors,
}


@pytest.mark.parametrize(("generation", "kind"), [("2.0", "gemma3"), ("2.3", "gemma3"), ("2.5", "gemma4_unified")])
def test_a_published_size_is_read_from_shapes_alone(tmp_path, lightricks, gemma_folder, generation, kind):
    """Names and shapes by diffusers' classes; no metadata, no data."""
    spec = SPECS[f"{generation}-dev"]
    vocoder = LTX2VocoderWithBWE if "bwe_in_channels" in spec.vocoder_config else LTX2Vocoder
    listing = {}
    for part, made in {**CLASSES, "vocoder": vocoder}.items():
        with torch.device("meta"):
            module = made(**getattr(spec, f"{part}_config"))
        for name, value in module.state_dict().items():
            listing[lightricks.name(part, name)] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [0, 0]}
    file, text = tmp_path / "x.safetensors", json.dumps(listing).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    plan = plan_model(base=str(file), version=f"{generation}-dev", text_encoder=str(gemma_folder(kind)))
    assert spec_of(plan) == spec
    other = {"2.0": "2.3-dev", "2.3": "2.5-dev", "2.5": "2.0-dev"}[generation]
    with pytest.raises(
        WeightsError, match=f"the recipe says version {other}, but the transformer has audio modules, 48"
    ):
        plan_model(base=str(file), version=other, text_encoder=str(gemma_folder(f"{kind}_text")))


@pytest.mark.parametrize("lacks", ["configuration", "tokenizer", "configuration tokenizer"])
@pytest.mark.parametrize(("name", "folder"), [("tiny/ltx2", GEMMA_3), ("tiny/ltx2.5", "text_encoder")])
def test_a_gemma_s_weights_alone_are_told_what_they_lack(tmp_path, tiny_folder, packed_gemma, name, folder, lacks):
    """ComfyUI's single files of Gemma 3 are such; here the tiny ones, named or beside the transformer."""
    file = tmp_path / "text_encoders" / "gemma_3_12B_it.safetensors"
    file.parent.mkdir()
    tensors = load_file(tiny_folder(name) / "text_encoder" / "model.safetensors")
    kept = {key.replace("language_model.model.", "model."): value for key, value in tensors.items()}
    kept["spiece_model"] = torch.zeros(8, dtype=torch.uint8)
    if "tokenizer" not in lacks:
        kept["tokenizer_json"] = torch.zeros(8, dtype=torch.uint8)
    save_file(kept, file, metadata=None if "configuration" in lacks else {"gemma_config": '{"text_config": {}}'})
    with pytest.raises(WeightsError, match="has a Gemma's weights, but lacks its") as raised:
        plan_model(base=str(tiny_folder(name)), version=version(name), text_encoder=str(file))
    for word in ("configuration", "tokenizer"):
        assert (word in raised.value.what) is (word in lacks)
    assert raised.value.where == str(file) and folder in raised.value.remedy and "the folder" in raised.value.remedy


def test_a_bare_gemma_beside_the_transformer_is_told_too(tmp_path, tiny_folder, ltx2_file):
    """And a file without any is not taken for one."""
    base = tmp_path / "diffusion_models" / "ltx-2.safetensors"
    base.parent.mkdir()
    shutil.copy(ltx2_file(), base)
    with pytest.raises(WeightsError, match="a single file has no text encoder in it"):
        plan_model(base=str(base), version="2.0-dev")
    beside = tmp_path / "text_encoders" / "gemma.safetensors"
    beside.parent.mkdir()
    shutil.copy(tiny_folder("tiny/ltx2") / "text_encoder" / "model.safetensors", beside)
    with pytest.raises(WeightsError, match="lacks its configuration .* and its tokenizer") as raised:
        plan_model(base=str(base), version="2.0-dev")
    assert raised.value.where == str(beside)
