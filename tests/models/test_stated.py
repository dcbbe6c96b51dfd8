"""What files say of themselves: another type or word than it must be is refused with its place, never taken."""

import copy
import json

import pytest
from safetensors.torch import load_file, save_file

from ltxforge.errors import WeightsError
from ltxforge.models.audio_features import MelSettings
from ltxforge.models.blueprints import mel_settings, require_whole
from ltxforge.models.detect import plan_model
from ltxforge.models.sources import spec_of
from ltxforge.models.stated import Stated
from ltxforge.plan import ModelPlan
from ltxforge.specs import TINY

# (where in `config`, what it says, what is said about it)
WRONG = [
    (("transformer",), None, "config.transformer is null, and must be a table"),
    (("transformer",), "x", 'config.transformer is "x", and must be a table'),
    (("transformer", "rope_type"), "weird", 'config.transformer.rope_type is "weird", and must be one of split, int'),
    (("transformer", "rope_type"), ["split"], "must be one of split"),
    (("transformer", "norm_eps"), "1e-6", 'norm_eps is "1e-6", and must be a number above 0'),
    (("transformer", "norm_eps"), True, "norm_eps is true, and must be a number above 0"),
    (("transformer", "positional_embedding_theta"), -1, "must be a number above 0"),
    (("transformer", "positional_embedding_theta"), float("nan"), "must be a number above 0"),
    (("transformer", "num_layers"), "4", 'num_layers is "4", and must be a whole number above 0'),
    (("transformer", "num_layers"), 10**400, "must be a whole number above 0"),
    (("transformer", "num_attention_heads"), 4.5, "num_attention_heads is 4.5, and must be a whole number above 0"),
    (("transformer", "num_attention_heads"), None, "num_attention_heads is null, and must be a whole number above 0"),
    (("transformer", "frequencies_precision"), "float16", "must be one of float64, float32"),
    (("transformer", "positional_embedding_max_pos"), [20, 2048], "must be a list of 3"),
    (("transformer", "positional_embedding_max_pos"), 20, "must be a list"),
    (("transformer", "connector_positional_embedding_max_pos"), ["4096"], "must be a whole number above 0"),
    (("transformer", "timestep_scale_multiplier"), 1, "timestep_scale_multiplier = 1, so .* ltxforge gives .* 1000"),
    (("transformer", "timestep_scale_multiplier"), "1000", "must be a number above 0"),
    (("audio_vae",), [1], r"config.audio_vae is \[1\], and must be a table"),
    (("audio_vae", "model"), None, "config.audio_vae.model is null, and must be a table"),
    (("audio_vae", "model", "params", "ddconfig"), 3, "params.ddconfig is 3, and must be a table"),
    (("audio_vae", "model", "params", "sampling_rate"), "16000", "sampling_rate is .16000., and must be a whole"),
    (("audio_vae", "model", "params", "ddconfig", "causality_axis"), "up", "must be one of height, width"),
    (("audio_vae", "preprocessing"), "x", "config.audio_vae.preprocessing is .x., and must be a table"),
    (("audio_vae", "preprocessing", "stft", "causal"), "yes", "causal is .yes., and must be true or false"),
    (("audio_vae", "preprocessing", "stft", "hop_length"), 0, "must be a whole number above 0"),
    (("audio_vae", "preprocessing", "stft", "win_length"), 4096, "longer than the transform's 1024"),
    (("audio_vae", "preprocessing", "mel", "mel_fmax"), 9000, "mel bins from 0 to 9000 Hz do not fit 16000"),
    (("audio_vae", "preprocessing", "mel", "mel_fmin"), "0", "must be a number"),
    (("vocoder",), 7, "config.vocoder is 7, and must be a table"),
    (("vocoder", "upsample_rates"), "65222", "must be a list"),
    (("vocoder", "resblock_dilation_sizes"), [[1, "3", 5]], "must be a whole number above 0"),
    ((), [], r"metadata config is \[\], and must be a table"),
]


def changed(config: dict, place: tuple[str, ...], value: object) -> object:
    """The configuration with one thing in it replaced, tables on the way made."""
    if not place:
        return value
    made = copy.deepcopy(config)
    table = made
    for name in place[:-1]:
        table = table.setdefault(name, {})
    table[place[-1]] = value
    return made


