"""LTX-Video 0.9.x: the family's own block and transformer forward, and the `VideoModel` around them.

The forward runs over the diffusers modules' own parameters, names unchanged, so that loading, PEFT and files are
untouched; diffusers' forward is the oracle and the order of operations is kept, so that the bits agree. What differs:
timesteps are embedded once per distinct value, rope tables are computed once per size, the prompt mask once per step,
and how a block is called may be said. Decides nothing about training and loads no file (`models/load.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from ltxforge_kernels.choice import EAGER, Kernels
from ltxforge_kernels.qk_norm_rope.rope import Rope, compact
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ltxforge.modalities import Streams
from ltxforge.models import ltx_video_sampling
from ltxforge.models.base_model import BaseModel
from ltxforge.models.blocks import (
    Gate,
    Modulation,
    RunBlock,
    Shift,
    add,
    add_and_norm,
    attention_forward,
    distinct_timesteps,
    feed_forward,
    norm,
    prompt_bias,
    run_plainly,
)
from ltxforge.models.interface import Latents, Noisy, PromptBatch, PromptEmbeddings, Sample, WantedPrompt
from ltxforge.models.parts import cast, release_memory
from ltxforge.models.vae import decode_frames, encode_frames
from ltxforge.models.vae_tiles import decoding_in_tiles
from ltxforge.plan import PromptPlan
from ltxforge.quant.keep import Keep
from ltxforge.shapes import LatentShape
from ltxforge.specs import ModelSpec


def block_forward(
    block: nn.Module,
    hidden: Tensor,
    kernels: Kernels,
    prompt: Tensor,
    modulation: Modulation,
    rope: Rope,
    bias: Tensor | None,
) -> Tensor:
    """One transformer block with adaptive layer norm (DiT, arXiv:2212.09748; shared table as in PixArt-α).

    Args:
        block: diffusers' LTXVideoTransformerBlock, perhaps with adapters injected into its linears.
        hidden: [B, T, D].
        kernels: which implementation each op has.
        prompt: projected prompt, [B, P, D].
        modulation: the step's time embedding, six rows: shift, scale and gate of attention, and of the feed-forward.
        rope: of the T tokens.
        bias: what is added to the prompt's attention scores, [B, 1, 1, P], or None.
    """
    table, index = modulation.table(block.scale_shift_table), modulation.index
    normed = norm(block.norm1, hidden, Shift(table, index, 0, 1), kernels)
    attended = attention_forward(block.attn1, normed, normed, kernels, rope)
    hidden = add(hidden, attended, Gate(table, index, 2), kernels)
    attended = attention_forward(block.attn2, hidden, prompt, kernels, bias=bias)
    hidden, normed = add_and_norm(hidden, attended, None, block.norm2, Shift(table, index, 3, 4), kernels)
    return add(hidden, feed_forward(block.ff, normed, kernels), Gate(table, index, 5), kernels)


def transformer_forward(
    transformer: LTXVideoTransformer3DModel,
    tokens: Tensor,
    embeds: Tensor,
    mask: Tensor,
    timesteps: Tensor,
    rope: Rope,
    kernels: Kernels = EAGER,
    run_block: RunBlock = run_plainly,
) -> Tensor:
    """The velocity [B, T, C] for noisy tokens [B, T, C].

    Args:
        transformer: diffusers' module; only its parameters and leaf modules are used.
        tokens: [B, T, C] in the transformer's dtype.
        embeds: the prompts' embeddings, [B, P, E], in that dtype.
        mask: [B, P], 1 real and 0 padding.
        timesteps: [B, 1] or [B, T] float32, sigma · 1000; best on the host.
        rope: from `rope_tables`.
        kernels: which implementation each op has.
        run_block: how each block is called.
    """
    hidden = transformer.proj_in(tokens)
    modulation, final = embed_timesteps(transformer, timesteps, hidden)
    prompt = transformer.caption_projection(embeds)
    bias = prompt_bias(mask, tokens.dtype)
    for number, block in enumerate(transformer.transformer_blocks):
        hidden = run_block(number, block_forward, block, hidden, kernels, prompt, modulation, rope, bias)
    return output_forward(transformer, hidden, final)


def output_forward(transformer: LTXVideoTransformer3DModel, hidden: Tensor, modulation: Modulation) -> Tensor:
    """The last norm, modulation and projection: [B, T, D] → [B, T, C]."""
    shift, scale = modulation.rows(transformer.scale_shift_table)
    return transformer.proj_out(transformer.norm_out(hidden) * (1 + scale) + shift)


def embed_timesteps(
    transformer: LTXVideoTransformer3DModel, timesteps: Tensor, like: Tensor
) -> tuple[Modulation, Modulation]:
    """The blocks' modulation, six rows, and the output's, one row, on the device and in the dtype of `like`.

    Each distinct timestep is embedded once; `timesteps` stay float32 up to their sinusoids, whatever the dtype is.
    """
    distinct, index = distinct_timesteps(timesteps, like.device)
    block, output = transformer.time_embed(distinct, batch_size=distinct.shape[0], hidden_dtype=like.dtype)
    return Modulation(block.unflatten(-1, (6, -1)), index), Modulation(output[:, None], index)


def rope_tables(
    transformer: LTXVideoTransformer3DModel,
    convention: str,
    shape: LatentShape,
    fps: float,
    device: torch.device,
    spatial: int = 32,
    temporal: int = 8,
) -> Rope:
    """The rotation of each token, by the transformer's own table of cos and sin, [1, T, D] float32.

    The time of latent frame j is 8·j/fps under "plain" (diffusers' LTXPipeline) and max(0, 8·j − 7)/fps under "causal"
    (LTXConditionPipeline): the causal VAE's first latent frame holds one pixel frame, every other one eight.
    """
    like = torch.empty(1, 0, device=device)  # the table reads only its batch size and device
    sizes = (shape.frames, shape.height, shape.width)
    if convention == "plain":
        scale = (temporal / fps, spatial, spatial)
        return compact(*transformer.rope(like, *sizes, rope_interpolation_scale=scale), sizes)
    assert convention == "causal", f"no rope convention {convention!r}"
    coordinates = causal_coordinates(shape, fps, device, spatial, temporal)
    return compact(*transformer.rope(like, video_coords=coordinates), sizes)


def causal_coordinates(shape: LatentShape, fps: float, device: torch.device, spatial: int, temporal: int) -> Tensor:
    """Seconds, rows and columns in pixels of every token: [1, 3, T] float32."""
    sizes = (shape.frames, shape.height, shape.width)
    frames, rows, columns = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    frames = (frames * temporal + 1 - temporal).clamp(min=0)
    grid = torch.stack([frames, rows * spatial, columns * spatial]).flatten(1)[None].float()
    grid[:, 0] = grid[:, 0] * (1.0 / fps)
    return grid


def pad_prompts(
    prompts: Sequence[PromptEmbeddings], tokens: int, device: torch.device | str, dtype: torch.dtype
) -> PromptBatch:
    """Stack T5's embeddings to [B, tokens, E] with zeros under the mask.

    The text encoder's own output at padding positions is not needed: attention adds −10000 there, whose softmax weight
    is exactly 0, so zeros give the same bits.
    """
    trimmed = [prompt.tensors["embeds"] for prompt in prompts]
    embeds = torch.zeros(len(prompts), tokens, trimmed[0].shape[-1], device=device, dtype=dtype)
    mask = torch.zeros(len(prompts), tokens, device=device, dtype=torch.float32)
    for row, prompt in enumerate(trimmed):
        length = prompt.shape[0]
        assert length <= tokens, f"a prompt of {length} tokens does not fit in {tokens}"
        embeds[row, :length] = prompt.to(device=device, dtype=dtype)
        mask[row, :length] = 1
    return PromptBatch(Streams(embeds), mask)


@dataclass(frozen=True)
class Parts:
    """How each part is made, on demand, on the device and in the dtype it is given; the transformer as it is kept.

    Made by `load.py` and `tiny.py`.
    """

    transformer: Callable[[Keep], LTXVideoTransformer3DModel]
    vae: Callable[[torch.device, torch.dtype], AutoencoderKLLTXVideo]
    text_encoder: Callable[[torch.device, torch.dtype], tuple[T5EncoderModel, PreTrainedTokenizerBase]]
    scheduler: Callable[[], FlowMatchEulerDiscreteScheduler]


class LTXVideo(BaseModel):
    """An LTX-Video base model; see `interface.VideoModel` for what each method promises.

    `dtype` is the transformer's. The encoders' dtypes are float32 on a CPU and bfloat16 elsewhere unless given.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: str,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        vae_dtype: torch.dtype | None = None,
        text_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, rope, parts, device, dtype, "video", vae_dtype, text_dtype)
        self._parts = parts
        self._vae: AutoencoderKLLTXVideo | None = None
        self._text_encoder: tuple[T5EncoderModel, PreTrainedTokenizerBase] | None = None

    def predict(self, noisy: Noisy, prompts: PromptBatch) -> Streams[Tensor]:
        video = noisy.streams.video
        assert video is not None and noisy.streams.audio is None and prompts.embeds.video is not None
        assert video.tokens.shape[1] == noisy.shape.tokens and prompts.mask is not None
        embeds, mask = prompts.embeds.video.to(self.device, self.dtype), prompts.mask.to(self.device)
        tokens = video.tokens.to(self.device, self.dtype)
        factors = self.spec.spatial_factor, self.spec.temporal_factor
        place = (self.transformer, self.rope, noisy.shape, noisy.fps, self.device, *factors)
        (rope,) = self._ropes_of((noisy.shape, noisy.fps), lambda: (rope_tables(*place),))
        given = (tokens, embeds, mask, video.timesteps, rope)
        return Streams(transformer_forward(self.transformer, *given, self.kernels, self.run_block))

    @contextlib.contextmanager
    def text_encoder(self) -> Iterator[None]:
        assert self._vae is None, "the VAE must be freed before the text encoder loads"
        assert self._text_encoder is None, "the text encoder is loaded already"
        try:
            self._text_encoder = self._parts.text_encoder(self.device, self.text_dtype)
            yield
        finally:
            self._text_encoder = None
            release_memory(self.device)

    @contextlib.contextmanager
    def vae(self) -> Iterator[None]:
        assert self._text_encoder is None, "the text encoder must be freed before the VAE loads"
        assert self._vae is None, "the VAE is loaded already"
        try:
            self._vae = self._parts.vae(self.device, self.vae_dtype).requires_grad_(False).eval()
            yield
        finally:
            self._vae = None
            release_memory(self.device)

    def encode_prompts(
        self, wanted: Sequence[WantedPrompt], tokens: int, on_read: Callable[[int], None] = lambda _: None
    ) -> Generator[PromptEmbeddings, None, None]:
        """Exactly the encoding of the rope's own pipeline: padded to `tokens`, then trimmed.

        LTXConditionPipeline hides the padding from the encoder, LTXPipeline and LTXImageToVideoPipeline do not. One
        caption at a time, so that its bits do not depend on its neighbours.
        """
        with self.text_encoder():
            for number, prompt in enumerate(wanted, start=1):
                encoded = self._encode_prompt(prompt.text, tokens)
                on_read(number)
                yield encoded

    @torch.no_grad()
    def _encode_prompt(self, caption: str, tokens: int) -> PromptEmbeddings:
        assert self._text_encoder is not None
        encoder, tokenizer = self._text_encoder
        words = tokenizer(
            [caption],
            padding="max_length",
            max_length=tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        mask = words.attention_mask.bool().to(self.device) if self.rope == "causal" else None
        embeds = encoder(words.input_ids.to(self.device), attention_mask=mask)[0][0]
        length = int(words.attention_mask.sum())
        return PromptEmbeddings({"embeds": embeds[:length].cpu().clone()}, length)

    def batch_prompts(
        self,
        prompts: Sequence[PromptEmbeddings],
        tokens: int,
        modalities: str = "video",  # noqa: ARG002
    ) -> PromptBatch:
        return pad_prompts(prompts, tokens, self.device, self.dtype)

    def encode_clip(self, frames: Tensor) -> Latents:
        return encode_frames(self._loaded_vae(), frames, self.device, self.kernels)

    def decode(self, latents: Tensor) -> Tensor:
        timestep = self.spec.sampling.decode_timestep
        return decode_frames(self._loaded_vae(), latents, self.device, timestep, self.decode_tiling)

    def sample(
        self,
        prompt: PromptPlan,
        prompts: Mapping[str, PromptEmbeddings],
        tokens: int,
        image: Image.Image | None,
        on_step: Callable[[int], None],
    ) -> Sample:
        """See `VideoModel.sample`. The VAE is held throughout; there is no sound and no frugal way."""
        embeds = self.batch_prompts([prompts[prompt.prompt]], tokens)
        negative = self.batch_prompts([prompts[prompt.negative_prompt]], tokens) if prompt.guided else None

        def after_step(finished: int) -> None:
            if finished == prompt.steps:
                self.make_room()  # the picture is decoded next
            on_step(finished)

        with self.vae():
            vae = cast(self._loaded_vae(), self.device, self.dtype)
            pipeline = ltx_video_sampling.make_pipeline(
                self.rope, image is not None, self.transformer, vae, self._parts.scheduler()
            )
            with decoding_in_tiles(vae, self.decode_tiling):
                made = ltx_video_sampling.sample(
                    pipeline, self.spec.sampling, prompt, embeds, negative, image, after_step
                )
            del vae, pipeline  # so that the memory is free once vae() is left
        return made

    def _loaded_vae(self) -> AutoencoderKLLTXVideo:
        assert self._vae is not None, "this works inside vae()"
        return self._vae
