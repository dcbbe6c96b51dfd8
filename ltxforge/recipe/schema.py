"""What a recipe may say: every key, its type, range, default and meaning. The one place where keys are named.

Says what is legal within one key; rules between keys stand in `rules.py`. A default of None means that the planner
decides, and the plan prints what it decided and why. Holds no number that depends on weights, data or machine.

A check's message goes on after `key = value ` and may name the remedy after "; ", which the report prints beside the
carets. A required key has an example: it is shown when the key is missing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from ltxforge_kernels.choice import Implementation
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ltxforge.durable import is_safe_name
from ltxforge.shapes import is_legal_frames, is_legal_side, nearest_frames, nearest_sizes
from ltxforge.specs import SPECS

Versions = Literal[tuple(SPECS)]  # type: ignore[valid-type]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Meaning:
    """What a text must be, in the words of a message."""

    words: str


def parse_size(text: str) -> tuple[int, int]:
    """`"768x512"` → (768, 512). Raises ValueError when it is not two numbers with an x between."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text)
    if not match:
        raise ValueError('is no size; write "WIDTHxHEIGHT", for example "768x512"')
    return int(match[1]), int(match[2])


def _check_size(text: str) -> str:
    width, height = parse_size(text)
    if not (is_legal_side(width) and is_legal_side(height)):
        nearest = " or ".join("x".join(map(str, size)) for size in nearest_sizes(width, height))
        raise ValueError(f"cannot be encoded: both sides must be multiples of 32; nearest: {nearest}")
    if width * height > 2**24:
        raise ValueError("has more than 16 megapixels; no LTX model works at that size")
    return text


