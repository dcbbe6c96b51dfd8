"""How many graphs torch.compile makes of a family's block: one for each form that a micro-batch may have. Torch-free.

Shapes are compiled as they are, which gives faster code than sizes left open. That all blocks share a graph is
`compiled.py`'s part.
"""

from __future__ import annotations

from ltxforge.modalities import has
from ltxforge.plan import BucketPlan, Plan


def block_graphs(plan: Plan) -> int:
    """An upper bound for a run; two samples of one noise level, which is as good as impossible, apart."""
    return sum(_forms(plan, bucket) for bucket in plan.data.buckets)


def _forms(plan: Plan, bucket: BucketPlan) -> int:
    """Batch sizes, times with and without clean first frames, times with, without and with some sound."""
    whole, rest = divmod(bucket.samples, plan.training.batch_size)
    sizes = [size for size, is_there in ((plan.training.batch_size, whole), (rest, rest)) if is_there]
    conditioned = has(plan.training.modalities, "video") and plan.conditioning.first_frame > 0
    conditioned = conditioned and bucket.shape.latent().frames > 1
    if plan.training.modalities == "video":
        return len(sizes) * (1 + conditioned)
    with_picture_alone = plan.training.modalities == "both" and bucket.with_sound < bucket.samples
    with_sound = bucket.with_sound > 0
    return len(sizes) * (1 + conditioned) * (with_sound + with_picture_alone)
