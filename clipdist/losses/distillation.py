"""Compute the distillation of logits and its gradients over the exact global batch.

    s_ij = exp(t) cos(image_i, text_j)   of the student;  r_ij of the teacher, by its own features and temperature
    L = 1/(2N) sum_i KL( softmax_j r_ij || softmax_j s_ij ) + 1/(2N) sum_j KL( softmax_i r_ij || softmax_i s_ij )

over the N valid pairs of all ranks. It is the cross-entropy between the teacher's softmax and the student's (CLIP-KD,
Yang et al., arXiv:2307.12732, eq. 3 to 5) less the teacher's entropy, which is constant: 0 where both agree, with the
same gradients. dL/ds_ij = (the student's softmax over rows and columns - the teacher's) / (2N).

Both matrices of logits exist in tiles alone, in step. Collectives: all-gather of the text features of student and
teacher, all-reduce of the columns' log-sum-exps, reduce-scatter of the student's text gradients.

Shapes: b rows of this rank, N columns of all ranks, D features of the student, E of the teacher.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, all_reduce_logsumexp
from clipdist.losses.global_batch import LN_100, FeatureGradients, GlobalBatch, inverse_norms, value_and_gradients
from clipdist.losses.tiles import Logits, Tile


def distill_logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_log_scale: float,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    logit_scale_max: float = LN_100,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean divergence of the student's softmaxes from the teacher's, in both directions. Collective.

    Args:
        image_features, text_features: the student's, [b, D], not normalised, any float dtype.
        logit_scale: the student's log scale t, shape [1]; clamped to `logit_scale_max`.
        teacher_image_features, teacher_text_features: [b, E], of the same rows; they get no gradients.
        teacher_log_scale: of the teacher's logits. (A bias would cancel.)
        The others, value and statistics: as for clipdist.losses.infonce.info_nce.

    Raises:
        UserError, NonFiniteFeatures: of the student's features, as info_nce.
    """
    taught = (teacher_image_features.detach(), teacher_text_features.detach(), math.exp(teacher_log_scale))
    return value_and_gradients(
        image_features,
        text_features,
        logit_scale,
        None,
        logit_scale_max,
        valid=valid,
        group_id=None,
        group=process_group,
        compute=partial(_value_and_gradients, taught=taught, tile=tile),
    )


def _value_and_gradients(
    batch: GlobalBatch, *, taught: tuple[Tensor, Tensor, float], tile: Tile | None
) -> tuple[Tensor, FeatureGradients]:
    """Return this rank's value, a float64 scalar, and its gradients."""
    student = replace(batch.logits(tile), first=len(batch.all_valid))  # own pairs are in the tiles
    teacher = _teacher_logits(batch, student, *taught)
    found = [_log_sum_exps(logits, batch) for logits in (student, teacher)]
    rows, columns = (torch.stack(part) for part in zip(*found))
    columns = all_reduce_logsumexp(columns, batch.process_group)
    divergence, image_sums, text_sums = _sweep(student, teacher, rows, columns, batch)
    *_, gradients = batch.finish(
        image_sums,
        text_sums,
        torch.zeros_like(batch.valid),
        tile_weight=0.5,
        group_weight=0.0,
        uniform_groups=False,
        all_weight=0.0,
    )
    differences = rows[0] - rows[1] + columns[0, batch.own] - columns[1, batch.own]
    divergence += torch.where(batch.valid > 0, differences, 0.0).sum()
    return divergence / 2 * (batch.world / batch.count), gradients


def _teacher_logits(batch: GlobalBatch, student: Logits, images: Tensor, texts: Tensor, scale: float) -> Logits:
    """Return the teacher's logits of this rank's images against all texts. Collective."""
    all_texts = all_gather(texts, batch.process_group)
    row_factor = inverse_norms(images) * batch.valid * scale
    column_factor = inverse_norms(all_texts) * batch.all_valid
    return replace(student, x=images, y=all_texts, row_factor=row_factor, column_factor=column_factor)


def _log_sum_exps(logits: Logits, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """Return log-sum-exps over valid pairs: float64 [b] of rows, float64 [N] of columns over this rank's rows.

    They are -inf where a row or column is not valid.
    """
    rows = torch.full_like(batch.valid, -torch.inf, dtype=torch.float64)
    columns = torch.full_like(batch.all_valid, -torch.inf, dtype=torch.float64)
    for row, column, _, _, s in logits.sweep():
        s.masked_fill_(_not_valid(batch, row, column), -torch.inf)
        rows[row] = torch.logaddexp(rows[row], s.logsumexp(1).double())
        columns[column] = torch.logaddexp(columns[column], s.logsumexp(0).double())
    return rows, columns


def _sweep(
    student: Logits, teacher: Logits, rows: Tensor, columns: Tensor, batch: GlobalBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the tiles of both.

    Args:
        rows, columns: log-sum-exps of student and teacher, float64 [2, b] and [2, N].

    Returns:
        float64 scalar: sum over rows and columns of the teacher's softmax times (r - s);
        fp32 [b, D]: sum_j G_ij v_j, and fp32 [N, D]: sum_i G_ij exp(t) u_i, with unit features u and v of the student
        and G = the student's softmaxes over rows and columns - the teacher's.
    """
    image_sums = torch.zeros_like(student.x, dtype=torch.float32, memory_format=torch.contiguous_format)
    text_sums = torch.zeros_like(student.y, dtype=torch.float32, memory_format=torch.contiguous_format)
    divergence = rows.new_zeros(())
    rows, columns = rows.float(), columns.float()
    for (row, column, left, right, s), (_, _, _, _, r) in zip(student.sweep(), teacher.sweep()):
        no_pair = _not_valid(batch, row, column)
        # Softmaxes of both, over rows and over columns; 0 outside of valid pairs, whatever a log-sum-exp is there.
        of_student, of_teacher = (
            (logits - over_rows[:, None]).masked_fill_(no_pair, -torch.inf).exp_()
            + (logits - over_columns).masked_fill_(no_pair, -torch.inf).exp_()
            for logits, over_rows, over_columns in zip((s, r), rows[:, row], columns[:, column])
        )
        divergence += (of_teacher * r.sub_(s)).sum(dtype=torch.float64)
        gradient = of_student.sub_(of_teacher)
        image_sums[row].addmm_(gradient, right)
        text_sums[column].addmm_(gradient.T, left)
    return divergence, image_sums, text_sums


def _not_valid(batch: GlobalBatch, row: slice, column: slice) -> Tensor:
    """Return which pairs of a tile are not valid, bool [R, C]."""
    return (batch.valid[row, None] == 0) | (batch.all_valid[None, column] == 0)
