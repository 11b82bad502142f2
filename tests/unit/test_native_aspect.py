"""Images at their own aspect ratio: grids, buffers, the packed tower beside timm's, the loader, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import Lengths, write_pairs
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.naflex_transforms import get_image_size_for_seq, patchify_image

from clipdist import config
from clipdist.config import Data, Stage
from clipdist.data.augment import (
    UNIFORMS,
    VIEW_UNIFORMS,
    Augmentation,
    View,
    apply_colour,
    colour_parameters,
    fill_views,
)
from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import ELONGATED, decode_pixels, eval_pixels, resize
from clipdist.data.loader import open_loader
from clipdist.data.order import OrderKey
from clipdist.data.patches import full_images, grids, write_patches
from clipdist.data.transform import EvalTransform, NativeAspect, patch_grid
from clipdist.data.views import image_view
from clipdist.errors import UserError
from clipdist.estimate.activations import one_pass
from clipdist.evals.audit import random_images
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import kept_aspect, sample_inputs
from clipdist.models.layers import hidden_matrices
from clipdist.models.program_export import _ImageTower
from clipdist.models.spec import ModelSpec, check_stages_fit, resolve_spec
from clipdist.objectives.teacher import check_teacher
from tools.bench.images import PhotographLike

TINY = "tests/dist/naflex.json"  # at most 16 patches of 8 pixels
VIT = "configs/models/tiny_vit.json"
SHAPE = NativeAspect(0, patch=8, budget=16)

SIGLIP = {"timm_model_name": "naflexvit_base_patch16_siglip", "timm_pool": "map", "timm_proj": "none"}
TOWERS: dict[str, dict[str, Any]] = {
    "registers, mean": {},
    "SigLIP 2": {**SIGLIP, "args": {"embed_dim": 64, "num_heads": 4}},
    "factorised": {"timm_model_name": "naflexvit_base_patch16_parfac_gap"},
    "own shape of positions": {"timm_model_name": "naflexvit_base_patch16_par_gap"},
    "class token": {"timm_pool": "token", "args": {"class_token": True, "reg_tokens": 0, "fc_norm": False}},
    "CLIP's ViT": {
        "timm_model_name": "vit_base_patch16_clip_224",
        "timm_pool": "token",
        "args": {"use_naflex": True, "img_size": 32, "reg_tokens": 0, "pos_embed_grid_size": None},
    },
    "SwiGLU, no positions": {"args": {"swiglu_mlp": True, "pos_embed": "none"}},
}


def described(folder: Path, vision: dict[str, Any] | None = None, **more: Any) -> str:
    """The tiny description with other entries of vision_cfg, and in "args" of timm's arguments; as a file."""
    content = json.loads(Path(TINY).read_text())
    changes = dict(vision or {}) | more
    args = content["vision_cfg"]["timm_model_kwargs"] | changes.pop("args", {})
    content["vision_cfg"] |= changes | {"timm_model_kwargs": args}
    if content["vision_cfg"].get("timm_proj") == "none":
        content["embed_dim"] = args["embed_dim"]
    file = folder / "model.json"
    file.write_text(json.dumps(content))
    return str(file)


def built(name: str) -> DualEncoder:
    torch.manual_seed(0)
    return build_model(config.Model(name=name))


def some_images(model: DualEncoder, rows: int = 9) -> torch.Tensor:
    images = random_images(rows, model.spec.transform, torch.Generator().manual_seed(1))
    images[4] = 0  # of a sample that cannot be decoded
    return images


def by_timm(model: DualEncoder, buffer: torch.Tensor) -> torch.Tensor:
    """Features of every image by itself, as timm computes them from patches and coordinates."""
    found = []
    for row, (height, width) in zip(buffer, grids(buffer)):
        pixels = row[1 : 1 + height * width].view(-1, 3).float() / 255
        patches = ((pixels - model.image_mean.view(3)) / model.image_std.view(3)).view(1, height * width, -1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        coord = torch.stack([y.flatten(), x.flatten()], dim=1)[None]
        valid = torch.ones(1, height * width, dtype=torch.bool)
        found.append(model.visual({"patches": patches, "patch_coord": coord, "patch_valid": valid}))
    return torch.cat(found)


def gradients(model: DualEncoder, features: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.visual.named_parameters() if p.grad is not None}


# Grids and buffers


def test_grids_are_those_of_timm():
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(side) for side in random.integers(40, 1000, 2))
        budget = int(random.choice([16, 49, 64, 256, 576]))
        rows, columns = patch_grid(height, width, budget)
        assert (rows * 16, columns * 16) == get_image_size_for_seq((height, width), 16, budget)[1]
    assert patch_grid(10, 160, 16) == (1, 16)
    assert patch_grid(160, 10, 16) == (16, 1)


