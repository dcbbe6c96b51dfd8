"""What `bench` is told and what it finds: a suite's cases, read from TOML, and the result of one case. Torch-free.

Says what is legal and refuses the rest, all mistakes at once, as recipes are refused. Measures nothing; a case becomes
numbers in `step_benchmark.py`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ltxforge.errors import PlanError
from ltxforge.modalities import has
from ltxforge.recipe.faults import Fault, Key, short
from ltxforge.recipe.keys import branches
from ltxforge.recipe.locate import Source
from ltxforge.recipe.parse import located, refusal, text_of
from ltxforge.recipe.schema import Count, Fps, Name, Target
from ltxforge.recipe.suggest import nearest
from ltxforge.recipe.syntax import NotToml, read_toml
from ltxforge.recipe.wording import expected, toml
from ltxforge.shapes import (
    ClipShape,
    is_legal_frames,
    is_legal_side,
    nearest_frames,
    nearest_sizes,
)
from ltxforge.specs import SPECS, TINY, ModelSpec

MODELS: dict[str, ModelSpec] = {**SPECS, **TINY}
"""What a case may name: every published version at full size, and the built-in small models."""
Models = Literal[tuple(MODELS)]  # type: ignore[valid-type]
Outcome = Literal["measured", "out of memory", "not finite", "skipped"]


def parse_shape(text: str) -> ClipShape:
    """`"768x512x49"`, width × height × frames. Raises ValueError, worded like a recipe's, for what no VAE encodes."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*", text)
    if not match:
        raise ValueError('is no size; write "WIDTHxHEIGHTxFRAMES", for example "768x512x49"')
    width, height, frames = map(int, match.groups())
    if not (is_legal_side(width) and is_legal_side(height)):
        sizes = " or ".join(f"{side}x{other}x{frames}" for side, other in nearest_sizes(width, height))
        raise ValueError(f"cannot be encoded: both sides must be multiples of 32; nearest: {sizes}")
    if not is_legal_frames(frames):
        sizes = " or ".join(f"{width}x{height}x{count}" for count in nearest_frames(frames))
        raise ValueError(f"cannot be encoded: the VAE needs 8k + 1 frames; nearest: {sizes}")
    return ClipShape(width, height, frames)


def _check_shape(text: str) -> str:
    parse_shape(text)
    return text


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StepCase(_Section):
    """One training step to measure: which model, on what, and how it is trained."""

    name: Name
    model: Models  # type: ignore[valid-type]
    size: Annotated[str, AfterValidator(_check_shape)]
    fps: Fps | None = Field(None, description="Default: the version's.")
    modalities: Literal["video", "audio", "both"] | None = Field(None, description="Default: all the model has.")
    batch_size: Annotated[int, Field(ge=1, le=100_000_000)] = 1
    accumulate: Annotated[int, Field(ge=1, le=1000)] = 1
    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    targets: Annotated[list[Target], Field(min_length=1, max_length=256)] = ["attention", "feed_forward"]
    checkpointing: Annotated[int, Field(ge=0, le=1000)] = Field(1, description="0 off, n every n-th block.")
    precision: Literal["bf16", "fp32"] = "bf16"
    steps: Count = 20
    warmup_steps: Annotated[int, Field(ge=1, le=1000)] = Field(3, description="Not timed: the first steps set up.")

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return MODELS[self.model]

    @property
    def shape(self) -> ClipShape:
        """`size`, parsed."""
        return parse_shape(self.size)

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.fps or self.spec.default_fps

    @property
    def trained(self) -> str:
        """Which modalities are computed and trained."""
        return self.modalities or ("both" if self.spec.has_audio else "video")


class Suite(_Section):
    """A file of cases. `suite` says which kind of measurement they are."""

    suite: Literal["step"]
    case: Annotated[list[StepCase], Field(min_length=1)]


@dataclass(frozen=True)
class StepResult:
    """What measuring one case gave; what was not measured is None or empty.

    `step_seconds` are whole steps, each from one synchronisation with the device to the next; `phase_seconds` the
    medians of their parts, on the device's own clock. `peak_bytes` is of the steps, `build_peak_bytes` of building
    model and adapter before them: "allocated" and "reserved" by PyTorch on the device, "resident" of the process.
    `model_flops` are one step's, see `step_benchmark.count_flops`.
    """

    name: str
    outcome: Outcome
    case: dict[str, Any]
    reason: str = ""
    parameters: int | None = None
    trained_parameters: int | None = None
    weights_bytes: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    build_seconds: float | None = None
    build_peak_bytes: dict[str, int] = field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    model_flops: int | None = None
    losses: tuple[float, ...] = ()