def parse_capacity(text: str) -> int:
    """`"12GB"` → bytes. GB and MB are 2^30 and 2^20 bytes, as cards are sold. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d{1,3})?)\s*(GB|GiB|MB|MiB)\s*", text)
    if not match:
        raise ValueError('is no amount of memory; write it as on the card\'s box, for example "12GB"')
    return round(float(match[1]) * 2 ** (30 if match[2].startswith("G") else 20))


def _check_capacity(text: str) -> str:
    if parse_capacity(text) == 0:
        raise ValueError("is no memory at all; leave the key out")
    return text


def _check_frames(frames: int) -> int:
    if not is_legal_frames(frames):
        nearest = " or ".join(map(str, nearest_frames(frames)))
        raise ValueError(f"cannot be encoded: the VAE needs 8k + 1 frames; nearest: {nearest}")
    return frames


def _check_name(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(
            "cannot become a file name on every platform; at most 64 of a-z, 0-9, - and _, first a letter or digit"
        )
    return name


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give it a value, or leave the key out")
    if "\0" in text:
        raise ValueError("holds a NUL character; remove it")
    return text


def _check_source(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise ValueError(
            "holds a control character; in \"…\" a backslash begins an escape, so write 'C:\\new' or C:/new"
        )
    return _check_not_blank(text)


def _check_positive(number: float) -> float:
    if not number > 0 or math.isinf(number):
        raise ValueError("is out of range; it must be above 0")
    return number


def _check_clip(number: float) -> float:
    if not number > 0:
        raise ValueError("would stop all learning; it must be above 0, or leave the key out")
    return number


def _check_alpha(number: float) -> float:
    if not number > 0:
        raise ValueError("would scale the LoRA to nothing or turn it around; alpha = rank gives scale 1")
    return number


def _check_pattern(target: str) -> str:
    _check_not_blank(target)
    if target.startswith("re:"):
        if len(target) > 1000:
            raise ValueError("is longer than 1000 characters")
        try:
            re.compile(target[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression: {error}") from error
    return target


# The extras are for JSON Schema only, which cannot know the checks.
Size = Annotated[
    str, AfterValidator(_check_size), Field(json_schema_extra={"pattern": r"^\s*\d{1,6}\s*[x×]\s*\d{1,6}\s*$"})
]
Frames = Annotated[int, Field(ge=1, le=10_001), AfterValidator(_check_frames)]
Fps = Annotated[float, Field(gt=0, le=240)]
Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": "^[a-z0-9][a-z0-9_-]{0,63}$"})]
Text = Annotated[str, AfterValidator(_check_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
Source = Annotated[str, AfterValidator(_check_source), Field(json_schema_extra={"pattern": r"\S"})]
Positive = Annotated[float, AfterValidator(_check_positive), Field(json_schema_extra={"exclusiveMinimum": 0})]
ClipBound = Annotated[float, AfterValidator(_check_clip), Field(json_schema_extra={"exclusiveMinimum": 0})]
Alpha = Annotated[float, AfterValidator(_check_alpha), Field(json_schema_extra={"exclusiveMinimum": 0})]
Target = Annotated[str, AfterValidator(_check_pattern)]
Capacity = Annotated[
    str,
    Meaning('an amount of memory such as "12GB"'),
    AfterValidator(_check_capacity),
    Field(json_schema_extra={"pattern": r"^\s*\d{1,5}(\.\d{1,3})?\s*(GB|GiB|MB|MiB)\s*$"}),
]
Optimizers = Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "paged_lion8bit", "ademamix8bit"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]


class Model(_Section):
    """The base model. Sources: a folder, a .safetensors file, or a Hub id `org/name[:path][@revision]`."""

    base: Source = Field(
        description="Folder, .safetensors file, Hub id, or a built-in tiny model such as tiny/ltx-video or tiny/ltx2.",
        examples=["Lightricks/LTX-Video-0.9.5"],
    )
    version: Versions | None = Field(
        None, description="Only needed where the weights do not say; a claim that contradicts them is refused."
    )
    transformer: Source | None = Field(None, description="A fine-tuned transformer to train on instead of the base's.")
    vae: Source | None = Field(None, description="A VAE from another source.")
    audio_vae: Source | None = Field(None, description="LTX-2: an audio VAE from another source.")
    vocoder: Source | None = Field(
        None, description="LTX-2: a vocoder, which turns mel into sound, from another source."
    )
    connectors: Source | None = Field(
        None, description="LTX-2: connectors, between text encoder and transformer, from another source."
    )
    text_encoder: Source | None = Field(
        None, description="A text encoder from another source: T5 for LTX-Video, the version's Gemma for LTX-2."
    )
    rope: Literal["auto", "plain", "causal"] = Field(
        "auto",
        description="LTX-Video: time coordinates plain 8j/fps, causal max(0, 8j-7)/fps; auto follows the weights.",
    )


class Run(_Section):
    """The run as a whole."""

    directory: Source | None = Field(None, description="Where the run lives; default runs/<recipe name>.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="Every random draw follows from it.")
    steps: Count | None = Field(None, description="Length in optimiser updates; or give epochs.")
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        None, description="Length in passes over the data; or give steps."
    )
    resume: Literal["latest", "never"] = Field(
        "latest", description="latest continues the newest whole checkpoint; never refuses a directory that has one."
    )
    max_rejected: Share = Field(
        0.05, description="Stop if more than this share of the clips, and more than one, are unreadable."
    )


class Dataset(_Section):
    """One folder of clips, each with its caption in a .txt file of the same name."""

    path: Source = Field(
        description="Folder with clips and captions; builtin/shapes is a small rendered set.", examples=["clips"]
    )
    id: Name | None = Field(None, description="A name for this dataset; default: the folder's.")
    resolution: Size = Field("768x512", description='Training size "WIDTHxHEIGHT"; other aspects get the same area.')
    frames: Frames = Field(121, description="Frames per sample: 8k + 1.")
    fps: Fps | None = Field(
        None, description="Clips are resampled to it; default: the model's (LTX-Video 25, LTX-2 24)."
    )
    windows: Literal["all", "first"] | Annotated[int, Field(ge=1, le=10_000)] = Field(
        "all", description="all: as many windows as fit, over the whole clip; first; or how many, evenly spread."
    )
    buckets: Literal["aspect", "fixed"] = Field(
        "aspect",
        description="aspect: sizes of equal area for other shapes; fixed: everything is cropped to resolution.",
    )
    max_upscale: Annotated[float, Field(ge=1, le=100)] = Field(
        2.0, description="Clips that would have to be enlarged by more than this are left out as too small."
    )
    repeats: Annotated[int, Field(ge=1, le=100_000)] = Field(1, description="How often each sample is seen per epoch.")
    enabled: bool = Field(True, description="false leaves this dataset out.")


class Training(_Section):
    """The step."""

    modalities: Literal["video", "audio", "both"] | None = Field(
        None,
        description="What is computed and trained: both is joint, video or audio leaves the other out entirely."
        " Default: both where the model makes sound, else video.",
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="Samples per micro-batch, per device.")
    accumulate: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="Micro-batches per optimiser update.")
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        None,
        description="Base weights and activations; LoRA weights and their gradients are always fp32. fp16 is for cards"
        " without bf16 units. Default: by device.",
    )
    compile: bool = Field(False, description="torch.compile the transformer's block; every new size costs a minute.")
    clip_norm: ClipBound | None = Field(
        None, description="Bound on the norm of the whole gradient; default 1.0 unless clip_value is given."
    )
    clip_value: ClipBound | None = Field(
        None, description="Bound on each element of the gradient, instead of clip_norm."
    )


class Audio(_Section):
    """How sound is trained, by models that make it (LTX-2)."""

    sigma: Literal["independent", "shared"] = Field(
        "independent", description="The sound's noise level: a draw of its own, as Lightricks trains, or the video's."
    )
    loss_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0,
        description="The sound's share in what is minimised; 0 keeps it as context: the LoRA then covers the video's"
        " layers and learns from the video alone.",
    )


class Optimizer(_Section):
    """The optimiser and its learning rate, a pure function of the step."""

    name: Optimizers = Field(
        "adamw",
        description="…8bit are bitsandbytes', with moments in 8 bits; paged ones give way to the host's memory.",
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="Rate after warm-up.")
    schedule: Literal["constant", "cosine", "linear", "polynomial"] = Field("constant", description="After warm-up.")
    warmup_steps: Annotated[int, Field(ge=0, le=100_000_000)] | None = Field(
        None, description="Default: 5 % of the steps, at most 100."
    )
    decay_steps: Count | None = Field(
        None, description="Step at which a decaying schedule ends; default: the run's length when it was first planned."
    )
    end_fraction: Share = Field(0.0, description="The decaying schedules end at this share of learning_rate.")
    power: Annotated[float, Field(gt=0, le=10)] = Field(2.0, description="Exponent of the polynomial schedule.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Decay of the first and second moment; default 0.9 and 0.999, Lion's 0.9 and 0.99."
    )
    epsilon: Annotated[float, Field(gt=0, le=1)] = Field(1e-8, description="Added to the denominator. Lion has none.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="Decoupled weight decay.")


class Lora(_Section):
    """The adapter."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(32, description="R: width of the low-rank update.")
    alpha: Alpha | None = Field(
        None, description="Scale is alpha / rank (rsLoRA: alpha / sqrt(rank)); default: the rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the LoRA branch.")
    rslora: bool = Field(False, description="Rank-stabilised scaling (arXiv 2312.03732).")
    targets: Annotated[list[Annotated[str, AfterValidator(_check_pattern)]], Field(min_length=1, max_length=256)] = (
        Field(
            ["attention"],
            description="Presets attention, feed_forward, cross_modal (between video and audio), all; or module name"
            " endings such as to_q; or re:<regex>.",
        )
    )
    modalities: Literal["video", "audio", "both"] | None = Field(
        None,
        description="Whose layers the presets mean; within training.modalities, which is the default, but video where"
        " audio.loss_weight is 0.",
    )
    init_from: Source | None = Field(
        None, description="A LoRA file to go on training: A and B start from it, instead of random A and B = 0."
    )
    save_precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="dtype of the exported file.")


