"""Predict the bytes that a rank sends in one step.

Collectives at their optimum, which rings reach, as in clipdist.losses.wire: an all-reduce of a bytes sends
2 (W-1)/W a, a gather or a scatter of a bytes in all (W-1)/W a. DeepSpeed's stages 1 and 2 reduce their buckets by an
all-reduce (use_multi_rank_bucket_allreduce), not by a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipdist.estimate.memory import LIVE, ModelSizes, StepLayout
from clipdist.losses.wire import clipdist_bytes, distill_bytes


def wire_bytes(
    sizes: ModelSizes,
    layout: StepLayout,
    op: str,
    dtype: str,
    narrower: Sequence[int] = (),
    texts: int = 1,
    taught: int = 0,
    views: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return bytes by collective; empty with one rank.

    Args:
        op: infonce or sigmoid; "" without a contrastive objective.  dtype: fp32, bf16 or fp16.
        texts: of an image.
        narrower: widths that have a loss of their own, beside that of all features.
        taught: width of a teacher whose logits are distilled; 0: none are.
        views: bytes for the losses and states of objectives on views of an image, by name.
    """
    if layout.world == 1:
        return {}
    part = (layout.world - 1) / layout.world
    weights, gradients = sizes.all * layout.itemsize, sizes.trained * layout.itemsize
    widths = (*narrower, sizes.width) if op else ()
    losses = [clipdist_bytes(op, layout.world, layout.share, width, dtype, texts) for width in widths]
    found = {"loss: features, their gradients, sums": sum(losses)} if op else {}
    if taught:
        found["distillation of logits: the same"] = distill_bytes(
            layout.world, layout.share, sizes.width, taught, dtype
        )
    found |= views or {}
    if layout.stage < 3:
        times = layout.pieces if layout.stage == 2 else 1  # stage 2 reduces after every micro-batch
        found["gradients: all-reduce"] = 2 * part * gradients * times
    if layout.stage in (1, 2):
        found["weights: all-gather after the step"] = part * gradients
    if layout.stage in (1, 2) and sizes.taught:
        found["teacher: all-reduce of fp32 weights"] = 2 * part * 4 * sizes.taught_trained
    if sizes.matrices:  # to the ranks that orthogonalise them, and back; stage 0 has them everywhere
        ways = layout.world if layout.stage == 0 else 2
        found["Muon's matrices: all-to-all"] = ways * part * sizes.matrices / layout.world * (4 if layout.cpu else 2)
    if layout.stage == 3:
        # Gathered weights stay until the backward pass where all of them fit; cached features need another pass.
        passes = 1 if 2 * sizes.all <= LIVE else 2
        found["gradients: reduce-scatter"] = part * gradients * layout.pieces
        found["weights: all-gather for the passes"] = (
            part * weights * (passes * layout.pieces + (layout.pieces if layout.pieces > 1 else 0))
        )
        if sizes.taught:
            found["weights: all-gather for the teacher's pass"] = part * sizes.taught * layout.itemsize * layout.pieces
    return found