def test_a_buffer_holds_the_patches_of_timm_and_their_grid():
    image = torch.randint(0, 256, (3, 16, 40), dtype=torch.uint8)
    row = torch.full((17, 192), 7, dtype=torch.uint8)
    write_patches(image, row, 8)
    assert torch.equal(row[1:11], patchify_image(image, (8, 8), include_info=False))
    assert not row[11:].any()
    assert grids(torch.stack([row, torch.zeros_like(row)])) == [(2, 5), (1, 1)]
    large = torch.zeros(2 + 300, 12, dtype=torch.uint8)
    write_patches(torch.zeros(3, 2, 600, dtype=torch.uint8), large, 2)
    assert grids(large[None]) == [(1, 300)]


def test_an_image_in_evaluation_keeps_its_aspect_ratio():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    row = eval_pixels(pixels, SHAPE)
    assert row.shape == SHAPE.shape
    assert grids(row[None]) == [(2, 6)]
    assert torch.equal(row[1:13], patchify_image(resize(pixels, 16, 48), (8, 8), include_info=False))
    with pytest.raises(BadSample, match=ELONGATED):
        eval_pixels(np.zeros((2, 33, 3), dtype=np.uint8), SHAPE)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_timms_transform(interpolation):
    image, _ = PhotographLike().draw(np.random.default_rng(3))
    theirs = create_transform(
        (3, 224, 224), naflex=True, patchify=True, max_seq_len=196, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation=interpolation,
    )  # fmt: skip
    ours = NativeAspect(224, interpolation=interpolation, patch=16, budget=196)
    for size in ((500, 333), (300, 400)):
        resized = image.resize(size)
        row, wanted = eval_pixels(np.array(resized), ours), theirs(resized)["patches"]
        (grid,) = grids(row[None])
        assert len(wanted) == grid[0] * grid[1]
        assert (wanted * 255 - row[1 : 1 + len(wanted)].float()).abs().max() < 2  # grey levels


# The tower


@pytest.mark.parametrize("kind", TOWERS)
def test_features_and_gradients_are_those_of_each_image_by_itself(kind, tmp_path):
    model = built(described(tmp_path, TOWERS[kind]))
    images = some_images(model)
    wanted, found = by_timm(model, images), model.encode_image(images)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    expected, packed = gradients(model, wanted), gradients(model, found)
    assert expected.keys() == packed.keys()
    for name, gradient in expected.items():
        assert (packed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_a_batch_does_not_change_the_features_of_an_image():
    model = built(TINY).eval()
    images = some_images(model)
    whole = model.encode_image(images)
    assert torch.allclose(torch.cat([model.encode_image(part) for part in images.split(2)]), whole, atol=1e-6)
    model.set_activation_checkpointing()
    wanted = gradients(model, whole)
    model.train()
    for name, gradient in gradients(model, model.encode_image(images)).items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-5, atol=1e-6), name


def test_squares_are_taken_as_before():
    model = built(TINY)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    buffer = torch.zeros(2, 17, 192, dtype=torch.uint8)
    for pixels, row in zip(image, buffer):
        write_patches(pixels, row, 8)
    assert torch.allclose(model.encode_image(buffer), model.encode_image(image), atol=1e-6)


def test_what_is_exported_takes_squares_and_says_so():
    model = built(TINY).eval()
    image, _ = sample_inputs(model)
    assert torch.equal(_ImageTower(model)(image), model.encode_image(image))
    assert kept_aspect(model.spec) == "vision_cfg.image_seq_len=16"


def test_only_the_patches_of_images_are_computed():
    model = built(TINY)
    images, seen = some_images(model), []
    model.visual.trunk.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model.encode_image(images)
    assert seen == [(1, sum(h * w + 4 for h, w in grids(images)), 32)]  # with four registers each