class Flow(_Section):
    """How the noise level sigma is drawn."""

    sigma: Literal["stretched-logit-normal", "logit-normal", "uniform"] = Field(
        "stretched-logit-normal", description="The first is how Lightricks trains."
    )
    shift: Literal["auto"] | Positive | None = Field(
        None, description="auto: by token count; or a factor s, as in s*sigma/(1+(s-1)*sigma)."
    )
    uniform_fraction: Share | None = Field(None, description="Share of samples drawn uniformly; default 0.1 or 0.")


class Conditioning(_Section):
    """What is kept clean or left out, drawn per sample."""

    first_frame: Share = Field(0.0, description="Probability of keeping the first frame clean (image-to-video).")
    caption_dropout: Share = Field(0.0, description="Probability of training on the empty caption.")
    prompt_tokens: Annotated[int, Field(ge=8, le=1024)] | None = Field(
        None,
        description="Prompt length; longer captions are cut and counted. LTX-2: a multiple of the connectors' 128"
        " registers. Default: the pipeline's, 128 or 256, LTX-2 1024.",
    )


class Memory(_Section):
    """How the model is made to fit. What is left open is decided by `fit`, or else is the plain way."""

    fit: Literal["auto"] | Capacity | None = Field(
        None,
        description='"12GB": choose what is left open here so that every phase fits a card of this size; "auto": so'
        " that it fits this one and this host.",
    )
    base_precision: Literal["bf16", "fp8", "int8", "int8-w8a8", "nf4"] | None = Field(
        None,
        description="How the frozen base weights are kept. bf16: as training.precision says, not quantised. int8 and"
        " nf4 are made whole for each product; int8-w8a8 and fp8 multiply in 8 bits. Default: bf16.",
    )
    double_quant: bool | None = Field(None, description="nf4: quantise its scales too. Default: true.")
    quantise_on: Literal["device", "host"] = Field("device", description="Where the base is quantised, layer by layer.")
    text_encoder_precision: Literal["bf16", "int8", "nf4"] | None = Field(
        None, description="How the text encoder's weights are kept while captions are encoded. Default: bf16."
    )
    checkpointing: bool | Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="Gradient checkpointing: true every block, n every n-th block, false off. Default: on for GPUs.",
    )
    activation_budget: Capacity | None = Field(
        None, description='"4GB": keep the activations of as many blocks as this holds, compute the others\' again.'
    )
    offload_activations: bool | None = Field(
        None, description="What a block keeps for its backward pass waits in host memory. Default: false."
    )
    block_swap: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="So many blocks' weights live in host memory and come when they are needed. Default: 0."
    )
    group_offload: Literal["block_level", "leaf_level"] | None = Field(
        None, description="All blocks' weights live in host memory: come block by block, or layer by layer."
    )
    blocks_per_group: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="block_level: so many blocks come together."
    )
    use_stream: bool | None = Field(
        None, description="Copy weights beside the computation, ahead of their use. Default: true on CUDA GPUs."
    )
    offload_to_disk: Source | None = Field(
        None, description="A folder: swapped or offloaded weights wait there instead of in host memory."
    )
    decode: Literal["whole", "tiles"] | None = Field(
        None, description="How samples are decoded: at once, or in overlapping tiles, in far less memory."
    )
    decode_tile: Annotated[int, Field(ge=128, le=4096, multiple_of=32)] = Field(
        512, description="tiles: their side in pixels."
    )
    decode_frames: Annotated[int, Field(ge=16, le=1024, multiple_of=8)] = Field(
        64, description="tiles: their length in frames."
    )
    dry_run: bool | None = Field(
        None, description="Before the first step try the largest bucket, and compare with the plan. Default: on GPUs."
    )


