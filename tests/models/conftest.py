"""Weights for the tests: tiny models as diffusers folders and as single files in Lightricks' spelling; bare headers."""

import json
import re
import types

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from safetensors.torch import save_file

from ltxforge.models import ltx2_tiny, tiny
from ltxforge.specs import SPECS, TINY

# Where diffusers' blocks stand in Lightricks' flat lists, per VAE family.
OLD_ENCODER = {
    "down_blocks.0.downsamplers.0": 1, "down_blocks.0.conv_out": 2, "down_blocks.0": 0,
    "down_blocks.1.downsamplers.0": 4, "down_blocks.1.conv_out": 5, "down_blocks.1": 3,
    "down_blocks.2.downsamplers.0": 7, "down_blocks.2": 6, "down_blocks.3": 8, "mid_block": 9,
}  # fmt: skip
NEW_ENCODER = {
    "mid_block": 8,
    **{f"down_blocks.{n}.downsamplers.0": 2 * n + 1 for n in range(4)},
    **{f"down_blocks.{n}": 2 * n for n in range(4)},
}
OLD_DECODER = {
    "mid_block": 0, "up_blocks.0": 1, "up_blocks.1.upsamplers.0": 2, "up_blocks.1": 3, "up_blocks.2.conv_in": 4,
    "up_blocks.2.upsamplers.0": 5, "up_blocks.2": 6, "up_blocks.3.conv_in": 7, "up_blocks.3.upsamplers.0": 8,
    "up_blocks.3": 9,
}  # fmt: skip
NEW_DECODER = {
    "mid_block": 0,
    **{f"up_blocks.{n}.upsamplers.0": 2 * n + 1 for n in range(3)},
    **{f"up_blocks.{n}": 2 * n + 2 for n in range(3)},
}
ENCODERS = {"0.9.0": OLD_ENCODER, "0.9.1": OLD_ENCODER, "0.9.5": NEW_ENCODER}
DECODERS = {"0.9.0": OLD_DECODER, "0.9.1": NEW_DECODER, "0.9.5": NEW_DECODER}


def lightricks_transformer_name(name: str) -> str:
    for ours, theirs in (("proj_in.", "patchify_proj."), ("time_embed.", "adaln_single.")):
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return "model.diffusion_model." + name.replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm.")


def lightricks_vae_name(name: str, family: str) -> str:
    if name in ("latents_mean", "latents_std"):
        return f"vae.per_channel_statistics.{'mean-of-means' if name == 'latents_mean' else 'std-of-means'}"
    part, rest = name.split(".", 1)
    if rest.startswith(("time_embedder.", "scale_shift_table")):
        return f"vae.{part}.last_{rest}"
    places = (ENCODERS if part == "encoder" else DECODERS)[family]
    block = next((place for place in sorted(places, key=len, reverse=True) if rest.startswith(place + ".")), None)
    if block is not None:
        rest = f"{'down' if part == 'encoder' else 'up'}_blocks.{places[block]}.{rest.removeprefix(block + '.')}"
    rest = rest.replace("resnets.", "res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.")
    return f"vae.{part}.{re.sub(r'norm3[.]', 'norm3.norm.', rest)}"