def test_the_layer_that_reads_pixels_is_no_hidden_matrix():
    found = hidden_matrices(built(TINY))
    assert "visual.trunk.blocks.0.attn.qkv.weight" in found
    assert not [name for name in found if "embeds" in name]


def test_memory_is_measured_with_full_images():
    with torch.device("meta"):
        model = built(TINY)
    full = full_images(3, model.spec.transform, "meta")
    assert grids(full) == [(4, 4)] * 3
    found = one_pass(model, 3)
    assert found.measured_on == "meta"
    real = one_pass(built(TINY), 3)
    assert found.saved == pytest.approx(real.saved, rel=0.1)


# The loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Images of 30 x 90 and 90 x 30 pixels in turn, one far too elongated, one that is none."""
    random = np.random.default_rng(0)
    images: dict[int, bytes] = {}
    for number in range(16):
        file = io.BytesIO()
        shape = (2, 90, 3) if number == 5 else (30, 90, 3) if number % 2 else (90, 30, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
        images[number] = file.getvalue()
    images[8] = b"no image"
    return write_pairs(tmp_path_factory.mktemp("shapes"), 16, bad=images)


def loaded(shards: Path, rank: int = 0, world: int = 1, **settings: Any) -> Any:
    cfg = dataclasses.replace(Data(threads=2), **settings)
    view = image_view(cfg, 32, SHAPE)
    source = open_loader(
        Catalog.open([str(shards)]), OrderKey(0, 16, 4, 0), Lengths(), cfg, views=[view], rank=rank, world=world
    )
    batch = source.next()
    source.close()
    return batch


def test_batches_hold_images_at_their_own_aspect_ratio(shards):
    batch = loaded(shards, crop_scale_min=1.0)
    found = dict(zip(batch.sample_id.tolist(), grids(batch.images["image"])))
    # The aspect ratio of a whole crop is drawn only where it fits: it is the image's own.
    assert {found[number] for number in (1, 3, 7)} == {(2, 6)}
    assert {found[number] for number in (0, 2, 4)} == {(6, 2)}
    assert sorted(batch.bad) == [(5, ELONGATED), (8, "not an image")]
    assert [found[5], found[8]] == [(1, 1), (1, 1)]
    assert batch.valid["image"].sum() == 14
    halves = [loaded(shards, rank, 2, crop_scale_min=1.0) for rank in range(2)]
    assert torch.equal(torch.cat([half.images["image"] for half in halves]), batch.images["image"])


def test_crops_flips_and_colours_come_before_the_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    cfg = Data(crop_scale_min=0.3, flip=1.0, jitter=[0.4, 0.4, 0.4, 0.1], jitter_probability=1.0)
    view = image_view(cfg, 32, SHAPE)
    uniforms = np.random.default_rng(1).random((1, 1, VIEW_UNIFORMS))
    out = torch.empty(1, *view.shape, dtype=torch.uint8)
    assert fill_views([file.getvalue()], [view], uniforms, [out], 10**6) == {}
    numbers = uniforms[0, 0].tolist()
    top, left, height, width = view.crop(60, 120, numbers)
    assert height * width >= 0.9 * 0.3 * 60 * 120
    assert 1.4 < width / height < 2.7  # twice as wide as high, times 3/4 to 4/3
    cropped = decode_pixels(file.getvalue())[top : top + height, left : left + width]
    rows, columns = patch_grid(height, width, 16)
    image = resize(cropped, 8 * rows, 8 * columns).flip(-1)
    image = apply_colour(image[None], colour_parameters(uniforms[0], view.augmentation))[0]
    assert grids(out) == [(rows, columns)]
    assert torch.equal(out[0, 1 : 1 + rows * columns], patchify_image(image, (8, 8), include_info=False))


def test_a_model_that_squashes_images_is_trained_on_squashed_crops():
    squash = EvalTransform(32, resize_mode="squash")
    view = image_view(Data(crop_scale_min=1.0), 32, squash)
    assert type(view) is View
    numbers = [0.5] * UNIFORMS
    assert view.crop(100, 300, numbers) == (0, 0, 100, 300)  # the whole image, as in evaluation
    assert image_view(Data(crop_scale_min=1.0), 32, EvalTransform(32)).crop(100, 300, numbers)[3] < 300
    random = np.random.default_rng(0)
    own = View("image", 32, Augmentation(0.3), own_aspect=True)
    for _ in range(200):
        height, width = (int(side) for side in random.integers(1, 60, 2))
        top, left, h, w = own.crop(height, width, random.random(UNIFORMS).tolist())
        assert top >= 0
        assert left >= 0
        assert 1 <= h <= height - top
        assert 1 <= w <= width - left


# What is described and what is refused


def test_open_clips_form_is_read_and_kept(tmp_path):
    spec = resolve_spec(config.Model(name=TINY))
    assert spec.transform == NativeAspect(32, patch=8, budget=16)
    assert str(spec.transform) == "own aspect ratio, at most 16 patches of 8 x 8, bicubic"
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).transform == spec.transform
    other = resolve_spec(config.Model(name=TINY, patch_budget=25))
    assert other.patch_budget == 25
    assert other.model != spec.model  # so that a checkpoint of one is not continued as the other
    file = tmp_path / "naflex_ViT-B-16.json"  # as open_clip 4 ships it
    vision = {"image_size": 224, "timm_model_name": "naflexvit_base_patch16_gap", "timm_model_pretrained": False}
    file.write_text(json.dumps({"embed_dim": 512, "custom_text": True, "vision_cfg": vision, "text_cfg": {}}))
    assert resolve_spec(config.Model(name=str(file))).transform == EvalTransform(224)
    assert resolve_spec(config.Model(name=str(file), patch_budget=196)).transform.shape == (197, 768)


