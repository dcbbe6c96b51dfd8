"""What was decided: the recipe with every number filled in. Data, and pure functions of the step.

The planner makes a Plan once; it is printed, saved as `plan.json`, and nothing reads the recipe afterwards. Fields
marked `free` may differ when a run is resumed; all others are the run's identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

from ltxforge_kernels.choice import EAGER, Kernels

from ltxforge.shapes import ClipShape

FORMAT = 3
MOST_CLIPS_TOLD = 8
T = TypeVar("T")


def free(**options: Any) -> Any:
    """A field that may change between attempts of one run."""
    return field(metadata={"free": True}, **options)


@dataclass(frozen=True)
class ComponentPlan:
    """Where one part of the model comes from.

    `digest` names the content (SHA-256, or the Hub's own blob names) and alone is the identity, since weights may be
    moved. `kind` is "builtin", "folder", "file" or "hub"; `location` the local path ("" until a Hub part is
    downloaded); `inside` a subfolder or file within the source; `revision` the resolved commit. `stored_format` is what
    a transformer's blocks come in, "nf4" or "fp8", "" where they are whole.
    """

    source: str = free()
    kind: str = free()
    digest: str = ""
    inside: str = free(default="")
    repository: str = free(default="")
    revision: str = free(default="")
    location: str = free(default="")
    bytes: int = free(default=0)
    stored_format: str = free(default="")


@dataclass(frozen=True)
class ModelPlan:
    """The base model. `components` holds transformer, vae, text_encoder, tokenizer and scheduler; LTX-2's also
    audio_vae, vocoder and connectors.
    """

    base: str = free()
    version: str
    rope: str
    components: dict[str, ComponentPlan]
    licence: str = free(default="")
    licence_url: str = free(default="")
    evidence: tuple[str, ...] = free(default=())


@dataclass(frozen=True)
class DevicePlan:
    """The machine's part. `kind` is cuda, rocm, mps or cpu; `exactness` is "exact" or "statistical".

    `precision` is the base's and the activations', `encoder_precision` the VAE's and the text encoder's.
    `loss_scale`, a power of two, keeps fp16's gradients above its smallest numbers; it is 1 elsewhere.

    A run may go on on another device or version, but then no longer bit for bit: the resume says so.
    """

    precision: str
    encoder_precision: str = free()
    kind: str = free()
    attention: str = free()
    exactness: str = free()
    exactness_reason: str = free()
    name: str = free(default="")
    versions: dict[str, str] = free(default_factory=dict)
    loss_scale: float = free(default=1.0)


@dataclass(frozen=True)
class BucketPlan:
    """Samples of one size and rate. `samples` counts windows times repeats, `tokens` is the sequence length T.

    `audio_tokens` is the sound's sequence length L. Either is 0 where that modality is not trained. `with_sound` counts
    the samples that have a sound track to train on. `video_bytes` and `audio_bytes` are what one sample's latents weigh
    in the cache.
    """

    shape: ClipShape
    fps: float
    tokens: int
    samples: int
    audio_tokens: int = 0
    with_sound: int = 0
    video_bytes: int = free(default=0)
    audio_bytes: int = free(default=0)


@dataclass(frozen=True)
class SamplePlan:
    """One window of one clip: what is encoded, cached and trained on.

    `start_seconds` is the time of the first frame in the clip; frame n is at start + n / fps. `dataset` is a name, by
    default the folder's: clips may be moved. `sound` is "" where none is trained, "own" for the clip's own track, else
    the digest of the sound file beside it.
    """

    dataset: str = free()
    clip: str
    path: str = free()
    caption: str
    shape: ClipShape
    fps: float
    start_seconds: float
    repeats: int = 1
    sound: str = ""


@dataclass(frozen=True)
class DataPlan:
    """All samples, sorted by content so that folder order and file times change nothing."""

    samples: tuple[SamplePlan, ...]
    buckets: tuple[BucketPlan, ...]
    max_rejected: float = free(default=0.05)

    @property
    def samples_per_epoch(self) -> int:
        """Windows seen in one epoch, repeats included."""
        return sum(sample.repeats for sample in self.samples)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Micro-batches in one epoch: each bucket's samples, cut into batches of equal shape."""
        return sum(math.ceil(bucket.samples / batch_size) for bucket in self.buckets)


@dataclass(frozen=True)
class CachePlan:
    """`latents` is "mean" (the VAE posterior's mean) or "sample" (mean and standard deviation, drawn by address).

    `text` says what is kept of a caption: "connectors" (their output) or "features" (what they are fed, trimmed to the
    caption's real tokens; the connectors then run with every step). It means nothing to a model without connectors.
    """

    directory: str = free()
    latents: str = "mean"
    text: str = "connectors"


@dataclass(frozen=True)
class FlowPlan:
    """How sigma is drawn. `shift` is None for the token-count rule, else a factor s (mu = ln s)."""

    sigma: str
    shift: float | None
    stretch: bool
    uniform_fraction: float


@dataclass(frozen=True)
class ConditioningPlan:
    """What is kept clean or left out, per sample: probabilities, and the prompt's length in tokens."""

    first_frame: float
    caption_dropout: float
    prompt_tokens: int


@dataclass(frozen=True)
class AudioPlan:
    """How sound is trained: `sigma` is "independent" of the video's or "shared" with it; `loss_weight` weighs it."""

    sigma: str
    loss_weight: float


@dataclass(frozen=True)
class LoraPlan:
    """The adapter. `targets` are presets or patterns, within the modules of `modalities`; `save_precision` is the
    exported file's dtype.

    `init_from` is the LoRA file that A and B start from, `init_digest` its content; "" for a fresh adapter.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: tuple[str, ...]
    save_precision: str = free(default="bf16")
    modalities: str = "video"
    init_from: str = free(default="")
    init_digest: str = ""


@dataclass(frozen=True)
class OptimizerPlan:
    """Optimiser and learning-rate schedule; steps are optimiser updates.

    `decay_steps` is the step at which the schedule reaches its end: the run's length when the run was first planned,
    or what the recipe says, which may stretch it later.
    """

    name: str
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    decay_steps: int = free()
    end_fraction: float
    power: float


@dataclass(frozen=True)
class TrainingPlan:
    """The step. `clip_norm` and `clip_value` are exclusive; both None means no clipping.

    `modalities` says what is computed: "video", "audio" or "both". What is left out costs nothing. `compile` compiles
    the transformer's block as a whole.
    """

    batch_size: int
    accumulate: int
    clip_norm: float | None
    clip_value: float | None
    modalities: str = "video"
    compile: bool = free(default=False)


@dataclass(frozen=True)
class StreamPlan:
    """Blocks whose large frozen weights wait off the device and come when they are needed.

    `units` are the numbers of the blocks that travel together; at `level` "leaf" each linear layer travels alone.
    `overlapped` copies beside the computation, on a stream of its own. `disk` is the folder where they wait, "" for
    host memory.
    """

    units: tuple[tuple[int, ...], ...]
    level: str = "block"
    overlapped: bool = True
    disk: str = ""

    @property
    def blocks(self) -> frozenset[int]:
        """All blocks that are streamed."""
        return frozenset(number for unit in self.units for number in unit)


def every_nth(every: int, blocks: int) -> tuple[int, ...]:
    """The numbers of every n-th block from the first; none where `every` is 0."""
    return tuple(range(0, blocks, every)) if every else ()


@dataclass(frozen=True)
class MemoryPlan:
    """How the model is made to fit.

    What changes no bit of a gradient may change between attempts: which blocks are computed again in the backward pass
    (`checkpointed`, by number), which are streamed, what is kept on the host. `base_precision` "bf16" is not quantised:
    the base is kept in the run's precision. `decode_tile` (pixels) and `decode_frames` are the sizes in which samples
    are decoded, 0 for whole. `budget` is what there is, in bytes of the device and of the host, 0 where nobody
    knows; `fit` how a choice was asked for; `blocks` how many the model has, 0 where that is not told.
    """

    checkpointed: tuple[int, ...] = free(default=())
    base_precision: str = "bf16"
    double_quant: bool = False
    quantise_on: str = free(default="device")
    text_encoder_precision: str = free(default="bf16")
    stream: StreamPlan | None = free(default=None)
    offload_activations: bool = free(default=False)
    decode_tile: int = free(default=0)
    decode_frames: int = free(default=0)
    dry_run: bool = free(default=False)
    fit: str = free(default="")
    budget: tuple[int, int] = free(default=(0, 0))
    blocks: int = free(default=0)


@dataclass(frozen=True)
class CheckpointPlan:
    """Saving: every n steps, the newest `keep` are kept."""

    every: int = free()
    keep: int = free()


@dataclass(frozen=True)
class PromptPlan:
    """One validation sample: everything its pipeline call needs. `image` is a path, or "" for text-to-video.

    From `audio_guidance` on for models with sound, see `model_spec.SamplingDefaults`. `frugal` decodes in tiles, with
    no second model on the device.
    """

    name: str
    prompt: str
    negative_prompt: str
    image: str
    shape: ClipShape
    fps: float
    steps: int
    guidance: float
    seed: int
    audio_guidance: float | None = None
    stg: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    modality_guidance: float = 1.0
    rescale: float = 0.0
    frugal: bool = False

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is used: guidance of the video or of the sound is above 1."""
        return max(self.guidance, self.audio_guidance or 0.0) > 1


@dataclass(frozen=True)
class ValidationPlan:
    """Samples during the run. `every` 0 means never; `at_start` also samples the base model at step 0."""

    every: int = free()
    at_start: bool = free()
    prompts: tuple[PromptPlan, ...] = free(default=())


@dataclass(frozen=True)
class PhasePlan:
    """What one phase of a run takes at its peak, in bytes; `parts` says what the device's are made of."""

    name: str
    device_bytes: int
    host_bytes: int
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimates:
    """What the plan can know before anything runs. Bytes.

    `caption_bytes` is what one caption weighs in the cache as the plan keeps it; `text_bytes` the same for each choice
    of `CachePlan.text`, empty for a model without connectors. See `estimates.caption_bytes` for what is guessed.
    `phases` are in the order in which a run meets them; `choices` says in words how `memory.fit` chose.
    """

    cache_bytes: int = 0
    caption_bytes: int = 0
    text_bytes: dict[str, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    lora_bytes: int = 0
    download_bytes: int = 0
    phases: tuple[PhasePlan, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every number of a run. `origins` says where a number came from: "recipe", "default", "device" or "weights".

    `kernels` says how each op is carried out: `kernels.of("gelu", tokens)`. It may change like the device, and is told
    likewise. `assumed` names what nobody looked at ("device", "weights", "data", …): no run follows such a plan.
    """

    name: str = free()
    seed: int
    steps: int = free()
    steps_per_epoch: float
    model: ModelPlan
    device: DevicePlan
    data: DataPlan
    cache: CachePlan
    flow: FlowPlan
    conditioning: ConditioningPlan
    lora: LoraPlan
    optimizer: OptimizerPlan
    training: TrainingPlan
    memory: MemoryPlan
    checkpoint: CheckpointPlan
    validation: ValidationPlan
    directory: str = free()
    resume: str = free(default="latest")
    audio: AudioPlan | None = None
    kernels: Kernels = free(default=EAGER)
    world_size: int = 1
    estimates: Estimates = free(default_factory=Estimates)
    notes: tuple[str, ...] = free(default=())
    assumed: tuple[str, ...] = free(default=())
    origins: dict[str, str] = free(default_factory=dict)
    format: int = FORMAT

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 1."""
        return learning_rate_at(self.optimizer, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint follows update `step`."""
        return step % self.checkpoint.every == 0 or step == self.steps

    def validates_at(self, step: int) -> bool:
        """Whether samples follow update `step`; 0 is before training."""
        if not self.validation.prompts:
            return False
        if step == 0:
            return self.validation.at_start
        return self.validation.every > 0 and (step % self.validation.every == 0 or step == self.steps)

    def noised_lengths(self) -> dict[str, int]:
        """Every sequence whose sigma is drawn for its own length: "768x512x121", "768x512x121 sound" → tokens."""
        lengths = {str(bucket.shape): bucket.tokens for bucket in self.data.buckets}
        if self.audio and (self.audio.sigma == "independent" or self.training.modalities == "audio"):
            lengths |= {f"{bucket.shape} sound": bucket.audio_tokens for bucket in self.data.buckets}
        return {name: tokens for name, tokens in lengths.items() if tokens}

    def identity_digest(self) -> str:
        """SHA-256 of all identity fields: equal digests may continue each other."""
        text = json.dumps(identity(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def learning_rate_at(optimizer: OptimizerPlan, step: int) -> float:
    """Warm-up, then the schedule, as a pure function of the update's number (from 1).

    Warm-up is linear and reaches the full rate at update `warmup_steps`. After it, with progress p = n / N before the
    n-th (from 0) of the N updates that remain up to `decay_steps`: constant 1; linear 1 − p; cosine (1 + cos πp)/2;
    polynomial (1 − p)^power; each blended with `end_fraction` as f = end + (1 − end)·shape. So the first of them has
    the full rate and the last is not wasted at the end's; beyond `decay_steps` the end value holds.
    """
    rate = optimizer.learning_rate
    if step <= optimizer.warmup_steps:
        return rate * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return rate
    span = max(1, optimizer.decay_steps - optimizer.warmup_steps)
    progress = min(1.0, (step - 1 - optimizer.warmup_steps) / span)
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "polynomial": (1 - progress) ** optimizer.power,
    }[optimizer.schedule]
    return rate * (optimizer.end_fraction + (1 - optimizer.end_fraction) * shape)


def to_json(plan: Any) -> dict[str, Any]:
    """A plan, or a part of one, as JSON-ready data."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def from_json(cls: type[T], data: dict[str, Any]) -> T:
    """The dataclass that `to_json` was given. Raises KeyError or TypeError if the data is of another format."""
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := set(data) - known:
        raise KeyError(f"{cls.__name__} has no field {sorted(unknown)}")
    return cls(**{name: _restore(hints[name], value) for name, value in data.items()})


def _restore(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else Any
        return tuple(_restore(inner, item) for item in value)
    if origin is dict:
        return {key: _restore(arguments[1], item) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType) and value is not None:
        return _restore(next(item for item in arguments if item is not type(None)), value)
    return value


def identity(value: Any) -> Any:
    """The identity part of a plan as JSON-ready data: free fields left out, at every depth."""
    if dataclasses.is_dataclass(value):
        return {
            item.name: identity(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if not item.metadata.get("free")
        }
    if isinstance(value, dict):
        return {key: identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    return value


def differences(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    """What makes two plans different runs, as (name, old, new): identity fields by dotted name, samples by clip.

    What follows from another difference is left out: the parts of another model version, with another base whether
    its scales are quantised, and with other modalities which samples have sound and which VAE counts.
    """
    if old.training.modalities != new.training.modalities:
        old, new = _without_sound(old), _without_sound(new)
    before, after = _flat(identity(old)), _flat(identity(new))
    found = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found.append((name, *(_worded(flat.get(name, "absent")) for flat in (before, after))))
    if samples := _sample_differences(old.data.samples, new.data.samples):
        # What the samples decide differs with them and says nothing more.
        derived = ("data.samples.", "data.buckets.", "steps_per_epoch")
        found = [entry for entry in found if not entry[0].startswith(derived)] + samples
    if old.memory.base_precision != new.memory.base_precision:
        found = [entry for entry in found if entry[0] != "memory.double_quant"]
    if old.model.version != new.model.version:
        found = [entry for entry in found if not entry[0].startswith("model.components.")]
    return found


def _worded(value: Any) -> str:
    """A value as a recipe's reader knows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else str(value)


def _without_sound(plan: Plan) -> Plan:
    samples = tuple(dataclasses.replace(sample, sound="") for sample in plan.data.samples)
    buckets = tuple(dataclasses.replace(bucket, tokens=0, audio_tokens=0, with_sound=0) for bucket in plan.data.buckets)
    parts = {
        name: dataclasses.replace(part, digest="") if name in ("vae", "audio_vae") else part
        for name, part in plan.model.components.items()
    }
    return dataclasses.replace(
        plan,
        data=dataclasses.replace(plan.data, samples=samples, buckets=buckets),
        model=dataclasses.replace(plan.model, components=parts),
    )


def _sample_differences(old: Iterable[SamplePlan], new: Iterable[SamplePlan]) -> list[tuple[str, str, str]]:
    """What became of each clip, by its file's name: gone, new, or what of it changed. Beyond a few, how many."""
    before, after = _by_clip(old, new), _by_clip(new, old)
    found = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, []), after.get(name, [])
        found.append((f"data: {name}", _what_it_was(was, now), _what_changed(was, now)))
    shown = found[:MOST_CLIPS_TOLD]
    return [*shown, ("data: others", str(len(found) - len(shown)), "likewise")] if len(found) > len(shown) else found


def _what_it_was(was: list[SamplePlan], now: list[SamplePlan]) -> str:
    if was and now:
        return "as it was"
    return "there" if was else "absent"


def _what_changed(was: list[SamplePlan], now: list[SamplePlan]) -> str:
    if not was or not now:
        return "there" if now else "gone"
    heard = [any(sample.sound for sample in samples) for samples in (was, now)]
    sound = {(True, False): "sound (none now)", (False, True): "sound (none before)"}.get(tuple(heard), "sound")
    words = {"clip": "content", "start_seconds": "windows", "sound": sound}
    names = [item.name for item in dataclasses.fields(SamplePlan) if not item.metadata.get("free")]
    differing = [name for name in names if [getattr(s, name) for s in was] != [getattr(s, name) for s in now]]
    return "other " + ", ".join(words.get(name, name) for name in differing)


def _by_clip(samples: Iterable[SamplePlan], known: Iterable[SamplePlan]) -> dict[str, list[SamplePlan]]:
    """The samples that are not among the known ones, by their file's name, which alone is no difference."""
    left = Counter(json.dumps(identity(sample)) for sample in known)
    found: dict[str, list[SamplePlan]] = {}
    for sample in samples:
        text = json.dumps(identity(sample))
        if left[text]:
            left[text] -= 1
            continue
        found.setdefault(PurePath(sample.path).name, []).append(sample)
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = ((str(index), item) for index, item in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in pairs:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat
