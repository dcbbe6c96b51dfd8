"""Which op a step calls on which tensors, counted on shapes alone."""

from __future__ import annotations

import dataclasses

import pytest
from ltxforge_kernels.choice import Choice, Kernels, TokenRange

from ltxforge.kernel_calls import calls_of
from ltxforge.plan import BucketPlan, MemoryPlan, StreamPlan, TrainingPlan
from ltxforge.shapes import ClipShape
from ltxforge.specs import SPECS, TINY

BUCKET = BucketPlan(ClipShape(768, 512, 121), 24.0, 6144, 1, 126)


def counted(plan, spec, modalities):
    plan = dataclasses.replace(
        plan,
        training=TrainingPlan(1, 1, 1.0, None, modalities),
        lora=dataclasses.replace(plan.lora, modalities=modalities, targets=("attention", "feed_forward")),
    )
    calls = calls_of(plan, spec, BUCKET)
    return calls, {(call.op, call.tokens, call.width): call.count for call in calls}


@pytest.mark.parametrize("version", ["0.9.5", "0.9.8-dev"])
def test_the_counts_are_those_of_the_block(version, plan_maker):
    """28 or 48 blocks: one norm, three residuals, two pairs of q and k, ten linears with a LoRA each."""
    spec = SPECS[version]
    _, counts = counted(plan_maker("tiny/ltx-video"), spec, "video")
    width, blocks = spec.width, spec.blocks
    assert counts["adaln_rms_norm", 6144, width] == blocks
    assert counts["gated_residual", 6144, width] == 3 * blocks
    assert counts["qk_norm_rope", 6144, width] == 2 * blocks
    assert counts["lora_linear", 6144, 4 * width] == blocks
    linears = sum(count for (op, _, _), count in counts.items() if op == "lora_linear")
    assert linears == 10 * blocks


def test_sound_has_calls_of_its_own(plan_maker):
    spec = TINY["tiny/ltx2.3"]
    plan = plan_maker("tiny/ltx2.3")
    both, video = (counted(plan, spec, modalities)[1] for modalities in ("both", "video"))
    assert {key for key in both if key[1] == 126} and not {key for key in video if key[1] == 126}


@pytest.mark.parametrize(("base", "op"), [("nf4", "nf4"), ("int8-w8a8", "int8"), ("fp8", "fp8")])
def test_a_quantised_base_has_a_product_for_each_linear_layer(base, op, plan_maker):
    """Wherever it waits. Under a LoRA, whose branch is a call of its own, but for W8A8, which has it in its product."""
    spec = SPECS["0.9.5"]
    stream = StreamPlan(tuple((number,) for number in range(spec.blocks)))
    memory = MemoryPlan(tuple(range(spec.blocks)), base, base == "nf4", stream=stream)
    _, counts = counted(dataclasses.replace(plan_maker("tiny/ltx-video"), memory=memory), spec, "video")
    products = {key[1:]: count for key, count in counts.items() if key[0] == op}
    branches = {key[1:]: count for key, count in counts.items() if key[0] == "lora_linear"}
    assert sum(products.values()) == 10 * spec.blocks and products[6144, 4 * spec.width] == spec.blocks
    assert branches == ({} if base == "int8-w8a8" else products)


def test_exceptions_by_size_are_told_where_they_hold(plan_maker):
    few = TokenRange(0, 1000, 64, "eager", "a test")
    chosen = Kernels((Choice("adaln_rms_norm", "triton", "a test", (few,)),))
    spec = TINY["tiny/ltx2.3"]
    calls, _ = counted(dataclasses.replace(plan_maker("tiny/ltx2.3"), kernels=chosen), spec, "both")
    norms = {(call.tokens, call.width): call.implementation for call in calls if call.op == "adaln_rms_norm"}
    assert set(norms.values()) == {"triton", "eager"}
    assert all((how == "eager") == few.holds(*size) for size, how in norms.items())
