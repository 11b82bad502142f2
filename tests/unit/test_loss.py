"""Both losses in one process against their definitions in float64; several processes are tests/dist's matter."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.losses.global_batch import NonFiniteFeatures, global_statistics
from clipdist.losses.infonce import batch_accuracy, info_nce
from clipdist.losses.several_texts import contrast_texts, texts_accuracy
from clipdist.losses.sigmoid import sigmoid_loss
from clipdist.losses.tiles import Tile

LOSSES = {"infonce": info_nce, "sigmoid": sigmoid_loss}
SMALL = Tile(16, 24)


def dense(kind, images, texts, t, bias, valid=None, group_id=None, smoothing=0.0):
    """The definition on the whole matrix, in the dtype of the features, by autograd."""
    valid = torch.ones(len(images), dtype=torch.bool) if valid is None else valid
    group = torch.arange(len(images)) if group_id is None else group_id
    images = images / images.norm(dim=1, keepdim=True)
    texts = texts / texts.norm(dim=1, keepdim=True)
    s = (t.exp() * images @ texts.T)[valid][:, valid]
    positive = (group[valid][:, None] == group[valid][None, :]).to(s.dtype)
    n = len(s)
    if kind == "sigmoid":
        target = (1 - smoothing) * positive + smoothing / 2
        return F.binary_cross_entropy_with_logits(s + bias, target, reduction="sum") / n
    target = (1 - smoothing) * positive / positive.sum(1, keepdim=True) + smoothing / n
    return -((target * s.log_softmax(1)).sum() + (target * s.T.log_softmax(1)).sum()) / (2 * n)


def draw(b=70, d=33, t=2.659, noise=None, seed=0):
    """Features of uneven length; with `noise`, texts that lie that near to their images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, d, generator=generator)
    texts = 3 * torch.randn(b, d, generator=generator)
    if noise is not None:
        texts = images + noise * texts / 3
    return images, texts, torch.tensor([t]), torch.tensor([-3.0])


def value_and_gradients(function, inputs, dtype=torch.float32, **options):
    leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
    value = function(*leaves, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.sum().backward()
    return [value.detach().double(), *(torch.zeros(1) if x.grad is None else x.grad.double() for x in leaves)]


def errors(found, exact):
    return [
        float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.norm() > 0 else float(a.norm())
        for a, b in zip(found, exact)
    ]


MASKED = torch.ones(70, dtype=torch.bool)
MASKED[[3, 40]] = False
GROUPS = torch.arange(70)
GROUPS[[5, 60]], GROUPS[8] = 9, 3  # three of one caption; and a pair whose twin is masked
CASES = {
    "plain": {},
    "masked": {"valid": MASKED},
    "groups": {"group_id": GROUPS},
    "masked groups": {"valid": MASKED, "group_id": GROUPS},
    "smoothed": {"valid": MASKED, "group_id": GROUPS, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0.0, 2.659, math.log(99)])
def test_value_and_gradients_are_those_of_the_definition(kind, case, t):
    options = dict(CASES[case])
    inputs = draw(t=t)
    found = value_and_gradients(LOSSES[kind], inputs, tile=SMALL, **options)
    options["smoothing"] = options.pop("label_smoothing", 0.0)
    exact = value_and_gradients(lambda *x: dense(kind, *x, **options), inputs, torch.float64)
    assert max(errors(found, exact)) < 3e-6


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("noise", [0.3, 0.1])
@pytest.mark.parametrize("t", [2.659, 3.5])
def test_a_small_loss_is_as_exact_as_a_large_one(kind, noise, t):
    """Where training has succeeded, p - 1 of a pair itself has few digits left in dense fp32 code; here it has all."""
    inputs = draw(b=300, t=t, noise=noise)
    inputs = (*inputs[:3], torch.tensor([-12.0]))
    exact = value_and_gradients(lambda *x: dense(kind, *x), inputs, torch.float64)
    ours = errors(value_and_gradients(LOSSES[kind], inputs, tile=Tile(128, 64)), exact)
    theirs = errors(value_and_gradients(lambda *x: dense(kind, *x), inputs), exact)
    assert max(ours) < 1e-5
    assert max(ours) <= max(1.5 * max(theirs), 1e-6)


def test_infonce_where_nothing_is_near_anything_at_scale_100():
    """Every cosine near -1: exp(s) of a whole row is below what fp32 holds, and its own shift is needed."""
    images, texts, _, bias = draw()
    direction = torch.randn(33, generator=torch.Generator().manual_seed(1))
    images, texts = 0.1 * images + 10 * direction, 0.1 * texts - 10 * direction
    inputs = (images, texts, torch.tensor([math.log(99.9)]), bias)
    options = {"valid": MASKED, "group_id": GROUPS}
    found = value_and_gradients(info_nce, inputs, tile=SMALL, **options)
    exact = value_and_gradients(lambda *x: dense("infonce", *x, **options), inputs, torch.float64)
    theirs = value_and_gradients(lambda *x: dense("infonce", *x, **options), inputs)
    assert exact[0] > 1
    assert max(errors(found, exact)[:3]) <= max(1.5 * max(errors(theirs, exact)[:3]), 1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(7, 500), Tile(500, 7), Tile(70, 70)])
