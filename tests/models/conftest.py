"""Weights for the tests: tiny models as diffusers folders and as single files in Lightricks' spelling; bare headers."""

import json
import re

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
