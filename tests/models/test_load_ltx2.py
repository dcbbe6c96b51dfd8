"""LTX-2's weights: folders, single files, split files and fp8, against the tensors that were saved."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from safetensors.torch import load_file, save_file

from ltxforge.errors import WeightsError
from ltxforge.models import ltx2_tiny
from ltxforge.models.audio_features import MelSettings
from ltxforge.models.detect import plan_model
from ltxforge.models.interface import WantedPrompt
from ltxforge.models.load import load_model
from ltxforge.models.ltx2_video import LTX2Video
from ltxforge.models.sources import spec_of
from ltxforge.models.tensors import fill
from ltxforge.models.text_encoders import _gemma_class, load_gemma
from ltxforge.quant.keep import Keep
from ltxforge.specs import TINY

CPU = torch.device("cpu")
NAMES = ["tiny/ltx2", "tiny/ltx2.3", "tiny/ltx2.5"]
PARTS = ["transformer", "vae", "audio_vae", "vocoder", "connectors", "text_encoder"]


def same_tensors(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def made(plan, name: str, dtype: torch.dtype = torch.float32):
    """One part of the plan's model, and whether it has memory everywhere."""
    asked = (Keep(CPU, dtype),) if name == "transformer" else (CPU, dtype)
    part = getattr(load_model(plan, CPU, dtype)._parts, name)(*asked)
    module = part[0] if isinstance(part, tuple) else part
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module


def plan_of(name: str, form: str, tiny_folder, ltx2_file):
    spec = TINY[name]
    if form == "builtin":
        return plan_model(base=name)
    base = tiny_folder(name) if form == "folder" else ltx2_file(name)
    return plan_model(base=str(base), version=spec.version, text_encoder=str(tiny_folder(name)))