def load(path: Path, names: Sequence[str] = ()) -> Suite:
    """Read a suite, or those of its cases that are named.

    Raises:
        RecipeError: with every mistake in the file, located.
        PlanError: no such file, or a name that no case has.
    """
    if not path.exists():
        remedy = "Name a suite's file; ltxforge's own lie in the folder bench/ of its repository."
        raise PlanError("there is no such suite", where=str(path), remedy=remedy)
    suite = parse(text_of(path), str(path))
    known = [case.name for case in suite.case]
    if strange := [name for name in names if name not in known]:
        near = nearest(strange[0], known)
        raise PlanError(
            f"there is no case {strange[0]!r} in this suite",
            where=str(path),
            remedy=f"Did you mean {near}?" if near else f"Its cases: {', '.join(known)}.",
        )
    return suite.model_copy(update={"case": [case for case in suite.case if not names or case.name in names]})


def parse(text: str, name: str) -> Suite:
    """A suite's text → Suite. `name` is how problems name the file. Raises RecipeError."""
    source = Source(name, text)
    try:
        data, places = read_toml(source)
    except NotToml as error:
        raise refusal([error.problem]) from None
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise refusal(located(_worded(error), places, source)) from None
    if faults := list(_contradictions(suite)):
        raise refusal(located(faults, places, source))
    return suite


def _contradictions(suite: Suite) -> Iterator[Fault]:
    """What no single key can know."""
    first: dict[str, int] = {}
    for number, case in enumerate(suite.case):
        key = ("case", number)
        if case.name in first:
            other = ("case", first[case.name], "name")
            yield Fault((*key, "name"), f'two cases are called "{case.name}"', "rename one of them", other=other)
        first.setdefault(case.name, number)
        if has(case.trained, "audio") and not case.spec.has_audio:
            yield Fault((*key, "modalities"), f"{case.model} makes no sound", 'write "video", or leave it out')


def _worded(error: ValidationError) -> Iterator[Fault]:
    """pydantic's errors in our words, one for each key."""
    seen = set()
    for item in error.errors(include_url=False):
        key = _key(item["loc"])
        if key not in seen:
            seen.add(key)
            yield _fault(key, item)


def _key(location: tuple[int | str, ...]) -> Key:
    """Without the names of union alternatives that pydantic puts behind a key."""
    deepest = 3 if location[:1] == ("case",) else 1
    return tuple(location[:deepest])


def _fault(key: Key, error: Mapping[str, Any]) -> Fault:
    table = StepCase if len(key) == 3 else Suite
    name, where = short(key), "[[case]]" if table is StepCase else "this file"
    if error["type"] == "extra_forbidden":
        near = nearest(str(key[-1]), table.model_fields)
        hint = f"did you mean `{near}`?" if near else f"legal here: {', '.join(table.model_fields)}"
        return Fault(key, f"unknown key `{name}` in {where}", hint, "key")
    if error["type"] == "missing":
        return Fault(key, f"`{name}` is missing in {where}", _EXAMPLES.get(str(key[-1]), ""), "key")
    if key[0] == "case" and len(key) < 3:
        return Fault(key, "cases are tables, at least one", "write [[case]] and its keys below it", "key")
    value, item = error["input"], table.model_fields[str(key[-1])]
    if error["type"] == "value_error":
        what, _, hint = str(error["ctx"]["error"]).partition("; ")
        return Fault(key, f"{name} = {toml(value)} {what}", hint)
    if error["type"] == "too_short":
        return Fault(key, f"{name} is empty", "at least one, or leave it out for the default")
    near = nearest(value, _words(item.annotation)) if isinstance(value, str) else None
    told = expected(item.annotation, item.metadata)
    return Fault(key, f"{name} must be {told}, not {toml(value)}", f'did you mean "{near}"?' if near else "")


def _words(annotation: Any) -> list[str]:
    """The words that a key takes, if it takes words of a fixed list."""
    literals = [kind for kind, _ in branches(annotation) if typing.get_origin(kind) is Literal]
    return [word for literal in literals for word in typing.get_args(literal)]


_EXAMPLES = {
    "suite": 'write suite = "step"',
    "name": 'for example name = "ltx2-49-frames"',
    "model": 'for example model = "2.0-dev"',
    "size": 'for example size = "768x512x49"',
    "case": "write [[case]] and its keys below it",
}
