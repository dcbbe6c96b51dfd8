"""Loading: folders, single files and what does not fit, against the tensors that were saved."""

import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltxforge.errors import WeightsError
from ltxforge.models import tiny
from ltxforge.models.convert import vae_config
from ltxforge.models.detect import plan_model
from ltxforge.models.load import load_model
from ltxforge.models.tensors import fill
from ltxforge.models.text_encoders import load_tokenizer
from ltxforge.models.weights import Header, TensorEntry
from ltxforge.specs import SPECS, TINY

CPU = torch.device("cpu")


def same_tensors(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def load(plan, dtype=torch.float32):
    model = load_model(plan, CPU, dtype)
    model.load_transformer()
    return model


@pytest.mark.parametrize(
    "name", ["tiny/ltx-video-0.9.0", "tiny/ltx-video-0.9.1", "tiny/ltx-video", "tiny/ltx-video-13b"]
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_loaded_is_what_was_saved(tiny_folder, tiny_file, name, form):
    spec = TINY[name]
    base = tiny_folder(name) if form == "folder" else tiny_file(name)
    model = load(plan_model(base=str(base), version=spec.version, text_encoder=str(tiny_folder(name))))
    assert same_tensors(model.transformer, tiny.tiny_transformer(spec))
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())
    with model.vae():
        assert same_tensors(model._vae, tiny.tiny_vae(spec))
    with model.text_encoder():
        assert same_tensors(model._text_encoder[0], tiny.tiny_text_encoder(spec))
    assert model.spec.transformer_config == spec.transformer_config


def test_a_dtype_is_applied_while_loading(tiny_file, tiny_folder):
    plan = plan_model(base=str(tiny_file()), version="0.9.5", text_encoder=str(tiny_folder()))
    assert {p.dtype for p in load(plan, torch.bfloat16).transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
def test_the_vae_configuration_follows_from_the_shapes(published_shapes, version):
    header = Header({name: TensorEntry("BF16", shape) for name, shape in published_shapes(version).items()})
    assert vae_config(header, {}) == SPECS[version].vae_config


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path, tiny_file, tiny_folder):
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny_file(), file)
    model = load(plan_model(base=str(file), version="0.9.5", text_encoder=str(tiny_folder())))
    with file.open("r+b") as content:
        content.seek(-4096, 2)
        content.write(bytes(4096))
    assert same_tensors(model.transformer, tiny.tiny_transformer(TINY["tiny/ltx-video"]))


def spoiled(tmp_path, tiny_file, change):
    """The tiny single file with some tensors changed; the metadata kept."""
    tensors, file = load_file(tiny_file()), tmp_path / "model.safetensors"
    with safe_open(tiny_file(), framework="pt") as stored:
        metadata = stored.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return file


LAST = "model.diffusion_model.transformer_blocks.3.ff.net.2.bias"
SPOILED = {
    "missing": (lambda tensors: tensors.pop(LAST), r"missing: transformer_blocks\.3\.ff\.net\.2\.bias"),
    "unexpected": (
        lambda tensors: tensors.update({"model.diffusion_model.extra.bias": torch.zeros(2)}),
        r"not part of the model: model\.diffusion_model\.extra\.bias",
    ),
    "misshaped": (lambda tensors: tensors.update({LAST: torch.zeros(7)}), r"of another shape: .*\(7,\) for \(128,\)"),
}


@pytest.mark.parametrize(("change", "said"), SPOILED.values(), ids=SPOILED)
def test_tensors_that_do_not_fit_are_named(tmp_path, tiny_file, change, said):
    file = spoiled(tmp_path, tiny_file, change)
    plan = plan_model(base=str(file), version="0.9.5", text_encoder="tiny/ltx-video")
    with pytest.raises(WeightsError, match=said) as raised:
        load(plan)
    assert str(file) in raised.value.where


def test_an_unpublished_width_needs_its_heads(tmp_path, tiny_file):
    file = tmp_path / "model.safetensors"
    save_file(load_file(tiny_file()), file)  # without metadata
    with pytest.raises(WeightsError, match="attention heads"):
        load(plan_model(base=str(file), version="0.9.5", text_encoder="tiny/ltx-video"))


def test_a_mixed_model_takes_each_part_from_its_source(tiny_folder, tiny_file):
    plan = plan_model(base="tiny/ltx-video", transformer=str(tiny_file()), text_encoder=str(tiny_folder()))
    model = load(plan)
    assert same_tensors(model.transformer, tiny.tiny_transformer(TINY["tiny/ltx-video"]))
    with model.vae():
        assert same_tensors(model._vae, tiny.tiny_vae(TINY["tiny/ltx-video"]))


def test_the_scheduler_is_the_folders_own(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder(), copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 7.0}))
    model = load(plan_model(base=str(copy), version="0.9.5"))
    assert model._parts.scheduler().config.shift == 7.0


def test_fill_reads_a_folder_of_shards_as_one(tiny_folder):
    spec = TINY["tiny/ltx-video"]
    with torch.device("meta"):
        module = tiny.LTXVideoTransformer3DModel(**spec.transformer_config)
    names = {name: name for name in module.state_dict()}
    filled = fill(module, tiny_folder() / "transformer", names, CPU, torch.float32)
    assert same_tensors(filled, tiny.tiny_transformer(spec))


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A small sentencepiece model, trained here, with T5's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"a red ball rolls over {n} green hills in the rain" for n in range(200)), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=48, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "spiece.vocab").unlink()
    return folder


@pytest.mark.parametrize("configured", [False, True], ids=["bare", "configured"])
def test_t5s_tokenizer_loads_from_its_sentencepiece_file(tmp_path, spiece, configured):
    folder = tmp_path / "tokenizer"
    shutil.copytree(spiece, folder)
    if configured:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 128}')
    tokenizer = load_tokenizer(folder)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    for caption in ("a red ball", "hills in the rain", "green green"):
        words = tokenizer([caption], padding="max_length", max_length=32, truncation=True)
        expected = [*truth.encode(caption), 1]
        assert words.input_ids[0] == expected + [0] * (32 - len(expected))
        assert sum(words.attention_mask[0]) == len(expected)
