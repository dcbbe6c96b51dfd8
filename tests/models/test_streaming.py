"""Loading holds a file's tensors once: the peak of the process's memory, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from ltxforge.specs import SPECS, TINY

MEASURE = """
import json, pathlib, sys, torch
from ltxforge.models.detect import plan_model
from ltxforge.models.load import load_model
from ltxforge.quant.keep import Keep

def memory(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

plan = plan_model(**json.loads(sys.argv[1]))
model = load_model(plan, torch.device("cpu"), torch.bfloat16)
part = getattr(model._parts, sys.argv[2])
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
place = (torch.device("cpu"), torch.bfloat16)
module = part(Keep(*place)) if sys.argv[2] == "transformer" else part(*place)
module = module[0] if isinstance(module, tuple) else module
held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
print(json.dumps({"peak": memory("VmHWM") - before, "held": held}))
"""


def big_transformer(path: Path, name: str, layers: int) -> int:
    """A bf16 transformer of a real wiring, 1024 wide, some 50 MB per layer; its size in bytes."""
    spec = TINY[name]
    sizes = {
        "num_attention_heads": 16, "attention_head_dim": 64, "audio_num_attention_heads": 16,
        "audio_attention_head_dim": 32, "audio_cross_attention_dim": 512, "cross_attention_dim": 1024,
        "num_layers": layers,
    }  # fmt: skip
    with torch.device("meta"):
        shapes = LTX2VideoTransformer3DModel(**{**spec.transformer_config, **sizes}).state_dict()
    tensors = {f"model.diffusion_model.{key}": torch.randn(value.shape).bfloat16() for key, value in shapes.items()}
    config = {"transformer": {key: value for key, value in sizes.items() if key.endswith("heads")}}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return path.stat().st_size


def big_vae(path: Path) -> int:
    """A bf16 video VAE of 2.0's layout, half as wide; its size in bytes."""
    table = SPECS["2.0-dev"].vae_config
    half = {key: tuple(n // 2 for n in table[key]) for key in ("block_out_channels", "decoder_block_out_channels")}
    with torch.device("meta"):
        shapes = AutoencoderKLLTX2Video(**{**table, **half, "latent_channels": 16}).state_dict()
    save_file({f"vae.{key}": torch.randn(value.shape).bfloat16() for key, value in shapes.items()}, path)
    return path.stat().st_size


def big_gemma(path: Path, small: Path) -> int:
    """A packed bf16 Gemma 4 of as many layers and as wide as the tiny one, with larger feed-forwards and embeddings."""
    with safe_open(small, framework="pt") as file:
        config = json.loads(file.metadata()["gemma_config"])
    tensors = load_file(small)
    config["text_config"] |= {"intermediate_size": 160_000, "vocab_size": 200_000}
    with torch.device("meta"):
        shapes = Gemma4UnifiedForConditionalGeneration(
            Gemma4UnifiedConfig(text_config=config["text_config"])
        ).state_dict()
    for key, value in shapes.items():
        if key.startswith("model.language_model."):
            tensors[key.replace("model.language_model.", "model.")] = torch.randn(value.shape).bfloat16()
    save_file(tensors, path, metadata={"gemma_config": json.dumps(config)})
    return path.stat().st_size


def measured(recipe: dict[str, str], part: str, size: int) -> None:
    """Load a part in a process of its own, and hold its peak against the file's size."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(recipe), part],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert 0.95 * size < told["held"] <= size
    assert told["peak"] <= 1.15 * size, f"{told['peak'] / size:.2f} times the file"


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux tells it"
)


@needs_linux
@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.sweep)])
def test_the_peak_of_loading_is_the_file_once(tmp_path, tiny_folder, layers):
    file = tmp_path / "ltx-2.safetensors"
    size = big_transformer(file, "tiny/ltx2", layers)
    measured(
        {"base": str(tiny_folder("tiny/ltx2")), "transformer": str(file), "version": "2.0-dev"}, "transformer", size
    )


@needs_linux
@pytest.mark.sweep
def test_the_vae_s_too(tmp_path, tiny_folder):
    file = tmp_path / "vae.safetensors"
    size = big_vae(file)
    measured({"base": str(tiny_folder("tiny/ltx2")), "vae": str(file), "version": "2.0-dev"}, "vae", size)


@needs_linux
@pytest.mark.sweep
def test_the_packed_text_encoder_s_too(tmp_path, tiny_folder, packed_gemma):
    file = tmp_path / "gemma4.safetensors"
    size = big_gemma(file, packed_gemma)
    recipe = {"base": str(tiny_folder("tiny/ltx2.5")), "text_encoder": str(file), "version": "2.5-dev"}
    measured(recipe, "text_encoder", size)
