"""Encoding in chunks against diffusers' own encoding of the whole clip, for every published VAE, and what it takes."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.causal_conv3d import causal_conv3d, pack
from ltxforge_kernels.choice import Choice, Kernels, TokenRange, everything
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltxforge.model_spec import ModelSpec
from ltxforge.models import tiny, vae_streaming
from ltxforge.models.parts import cast
from ltxforge.models.vae import encode_frames, statistics
from ltxforge.models.vae_streaming import CHUNK_FRAMES, EncoderStream, stream_encode, to_pixels
from ltxforge.specs import SPECS, TINY

CPU = torch.device("cpu")
NAMES = ["tiny/ltx-video-0.9.0", "tiny/ltx-video-0.9.1", "tiny/ltx-video", "tiny/ltx2", "tiny/ltx2.3"]
# One of each family of interchangeable VAEs.
REAL = list({spec.vae_family: version for version, spec in reversed(SPECS.items())}.values())
# Sums of float32 products in another order, layer after layer.
FLOAT32, FLOAT64 = 2e-6, 1e-12


def vae_class(spec: ModelSpec) -> type[AutoencoderKLLTX2Video | AutoencoderKLLTXVideo]:
    return AutoencoderKLLTX2Video if spec.has_audio else AutoencoderKLLTXVideo


@functools.cache
def make(
    name: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> AutoencoderKLLTX2Video | AutoencoderKLLTXVideo:
    """A VAE with random weights; of a real version, as deep as it is and a 32nd as wide."""
    spec = {**SPECS, **TINY}[name]
    config = {**spec.vae_config, **changes}
    if name in SPECS:
        config |= {
            key: tuple(size // 32 for size in config[key]) for key in config if key.endswith("block_out_channels")
        }
        config["latent_channels"] = 8
    with tiny.seeded(7):
        return cast(vae_class(spec)(**config).requires_grad_(False).eval(), CPU, dtype)


def clip(frames: int, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def whole(vae: nn.Module, frames: Tensor) -> Tensor:
    """Mean and logarithm of variance of the clip by diffusers' own forward."""
    return vae.encode(to_pixels(frames, CPU, vae.dtype)).latent_dist.parameters


def in_chunks(vae: nn.Module, frames: Tensor, **settings: Any) -> Tensor:
    return torch.cat([posterior.parameters for posterior in stream_encode(vae, frames, CPU, **settings)], dim=2)


