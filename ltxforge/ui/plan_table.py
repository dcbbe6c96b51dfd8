"""The plan as a readable table: every number, what it means, and who decided it.

Decides grouping and wording. Computes nothing that a run depends on: sigma quantiles come in as an argument, all else
stands in the plan. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ltxforge.plan import LoraPlan, Plan, PromptPlan
from ltxforge.printable import printable
from ltxforge.specs import SPECS
from ltxforge.ui.kernels_table import kernel_rows
from ltxforge.ui.memory_table import memory_rows, phases_of
from ltxforge.ui.text import counted, number, short, size

# Label, value, and who decided it: "recipe", "default", "device", "weights", "dataset" or nobody in particular.
Row = tuple[str, str, str]

LABEL_WIDTH, VALUE_WIDTH, ORIGIN_WIDTH = 17, 48, 8
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def plan_table(plan: Plan, sigma_quantiles: Mapping[str, Sequence[float]] | None = None) -> RenderableType:
    """The whole plan, for a terminal of 80 columns or more, readable without colour.

    Args:
        sigma_quantiles: what is noised ("768x512x121", "768x512x121 sound") → the sigmas below which `SHARES` of the
            draws lie, as `flow_matching.sigma_quantiles` gives them.
    """
    parts: list[RenderableType] = [_head(plan)]
    for title, rows in (
        ("Model", _model(plan)),
        ("Device", _device(plan)),
        ("Data", _data(plan)),
        ("LoRA", _lora(plan)),
        ("Training", _training(plan)),
        ("Memory", memory_rows(plan)),
        ("Optimizer", _optimizer(plan)),
        ("Noise", _flow(plan)),
        ("Sampling", _sampling(plan)),
        ("Files", _files(plan)),
    ):
        parts += [Text(), Text(title, "bold"), _rows(rows)]
        if title == "Data":
            parts.append(_buckets(plan))
        if title == "Memory":
            parts += [Text(), phases_of(plan)]
        if title == "Noise" and sigma_quantiles:
            parts.append(_quantiles(sigma_quantiles))
        if title == "Sampling" and plan.validation.prompts:
            parts.append(_prompts(plan.validation.prompts))
    if plan.notes:
        parts += [Text(), Text("Notes", "bold yellow"), _notes(plan.notes)]
    return Group(*parts)


def _head(plan: Plan) -> RenderableType:
    return Text.assemble(
        ("Plan ", "bold"), (printable(plan.name), "bold cyan"),
        f"   {counted(plan.steps, 'step')} on {counted(len(plan.data.samples), 'sample')}   seed {plan.seed}",
        f"   assumed: {', '.join(plan.assumed)}" if plan.assumed else "",
    )  # fmt: skip


def _rows(rows: Iterable[Row]) -> Table:
    """Label, value, origin; long values are folded under themselves."""
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(width=2)
    table.add_column(width=LABEL_WIDTH, no_wrap=True)
    table.add_column(overflow="fold", min_width=VALUE_WIDTH, max_width=88)
    table.add_column(width=ORIGIN_WIDTH, no_wrap=True)
    for label, value, origin in rows:
        if not value:
            continue
        table.add_row("", Text(label, "dim"), Text(printable(value)), Text(origin, "dim italic"))
    return table


def _model(plan: Plan) -> list[Row]:
    model, origin = plan.model, plan.origins.get
    formula = "at " + {"plain": "8j/fps", "causal": "max(0, 8j - 7)/fps"}.get(model.rope, "")
    if "connectors" in model.components:
        formula = "in the middle of the frames that it covers"
    rows = [
        ("base", model.base, origin("model.base", "")),
        ("version", model.version, origin("model.version", "")),
        ("rope", f"{model.rope}: latent frame j {formula}", origin("model.rope", "")),
    ]
    whose = "assumed" if "weights" in plan.assumed else ""
    rows += [("parts", f"{', '.join(names)}: {place}", whose) for place, names in _parts(plan).items()]
    rows += [("recognised by", evidence, "") for evidence in model.evidence]
    rows.append(("licence", " ".join(filter(None, (model.licence, model.licence_url))), ""))
    return rows


def _parts(plan: Plan) -> dict[str, list[str]]:
    """Where the model's parts come from; those of one place together."""
    places: dict[str, list[str]] = {}
    for name, part in plan.model.components.items():
        place = f"{part.source}:{part.inside}" if part.inside and part.kind != "assumed" else part.source
        details = [part.kind, f"revision {part.revision[:12]}" if part.revision else ""]
        if part.kind == "assumed" and part.bytes:
            details.append(size(part.bytes))
        if part.kind == "hub" and not part.location:
            details.append(f"to be downloaded, {size(part.bytes)}")
        places.setdefault(f"{place} ({', '.join(filter(None, details))})", []).append(name.replace("_", " "))
    return places


