"""Stages of a run: smaller images, shorter texts, fewer patches; what they leave as it is, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import PatchDropout

from clipdist import config
from clipdist.config import Stage, load_config
from clipdist.config.stages import PlannedStage, plan_stages, stage_number
from clipdist.data.catalog import Catalog
from clipdist.data.loader import open_loader
from clipdist.data.order import OrderKey
from clipdist.data.stages import BatchStage, kept_patches
from clipdist.data.tokens import BPETokenizer
from clipdist.data.views import image_view
from clipdist.errors import UserError
from clipdist.fault_tolerance.guard import Guard
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.fewer_patches import allow_stages, kept_of, patches_chosen, patches_of
from clipdist.models.spec import check_stages_fit, resolve_spec

VIT = "configs/models/tiny_vit.json"  # 32 pixels, patches of 8
RESNET = "configs/models/tiny_rn.json"


def staged(name: str, *stages: PlannedStage) -> DualEncoder:
    torch.manual_seed(0)
    model = build_model(config.Model(name=name))
    allow_stages(model, stages)
    return model


def images(side: int, count: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def timm_json(folder: Path, name: str, side: int, **more: object) -> str:
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "image_size": side, **more}
    text = {"context_length": 16, "vocab_size": 2048, "width": 32, "heads": 2, "layers": 2}
    file = folder / "model.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(file)


def test_borders_are_a_function_of_the_number_of_steps():
    stages = [Stage(0.7, image_size=16, tokens=8, patch_dropout=0.5), Stage(0.2, image_size=24), Stage(0.1)]
    planned = plan_stages(stages, 10, 32, 16)
    assert [stage.first for stage in planned] == [0, 7, 9]
    assert [(stage.image_size, stage.tokens, stage.patch_dropout) for stage in planned] == [
        (16, 8, 0.5),
        (24, 16, 0.0),
        (32, 16, 0.0),
    ]
    assert [stage_number(planned, step) for step in range(10)] == [0] * 7 + [1] * 2 + [2]
    with pytest.raises(UserError, match=r"train\.stages\[2\]\.share=0\.1: leaves it no step of 4"):
        plan_stages(stages, 4, 32, 16)
    assert plan_stages([], 4, 32, 16) == (PlannedStage(0, 32, 16, 0.0),)


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_at_the_models_own_size_features_stay_the_same_bits(name):
    torch.manual_seed(0)
    before = build_model(config.Model(name=name)).eval()
    after = staged(name, PlannedStage(0, 32, 16, 0.0)).eval()
    assert torch.equal(before.encode_image(images(32)), after.encode_image(images(32)))
    assert before.state_dict().keys() == after.state_dict().keys()


def test_a_smaller_image_sees_positions_as_open_clip_resizes_them():
    model = staged(VIT, PlannedStage(0, 16, 16, 0.0)).eval()
    weights = {f"visual.{name}": tensor.clone() for name, tensor in model.visual.state_dict().items()}
    smaller = json.loads(Path(VIT).read_text())
    smaller["vision_cfg"]["image_size"] = 16
    built = build_model(config.Model(name=VIT)).visual
    small = type("Small", (), {"visual": build_small(smaller)})
    resize_pos_embed(weights, small)
    small.visual.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in weights.items()})
    pixels = model.pixels(images(16))
    assert torch.allclose(model.visual(pixels), small.visual.eval()(pixels), atol=1e-6)
    with pytest.raises(RuntimeError):
        built(pixels)


def build_small(description):
    import open_clip

    return open_clip.CustomTextCLIP(**description).visual


@pytest.mark.parametrize(
    ("name", "side", "small"), [(VIT, 32, 16), ("vit_tiny_patch16_224", 224, 96), ("deit_tiny_patch16_224", 224, 96)]
)
def test_gradients_reach_the_whole_table(tmp_path, name, side, small):
    model = staged(name if name == VIT else timm_json(tmp_path, name, side), PlannedStage(0, small, 16, 0.0))
    model.encode_image(images(small)).square().sum().backward()
    trunk = getattr(model.visual, "trunk", model.visual)
    table = getattr(trunk, trunk.table.name)
    assert table.grad.shape == table.shape
    assert table.grad.flatten(0, -2).abs().sum(-1).count_nonzero() == table[..., 0].numel()


def test_a_resnet_takes_smaller_images(tmp_path):
    described = json.loads(Path(RESNET).read_text())
    described["vision_cfg"]["image_size"] = 128
    (tmp_path / "rn.json").write_text(json.dumps(described))
    model = staged(str(tmp_path / "rn.json"), PlannedStage(0, 64, 16, 0.0), PlannedStage(5, 128, 16, 0.0))
    table = model.visual.attnpool.positional_embedding
    features = model.encode_image(images(64))
    assert features.shape == (2, 32)
    features.square().sum().backward()
    assert table.grad.abs().sum(-1).count_nonzero() == len(table) == 17
    assert model.visual.attnpool.positional_embedding is table


@pytest.mark.parametrize("more", [{}, {"pool_type": "last", "no_causal_mask": True}, {"pool_type": "last"}])
def test_shorter_texts_are_taken_padded_and_not(tmp_path, more):
    described = json.loads(Path(VIT).read_text())
    described["text_cfg"] |= more
    (tmp_path / "model.json").write_text(json.dumps(described))
    model = staged(str(tmp_path / "model.json"), PlannedStage(0, 32, 8, 0.0), PlannedStage(1, 32, 16, 0.0)).eval()
    tokens = torch.tensor([[1, 2, 2047, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 2047]])
    features = model.encode_text(tokens)
    assert torch.allclose(features, model.text(tokens), atol=1e-6)  # on a GPU texts are run as they are
    if not more:
        longer = torch.nn.functional.pad(tokens, (0, 8))
        assert torch.allclose(features, model.text(longer), atol=1e-6)


@pytest.mark.parametrize("name", [VIT, "vit_tiny_patch16_224"])
def test_only_the_chosen_patches_are_seen(tmp_path, name):
    side = 32 if name == VIT else 224
    model = staged(name if name == VIT else timm_json(tmp_path, name, side), PlannedStage(0, side, 16, 0.5)).train()
    patches = patches_of(model.visual, side)
    assert patches == (16 if name == VIT else 196)
    chosen = torch.stack([torch.arange(0, patches, 2), torch.arange(1, patches, 2)])
    pixels = images(side)
    given = model(image=pixels, patches=chosen)["image"]
    assert torch.equal(model(image=pixels, patches=chosen)["image"], given)
    changed = pixels.clone()
    patch = side // round(patches**0.5)
    changed[0, :, :patch, patch : 2 * patch] ^= 255  # patch 1, which the first image lacks
    other = model(image=changed, patches=chosen)["image"]
    assert torch.equal(other[0], given[0])
    changed[1, :, :patch, patch : 2 * patch] ^= 255  # and the second has
    assert not torch.allclose(model(image=changed, patches=chosen)["image"][1], given[1])
    model.eval()
    assert torch.equal(model(image=pixels, patches=chosen)["image"], model(image=pixels)["image"])


def test_the_choice_is_that_of_open_clips_dropout(monkeypatch):
    """The same patches by open_clip's own module give the same features."""
    model = staged(VIT, PlannedStage(0, 32, 16, 0.5)).train()
    chosen = torch.tensor([[0, 3, 5, 6, 9, 10, 12, 15], [1, 2, 4, 7, 8, 11, 13, 14]])
    pixels = model.pixels(images(32))
    with patches_chosen(model.visual, chosen):
        ours = model.visual(pixels)
    model.visual.patch_dropout = PatchDropout(0.5)
    scores = torch.zeros(2, 16).scatter(1, chosen, 1.0)
    monkeypatch.setattr(torch, "randn", lambda *_: scores)
    assert torch.allclose(model.visual(pixels), ours, atol=1e-6)


