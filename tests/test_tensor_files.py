"""Tensor files: equal content gives equal bytes, and safetensors reads them as it would its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltxforge.checkpoint import Checkpoints
from ltxforge.dataset.cache import Cache
from ltxforge.lora import files
from ltxforge.tensor_files import save_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(())}
# What JSON escapes, and what it need not: both writers of the header must take the same room for it.
METADATA = {
    "z": 'a "quoted" \\ word', "format": "pt", "ä€𝄞": "\x00\x01\x1f\x7f\t\n\r\b\f\u2028 / ü 漢字 𝄞",
    **{f"key {number}": str(number) for number in range(20)}, "": "",
}  # fmt: skip


def test_metadata_is_sorted_and_nothing_else_differs(tmp_path):
    save_tensors(tmp_path / "ours", TENSORS, METADATA)
    save_file(TENSORS, tmp_path / "theirs", metadata=METADATA)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    length = int.from_bytes(ours[:8], "little")
    assert ours[:8] == theirs[:8] and ours[8 + length :] == theirs[8 + length :]
    header = json.loads(ours[8 : 8 + length])
    assert header == json.loads(theirs[8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(METADATA)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == METADATA
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }


WRITE = """
import sys, torch
from pathlib import Path
from ltxforge.lora.files import export, provenance
adapter = {f"transformer_blocks.{n}.attn1.to_q.lora_{x}.weight": torch.ones(2, 2) for n in range(2) for x in "AB"}
export(Path(sys.argv[1]), adapter, 1.0, "bf16", provenance({"name": "mine", "version": "2.0-dev", "step": 3}))
"""


def test_two_processes_export_the_same_bytes(tmp_path):
    for name in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / name)], check=True)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.skipif(os.name != "posix", reason="files have no mode bits here")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_them_is_the_umask_s_to_say(tmp_path, umask, mode):
    adapter = {"a.lora_A.weight": torch.ones(1, 1), "a.lora_B.weight": torch.ones(1, 1)}

    def export(path):
        return files.export(path, adapter, 1.0, "fp32", {"name": "x", "more": "y"})

    before = os.umask(umask)
    try:
        export(tmp_path / "lora.safetensors")
        Checkpoints(tmp_path, keep=2).save(1, adapter, TENSORS, export, {})
        Cache(tmp_path / "cache", lambda _event: None).write("latents", {"of": "a clip"}, TENSORS)
    finally:
        os.umask(before)
    written = list(tmp_path.rglob("*.safetensors"))
    assert len(written) == 5
    assert {path.stat().st_mode & 0o777 for path in written} == {mode}