def _device(plan: Plan) -> list[Row]:
    device, whose = plan.device, "assumed" if "device" in plan.assumed else "device"
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    return [
        ("device", f"{device.kind} ({device.name})" if device.name else device.kind, whose),
        (
            "precision",
            f"{device.precision} base, fp32 adapter, {device.encoder_precision} encoders",
            plan.origins.get("training.precision", ""),
        ),
        ("loss scale", f"{number(device.loss_scale)}, undone before clipping" if device.loss_scale != 1 else "", ""),
        ("attention", device.attention, "device"),
        *kernel_rows(plan.kernels, plan.origins),
        ("a resume is", f"{device.exactness}: {device.exactness_reason}", "device"),
        ("processes", number(plan.world_size), "device"),
        ("versions", versions, "device"),
    ]


def _data(plan: Plan) -> list[Row]:
    data, origin = plan.data, plan.origins.get
    clips = len({sample.clip for sample in data.samples})
    datasets = sorted({sample.dataset for sample in data.samples})
    conditioning, whose = plan.conditioning, "assumed" if "data" in plan.assumed else ""
    return [
        (
            "samples",
            f"{counted(len(data.samples), 'window')} of {counted(clips, 'clip')}: {', '.join(datasets)}",
            whose,
        ),
        ("per epoch", f"{counted(data.samples_per_epoch, 'sample')}, {_steps(plan.steps_per_epoch)}", ""),
        ("max rejected", f"{short(100 * data.max_rejected)} % of the clips", origin("run.max_rejected", "")),
        ("sound", _sound(plan), ""),
        ("latents", f"the VAE posterior's {plan.cache.latents}", origin("cache.latents", "")),
        ("prompt length", f"{conditioning.prompt_tokens} tokens", origin("conditioning.prompt_tokens", "")),
        *_captions(plan),
        ("first frame kept", _share(conditioning.first_frame), origin("conditioning.first_frame", "")),
        ("caption dropped", _share(conditioning.caption_dropout), origin("conditioning.caption_dropout", "")),
    ]


def _sound(plan: Plan) -> str:
    """How many samples have a sound track, where sound is trained."""
    if plan.audio is None:
        return ""
    with_sound = sum(bool(sample.sound) for sample in plan.data.samples)
    beside = sum(sample.sound not in ("", "own") for sample in plan.data.samples)
    more = f", {beside} from a file beside the clip" if beside else ""
    return f"{with_sound} of {counted(len(plan.data.samples), 'sample')} have a sound track{more}"


def _captions(plan: Plan) -> list[Row]:
    """What a caption weighs in the cache, as it is kept and as it could be."""
    estimates, kept = plan.estimates, plan.cache.text
    if not estimates.text_bytes:
        return [("a caption", f"at most {size(estimates.caption_bytes)} in the cache", "")]
    rows = [("a caption", _caption(kept, estimates.caption_bytes), plan.origins.get("cache.text_cache", ""))]
    others = (name for name in estimates.text_bytes if name != kept)
    return rows + [
        ("", f'cache.text_cache = "{name}": {_caption(name, estimates.text_bytes[name])}', "") for name in others
    ]