def test_patches_are_those_of_the_sample_in_its_epoch():
    stage = BatchStage(0, [], BPETokenizer(2048, 16), patches=49, kept=24)
    ids, epochs = np.arange(2000), np.zeros(2000, dtype=np.int64)
    chosen = kept_patches(3, epochs, ids, stage)
    assert chosen.shape == (2000, 24)
    assert (chosen.diff(dim=1) > 0).all()
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 49
    rows = np.array([7, 3, 1999])
    assert torch.equal(kept_patches(3, epochs[rows], ids[rows], stage), chosen[rows])
    assert not torch.equal(kept_patches(4, epochs, ids, stage), chosen)
    assert not torch.equal(kept_patches(3, epochs + 1, ids, stage), chosen)
    share = torch.bincount(chosen.flatten(), minlength=49) / 2000
    assert (share - 24 / 49).abs().max() < 0.06  # five deviations
    assert kept_of(196, 0.5) == 98
    assert kept_of(100, 0.9) == 10
    assert kept_of(4, 0.99) == 1
    assert kept_of(49, 0.0) == 0


def take(folder: Path, world: int, rank: int, start: int, stages, tokenizer, count: int = 4, **settings):
    cfg = dataclasses.replace(config.Data(threads=2), **settings)
    catalog, views = Catalog.open([str(folder)]), stages[-1].views
    source = open_loader(
        catalog, OrderKey(0, 16, 4, 0), tokenizer, cfg, views=views, stages=stages, rank=rank, world=world, start=start
    )
    batches = [source.next() for _ in range(count)]
    memory = {array.shape for array in source._memory}
    source.close()
    return batches, memory