class Kernels(_Section):
    """How each op is computed. What is left open the plan chooses, from the device and from what was measured.

    triton is our kernel, compile is torch.compile of its definition, eager the definition in plain PyTorch.
    """

    all: Implementation | None = Field(None, description="Every op that has no key of its own here.")
    causal_conv3d: Implementation | None = Field(None, description="Encoding: the VAE's convolutions.")
    flow_matching: Implementation | None = Field(None, description="Noising and the loss.")
    adaln_rms_norm: Implementation | None = Field(None, description="Norms, and their scale and shift by timestep.")
    gated_residual: Implementation | None = Field(
        None, description="Adding a branch by its gate, and the norm that follows."
    )
    qk_norm_rope: Implementation | None = Field(None, description="Norms and rotation of queries and keys.")
    gelu: Implementation | None = Field(None, description="The feed-forward's activation.")
    lora_linear: Implementation | None = Field(None, description="Linear layers with their LoRA branch.")
    nf4: Implementation | None = Field(None, description="Linear layers whose weights are in NF4.")
    int8: Implementation | None = Field(None, description="Linear layers whose weights are in int8.")
    fp8: Implementation | None = Field(None, description="Linear layers whose weights are in fp8.")


class Cache(_Section):
    """Latents and prompt embeddings on disk."""

    directory: Source | None = Field(None, description="Default: cache/ beside runs/. Runs may share one.")
    latents: Literal["mean", "sample"] = Field("mean", description="The VAE posterior's mean, or a draw from it.")
    text_cache: Literal["connectors", "features"] = Field(
        "connectors",
        description="LTX-2, of each caption: the connectors' output, whole; or what they are fed, a fraction of it,"
        " and they run in every step. The plan prints what each weighs.",
    )