def test_a_tower_in_a_folder_of_timm_is_known(tmp_path):
    folder = tmp_path / "tower"
    folder.mkdir()
    args = {"patch_size": [4, 4], "embed_dim": 32, "depth": 1, "num_heads": 2}
    facts = {"input_size": [3, 32, 32], "fixed_input_size": False}
    content = {"architecture": "naflexvit_base_patch16_gap", "pretrained_cfg": facts, "model_args": args}
    (folder / "config.json").write_text(json.dumps(content))
    description = json.loads(Path(TINY).read_text())
    description["vision_cfg"] |= {"timm_model_name": "local-dir:tower"}
    del description["vision_cfg"]["timm_model_kwargs"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    model = built(str(tmp_path / "model.json"))
    assert model.spec.transform.shape == (17, 48)
    images = some_images(model)
    assert torch.allclose(model.encode_image(images), by_timm(model, images), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": TINY, "patch_budget": 3}, "model.patch_budget=3: must be a number of patches in 4 .. 65535"),
        (
            {"name": VIT, "patch_budget": 64},
            f"model.patch_budget=64: the image tower of {VIT} takes square images alone",
        ),
        ({"name": "RN50", "patch_budget": 64}, "take one with timm's naflexvit"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_a_model_is_built(settings, said):
    with pytest.raises(UserError) as error:
        resolve_spec(config.Model(**settings))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"args": {"rope_type": "axial"}}, "not known how with rotary positions"),
        ({"args": {"embed_proj_type": "conv"}}, "embed_proj_type=conv"),
        ({"timm_drop_path": 0.1}, "stochastic depth"),
        ({"patch_dropout": 0.5}, "patch dropout"),
        ({"image_seq_len": "many"}, "vision_cfg.image_seq_len=many: must be a number of patches"),
    ],
)
def test_towers_that_cannot_be_packed_are_refused(vision, said, tmp_path):
    with pytest.raises(UserError) as error:
        built(described(tmp_path, vision))
    assert said in str(error.value)


def test_what_needs_squares_is_refused(tmp_path):
    model = built(TINY)
    with pytest.raises(UserError, match=r"train\.stages: not with"):
        check_stages_fit([Stage(1.0)], model.spec)
    with pytest.raises(UserError, match=r"engine\.compile=true: not for"):
        model.prepare(config.Engine(compile=True))
    squares = tmp_path / "weights.safetensors"
    save_file(built(VIT).state_dict(), squares)
    with pytest.raises(UserError, match="takes no images at their own aspect ratio in patches of 8 pixels"):
        check_teacher(config.Distill(teacher=f"{VIT}:{squares}"), config.Model(name=TINY))
