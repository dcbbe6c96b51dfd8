"""Whether weights are whole: told for all parts at once, by names and shapes, before anything is encoded."""

import dataclasses
import io
import json
import random
import shutil
import time

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltxforge import hardware, run
from ltxforge.errors import WeightsError
from ltxforge.models.blueprints import require_whole
from ltxforge.models.detect import plan_model
from ltxforge.models.sources import spec_of
from ltxforge.recipe.parse import load
from ltxforge.specs import SPECS, TINY
from ltxforge.ui.screen import screen_for

LTX2 = ["tiny/ltx2", "tiny/ltx2.3"]
EVERY = ["tiny/ltx-video-0.9.0", "tiny/ltx-video-0.9.1", "tiny/ltx-video", *LTX2]
# Each has one; a file without them is whole all the same: no module uses it.
UNUSED = "vae.per_channel_statistics.mean-of-stds"


def header_of(path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata()  # noqa: SIM118


def headed(path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None):
    """A file with a header and no data behind it: nothing here may read any."""
    listing = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({**listing, **({"__metadata__": metadata} if metadata else {})}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.fixture
def single_file(tiny_file, ltx2_file):
    """`single_file(name)`: names and shapes of a tiny single file, and its metadata."""
    return lambda name: header_of(ltx2_file(name) if TINY[name].has_audio else tiny_file(name))


def check(path, name: str) -> None:
    require_whole(plan_model(base=str(path), version=TINY[name].version, text_encoder=name))


@pytest.mark.parametrize("name", EVERY)
def test_whole_weights_pass_in_every_form(tmp_path, tiny_folder, single_file, name):
    require_whole(plan_model(base=name))
    require_whole(plan_model(base=str(tiny_folder(name)), version=TINY[name].version))
    check(headed(tmp_path / "whole.safetensors", *single_file(name)), name)


def some(count: int) -> list:
    return [pytest.param(count, id="some"), pytest.param(None, id="all", marks=pytest.mark.sweep)]


@pytest.mark.parametrize("count", some(12))
@pytest.mark.parametrize("name", EVERY)
def test_no_tensor_can_be_lost_unnoticed(tmp_path, single_file, name, count):
    """Nor with a traceback: every one, or as many as a fast test may, each alone."""
    shapes, metadata = single_file(name)
    names = sorted(shapes.keys() - {UNUSED})
    for lost in random.Random(1).sample(names, count or len(names)):
        rest = {key: shape for key, shape in shapes.items() if key != lost}
        with pytest.raises(WeightsError) as raised:
            check(headed(tmp_path / "cut.safetensors", rest, metadata), name)
        assert "cut.safetensors" in str(raised.value), lost


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", ["tiny/ltx-video", "tiny/ltx2"])
def test_a_lost_block_is_named(tmp_path, single_file, name, block):
    """The last one too, which no other tensor betrays: the file says how many there are."""
    shapes, metadata = single_file(name)
    rest = {key: shape for key, shape in shapes.items() if f".transformer_blocks.{block}." not in key}
    file = headed(tmp_path / "cut.safetensors", rest, metadata)
    with pytest.raises(WeightsError, match=rf"fit the transformer: missing: transformer_blocks\.{block}\.") as raised:
        check(file, name)
    assert "more" in str(raised.value) and "not part of the model" not in str(raised.value)


def test_all_parts_mistakes_are_told_at_once(tmp_path, single_file, tiny_folder):
    shapes, metadata = single_file("tiny/ltx2")
    lost = ["transformer_blocks.3.audio_ff.net.2.weight", "vae.decoder.up_blocks.3.conv.conv.weight"]
    rest = {key: shape for key, shape in shapes.items() if not key.endswith(tuple(lost))}
    rest["vocoder.conv_pre.bias"] = (5,)
    rest["audio_vae.decoder.extra.weight"] = (5,)
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_folder("tiny/ltx2") / "text_encoder", folder)
    shutil.copytree(tiny_folder("tiny/ltx2") / "tokenizer", tmp_path / "tokenizer")
    encoder = load_file(folder / "model.safetensors")
    gone = next(key for key in encoder if key.endswith("layers.1.mlp.up_proj.weight"))
    save_file({key: value for key, value in encoder.items() if key != gone}, folder / "model.safetensors")
    file = headed(tmp_path / "cut.safetensors", rest, metadata)
    plan = plan_model(base=str(file), version="2.0-dev", text_encoder=str(folder))
    with pytest.raises(WeightsError) as raised:
        require_whole(plan)
    told = str(raised.value)
    assert "the transformer: missing: transformer_blocks.3.audio_ff.net.2.weight" in told
    assert "the vae: missing: decoder.up_blocks.1.upsamplers.0.conv.conv.weight" in told
    assert "the vocoder: of another shape: vocoder.conv_pre.bias (5,) for (32,)" in told
    assert "the audio vae: not part of the model: audio_vae.decoder.extra.weight" in told
    assert "text encoder's configuration: model.language_model.layers.1.mlp.up_proj.weight" in told
    assert told.count("download it again") == 5


RECIPE = """
[model]
base = '{base}'
version = "2.0-dev"
text_encoder = "tiny/ltx2"
[run]
steps = 1
[[dataset]]
path = "builtin/shapes"
resolution = "64x64"
frames = 9
[validation]
every = 0
"""


@pytest.mark.parametrize("verb", [run.run, run.plan_only])
def test_run_and_plan_tell_it_before_anything_is_encoded(tmp_path, monkeypatch, ltx2_file, verb):
    shapes, metadata = header_of(ltx2_file())
    rest = {key: shape for key, shape in shapes.items() if not key.endswith("blocks.2.audio_ff.net.2.weight")}
    monkeypatch.chdir(tmp_path)
    # A real version's size in float32 fits few hosts; here it is to be refused for another reason.
    unlimited = dataclasses.replace(hardware.detect(), host_bytes=0)
    monkeypatch.setattr(hardware, "detect", lambda: unlimited)
    recipe = tmp_path / "recipe.toml"
    base = headed(tmp_path / "cut.safetensors", rest, metadata)
    recipe.write_text(RECIPE.format(base=base), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"missing: transformer_blocks\.2\.audio_ff\.net\.2\.weight"):
        verb(load(recipe, ()), None, screen_for(io.StringIO(), plain=True))
    assert not (tmp_path / "runs" / "recipe" / "plan.json").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


ENCODERS = {
    "tiny/ltx-video": "layer.1.DenseReluDense.wo.weight", "tiny/ltx2": "layers.1.mlp.up_proj.weight",
    "tiny/ltx2.5": "layers.1.mlp.up_proj.weight",
}  # fmt: skip


@pytest.mark.parametrize("change", ["lost", "of another shape"])
@pytest.mark.parametrize(("name", "ending"), ENCODERS.items())
def test_a_text_encoder_that_is_not_whole_is_told_from_its_headers(tmp_path, tiny_folder, name, ending, change):
    folder = tmp_path / "text_encoder"
    shutil.copytree(tiny_folder(name) / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(tiny_folder(name) / "text_encoder", folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith(ending)]:
            del tensors[key]
            if change != "lost":
                tensors[key] = torch.zeros(3)
        save_file(tensors, file, metadata={"format": "pt"})
    plan = plan_model(base=name, text_encoder=str(folder))
    with pytest.raises(WeightsError, match=ending.replace(".", r"\.")):
        require_whole(plan)


def test_a_packed_text_encoder_too(tmp_path, packed_gemma, tiny_folder):
    file = tmp_path / "gemma4.safetensors"
    shapes, metadata = header_of(packed_gemma)
    plan = plan_model(base=str(tiny_folder("tiny/ltx2.5")), version="2.5-dev", text_encoder=str(packed_gemma))
    require_whole(plan)
    del shapes["model.layers.2.self_attn.k_proj.weight"]
    plan = plan_model(
        base=str(tiny_folder("tiny/ltx2.5")), version="2.5-dev", text_encoder=str(headed(file, shapes, metadata))
    )
    with pytest.raises(WeightsError, match=r"layers\.2\.self_attn\.k_proj\.weight") as raised:
        require_whole(plan)
    assert raised.value.where == str(file)


def test_older_gemma_folders_have_other_names(tmp_path, tiny_folder):
    """As google/gemma-3-12b-it-qat-q4_0-unquantized is published; transformers knows them."""
    folder = tmp_path / "text_encoder"
    shutil.copytree(tiny_folder("tiny/ltx2") / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(tiny_folder("tiny/ltx2") / "text_encoder", folder)
    file = folder / "model.safetensors"
    older = {key.replace("model.language_model.", "language_model.model."): v for key, v in load_file(file).items()}
    assert any(key.startswith("language_model.model.layers.") for key in older)
    save_file(older, file, metadata={"format": "pt"})
    require_whole(plan_model(base="tiny/ltx2", text_encoder=str(folder)))


CLASSES = {
    "transformer": LTX2VideoTransformer3DModel, "vae": AutoencoderKLLTX2Video, "audio_vae": AutoencoderKLLTX2Audio,
    "connectors": LTX2TextConnectors, "vocoder": LTX2Vocoder,
}  # fmt: skip
# The last of its kind each: without it the rest looks like a shorter model.
LAST = {
    "transformer": "transformer_blocks.47.", "vae": "decoder.up_blocks.2.resnets.4.",
    "audio_vae": "encoder.down.0.block.1.", "connectors": "video_connector.transformer_blocks.1.",
}  # fmt: skip


@pytest.fixture(scope="module")
def published_20(lightricks):
    """Names and shapes of 2.0 in its published size."""
    shapes = {}
    for part, kind in CLASSES.items():
        with torch.device("meta"):
            module = kind(**getattr(SPECS["2.0-dev"], f"{part}_config"))
        shapes |= {lightricks.name(part, name): tuple(value.shape) for name, value in module.state_dict().items()}
    return shapes


@pytest.mark.parametrize("part", LAST)
def test_in_its_published_size_a_file_without_metadata_cannot_lose_its_last(tmp_path, published_20, lightricks, part):
    with torch.device("meta"):
        module = CLASSES[part](**getattr(SPECS["2.0-dev"], f"{part}_config"))
    own = [name for name in module.state_dict() if name.startswith(LAST[part])]
    lost = {lightricks.name(part, name) for name in own}
    file = headed(tmp_path / "x.safetensors", {key: v for key, v in published_20.items() if key not in lost})
    plan = plan_model(base=str(file), version="2.0-dev", text_encoder=str(gemma_folder(tmp_path)))
    assert spec_of(plan) == SPECS["2.0-dev"]
    began = time.perf_counter()
    with pytest.raises(WeightsError) as raised:
        require_whole(plan)
    assert time.perf_counter() - began < 20
    told = next(line for line in str(raised.value).splitlines() if f"fit the {part.replace('_', ' ')}: " in line)
    assert f"missing: {sorted(own)[0]}" in told and "not part of the model" not in told
    assert f"{file}: tensors" in told


def gemma_folder(parent):
    """A Gemma 3 12B by its configuration, without its weights."""
    folder = parent / "gemma"
    folder.mkdir()
    sizes = {"hidden_size": 3840, "num_hidden_layers": 48}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": sizes}), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    return folder