def apart(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_clip_of_one_chunk_has_the_bits_of_the_stock_encoder(name, dtype):
    vae = make(name, dtype)
    for frames in (1, 9, CHUNK_FRAMES + 1):
        assert torch.equal(in_chunks(vae, clip(frames)), whole(vae, clip(frames)))


@pytest.mark.parametrize("name", [*NAMES, *REAL])
def test_longer_clips_are_encoded_as_they_are_whole(name):
    vae, frames = make(name), clip(41)
    truth = whole(vae, frames)
    for chunk in (8, 16, 24):
        assert apart(in_chunks(vae, frames, chunk=chunk), truth) <= FLOAT32


@pytest.mark.parametrize("frames", [25, 33, 121])
@pytest.mark.parametrize("name", ["tiny/ltx-video-0.9.0", "tiny/ltx2"])
def test_whatever_is_left_for_the_last_chunk(name, frames):
    vae, given = make(name), clip(frames, 32, 32)
    result = in_chunks(vae, given)
    assert result.shape[2] == (frames - 1) // 8 + 1
    assert apart(result, whole(vae, given)) <= FLOAT32


class Float64Norm(nn.Module):
    """RMSNorm over the last dimension; diffusers' squares in float32 whatever comes in."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_rounding_is_between_them(name):
    vae, frames = make(name, torch.float64, resnet_norm_eps=1e-5), clip(25, 32, 32)
    for module in list(vae.encoder.modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, RMSNorm):
                setattr(module, child, Float64Norm())
    truth = whole(vae, frames)
    for chunk in (8, 16):
        assert apart(in_chunks(vae, frames, chunk=chunk), truth) <= FLOAT64


def test_frames_to_come_change_nothing():
    vae = make("tiny/ltx2")
    frames = clip(25, 32, 32)
    assert torch.equal(in_chunks(vae, frames, chunk=8)[:, :, :2], whole(vae, frames[:9]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("tiny/ltx2", "triton"),
        pytest.param("tiny/ltx-video-0.9.0", "triton", marks=pytest.mark.sweep),
        pytest.param("tiny/ltx-video", "triton", marks=pytest.mark.sweep),
        pytest.param("tiny/ltx-video-0.9.0", "compile", marks=pytest.mark.sweep),
        pytest.param("tiny/ltx2", "compile", marks=pytest.mark.sweep),
    ],
)
def test_norm_and_activation_inside_the_op(name, implementation):
    """By kernels in Triton's interpreter, and compiled."""
    vae, frames = copy.deepcopy(make(name)), clip(17, 32, 32)
    truth, names = whole(vae, frames), dict(vae.state_dict())
    kernels = everything(implementation)
    assert apart(in_chunks(vae, frames, chunk=8, kernels=kernels), truth) <= FLOAT32
    # Packing the weights changed their place in memory and nothing else.
    assert all(torch.equal(value, names[name]) for name, value in vae.state_dict().items())
    assert apart(in_chunks(vae, frames, chunk=8), truth) <= FLOAT32


BY_WIDTH = (TokenRange(0, None, 16, "eager", "a test"), TokenRange(129, None, 8, "compile", "a test"))


def test_each_convolution_is_carried_out_as_was_measured_to_be_the_fastest_at_its_size(monkeypatch):
    """By the pixels and channels that it reads, chunk by chunk; what it keeps of a chunk is the same for all."""
    vae, frames, asked = copy.deepcopy(make("tiny/ltx2")), clip(17, 32, 32), {}

    def noted(x: Tensor, *arguments: Any, implementation: str, **settings: Any) -> tuple[Tensor, Tensor]:
        assert (settings["norm_eps"] is None) or implementation != "eager"
        asked.setdefault((x.shape[1], x.numel() // x.shape[1]), set()).add(implementation)
        return causal_conv3d(x, *arguments, implementation=implementation, **settings)

    monkeypatch.setattr(vae_streaming, "causal_conv3d", noted)
    kernels = Kernels((Choice("causal_conv3d", "triton", "a test", BY_WIDTH),))
    with torch.compiler.set_stance("force_eager"):
        assert apart(in_chunks(vae, frames, chunk=8, kernels=kernels), whole(vae, frames)) <= FLOAT32
    assert asked == {size: {kernels.of("causal_conv3d", size[1], size[0])} for size in asked}
    found = {(width, how) for (width, _), implementations in asked.items() for how in implementations}
    # The first chunk's frame more is over the limit.
    assert {(8, 144, "compile"), (8, 128, "triton")} <= {(*size, *how) for size, how in asked.items()}
    assert found == {*((width, "triton") for width in (48, 8, 32, 64)), (8, "compile"), (16, "eager")}


@pytest.mark.parametrize("exceptions", [(), BY_WIDTH[:1]])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_weights_are_packed_all_or_none(implementation, exceptions):
    vae = copy.deepcopy(make("tiny/ltx2"))
    EncoderStream(vae, Kernels((Choice("causal_conv3d", implementation, "a test", exceptions),)))
    for module in vae.encoder.modules():
        if isinstance(module, nn.Conv3d):
            assert pack(module.weight).data_ptr() == module.weight.data_ptr() or implementation == "eager"
            assert module.weight.is_contiguous() == (implementation == "eager")
            assert module.weight.untyped_storage().nbytes() == module.weight.nbytes, "no copy is kept"


def test_padding_that_is_not_zero_is_left_to_pytorch(monkeypatch):
    """No published encoder has it; the op is never asked for it."""
    vae, frames = make("tiny/ltx2", encoder_spatial_padding_mode="reflect"), clip(17, 64, 64)
    monkeypatch.setattr(vae_streaming, "causal_conv3d", None)
    assert apart(in_chunks(vae, frames, chunk=8, kernels=everything("triton")), whole(vae, frames)) <= FLOAT32


@pytest.mark.parametrize("name", ["tiny/ltx-video", "tiny/ltx2"])
def test_latents_are_normalised_posteriors(name):
    vae, frames = make(name), clip(33, 32, 32)
    vae.latents_mean.normal_(generator=torch.Generator().manual_seed(1))
    latents = encode_frames(vae, frames, CPU)
    mean, std, scale = statistics(vae)
    moments, logarithm = whole(vae, frames).chunk(2, dim=1)
    assert latents.mean.shape == latents.std.shape == (vae.config.latent_channels, 5, 1, 1)
    assert apart(latents.mean, ((moments - mean) * scale / std)[0]) <= FLOAT32
    assert apart(latents.std, ((0.5 * logarithm).exp() * scale / std)[0]) <= FLOAT32


class LiveBytes(TorchDispatchMode):
    """`peak` is the most that tensors made within it hold at once; what an op holds inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((arguments, named))}
        result = function(*arguments, **(named or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def drop(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.live -= size


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_of(vae: nn.Module, frames: Tensor, device: torch.device = CPU, **settings: Any) -> int:
    """Bytes beside weights and clip, each chunk's latents being dropped as they come."""
    with LiveBytes() as counted:
        for _ in stream_encode(vae, frames, device, **settings):
            pass
    return counted.peak


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_clip(name):
    vae = make(name)
    peaks = [peak_of(vae, clip(frames, 32, 32), chunk=8) for frames in (33, 121)]
    assert peaks[0] == peaks[1] > 0
    with LiveBytes() as counted:
        whole(vae, clip(121, 32, 32))
    assert counted.peak > 3 * peaks[0]


@pytest.mark.parametrize("name", REAL)
def test_the_real_encoders_stay_below_one_and_a_half_gigabytes(name):
    """A count on the meta device, at 768x512 in bf16: no measurement, and without workspaces inside convolutions."""
    spec, device = SPECS[name], torch.device("meta")
    with device:
        vae = vae_class(spec)(**spec.vae_config).requires_grad_(False).to(torch.bfloat16)
    frames = torch.empty(33 + CHUNK_FRAMES, 512, 768, 3, dtype=torch.uint8)
    assert 0.5e9 < peak_of(vae, frames, device) <= 1.5e9


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        (clip(16), {}, r"16 frames are not 8k \+ 1"),
        (clip(9), {"chunk": 12}, "chunks of 12 frames"),
        (clip(9).float(), {}, "uint8"),
        (clip(9, 32, 48), {}, "32 and 48 are not multiples of 32"),
    ],
)
def test_what_cannot_be_chunks_is_refused(frames, settings, message):
    with pytest.raises(AssertionError, match=message):
        in_chunks(make("tiny/ltx2"), frames, **settings)


def test_an_encoder_that_looks_ahead_is_refused():
    with pytest.raises(AssertionError, match="looks ahead"):
        EncoderStream(make("tiny/ltx2", encoder_causal=False))
