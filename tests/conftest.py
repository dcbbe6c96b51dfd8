"""Shared pieces: a small plan, a cache filled with made-up latents, models that fit it. No network, ever."""

from __future__ import annotations

import dataclasses
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when it is imported, by whatever test comes first. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

from ltxforge import plan as planning
from ltxforge.shapes import ClipShape
from ltxforge.specs import TINY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real clips, or a skip where there is none."""
    folder = os.environ.get("LTXFORGE_TEST_DATA")
    if not folder or not (Path(folder) / "clips").is_dir():
        pytest.skip("set LTXFORGE_TEST_DATA to a folder with clips/ and nasty/ to run this")
    return Path(folder)


def make_plan(directory: Path, base: str = "tiny/ltx-video", **changes: object) -> planning.Plan:
    """A plan for made-up samples of two shapes, six in all, as the planner would give."""
    spec = TINY[base]
    shapes = [ClipShape(64, 64, 9)] * 4 + [ClipShape(96, 64, 17)] * 2
    samples = tuple(
        planning.SamplePlan("made-up", f"clip{n}", f"/clips/{n}.mp4", f"caption {n}", shape, 25.0, 0.0)
        for n, shape in enumerate(shapes)
    )
    buckets = tuple(
        planning.BucketPlan(shape, 25.0, shape.latent().tokens, shapes.count(shape)) for shape in sorted(set(shapes))
    )
    part = planning.ComponentPlan(source=base, kind="builtin", digest=f"builtin:{base}")
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    plan = planning.Plan(
        name="made-up",
        seed=42,
        steps=6,
        steps_per_epoch=2.0,
        model=planning.ModelPlan(base, spec.version, spec.rope, dict.fromkeys(names, part)),
        device=planning.DevicePlan("fp32", "fp32", "cpu", "PyTorch SDPA", "exact", "a test"),
        data=planning.DataPlan(samples, buckets),
        cache=planning.CachePlan(str(directory / "cache")),
        flow=planning.FlowPlan("stretched-logit-normal", None, True, 0.1),
        conditioning=planning.ConditioningPlan(0.5, 0.25, 32),
        lora=planning.LoraPlan(4, 4.0, 0.0, False, ("attention", "feed_forward"), "fp32"),
        optimizer=planning.OptimizerPlan("adamw", 1e-2, (0.9, 0.999), 1e-8, 0.0, "cosine", 2, 6, 0.0, 2.0),
        training=planning.TrainingPlan(2, 2, 1.0, None),
        memory=planning.MemoryPlan(),
        checkpoint=planning.CheckpointPlan(2, 2),
        validation=planning.ValidationPlan(0, False),
        directory=str(directory / "run"),
    )
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="session")
def plan_in() -> Callable[..., planning.Plan]:
    """`make_plan` itself, for fixtures that live longer than one test."""
    return make_plan


@pytest.fixture
def tiny_plan(tmp_path: Path) -> planning.Plan:
    """`make_plan` in a fresh folder."""
    return make_plan(tmp_path)


@pytest.fixture
def plan_maker(tmp_path: Path) -> Callable[..., planning.Plan]:
    """`make_plan` in a fresh folder, for tests that change parts."""
    return lambda *arguments, **changes: make_plan(tmp_path, *arguments, **changes)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every freed encoder costs a `gc.collect()`: half a second while it looks at all that was ever imported."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted (`record_property("count", text)`), so that figures can be quoted from any run."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    counts = [
        text
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == "count"
    ]
    if counts:
        terminalreporter.section("counts")
        for text in sorted(counts):
            terminalreporter.write_line(text)


@pytest.fixture
def stock_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' norms and rotations, which compute in float32 whatever comes in, keep float64 where that comes in.

    What it does in float32 stays its own.
    """
    import torch
    from diffusers.models import normalization
    from diffusers.models.transformers import transformer_ltx, transformer_ltx2

    def norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != torch.float64:
            return stock_norm(module, hidden)
        assert module.weight is None
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=module.eps)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int) -> torch.Tensor:
        """Numbers along `dim` of size 2 as complex ones, turned by cos + i·sin."""
        return torch.stack(torch.view_as_real(torch.complex(*x.unbind(dim)) * torch.complex(cos, sin)).unbind(-1), dim)

    def interleaved(x: torch.Tensor, freqs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if x.dtype != torch.float64:
            return stock_interleaved(x, freqs)
        cos, sin = (table.double()[..., ::2] for table in freqs)
        return turned(x.unflatten(2, (-1, 2)), cos, sin, -1).flatten(2)

    def split(x: torch.Tensor, freqs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if x.dtype != torch.float64:
            return stock_split(x, freqs)
        cos, sin = (table.double().transpose(1, 2) for table in freqs)
        return turned(x.unflatten(2, (cos.shape[2], 2, -1)), cos, sin, 3).flatten(2)

    stock_norm = normalization.RMSNorm.forward
    stock_interleaved = transformer_ltx.apply_rotary_emb
    stock_split = transformer_ltx2.apply_split_rotary_emb
    monkeypatch.setattr(normalization.RMSNorm, "forward", norm)
    monkeypatch.setattr(transformer_ltx, "apply_rotary_emb", interleaved)
    monkeypatch.setattr(transformer_ltx2, "apply_interleaved_rotary_emb", interleaved)
    monkeypatch.setattr(transformer_ltx2, "apply_split_rotary_emb", split)