@pytest.mark.parametrize("form", ["builtin", "folder", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_what_was_saved(tiny_folder, ltx2_file, name, form):
    spec = TINY[name]
    plan = plan_of(name, form, tiny_folder, ltx2_file)
    for part in PARTS:
        assert same_tensors(made(plan, part), getattr(ltx2_tiny, f"tiny_{part}")(spec)), part


@pytest.mark.parametrize("form", ["builtin", "folder", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_the_spec_has_the_files_sizes(tiny_folder, ltx2_file, name, form):
    spec, found = TINY[name], spec_of(plan_of(name, form, tiny_folder, ltx2_file))
    for config in ("transformer_config", "connectors_config", "audio_vae_config", "vocoder_config"):
        assert getattr(found, config) == getattr(spec, config), config
    assert {key: value for key, value in _tupled(found.vae_config).items() if key in spec.vae_config} == spec.vae_config
    assert found.caption_channels == spec.caption_channels


def _tupled(config: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def test_split_files_take_each_part_from_its_file(tmp_path, tiny_folder, ltx2_file, packed_gemma):
    """2.5's way: connectors with the transformer, their projections with the text encoder, sound in one file."""
    spec, name = TINY["tiny/ltx2.5"], "tiny/ltx2.5"
    transformer = split(tmp_path, "diffusion_models/ltx-2.5-22b-dev-transformer-bf16", without_projections(ltx2_file))
    sound = str(ltx2_file(name, ("audio_vae", "vocoder")))
    plan = plan_model(
        base=str(transformer), version="2.5-dev", text_encoder=str(packed_gemma), vae=str(ltx2_file(name, ("vae",))),
        audio_vae=sound, vocoder=sound,
    )  # fmt: skip
    for part in PARTS:
        if part != "text_encoder":
            assert same_tensors(made(plan, part), getattr(ltx2_tiny, f"tiny_{part}")(spec)), part
    assert spec_of(plan).connectors_config == spec.connectors_config


def without_projections(ltx2_file) -> dict[str, torch.Tensor]:
    path = ltx2_file("tiny/ltx2.5", ("transformer", "connectors"))
    return {name: value for name, value in load_file(path).items() if not name.startswith("text_embedding_projection.")}


def split(root, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """A file of a folder in ComfyUI's layout."""
    path = root / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path


def test_the_packed_text_encoder_reads_as_its_folder_does(tiny_folder, packed_gemma):
    folder = plan_model(base=str(tiny_folder("tiny/ltx2.5")), version="2.5-dev")
    packed = plan_model(base=str(tiny_folder("tiny/ltx2.5")), version="2.5-dev", text_encoder=str(packed_gemma))
    parts = [load_model(plan, CPU, torch.float32)._parts for plan in (folder, packed)]
    (one, its), (other, theirs) = (each.text_encoder(CPU, torch.float32) for each in parts)
    asked = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    words, same = (each(["a red fox"], **asked) for each in (its, theirs))
    assert torch.equal(words.input_ids, same.input_ids) and torch.equal(words.attention_mask, same.attention_mask)
    assert int(words.attention_mask[0].sum()) == 10 and words.input_ids[0, 6] == its.bos_token_id  # nine bytes, right
    with torch.no_grad():
        states = [m.model(**words, output_hidden_states=True).hidden_states for m in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert packed.components["tokenizer"].location == str(packed_gemma)


def as_fp8(tensors: dict[str, torch.Tensor], scaled: bool) -> dict[str, torch.Tensor]:
    """Lightricks' fp8 files: the blocks' linears in e4m3 with scalars for weight and input, all else as it was."""
    made = {}
    for name, value in tensors.items():
        if "transformer_blocks." not in name or not name.endswith(".weight") or value.ndim != 2 or "gate" in name:
            made[name] = value.bfloat16() if value.is_floating_point() else value
            continue
        scale = value.abs().max() / 448 if scaled else torch.tensor(1.0)
        made[name] = (value / scale).to(torch.float8_e4m3fn)
        if scaled:
            made[name.removesuffix(".weight") + ".weight_scale"] = scale.float()
            made[name.removesuffix(".weight") + ".input_scale"] = torch.tensor(0.5)
    return made


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "cast"])
@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.3"])
def test_fp8_files_become_whole_weights(tmp_path, tiny_folder, lightricks, name, scaled):
    spec = TINY[name]
    stored = as_fp8(lightricks.tensors(spec), scaled)
    file = split(tmp_path, "ltx-2-19b-dev-fp8", stored, {"config": json.dumps(lightricks.config(spec))})
    plan = plan_model(base=str(file), version=spec.version, text_encoder=str(tiny_folder(name)))
    loaded = made(plan, "transformer", torch.bfloat16).state_dict()
    truth = ltx2_tiny.tiny_transformer(spec).state_dict()
    eighths = 0
    for own, value in loaded.items():
        theirs = lightricks.name("transformer", own)
        whole = stored[theirs].double() * stored.get(theirs.removesuffix(".weight") + ".weight_scale", 1.0)
        assert value.dtype == torch.bfloat16 and torch.equal(value, whole.float().bfloat16()), own
        assert torch.allclose(value.double(), truth[own].double(), rtol=0.07, atol=2e-3), own
        eighths += stored[theirs].dtype == torch.float8_e4m3fn
    assert eighths > 50


def test_a_scale_per_row_multiplies_its_row(tmp_path):
    weight = torch.tensor([[1.0, 2.0], [4.0, -8.0]]).to(torch.float8_e4m3fn)
    stored = {"to_q.weight": weight, "to_q.weight_scale": torch.tensor([[2.0], [0.5]]), "to_q.bias": torch.zeros(2)}
    file = split(tmp_path, "w", stored)
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    fill(module, file, {"weight": "to_q.weight", "bias": "to_q.bias"}, CPU, torch.float32)
    assert module.weight.tolist() == [[2.0, 4.0], [2.0, -4.0]]


def test_mel_settings_come_from_the_file(tiny_folder, ltx2_file, lightricks, tmp_path):
    name = "tiny/ltx2"
    config = lightricks.config(TINY[name])
    config["audio_vae"]["preprocessing"]["mel"] = {"mel_fmin": 20, "mel_fmax": 7600}
    file = split(tmp_path, "audio", load_file(ltx2_file(name)), {"config": json.dumps(config)})
    asked = {"base": str(tiny_folder(name)), "version": "2.0-dev"}
    assert load_model(plan_model(**asked), CPU, torch.float32)._parts.mel() == MelSettings()
    told = load_model(plan_model(**asked, audio_vae=str(file)), CPU, torch.float32)._parts.mel()
    assert (told.lowest_hz, told.highest_hz, told.hop_length) == (20.0, 7600.0, 160)


def test_settings_of_a_file_are_taken_over_the_versions(tmp_path, tiny_folder, ltx2_file, lightricks):
    """What no shape shows: the file's own word counts."""
    config = lightricks.config(TINY["tiny/ltx2"])
    config["transformer"] |= {
        "positional_embedding_theta": 500.0, "frequencies_precision": "float32", "rope_type": "interleaved",
        "positional_embedding_max_pos": [10, 1024, 512], "av_ca_timestep_scale_multiplier": 1,
    }  # fmt: skip
    file = split(tmp_path, "own", load_file(ltx2_file()), {"config": json.dumps(config)})
    plan = plan_model(base=str(file), version="2.0-dev", text_encoder=str(tiny_folder("tiny/ltx2")))
    transformer = spec_of(plan).transformer_config
    rope = [transformer[key] for key in ("rope_theta", "rope_type", "rope_double_precision")]
    assert rope == [500.0, "interleaved", False]
    assert [transformer[key] for key in ("pos_embed_max_pos", "base_height", "base_width")] == [10, 1024, 512]
    assert transformer["cross_attn_timestep_scale_multiplier"] == 1
    assert spec_of(plan).connectors_config["rope_theta"] == 500.0


def test_a_changed_width_or_depth_is_read_from_the_shapes(tmp_path, tiny_folder):
    spec = TINY["tiny/ltx2.3"]
    own = {**spec.transformer_config, "num_layers": 2, "audio_num_attention_heads": 8, "audio_attention_head_dim": 8}
    transformer = LTX2VideoTransformer3DModel(**own)
    tensors = {f"diffusion_model.{name}": value for name, value in transformer.state_dict().items()}
    file = split(tmp_path, "mine", tensors)
    plan = plan_model(base=str(tiny_folder("tiny/ltx2.3")), version="2.3-dev", transformer=str(file))
    assert spec_of(plan).transformer_config == own
    assert same_tensors(made(plan, "transformer"), transformer)


def test_tensors_that_do_not_fit_are_named(tmp_path, tiny_folder, ltx2_file, lightricks):
    tensors, config = load_file(ltx2_file()), lightricks.config(TINY["tiny/ltx2"])
    del tensors["model.diffusion_model.transformer_blocks.1.audio_ff.net.2.bias"]
    file = split(tmp_path, "cut", tensors, {"config": json.dumps(config)})
    plan = plan_model(base=str(file), version="2.0-dev", text_encoder=str(tiny_folder("tiny/ltx2")))
    with pytest.raises(WeightsError, match=r"missing: transformer_blocks\.1\.audio_ff\.net\.2\.bias"):
        made(plan, "transformer")


def test_planning_a_file_reads_no_tensor_and_no_network(tiny_folder, ltx2_file):
    """A process whose sockets fail, without torch."""
    code = (
        "import json, socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from ltxforge.models.detect import plan_model\n"
        "from ltxforge.models.sources import spec_of\n"
        "plan = plan_model(**json.loads(sys.argv[1]))\n"
        "assert spec_of(plan).connectors_config['caption_channels'] == 64\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    asked = {"base": str(ltx2_file()), "version": "2.0-dev", "text_encoder": str(tiny_folder("tiny/ltx2"))}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.5"])
def test_a_text_encoder_is_never_made_up_in_part(tmp_path, tiny_folder, name):
    """transformers fills what is missing with random numbers, and only warns."""
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_folder(name) / "text_encoder", encoder)
    tensors = load_file(encoder / "model.safetensors")
    lost = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[lost]
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tiny_folder(name) / "tokenizer", tmp_path / "tokenizer")
    plan = plan_model(base=str(tiny_folder(name)), text_encoder=str(encoder))
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        made(plan, "text_encoder")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_model_reads_and_hears_as_the_built_in_one(tiny_folder, ltx2_file, form):
    """From files and built in: the same embeddings and latents, to the last bit."""
    name = "tiny/ltx2.3"
    plans = [plan_of(name, kind, tiny_folder, ltx2_file) for kind in (form, "builtin")]
    models = [load_model(plan, CPU, torch.float32, modalities="both") for plan in plans]
    assert {type(model) for model in models} == {LTX2Video}
    wanted = [WantedPrompt("a red fox", "both")]
    prompts = [found.tensors for model in models for found in model.encode_prompts(wanted, 128)]
    sounds = []
    for model in models:
        with model.audio_vae():
            sounds.append(model.encode_sound(torch.linspace(-1, 1, 16000).expand(2, -1).sin(), 25))
    assert torch.equal(sounds[0].mean, sounds[1].mean) and sounds[0].mean.shape[0] == 25
    for modality in ("video", "audio"):
        assert torch.equal(prompts[0][modality], prompts[1][modality])


def test_built_in_text_encoders_serve_files_of_their_size(ltx2_file):
    plan = plan_model(base=str(ltx2_file()), version="2.0-dev", text_encoder="tiny/ltx2")
    assert plan.components["text_encoder"].kind == "builtin"
    assert spec_of(plan).connectors_config == TINY["tiny/ltx2"].connectors_config
    with pytest.raises(WeightsError, match="is a Gemma 4"):
        plan_model(base=str(ltx2_file()), version="2.0-dev", text_encoder="tiny/ltx2.5")


@pytest.mark.parametrize("name", ["tiny/ltx2", "tiny/ltx2.5"])
def test_a_text_encoder_in_bf16_is_transformers_own(tiny_folder, packed_gemma, name):
    """Rotary positions stay in float32: rounded to bf16 they are off by whole tokens further down a caption."""
    folder = tiny_folder(name) / "text_encoder"
    kind = _gemma_class(folder)
    stock = kind.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    sources = [
        (folder, tiny_folder(name) / "tokenizer"),
        *([(packed_gemma, packed_gemma)] if name.endswith("5") else []),
    ]
    words = torch.arange(5, 200)[None]
    with torch.no_grad():
        expected = stock.model(words).last_hidden_state
        for encoder, tokenizer in sources:
            ours, _ = load_gemma(encoder, tokenizer, CPU, torch.bfloat16)
            assert torch.equal(ours.model(words).last_hidden_state, expected)
            assert all(each.dtype == torch.bfloat16 for each in ours.parameters())
    rotary = [each for each, _ in ours.named_buffers() if "inv_freq" in each]
    assert rotary and all(ours.get_buffer(each).dtype == torch.float32 for each in rotary)