def planned(file, name: str) -> ModelPlan:
    """As `plan` and `run` do it, before anything is encoded."""
    plan = plan_model(base=str(file), version=TINY[name].version, text_encoder=name)
    spec_of(plan)
    require_whole(plan)
    return plan


@pytest.mark.parametrize(("place", "value", "said"), WRONG)
def test_what_a_file_says_of_itself_wrongly_is_refused(tmp_path, ltx2_file, lightricks, place, value, said):
    config = changed(lightricks.config(TINY["tiny/ltx2"]), place, value)
    file = tmp_path / "ltx-2.safetensors"
    save_file(load_file(ltx2_file()), file, metadata={"config": json.dumps(config)})
    with pytest.raises(WeightsError, match=said) as raised:
        planned(file, "tiny/ltx2")
    assert raised.value.where == str(file) and raised.value.remedy


def test_a_config_that_is_no_json_is_refused(tmp_path, ltx2_file):
    file = tmp_path / "ltx-2.safetensors"
    save_file(load_file(ltx2_file()), file, metadata={"config": '{"transformer": '})
    with pytest.raises(WeightsError, match="`config` in its metadata is no JSON"):
        planned(file, "tiny/ltx2")


@pytest.mark.parametrize(("place", "value", "said"), [WRONG[0], WRONG[1], WRONG[8], WRONG[10], WRONG[16]])
def test_so_it_is_for_ltx_video(tmp_path, tiny_file, place, value, said):
    file, heads = tmp_path / "ltxv.safetensors", TINY["tiny/ltx-video"].transformer_config["num_attention_heads"]
    config = changed({"transformer": {"num_attention_heads": heads}}, place, value)
    save_file(load_file(tiny_file()), file, metadata={"config": json.dumps(config)})
    with pytest.raises(WeightsError, match=said) as raised:
        planned(file, "tiny/ltx-video")
    assert raised.value.where == str(file)


def test_published_ways_of_writing_are_taken(tmp_path, ltx2_file, lightricks):
    """Whole numbers as floats, a highest frequency of null, and settings that no table here knows."""
    config = lightricks.config(TINY["tiny/ltx2"])
    config["transformer"] |= {
        "av_ca_timestep_scale_multiplier": 1000.0, "timestep_scale_multiplier": 1000, "num_vector_embeds": None,
    }  # fmt: skip
    config["audio_vae"]["preprocessing"]["mel"]["mel_fmax"] = None
    file = tmp_path / "ltx-2.safetensors"
    save_file(load_file(ltx2_file()), file, metadata={"config": json.dumps(config)})
    plan = planned(file, "tiny/ltx2")
    spec = spec_of(plan)
    assert spec.transformer_config == TINY["tiny/ltx2"].transformer_config
    assert type(spec.transformer_config["cross_attn_timestep_scale_multiplier"]) is int
    assert mel_settings(plan, spec) == MelSettings()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("transformer", "rope_type", "weird"),
        ("transformer", "timestep_scale_multiplier", 1),
        ("vocoder", "antialias", 1),
    ],
)
def test_a_folder_s_config_is_held_to_the_same(tmp_path, tiny_folder, part, name, value):
    base = tiny_folder("tiny/ltx2")
    config = json.loads((base / part / "config.json").read_bytes())
    folder = tmp_path / part
    folder.mkdir()
    for file in (base / part).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, name: value}), encoding="utf-8")
    with pytest.raises(WeightsError, match=name) as raised:
        spec_of(plan_model(base=str(base), version="2.0-dev", **{part: str(folder)}))
    assert raised.value.where == str(folder)


def test_metadata_that_are_no_texts_are_a_damaged_file(tmp_path):
    text = json.dumps({"__metadata__": {"config": {"transformer": {}}}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightsError, match="is no safetensors file"):
        plan_model(base=str(file))


def test_a_long_wrong_value_is_cut_short():
    with pytest.raises(WeightsError) as raised:
        Stated({"t": "x" * 10_000}, "f").table("t")
    assert len(str(raised.value)) < 250