def single_file_metadata(spec, distilled: bool = False, causal: bool | None = None) -> dict[str, str]:
    config = {
        "transformer": {
            "_class_name": "Transformer3DModel",
            "num_attention_heads": spec.transformer_config["num_attention_heads"],
            "attention_head_dim": spec.transformer_config["attention_head_dim"],
            "num_layers": spec.blocks,
            "causal_temporal_positioning": spec.rope == "causal" if causal is None else causal,
        },
        "vae": {"_class_name": "CausalVideoAutoencoder", "dims": 3},
        "scheduler": {"_class_name": "RectifiedFlowScheduler"},
    }
    if distilled:
        config["allowed_inference_steps"] = [1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219]
    return {"config": json.dumps(config)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`tiny_folder(name)`: a tiny model as a diffusers folder, sharded; made once per session, not to be written to."""
    made = {}

    def make(name: str = "tiny/ltx-video"):
        if name not in made:
            spec, folder = TINY[name], tmp_path_factory.mktemp("folder") / "model"
            tiny_pipeline(spec).save_pretrained(folder, max_shard_size="2MB")
            made[name] = folder
        return made[name]

    return make


def tiny_pipeline(spec) -> DiffusionPipeline:
    """diffusers' own pipeline over a tiny model's parts."""
    scheduler = FlowMatchEulerDiscreteScheduler(**spec.scheduler_config)
    if spec.has_audio:
        parts = {
            name: getattr(ltx2_tiny, f"tiny_{name}")(spec)
            for name in ("vae", "audio_vae", "text_encoder", "connectors", "transformer", "vocoder")
        }
        return LTX2Pipeline(scheduler=scheduler, tokenizer=ltx2_tiny.gemma_tokenizer(), **parts)
    kind = LTXConditionPipeline if spec.rope == "causal" else LTXPipeline
    return kind(
        scheduler=scheduler, vae=tiny.tiny_vae(spec), text_encoder=tiny.tiny_text_encoder(spec),
        tokenizer=tiny.byte_tokenizer(), transformer=tiny.tiny_transformer(spec),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """`tiny_file(name)`: a tiny model as a single file in Lightricks' spelling, with its metadata."""
    made = {}

    def make(name: str = "tiny/ltx-video", **metadata):
        key = (name, *sorted(metadata.items()))
        if key not in made:
            spec, path = TINY[name], tmp_path_factory.mktemp("file") / "ltxv.safetensors"
            tensors = {
                lightricks_transformer_name(key): value
                for key, value in tiny.tiny_transformer(spec).state_dict().items()
            }
            for own, value in tiny.tiny_vae(spec).state_dict().items():
                tensors[lightricks_vae_name(own, spec.vae_family)] = value
            save_file(tensors, path, metadata=single_file_metadata(spec, **metadata))
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def published_shapes():
    """`published_shapes(version)`: names and shapes of a published single file, by diffusers' classes."""

    def shapes(version: str, vae: str | None = None):
        spec, vae_spec = SPECS[version], SPECS[vae or version]
        with torch.device("meta"):
            transformer = LTXVideoTransformer3DModel(**spec.transformer_config).state_dict()
            decoder = AutoencoderKLLTXVideo(**vae_spec.vae_config).state_dict()
        found = {lightricks_transformer_name(name): tuple(value.shape) for name, value in transformer.items()}
        for name, value in decoder.items():
            found[lightricks_vae_name(name, vae_spec.vae_family)] = tuple(value.shape)
        return found

    return shapes


@pytest.fixture(scope="session")
def published_header(published_shapes):
    """`published_header(path, version)`: a file that has the header of a published one, and no data behind it."""

    def write(path, version: str, vae: str | None = None, metadata: dict | None = None, dtype: str = "BF16"):
        listing = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
            for name, shape in published_shapes(version, vae).items()
        }
        if metadata:
            listing["__metadata__"] = metadata
        text = json.dumps(listing).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        return path

    return write


