"""The losses of self-supervised objectives on a GPU against the same on the CPU, which the other tests check."""

from __future__ import annotations

import pytest
import torch
from unit.test_nt_xent import draw, worst

from clipdist.losses.koleo import koleo
from clipdist.losses.momentum_contrast import contrast_batch, contrast_queue, empty_queue, enqueue
from clipdist.losses.nt_xent import nt_xent
from clipdist.losses.prototypes import (
    prototype_cross_entropy,
    sinkhorn_centre,
    soft_targets,
    sum_rows,
    update_centre,
)


def moco(queries, keys):
    state = {name: tensor.to(keys.device) for name, tensor in empty_queue(50, keys.shape[1]).items()}
    return contrast_queue(queries, keys, enqueue(state, keys.flip(0)), 0.2)


def dino(student, teacher):
    teacher = teacher.detach()
    valid = torch.arange(len(teacher), device=teacher.device) % 5 > 0
    sinkhorn = sinkhorn_centre(lambda rows: teacher[rows], valid, teacher.shape[1], 0.3)
    centre = update_centre(torch.zeros_like(sinkhorn), sum_rows(teacher, valid), 0.9)
    targets = [soft_targets(teacher, c, 0.3) for c in (centre, sinkhorn)]
    return prototype_cross_entropy(student, targets, 0.5, valid.float())


LOSSES = {
    "nt_xent": lambda x, y: nt_xent(x, y, 0.1),
    "koleo": lambda x, y: koleo(x, group_size=5),
    "moco": moco,
    "moco v3": lambda x, y: contrast_batch(x, y, 0.2),
    "dino": dino,
}


def values(loss, device):
    leaves = [x.to(device).requires_grad_() for x in draw(b=300, d=64)]
    value = LOSSES[loss](*leaves)
    value = value[0] if isinstance(value, tuple) else value
    return [x.detach().cpu().double() for x in (value, *torch.autograd.grad(value, leaves[:1]))]


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_computes_what_the_cpu_does(loss):
    assert worst(values(loss, "cuda"), values(loss, "cpu")) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_a_batch_larger_than_their_tiles(loss):
    found = values(loss, "cpu")
    assert all(bool(x.isfinite().all()) for x in found)
    assert found[1].abs().max() > 0