def test_tiles_of_any_size_give_the_same(kind, tile):
    inputs = draw()
    whole = value_and_gradients(LOSSES[kind], inputs, **CASES["smoothed"])
    assert max(errors(value_and_gradients(LOSSES[kind], inputs, tile=tile, **CASES["smoothed"]), whole)) < 3e-6


@pytest.mark.parametrize("kind", LOSSES)
def test_wide_features(kind):
    inputs = draw(b=9, d=4096)
    exact = value_and_gradients(lambda *x: dense(kind, *x), inputs, torch.float64)
    assert max(errors(value_and_gradients(LOSSES[kind], inputs), exact)) < 3e-6


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.integers(2, 40), st.integers(1, 20), st.integers(0, 1000), st.floats(0, 4.5))
def test_permuting_the_pairs_leaves_the_loss_and_permutes_the_gradients(kind, b, d, seed, t):
    inputs = draw(b, d, t, seed=seed)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    valid, group = torch.arange(b) % 7 != 3, torch.arange(b) % 11
    plain = value_and_gradients(LOSSES[kind], inputs, valid=valid, group_id=group, tile=SMALL)
    images, texts, *scalars = inputs
    shuffled = (images[order], texts[order], *scalars)
    moved = value_and_gradients(LOSSES[kind], shuffled, valid=valid[order], group_id=group[order], tile=SMALL)
    size = max(float(plain[1].norm()), float(plain[2].norm()), 1e-3)
    assert float(moved[0]) == pytest.approx(float(plain[0]), rel=1e-5, abs=1e-5)
    assert float((moved[1] - plain[1][order]).norm()) < 1e-4 * size
    assert float((moved[2] - plain[2][order]).norm()) < 1e-4 * size


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 20), st.integers(0, 1000), st.floats(0, 4.5))
def test_the_closed_form_is_autograds_and_not_the_common_wrong_one(b, d, seed, t):
    """docs/loss.md: dL_i/ds_ij = p_ij - delta_ij for one direction. A common derivation has -(1 - p_ij) for every j."""
    images, texts, scale, _ = (x.double() for x in draw(b, d, t, seed=seed))
    images.requires_grad_()
    tau = torch.exp(-scale[0])
    s = F.normalize(images) @ F.normalize(texts).T
    (F.cross_entropy(s / tau, torch.arange(b), reduction="sum")).backward()
    p = (s / tau).softmax(1).detach()

    def towards_images(slope):  # dL/dx_i of the closed form, with any dL_i/ds_ij * tau
        x, y = images.detach(), texts
        norm_x, norm_y = x.norm(dim=1)[:, None, None], y.norm(dim=1)[None, :, None]
        dots = (x @ y.T)[:, :, None]
        along = (norm_x**2 * y[None] - dots * x[:, None]) / (norm_x**3 * norm_y)
        return (slope[:, :, None] * along).sum(1) / tau

    right = towards_images(p - torch.eye(b, dtype=torch.float64))
    torch.testing.assert_close(right, images.grad, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(towards_images(p - 1), images.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_rows_get_no_gradient_and_give_none(kind):
    images, texts, t, bias = draw()
    plain = value_and_gradients(LOSSES[kind], (images, texts, t, bias), valid=MASKED)
    images, texts = images.clone(), texts.clone()
    images[~MASKED], texts[~MASKED] = 1e6, -1e6
    moved = value_and_gradients(LOSSES[kind], (images, texts, t, bias), valid=MASKED)
    assert plain[1][~MASKED].abs().max() == 0
    assert plain[2][~MASKED].abs().max() == 0
    assert plain[1][MASKED].abs().min() > 0
    assert moved[0] == plain[0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("t", [2.659, math.log(100)])
@pytest.mark.parametrize("opposite", [False, True])
def test_a_batch_of_no_pair_or_one_is_finite(kind, keep, t, opposite):
    images, texts, *scalars = draw(b=6, t=t)
    inputs = (images, -images if opposite else texts, *scalars)
    valid = torch.arange(6) < keep
    found = value_and_gradients(LOSSES[kind], inputs, valid=valid)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    if kind == "infonce" or not keep:
        assert found[0] == 0
    _, statistics = LOSSES[kind](*inputs, valid=valid)
    assert global_statistics(statistics)["valid"] == keep


def test_equal_captions_are_positives_only_where_ids_say_so():
    inputs = draw(b=6)
    apart = info_nce(*inputs, group_id=torch.arange(6))[0].item()
    assert apart == info_nce(*inputs)[0].item()
    assert info_nce(*inputs, group_id=torch.zeros(6, dtype=torch.int64))[0].item() != pytest.approx(apart, abs=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_temperature_is_read_as_at_most_its_bound_and_keeps_its_gradient(kind):
    images, texts, _, bias = draw()
    at_bound = value_and_gradients(LOSSES[kind], (images, texts, torch.tensor([math.log(100)]), bias))
    above = value_and_gradients(LOSSES[kind], (images, texts, torch.tensor([9.0]), bias))
    assert float(above[0]) == pytest.approx(float(at_bound[0]), rel=1e-6)
    assert float(above[3]) == pytest.approx(float(at_bound[3]), rel=1e-5)
    assert abs(float(above[3])) > 1e-3


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_have_fp32_logits_and_half_gradients(kind, dtype):
    images, texts, t, bias = draw(b=64, d=32)
    images, texts = images.to(dtype).requires_grad_(), texts.to(dtype).requires_grad_()
    value, _ = LOSSES[kind](images, texts, t, bias)
    value.backward()
    exact = value_and_gradients(lambda *x: dense(kind, *x), (images.detach(), texts.detach(), t, bias), torch.float64)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(exact[0]), rel=1e-6)
    assert images.grad.dtype == dtype
    assert errors([images.grad.double()], [exact[1]])[0] < (4e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_under_torch_compile(kind):
    inputs = draw()
    plain = value_and_gradients(LOSSES[kind], inputs, tile=SMALL, **CASES["smoothed"])
    outside = torch.compile(lambda *x: LOSSES[kind](2 * x[0], *x[1:], tile=SMALL, **CASES["smoothed"]))
    assert max(errors(value_and_gradients(outside, inputs), plain)[:1]) < 1e-6


def test_a_second_backward_pass_is_refused():
    images, *rest = draw(b=6)
    value, _ = info_nce(images.requires_grad_(), *rest)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        value.backward()


@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("kind", LOSSES)
def test_features_that_are_not_finite_name_rank_and_tower(kind, tower):
    inputs = list(draw(b=6))
    inputs[tower] = inputs[tower].clone()
    inputs[tower][2, 1] = math.nan
    inputs[tower][4, 0] = math.inf
    with pytest.raises(NonFiniteFeatures, match=rf"rank 0: 2 rows of the {('image', 'text')[tower]} tower"):
        LOSSES[kind](*inputs)


def test_features_that_do_not_fit_together():
    images, texts, t, _ = draw(b=6)
    for wrong in (texts[:5], texts[:, :7], texts.bfloat16(), texts[0]):
        with pytest.raises(UserError, match="do not fit together"):
            info_nce(images, wrong, t)


def test_bad_settings():
    images, texts, t, _ = draw(b=6)
    with pytest.raises(UserError, match="logit_bias"):
        sigmoid_loss(images, texts, t)
    with pytest.raises(UserError, match=r"objectives\.clip\.implementation=kernel: needs Triton and a GPU"):
        info_nce(images, texts, t, implementation="kernel")
    with pytest.raises(UserError, match="choose auto"):
        info_nce(images, texts, t, implementation="fast")


def test_accuracy_counts_rows_whose_best_candidate_is_a_positive():
    features = torch.eye(4)
    texts = features[[0, 1, 3, 2]]
    _, statistics = info_nce(features, texts, torch.tensor([2.0]))
    numbers = global_statistics(statistics | batch_accuracy(features, texts, tile=Tile(3, 2)))
    assert numbers["batch_i2t_r1"] == 50
    assert numbers["batch_t2i_r1"] == 50
    grouped = batch_accuracy(features, texts, group_id=torch.tensor([0, 1, 2, 2]))
    assert float(grouped["correct_i2t"]) == float(grouped["correct_t2i"]) == 4
    masked = batch_accuracy(features, texts, valid=torch.tensor([True, True, True, False]))
    assert float(masked["correct_i2t"]) == 2


def dense_texts(kind, images, texts, t, bias, captions, candidates, valid, group_id=None, label_smoothing=0.0):
    """The formulas of clipdist/losses/several_texts.py, written out over the images and texts that are there."""
    valid = valid & captions.any(1)
    here = candidates & valid[:, None]
    owner = torch.arange(len(valid))[:, None].expand_as(here)[here]
    caption = captions[here]
    if group_id is None:
        positive = (owner[None] == torch.arange(len(valid))[:, None]) & caption
    else:
        own = (group_id[:, :, None] == group_id[here]) & captions[:, :, None]
        positive = own.any(1)
    positive = positive[valid].to(images.dtype)
    logits = t.exp() * F.normalize(images[valid], dim=1) @ F.normalize(texts[here], dim=1).T
    n, m = logits.shape
    if kind == "sigmoid":
        target = (1 - label_smoothing) * positive + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits + bias, target, reduction="sum") / n
    rows = (1 - label_smoothing) * positive / positive.sum(1, keepdim=True) + label_smoothing / m
    columns, logits_of_captions = positive[:, caption], logits[:, caption]
    columns = (1 - label_smoothing) * columns / columns.sum(0) + label_smoothing / n
    image_loss = -(rows * logits.log_softmax(1)).sum(1).mean()
    return (image_loss - (columns * logits_of_captions.log_softmax(0)).sum(0).mean()) / 2


def draw_texts(t=2.659, b=40, k=4, d=17):
    """Images with one to four captions, some negatives, and texts that several images share; one image has none."""
    generator = torch.Generator().manual_seed(2)
    inputs = (torch.randn(b, d, generator=generator), torch.randn(b, k, d, generator=generator))
    captions, candidates = torch.rand(2, b, k, generator=generator) > 0.4
    captions[:, 0] = True
    captions[7] = False
    candidates |= captions
    valid = torch.rand(b, generator=generator) > 0.1
    groups = torch.randint(0, 60, (b, k), generator=generator)
    return (*inputs, torch.tensor([t]), torch.tensor([-3.0])), {
        "captions": captions,
        "candidates": candidates,
        "valid": valid,
        "group_id": groups,
    }


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("t", [0.0, 2.659, math.log(99)])
@pytest.mark.parametrize("more", [{}, {"group_id": None}, {"label_smoothing": 0.1}])
def test_several_texts_are_contrasted_as_defined(kind, t, more):
    inputs, options = draw_texts(t)
    options |= more
    found = value_and_gradients(partial(contrast_texts, loss=kind), inputs, tile=SMALL, **options)
    exact = value_and_gradients(lambda *x: dense_texts(kind, *x, **options), inputs, torch.float64)
    assert max(errors(found, exact)) < 3e-6


@pytest.mark.parametrize("kind", LOSSES)
def test_one_text_per_image_is_the_loss_of_pairs(kind):
    inputs = draw()
    options = {**CASES["smoothed"], "captions": torch.ones(70, 1, dtype=torch.bool), "group_id": GROUPS[:, None]}
    found = value_and_gradients(
        lambda x, y, *scalars, **rest: contrast_texts(x, y[:, None], *scalars, loss=kind, **rest), inputs, **options
    )
    assert max(errors(found, value_and_gradients(LOSSES[kind], inputs, **CASES["smoothed"]))) < 3e-6


def test_accuracy_of_several_texts_counts_images_and_captions():
    features = torch.eye(4)
    texts = torch.stack([features, features.roll(1, 0)], dim=1)  # the second text of each image is that of another
    captions = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    counts = texts_accuracy(features, texts, captions=captions)
    assert counts["captions"] == 5  # of which the second one of image 1 lies at image 0
    assert global_statistics({"valid": torch.tensor(4.0), **counts})["batch_t2i_r1"] == pytest.approx(100 * 4 / 5)