# LTX-2: each rule of diffusers' conversion script turned round.
LTX2_TRANSFORMER = [
    ("audio_time_embed.", "audio_adaln_single."),
    ("time_embed.", "adaln_single."),
    ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
    ("prompt_adaln.", "prompt_adaln_single."),
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."),
    ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
    ("audio_proj_in.", "audio_patchify_proj."),
    ("proj_in.", "patchify_proj."),
]
LTX2_ANYWHERE = {
    ".video_a2v_cross_attn_scale_shift_table": ".scale_shift_table_a2v_ca_video",
    ".audio_a2v_cross_attn_scale_shift_table": ".scale_shift_table_a2v_ca_audio",
    ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm.",
}  # fmt: skip
LTX2_ENCODER = {f"down_blocks.{n}.downsamplers.0": 2 * n + 1 for n in range(4)} | {
    **{f"down_blocks.{n}": 2 * n for n in range(4)}, "mid_block": 8,
}  # fmt: skip
LTX2_DECODER = {f"up_blocks.{n}.upsamplers.0": 2 * n + 1 for n in range(4)} | {
    **{f"up_blocks.{n}": 2 * n + 2 for n in range(4)}, "mid_block": 0,
}  # fmt: skip
LTX2_CONNECTORS = {
    "video_connector.": "model.diffusion_model.video_embeddings_connector.",
    "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
    "video_text_proj_in.": "text_embedding_projection.video_aggregate_embed.",
    "audio_text_proj_in.": "text_embedding_projection.audio_aggregate_embed.",
    "text_proj_in.": "text_embedding_projection.aggregate_embed.",
}
LTX2_VOCODER = {
    "conv_in.": "conv_pre.", "conv_out.": "conv_post.", "act_out.": "act_post.", "upsamplers.": "ups.",
    "resnets.": "resblocks.", ".downsample.filter": ".downsample.lowpass.filter",
}  # fmt: skip


def ltx2_name(part: str, name: str) -> str:
    """diffusers' name of a tensor of LTX-2 → Lightricks'."""
    if part == "transformer":
        for ours, theirs in LTX2_TRANSFORMER:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        for ours, theirs in LTX2_ANYWHERE.items():
            name = name.replace(ours, theirs)
        return f"model.diffusion_model.{name}"
    if part == "connectors":
        start = next(ours for ours in LTX2_CONNECTORS if name.startswith(ours))
        name = LTX2_CONNECTORS[start] + name.removeprefix(start)
        name = name.replace("connector.transformer_blocks.", "connector.transformer_1d_blocks.")
        return name.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
    if part == "vocoder":
        for ours, theirs in LTX2_VOCODER.items():
            name = name.replace(ours, theirs)
        return f"vocoder.{name}"
    if name in ("latents_mean", "latents_std"):
        return f"{part}.per_channel_statistics.{'mean-of-means' if name == 'latents_mean' else 'std-of-means'}"
    return f"audio_vae.{name}" if part == "audio_vae" else f"vae.{ltx2_vae_name(name)}"


def ltx2_vae_name(name: str) -> str:
    side, rest = name.split(".", 1)
    places = LTX2_ENCODER if side == "encoder" else LTX2_DECODER
    block = next((place for place in sorted(places, key=len, reverse=True) if rest.startswith(place + ".")), None)
    if block is not None:
        kind = "down" if side == "encoder" else "up"
        rest = f"{kind}_blocks.{places[block]}.{rest.removeprefix(block + '.')}"
    return f"{side}.{rest.replace('resnets.', 'res_blocks.')}"


LTX2_PARTS = ("transformer", "vae", "audio_vae", "vocoder", "connectors")


def ltx2_tensors(spec, parts=LTX2_PARTS) -> dict[str, torch.Tensor]:
    """A tiny LTX-2's tensors by Lightricks' names; with statistics that no module has."""
    tensors = {}
    for part in parts:
        for name, value in getattr(ltx2_tiny, f"tiny_{part}")(spec).state_dict().items():
            tensors[ltx2_name(part, name)] = value.clone()
    if "vae" in parts:
        tensors["vae.per_channel_statistics.mean-of-stds"] = torch.ones(spec.latent_channels)
    return tensors


