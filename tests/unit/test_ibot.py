"""iBOT: masks of patches, what the model and its teacher see of them, the centre, and what the loss is divided by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from clipdist.config import load_config
from clipdist.data.batch import Batch, pair_batch
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.objectives.ibot import _DRAWN, IbotObjective, block_masks
from clipdist.objectives.make import make_objectives, prepare_model
from clipdist.objectives.objective import COUNTS, TEACHER, Moment

TOWERS = ("configs/models/tiny_vit.json", "tests/dist/timm_vit.json")
ROWS, PATCHES, PROTOTYPES = 8, 16, 12
AT = Moment(3, 100)
NAMES = ("patches/dino/0", "patches/dino/1")


def prepared(tower: str = TOWERS[0]) -> tuple[DualEncoder, IbotObjective]:
    dino = f"{{head: [24, 12], prototypes: 20, local_views: 0, ibot: {{head: [24, 12], prototypes: {PROTOTYPES}}}}}"
    config = load_config(None, [f"model.name={tower}", f"objectives={{clip: null, dino: {dino}}}"])
    torch.manual_seed(0)
    model = build_model(config.model, with_text=False)
    objectives = make_objectives(config.objectives, model.spec.image_size)
    prepare_model(model, objectives)
    assert isinstance(objectives[1], IbotObjective)
    return model, objectives[1]


def rows() -> Batch:
    valid = torch.arange(ROWS) != 5
    image = torch.zeros(ROWS, 3, 32, 32, dtype=torch.uint8)
    batch = pair_batch(image, torch.zeros(ROWS, 0, dtype=torch.int64), valid, torch.arange(ROWS))
    return replace(batch, sample_id=torch.arange(ROWS) * 17 + 3)


def given(objective: IbotObjective, batch: Batch) -> dict[str, torch.Tensor]:
    """Drawn logits of the teacher for the masked patches of a batch, and their numbers."""
    draw = torch.Generator().manual_seed(1)
    counts = [mask.sum(1) for mask in objective.noise(batch, AT).values()]
    drawn = {TEACHER + name: torch.randn(int(c.sum()), PROTOTYPES, generator=draw) for name, c in zip(NAMES, counts)}
    return drawn | {TEACHER + name + COUNTS: c for name, c in zip(NAMES, counts)}


def test_masks_depend_on_sample_step_and_view_alone():
    objective, batch = prepared()[1], rows()
    whole = objective.noise(batch, AT)
    for micro in (1, 2, 4):  # rows of a rank, or of a micro-batch
        for view in whole:
            parts = [objective.noise(piece, AT)[view] for piece in batch.split(micro)]
            assert torch.equal(torch.cat(parts), whole[view])
    assert not torch.equal(whole["dino/0"], whole["dino/1"])
    assert not torch.equal(whole["dino/0"], objective.noise(batch, Moment(4, 100))["dino/0"])


def test_masks_are_blocks_of_the_share_that_was_asked_for():
    grid, images = 16, 2000
    uniforms = np.random.default_rng(0).random((images, _DRAWN))
    masks = block_masks(uniforms, grid, 0.5, [0.1, 0.5])
    counts = masks.sum(1)
    assert (counts > 0).mean() == pytest.approx(0.5, abs=0.05)
    assert counts.max() <= 0.5 * grid**2
    wanted = np.round((0.1 + 0.4 * uniforms[:, 1]) * grid**2)[counts > 0]
    assert (counts[counts > 0] <= wanted).all()
    assert (counts[counts > 0] / wanted).mean() > 0.9
    squares = masks.reshape(images, grid, grid)
    alike = (squares[:, 1:] & squares[:, :-1]).sum() / squares[:, 1:].sum()  # single patches: 0.3
    assert alike > 0.6


@pytest.mark.parametrize("tower", TOWERS)
def test_the_model_sees_nothing_of_a_masked_patch_and_the_teacher_all(tower):
    model, _ = prepared(tower)
    torch.nn.init.normal_(model.heads["dino"].patches.mask_token.token)
    draw = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=draw)
    other = image.clone()
    other[0, :, 8:16, 24:] = 0  # patch 7 of the first image
    mask = torch.zeros(2, PATCHES, dtype=torch.bool)
    mask[0, 7] = mask[1, 2] = mask[1, 9] = True
    noise = {"dino/0": mask}
    seen, unseen = (model(noise=noise, **{"dino/0": pixels}) for pixels in (image, other))
    for name in ("dino/0", NAMES[0]):
        assert torch.equal(seen[name], unseen[name])
    assert seen[NAMES[0]].shape == (3, PROTOTYPES)
    taught, changed = (model(teaching=True, noise=noise, **{"dino/0": pixels}) for pixels in (image, other))
    assert not torch.allclose(taught[NAMES[0]][0], changed[NAMES[0]][0])
    whole = model(**{"dino/0": image})
    torch.testing.assert_close(taught["dino/0"], whole["dino/0"])
    assert not torch.allclose(seen["dino/0"], whole["dino/0"])
    seen[NAMES[0]].sum().backward()
    assert model.heads["dino"].patches.mask_token.token.grad.norm() > 0


def test_the_centre_is_the_mean_over_masked_patches():
    """Each counts once, whatever its image and view; not those of rows that are not valid."""
    objective, batch = prepared()[1], rows()
    taught = given(objective, batch)
    (centre,) = objective.after_update(taught, batch, objective.state()).values()
    found = []
    for name in NAMES:
        parts = taught[TEACHER + name].split(taught[TEACHER + name + COUNTS].tolist())
        found += [logits for row, part in enumerate(parts) for logits in part if row != 5]
    torch.testing.assert_close(centre, 0.1 * torch.stack(found).mean(0))


def test_the_loss_is_divided_by_all_views_also_those_without_masks():
    objective, batch = prepared()[1], rows()
    taught = given(objective, batch)
    constants = objective.given(taught, batch, objective.state(), AT).split(ROWS, ROWS)[0]
    student = {name: torch.randn(len(taught[TEACHER + name]), PROTOTYPES) for name in NAMES}
    term = objective.loss({**student, **constants}, batch)
    total, without = 0.0, 0
    for name in NAMES:
        counts = taught[TEACHER + name + COUNTS].tolist()
        for row, (own, theirs) in enumerate(zip(student[name].split(counts), taught[TEACHER + name].split(counts))):
            without += row != 5 and not len(own)
            if row != 5 and len(own):
                target = (theirs / objective.cfg.teacher_temperature[1]).softmax(1)
                total += float(-(target * (own / 0.1).log_softmax(1)).sum(1).mean())
    assert without > 0
    assert float(term.sum / term.count) == pytest.approx(total / (2 * (ROWS - 1)), rel=1e-5)


def test_a_tower_whose_patches_cannot_be_masked_is_named():
    config = load_config(None, ["model.name=configs/models/tiny_rn.json", "objectives={clip: null, dino: {ibot: {}}}"])
    model = build_model(config.model, with_text=False)
    with pytest.raises(UserError, match=r"objectives\.dino\.ibot: .*not for ModifiedResNet"):
        prepare_model(model, make_objectives(config.objectives, model.spec.image_size))
