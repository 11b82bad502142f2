"""Drop path: which samples keep a branch, what is computed, and towers that do not take it."""

from __future__ import annotations

import pytest
import torch

from clipdist.config import load_config
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.drop_path import branches_kept, draw_kept, drop_path_blocks
from clipdist.models.dual_encoder import DualEncoder

TOWERS = ("configs/models/tiny_vit.json", "tests/dist/timm_vit.json")
RATE = 0.5


def built(name: str, rate: float = RATE) -> DualEncoder:
    config = load_config(None, [f"model.name={name}", f"model.drop_path={rate}", "objectives={clip: null, dino: {}}"])
    torch.manual_seed(0)
    return build_model(config.model, with_text=False)


def test_what_is_kept_depends_on_sample_step_view_block_and_branch_alone():
    ids = torch.arange(400) * 3
    drawn = draw_kept(3, 0.3, 1, 5, ids, ["image", "other"])
    for micro in (1, 7, 100):
        parts = [draw_kept(3, 0.3, 1, 5, own, ["other"])["other"] for own in ids.split(micro)]
        assert torch.equal(torch.cat(parts), drawn["other"])
    other_step, other_seed = (draw_kept(3, 0.3, seed, step, ids, ["image"]) for seed, step in ((1, 6), (2, 5)))
    patterns = [drawn["image"], drawn["other"], other_step["image"], other_seed["image"]]
    columns = torch.cat([pattern.flatten(1) for pattern in patterns], dim=1).T  # every block and branch
    assert len(columns.unique(dim=0)) == len(columns) == 24
    assert columns.float().mean() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_branch_runs_on_its_rows_alone_with_the_same_result(name, checkpointed):
    """Also where no row keeps one: a rank that left out a module would not gather its weights at ZeRO stage 3."""
    model, plain = built(name), built(name, 0.0)
    if checkpointed:
        model.set_activation_checkpointing()
    blocks = drop_path_blocks(model.visual)
    assert len(blocks) == 2
    seen: list[int] = []
    for block in blocks:
        for norm in ("ln_1", "ln_2", "norm1", "norm2"):
            if hasattr(block, norm):
                getattr(block, norm).register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    kept = torch.tensor([[[1, 0], [0, 1]], [[1, 0], [1, 1]], [[0, 0], [0, 1]]], dtype=torch.bool)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = model(image=image, kept={"image": kept})["image"]
    assert seen == [2, 1, 1, 3]

    def weigh(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return output * (weights / (1 - RATE))[:, None, None]

    trunk = getattr(plain.visual, "trunk", plain.visual)
    for number, block in enumerate(getattr(trunk, "blocks", None) or trunk.transformer.resblocks):
        for branch, last in enumerate((block.attn, block.mlp)):
            places = kept[:, number, branch].float()
            if branch == 0 and hasattr(block, "ln_1"):  # open_clip's attention returns its weights, too
                last.register_forward_hook(lambda _, __, out, places=places: (weigh(out[0], places), out[1]))
            else:
                last.register_forward_hook(lambda _, __, out, places=places: weigh(out, places))
    wanted = plain(image=image)["image"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for output in (found, wanted):
        output.square().sum().backward()
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], rtol=1e-4, atol=1e-5)


def test_evaluation_and_a_teacher_drop_nothing():
    model, plain = built(TOWERS[0]), built(TOWERS[0], 0.0)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with branches_kept(model.visual, torch.zeros(3, 2, 2, dtype=torch.bool), RATE):
        assert not torch.equal(model.encode_image(image), plain.encode_image(image))
    assert torch.equal(model(image=image)["image"], plain(image=image)["image"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.drop_path=1"], "model.drop_path=1.0: must lie in [0, 1)"),
        (["model.drop_path=0.1", "model.lock_image=true"], "model.drop_path=0.1: must be 0 with model.lock_image"),
        (["model.drop_path=0.1", "engine.compile=true"], "model.drop_path=0.1: must be 0 with engine.compile"),
    ],
)
def test_settings_that_do_not_go_together(words, told):
    with pytest.raises(UserError) as refused:
        load_config(None, words)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("configs/models/tiny_rn.json", "ModifiedResNet has no blocks of a known ViT"),
        ("configs/models/vits16_dino.json", "drops branches by its description"),
    ],
)
def test_a_tower_that_does_not_take_it_is_named(name, told):
    with pytest.raises(UserError, match=told):
        built(name, 0.1)