def ltx2_config(spec) -> dict:
    """What a single file's metadata says under `config`, in Lightricks' words."""
    transformer, audio, vocoder = spec.transformer_config, spec.audio_vae_config, spec.vocoder_config
    connectors = spec.connectors_config
    words = {
        "transformer": {
            "num_attention_heads": transformer["num_attention_heads"],
            "attention_head_dim": transformer["attention_head_dim"],
            "audio_num_attention_heads": transformer["audio_num_attention_heads"],
            "audio_attention_head_dim": transformer["audio_attention_head_dim"],
            "num_layers": transformer["num_layers"],
            "positional_embedding_theta": transformer["rope_theta"],
            "positional_embedding_max_pos": [20, 2048, 2048],
            "audio_positional_embedding_max_pos": [20],
            "frequencies_precision": "float64",
            "rope_type": "split",
            "causal_temporal_positioning": True,
            "connector_num_attention_heads": connectors["video_connector_num_attention_heads"],
            "audio_connector_num_attention_heads": connectors["audio_connector_num_attention_heads"],
            "connector_positional_embedding_max_pos": [4096],
        },
        "vae": {"_class_name": "CausalVideoAutoencoder"},
        "audio_vae": {
            "model": {
                "params": {"ddconfig": {"mel_bins": audio["mel_bins"], "ch": audio["base_channels"]},
                           "sampling_rate": audio["sample_rate"]}
            },
            "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "causal": True},
                              "mel": {"mel_fmin": 0, "mel_fmax": 8000}},
        },
    }  # fmt: skip
    own = {"upsample_rates": vocoder["upsample_factors"], "resblock_dilation_sizes": vocoder["resnet_dilations"]}
    if "bwe_in_channels" not in vocoder:
        words["vocoder"] = {**own, "output_sampling_rate": vocoder["output_sampling_rate"]}
    else:
        words["vocoder"] = {
            "vocoder": own,
            "bwe": {
                "upsample_rates": vocoder["bwe_upsample_factors"],
                "resblock_dilation_sizes": vocoder["bwe_resnet_dilations"], "n_fft": vocoder["filter_length"],
                "hop_length": vocoder["hop_length"], "num_mels": vocoder["num_mel_channels"],
                "input_sampling_rate": 16000, "output_sampling_rate": 48000,
            },
        }  # fmt: skip
    return words


@pytest.fixture(scope="session")
def lightricks():
    """LTX-2 in Lightricks' words: `name(part, name)`, `tensors(spec, parts)`, `config(spec)`, `parts`."""
    return types.SimpleNamespace(name=ltx2_name, tensors=ltx2_tensors, config=ltx2_config, parts=LTX2_PARTS)


@pytest.fixture(scope="session")
def ltx2_file(tmp_path_factory):
    """`ltx2_file(name, parts)`: a tiny LTX-2 as a single file in Lightricks' spelling, with its metadata."""
    made = {}

    def make(name: str = "tiny/ltx2", parts: tuple[str, ...] = LTX2_PARTS, **metadata: str):
        key = (name, parts, *sorted(metadata.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("ltx2") / "ltx-2.safetensors"
            told = {"config": json.dumps(ltx2_config(TINY[name])), **metadata}
            save_file(ltx2_tensors(TINY[name], parts), path, metadata=told)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def packed_gemma(tmp_path_factory):
    """A tiny Gemma 4 as 2.5's text encoder is published: configuration, tokenizer and projections in one file."""
    spec, path = TINY["tiny/ltx2.5"], tmp_path_factory.mktemp("packed") / "gemma4.safetensors"
    encoder, tokenizer = ltx2_tiny.tiny_text_encoder(spec), ltx2_tiny.gemma_tokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    bare = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {
        "tokenizer_json": json.dumps({**bare, "post_processor": None}).encode(),  # as published: no <bos> of its own
        "hf_asset__tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes(),
    }
    tensors = {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in texts.items()}
    for name, value in encoder.state_dict().items():
        if name != "lm_head.weight":
            tensors[name.replace("model.language_model.", "model.")] = value.clone()
    tensors["vision_model.patch_dense.weight"] = torch.zeros(4, 4)
    tensors["audio_projector.embedding_projection.weight"] = torch.zeros(4, 4)
    for name, value in ltx2_tiny.tiny_connectors(spec).state_dict().items():
        if "text_proj_in" in name:
            tensors[ltx2_name("connectors", name)] = value.clone()
    save_file(tensors, path, metadata={"gemma_config": encoder.config.to_json_string(use_diff=False)})
    return path