def _caption(kept: str, count: int) -> str:
    if kept == "features":
        return f"about {size(count)} in the cache: what the connectors are fed; they run in every step"
    return f"{size(count)} in the cache: what the {kept} make of it"


def _buckets(plan: Plan) -> Table:
    buckets, hears = plan.data.buckets, plan.audio is not None
    table = _columns("bucket", "fps", "tokens", *(["of sound"] if hears else []), "samples",
                     *(["with sound"] if hears else []), "a sample weighs")  # fmt: skip
    for bucket in buckets:
        cells = [str(bucket.shape), number(bucket.fps), f"{bucket.tokens:,}"]
        cells += [f"{bucket.audio_tokens:,}"] if hears else []
        cells += [f"{bucket.samples:,}"]
        cells += [f"{bucket.with_sound:,}"] if hears else []
        table.add_row("", *cells, size(bucket.video_bytes + bucket.audio_bytes))
    return table


def _lora(plan: Plan) -> list[Row]:
    lora, origin = plan.lora, plan.origins.get
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    rule = "rsLoRA, alpha / sqrt(rank)" if lora.rslora else "alpha / rank"
    return [
        ("rank", number(lora.rank), origin("lora.rank", "")),
        ("alpha", f"{number(lora.alpha)} (scale {scale:g}: {rule})", origin("lora.alpha", "")),
        ("dropout", number(lora.dropout), origin("lora.dropout", "")),
        ("targets", ", ".join(lora.targets), origin("lora.targets", "")),
        ("modalities", _modalities(lora.modalities), origin("lora.modalities", "")),
        ("starts from", _lora_file(lora), origin("lora.init_from", "")),
        (
            "saved as",
            f"{lora.save_precision}, about {size(plan.estimates.lora_bytes)}",
            origin("lora.save_precision", ""),
        ),
    ]


def _lora_file(lora: LoraPlan) -> str:
    """The LoRA file that the run goes on from, and how its content's digest begins."""
    return " ".join(filter(None, (lora.init_from, lora.init_digest and f"({lora.init_digest[:12]})")))


def _training(plan: Plan) -> list[Row]:
    training, origin = plan.training, plan.origins.get
    whole = f"up to {counted(training.batch_size * training.accumulate, 'sample')} a step"
    epochs = f", {_epochs(plan.steps / plan.steps_per_epoch)}" if plan.steps_per_epoch else ""
    return [
        ("modalities", _modalities(training.modalities), origin("training.modalities", "")),
        ("steps", f"{plan.steps:,}{epochs}", origin("run.steps", "")),
        ("seed", number(plan.seed), origin("run.seed", "")),
        ("batch size", number(training.batch_size), origin("training.batch_size", "")),
        ("accumulate", f"{training.accumulate} ({whole})", origin("training.accumulate", "")),
        _clipping(plan),
        ("compiled", "each block as a whole" if training.compile else "no block", origin("training.compile", "")),
        ("resume", plan.resume, origin("run.resume", "")),
    ]


def _epochs(count: float) -> str:
    rounded = f"{count:,.0f}" if count >= 100 else f"{count:.3g}"
    return f"{rounded} epoch" if rounded == "1" else f"{rounded} epochs"


def _steps(count: float) -> str:
    rounded = short(count)
    return f"{rounded} step" if rounded == "1" else f"{rounded} steps"


def _modalities(modalities: str) -> str:
    return {"both": "video and audio, jointly"}.get(modalities, f"{modalities} alone")


def _clipping(plan: Plan) -> Row:
    training = plan.training
    if training.clip_value is not None:
        return "clip value", number(training.clip_value), plan.origins.get("training.clip_value", "")
    text = "off" if training.clip_norm is None else number(training.clip_norm)
    return "clip norm", text, plan.origins.get("training.clip_norm", "")