class Checkpoint(_Section):
    """Saving during the run."""

    every: Count | None = Field(None, description="Steps between checkpoints; default 250, at most the run's length.")
    keep: Annotated[int, Field(ge=2, le=100_000)] = Field(
        3, description="How many of the newest checkpoints stay; at least 2, so that one survives damage."
    )


class Prompt(_Section):
    """One validation sample. Keys left out come from [validation]."""

    name: Name = Field(description="Becomes the file's name.", examples=["fox"])
    prompt: Text = Field(description="The text.", examples=["A fox runs through snow."])
    image: Source | None = Field(None, description="First frame for image-to-video.")
    negative_prompt: str | None = Field(None, description="Instead of the section's.")
    resolution: Size | None = Field(None, description="Instead of the section's.")
    frames: Frames | None = Field(None, description="Instead of the section's.")
    fps: Fps | None = Field(None, description="Instead of the section's.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Instead of the section's.")


class Validation(_Section):
    """Samples while training, made with diffusers' own pipelines."""

    every: Annotated[int, Field(ge=0, le=100_000_000)] | None = Field(
        None, description="Steps between samples; 0 none while training; default: with each checkpoint."
    )
    at_start: bool = Field(True, description="Also sample the base model before the first step.")
    library: Source | None = Field(None, description="A file of prompts: TOML, or JSON of name -> prompt.")
    prompt: list[Prompt] = Field([], description="[[validation.prompt]] tables.")
    resolution: Size | None = Field(None, description="Default: the first dataset's.")
    frames: Frames | None = Field(None, description="Default: the first dataset's.")
    fps: Fps | None = Field(None, description="Default: the training rate.")
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Default: the model version's.")
    guidance: Annotated[float, Field(ge=1, le=30)] | None = Field(
        None, description="Classifier-free guidance; 1 is off. LTX-2: the video's. Default: the model version's."
    )
    audio_guidance: Annotated[float, Field(ge=1, le=30)] | None = Field(
        None, description="LTX-2: the sound's classifier-free guidance; 1 is off. Default: the version's."
    )
    stg: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None,
        description="LTX-2: spatio-temporal guidance, away from a pass that skips self attention in some blocks;"
        " 0 is off. Default: the version's.",
    )
    modality_guidance: Annotated[float, Field(ge=1, le=30)] | None = Field(
        None,
        description="LTX-2: away from a pass in which video and sound do not see each other; 1 is off."
        " Default: the version's.",
    )
    rescale: Share | None = Field(
        None,
        description="LTX-2: how much of the contrast that guidance adds is taken back; 0 is off."
        " Default: the version's.",
    )
    frugal: bool = Field(
        False, description="LTX-2: decode in tiles, with nothing else on the device: slower, in far less memory."
    )
    negative_prompt: str | None = Field(
        None, description="Used when guidance > 1. Default: the model version's, of the usual faults."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="Starting noise of every sample.")


class Recipe(_Section):
    """An ltxforge recipe."""

    model: Model
    run: Run = Run()
    dataset: Annotated[list[Dataset], Field(min_length=1)]
    training: Training = Training()
    audio: Audio = Audio()
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    flow: Flow = Flow()
    conditioning: Conditioning = Conditioning()
    memory: Memory = Memory()
    kernels: Kernels = Kernels()
    cache: Cache = Cache()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()


NOT_YET: dict[str, str] = {
    "training.attention": "attention backends are not in this release yet; it uses PyTorch's own attention",
    "validation.attention": "attention backends are not in this release yet; it uses PyTorch's own attention",
    "ema": "EMA is not in this release yet",
    "crepa": "CREPA is not in this release yet",
    "tread": "TREAD is not in this release yet",
    "scheduled_sampling": "scheduled sampling is not in this release yet",
    "distributed": "training on several GPUs is not in this release yet",
    "trackers": "trackers are not in this release yet; every run writes events.jsonl",
    "hub": "pushing to the Hub is not in this release yet",
}
"""Keys that the design has a place for and this release has not: refused by name, with the reason."""