@pytest.mark.parametrize("texts", [1, 2])
def test_batches_cross_a_border(shards, texts):
    cfg = config.Data(flip=0.5)
    whole, short = BPETokenizer(2048, 16), BPETokenizer(2048, 5)
    stages = [
        BatchStage(0, [image_view(cfg, 16)], short, patches=16, kept=4),
        BatchStage(2, [image_view(cfg, 24)], whole),
    ]
    settings = {"caption": "random" if texts == 1 else texts, "flip": 0.5}
    batches, memory = take(shards / "train", 1, 0, 0, stages, whole, count=8, **settings)
    assert [batch.images["image"].shape[-1] for batch in batches] == [16] * 2 + [24] * 6
    assert [batch.tokens.shape[-1] for batch in batches] == [5] * 2 + [16] * 6
    assert [batch.patches is None for batch in batches] == [False] * 2 + [True] * 6
    assert memory == {(16, 24, 24, 3)}  # nothing of the first stage is kept
    ends = batches[0].tokens.flatten(0, -2)
    assert (ends.max(dim=-1).values == 2047).all()  # cut, and ended
    assert (ends[:, -1] == 2047).any()
    plain = [BatchStage(0, stages[1].views, whole)]
    same, _ = take(shards / "train", 1, 0, 2, plain, whole, **settings)
    for ours, theirs in zip(batches[2:], same):
        assert torch.equal(ours.images["image"], theirs.images["image"])
        assert torch.equal(ours.tokens, theirs.tokens)
    for rank in range(2):
        mine, _ = take(shards / "train", 2, rank, 1, stages, whole, **settings)
        for ours, all_rows in zip(mine, batches[1:]):
            rows = all_rows.rows(8 * rank, 8 * rank + 8)
            assert torch.equal(ours.images["image"], rows.images["image"])
            assert (ours.patches is None) == (rows.patches is None)
            assert ours.patches is None or torch.equal(ours.patches, rows.patches)
            if texts == 1:
                assert torch.equal(ours.tokens, rows.tokens)


def test_the_guard_compares_within_a_stage():
    guard = Guard(config.Guard(window=10))
    for step in range(10):
        guard.accepted(step, 1.0, {"image": 1.0})
    assert guard.judge_loss(5.0)
    again = Guard(config.Guard(window=10), guard.state())
    for one in (guard, again):
        one.enter_stage(0)
        assert one.judge_loss(5.0)
        one.enter_stage(1)
        assert not one.judge_loss(5.0)
    assert guard.state() == again.state()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{share: 0.7}, {share: 0.2}]", r"train\.stages=shares \[0\.7, 0\.2\]: must sum to 1, not 0\.9"),
        ("[{share: 0}, {share: 1}]", r"train\.stages\[0\]\.share=0\.0: must lie in \(0, 1\]"),
        ("[{share: 1, tokens: 3}]", r"train\.stages\[0\]\.tokens=3: must be at least 4"),
        ("[{share: 1, patch_dropout: 1}]", r"train\.stages\[0\]\.patch_dropout=1\.0: must lie in \[0, 1\)"),
        ("[{share: 1, image_size: -1}]", r"train\.stages\[0\]\.image_size=-1: must not be negative"),
        ("[{image_size: 16}]", "share"),
        ("[{share: 1, size: 16}]", "size"),
        ("0.5", "stages"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(UserError, match=message) as refused:
        load_config(None, ["model.name=" + VIT, f"train.stages={stages}"])
    assert "\n" not in str(refused.value)


def test_one_stage_is_a_list_of_one():
    assert load_config(None, ["train.stages={share: 1, patch_dropout: 0.5}"]).train.stages == [
        Stage(1.0, patch_dropout=0.5)
    ]


def test_stages_and_kept_features_exclude_each_other():
    words = ["train.stages=[{share: 1, tokens: 8}]", "data.cache_features=true", "model.lock_image=true"]
    with pytest.raises(UserError, match=r"train\.stages=shares \[1\.0\]: must be empty with data\.cache_features"):
        load_config(None, [*words, "data.crop_scale_min=1"])


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        (VIT, Stage(1, image_size=20), r"image_size=20: must be a multiple of the model's patches of 8: 16 or 24"),
        (VIT, Stage(1, image_size=40), r"image_size=40: must not exceed the model's 32"),
        (VIT, Stage(1, tokens=17), r"tokens=17: must not exceed the model's 16"),
        (RESNET, Stage(1, patch_dropout=0.5), r"patch_dropout=0\.5: the image tower has no patches"),
        ("tests/dist/vit_patch_dropout.json", Stage(1, patch_dropout=0.5), "patches would be dropped twice"),
    ],
)
def test_stages_that_do_not_fit_a_model_are_refused_before_it_is_built(model, stage, message):
    with pytest.raises(UserError, match=message):
        check_stages_fit([stage], resolve_spec(config.Model(name=model)))


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("swin_tiny_patch4_window7_224", PlannedStage(0, 192, 16, 0.0), "image_size=192: SwinTransformer does not"),
        ("resnet18", PlannedStage(0, 96, 16, 0.5), r"patch_dropout=0\.5: ResNet has no patches"),
        ("vit_tiny_patch16_224", PlannedStage(0, 100, 16, 0.0), "image_size=100: VisionTransformer does not take it"),
    ],
)
def test_a_timm_tower_that_does_not_take_a_stage_is_refused(tmp_path, name, stage, message):
    with pytest.raises(UserError, match=message):
        staged(timm_json(tmp_path, name, 224, timm_proj="linear"), stage)