def _optimizer(plan: Plan) -> list[Row]:
    optimizer, origin = plan.optimizer, plan.origins.get
    betas = ", ".join(map(number, optimizer.betas))
    rows = [
        ("optimizer", optimizer.name, origin("optimizer.name", "")),
        ("learning rate", number(optimizer.learning_rate), origin("optimizer.learning_rate", "")),
        ("warm-up", counted(optimizer.warmup_steps, "step"), origin("optimizer.warmup_steps", "")),
        ("schedule", optimizer.schedule, origin("optimizer.schedule", "")),
    ]
    if optimizer.schedule != "constant":
        end = short(optimizer.learning_rate * optimizer.end_fraction)
        rows.append(("ends", f"at {end} from step {optimizer.decay_steps:,} on", origin("optimizer.end_fraction", "")))
    if optimizer.schedule == "polynomial":
        rows.append(("power", number(optimizer.power), origin("optimizer.power", "")))
    return [
        *rows,
        ("betas", betas, origin("optimizer.betas", "")),
        ("epsilon", number(optimizer.epsilon), origin("optimizer.epsilon", "")),
        ("weight decay", number(optimizer.weight_decay), origin("optimizer.weight_decay", "")),
    ]


def _flow(plan: Plan) -> list[Row]:
    flow, origin = plan.flow, plan.origins.get
    shift = "auto, by token count" if flow.shift is None else f"{number(flow.shift)} (mu = ln {number(flow.shift)})"
    return [
        ("sigma", flow.sigma, origin("flow.sigma", "")),
        ("stretch", "0.5 and 99.9 percentiles to 0 and 1" if flow.stretch else "none", ""),
        ("shift", "none" if flow.sigma == "uniform" else shift, origin("flow.shift", "")),
        ("uniform share", _share(flow.uniform_fraction), origin("flow.uniform_fraction", "")),
        *_sound_noise(plan),
    ]


def _sound_noise(plan: Plan) -> list[Row]:
    if plan.audio is None:
        return []
    words = {"independent": "independent: a draw of its own", "shared": "shared with the video"}
    sigma = words.get(plan.audio.sigma, plan.audio.sigma)
    weight = f"{number(plan.audio.loss_weight)} beside the video's 1" if plan.audio.loss_weight else "0: context only"
    if plan.training.modalities == "audio":
        sigma, weight = "", number(plan.audio.loss_weight)
    return [
        ("sound's sigma", sigma, plan.origins.get("audio.sigma", "")),
        ("sound's weight", weight, plan.origins.get("audio.loss_weight", "")),
    ]


def _quantiles(quantiles: Mapping[str, Sequence[float]]) -> Table:
    """For each bucket, below which sigma a tenth, a quarter … of the draws lie."""
    table = _columns("sigma trained", *(f"{100 * share:.0f} % <" for share in SHARES))
    for bucket, sigmas in quantiles.items():
        table.add_row("", bucket, *(f"{sigma:.3f}" for sigma in sigmas))
    return table


def _sampling(plan: Plan) -> list[Row]:
    validation, origin = plan.validation, plan.origins.get
    if not validation.prompts:
        return [("samples", "none: the recipe has no validation prompts", "")]
    start = ", and before the first step" if validation.at_start else ""
    return [
        ("every", _every(validation.every, "step", "never") + start, origin("validation.every", "")),
        ("pipeline", _pipelines(plan), ""),
        ("schedule", f"{_schedule(plan)}, not the one trained on", "weights"),
        *_guidance(plan),
    ]


def _has_audio(plan: Plan) -> bool:
    return "audio_vae" in plan.model.components


def _pipelines(plan: Plan) -> str:
    """diffusers' pipelines that make the samples."""
    if _has_audio(plan):
        from_images = {bool(prompt.image) for prompt in plan.validation.prompts}
        names = {False: "LTX2Pipeline", True: "LTX2ImageToVideoPipeline"}
        return ", ".join(names[each] for each in sorted(from_images))
    return {"plain": "LTXPipeline, LTXImageToVideoPipeline"}.get(plan.model.rope, "LTXConditionPipeline")


def _guidance(plan: Plan) -> list[Row]:
    """What steers LTX-2's samples beside the video's own guidance, which the prompts' table shows."""
    if not _has_audio(plan):
        return []
    prompts, origin = plan.validation.prompts, plan.origins.get
    blocks = sorted({block for prompt in prompts for block in prompt.stg_blocks})
    where = f" in block {', '.join(map(str, blocks))}" if blocks else ""
    return [
        ("guidance", f"{_values(p.guidance for p in prompts)} of the video", origin("validation.guidance", "")),
        (
            "",
            f"{_values(p.audio_guidance or 1.0 for p in prompts)} of the sound",
            origin("validation.audio_guidance", ""),
        ),
        ("STG", _values((p.stg for p in prompts), 0) + where, origin("validation.stg", "")),
        (
            "modality guidance",
            _values((p.modality_guidance for p in prompts), 1),
            origin("validation.modality_guidance", ""),
        ),
        ("rescale", _values((p.rescale for p in prompts), 0), origin("validation.rescale", "")),
        ("decoding", _decoding(prompts, plan.memory.decode_tile), origin("validation.frugal", "")),
    ]


def _values(found: Iterable[float], off: float | None = None) -> str:
    """The different values of the prompts, usually one; `off` is told as such."""
    return ", ".join("off" if value == off else number(value) for value in sorted(set(found)))


def _decoding(prompts: Iterable[PromptPlan], tile: int) -> str:
    if any(prompt.frugal for prompt in prompts):
        return "frugal: in tiles, with nothing else on the device"
    return "in tiles" if tile else "whole"


def _schedule(plan: Plan) -> str:
    """How the version's own pipeline spaces its denoising steps."""
    spec = SPECS.get(plan.model.version)
    if spec is not None and spec.sampling.timesteps:
        listed = ", ".join(f"{timestep:g}" for timestep in spec.sampling.timesteps)
        return f"with {spec.sampling.steps} steps the distilled weights' own timesteps {listed}"
    if plan.model.rope == "causal" and not _has_audio(plan):
        return "the pipeline's own, linear-quadratic"
    return "the pipeline's own, shifted by the number of tokens"


def _prompts(prompts: Iterable[PromptPlan]) -> Table:
    table = _columns("prompt", "size", "fps", "steps", "guidance", "seed", "image")
    for prompt in prompts:
        image = printable(prompt.image.replace("\\", "/").rpartition("/")[2]) if prompt.image else "-"
        table.add_row(
            "", Text(printable(prompt.name)), str(prompt.shape), number(prompt.fps), number(prompt.steps),
            number(prompt.guidance), str(prompt.seed), Text(image),
        )  # fmt: skip
    return table


def _files(plan: Plan) -> list[Row]:
    estimates, checkpoint = plan.estimates, plan.checkpoint
    kept = f"{_every(checkpoint.every, 'step')}, the newest {checkpoint.keep} stay"
    each = size(estimates.checkpoint_bytes)
    total = f"{each} each, {size(estimates.checkpoint_bytes * checkpoint.keep)} in all"
    return [
        ("run", plan.directory, plan.origins.get("run.directory", "")),
        ("cache", plan.cache.directory, plan.origins.get("cache.directory", "")),
        ("checkpoints", kept, plan.origins.get("checkpoint.every", "")),
        ("", f"about {total}", ""),
        ("cache size", f"about {size(estimates.cache_bytes)}", ""),
        ("to download", size(estimates.download_bytes) if estimates.download_bytes else "nothing", ""),
    ]


def _notes(notes: Iterable[str]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    table.add_column(overflow="fold")
    for note in notes:
        table.add_row("-", Text(printable(note)))
    return table


def _columns(*titles: str) -> Table:
    """A small table, indented like the rows above it; the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(width=1)
    for position, title in enumerate(titles):
        table.add_column(title, justify="right" if position else "left", overflow="fold")
    return table


def _share(probability: float) -> str:
    return f"{short(100 * probability)} %"


def _every(count: int, unit: str, off: str = "off") -> str:
    return off if count == 0 else f"every {unit}" if count == 1 else f"every {count:,} {unit}s"
