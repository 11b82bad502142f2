"""Crops, flips and colours against torchvision's; all of it a pure function of the uniform numbers."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as tv
from torchvision.transforms.v2 import functional as tv2
from views import train_image

from clipdist.data.augment import (
    UNIFORMS,
    VIEW_UNIFORMS,
    Augmentation,
    View,
    apply_colour,
    colour_parameters,
    dct_factor,
    decode_for,
    random_crop,
    train_views,
)
from clipdist.data.bad_sample import BadSample
from clipdist.data.decode import decode_pixels
from clipdist.errors import UserError


def picture(width: int, height: int) -> Image.Image:
    """As cameras make them: smooth shapes, one hard edge, and a texture that grows weaker as it grows finer."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width]
    field = np.stack([127 + 60 * np.sin(x / a + y / b) for a, b in ((39, 64), (57, 31), (83, 48))], -1)
    field[:, width // 3 : width // 2] += 30
    for octave in range(6):
        cells = random.normal(0, 4, (4 << octave, 4 << octave, 3)).astype(np.float32)
        planes = [Image.fromarray(cells[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        field += np.stack([np.asarray(plane) for plane in planes], -1)
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def uniforms(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, VIEW_UNIFORMS))


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.to(torch.int16) - b.to(torch.int16)).abs().max())


def pillows(pixels: np.ndarray, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """The box of the pixels, cut and resized by Pillow: uint8 [3, size, size]."""
    top, left, height, width = box
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(crop.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions."""
    places = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(
    ("height", "width", "least", "most"),
    [(100, 130, 0.4, 1.0), (480, 640, 0.9, 1.0), (200, 60, 0.08, 1.0), (100, 130, 0.05, 0.4)],
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, least: float, most: float) -> None:
    n = 3000
    ours = np.array([random_crop(height, width, row.tolist(), least, most) for row in uniforms(n)], dtype=np.float64)
    torch.manual_seed(0)
    image = torch.empty(1).expand(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [least, most], [3 / 4, 4 / 3]) for _ in range(n)], dtype=np.float64
    )
    of_chance = 1.95 * np.sqrt(2 / n)  # one pair in a thousand is further apart
    for name, value in (
        ("area", lambda crop: crop[:, 2] * crop[:, 3]),
        ("aspect", lambda crop: crop[:, 3] / crop[:, 2]),
        ("top", lambda crop: crop[:, 0]),
        ("left", lambda crop: crop[:, 1]),
    ):
        assert kolmogorov_smirnov(value(ours), value(theirs)) < of_chance, name
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    assert ours[:, :2].min() >= 0


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (2, 900)])
def test_a_strip_is_cropped_in_its_middle_as_torchvision_does(height: int, width: int) -> None:
    image = torch.empty(1).expand(3, height, width)
    theirs = RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    for row in uniforms(20):
        assert random_crop(height, width, row.tolist(), 0.9) == tuple(theirs)


@pytest.mark.parametrize("extreme", [0.0, np.nextafter(1, 0)])
def test_extreme_numbers_stay_inside(extreme: float) -> None:
    for height, width in ((1, 1), (3, 4), (64, 64), (333, 500)):
        top, left, h, w = random_crop(height, width, [extreme] * UNIFORMS, 0.3)
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert min(h, w) >= 1
    drawn = colour_parameters(
        np.full((1, VIEW_UNIFORMS), extreme), Augmentation(1.0, jitter=(1, 1, 1, 0.5), jitter_probability=1.0)
    )
    assert drawn is not None
    assert sorted(drawn[0, 4:8].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_pictures_are_pillows_crop_and_resize(kind: str) -> None:
    data = encoded(picture(90, 70), kind)
    pixels = decode_pixels(data)
    for row in uniforms(10):
        ours = train_image(data, 32, row, Augmentation(0.3))
        assert ours.shape == (3, 32, 32)
        assert ours.dtype == torch.uint8
        assert distance(ours, pillows(pixels, random_crop(70, 90, row.tolist(), 0.3), 32)) <= 2


def test_the_same_numbers_give_the_same_picture() -> None:
    data, augmentation = encoded(picture(90, 70)), Augmentation(0.5, flip=0.5)
    first, again = ([train_image(data, 24, row, augmentation) for row in uniforms(8)] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [24, 40])  # 40: the whole picture, nothing to resize
def test_rows_of_a_batch_are_written_in_place(layout: torch.memory_format, flip: float, size: int) -> None:
    data, row, augmentation = encoded(picture(40, 40)), uniforms(1)[0], Augmentation(1.0, flip=flip)
    row[1] = 0.5  # aspect 1: the crop is the whole
    batch = torch.zeros(3, 3, size, size, dtype=torch.uint8).to(memory_format=layout)
    returned = train_image(data, size, row, augmentation, out=batch[1])
    assert returned.data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], train_image(data, size, row, augmentation))
    assert not batch[0].any()
    assert not batch[2].any()


def test_a_bad_picture_leaves_its_row_as_it_is() -> None:
    batch = torch.zeros(1, 3, 24, 24, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for augmentation in (Augmentation(0.5), Augmentation(0.5, dct_scaling=True)):
        with pytest.raises(BadSample, match="truncated image"):
            train_image(encoded(picture(90, 70))[:-200], 24, uniforms(1)[0], augmentation, out=batch[0])
        with pytest.raises(BadSample, match="too many pixels"):
            train_image(encoded(picture(90, 70)), 24, uniforms(1)[0], augmentation, 90 * 70 - 1, out=batch[0])
    assert not batch.any()


def test_flips_come_as_often_as_asked() -> None:
    data, rows = encoded(picture(40, 30)), uniforms(400)
    flipped = 0
    for row in rows:
        plain, seen = (train_image(data, 16, row, Augmentation(0.8, flip=flip)) for flip in (0.0, 0.3))
        assert torch.equal(seen, plain) or torch.equal(seen, plain.flip(2))
        flipped += not torch.equal(seen, plain)
    assert 0.23 < flipped / len(rows) < 0.37  # three standard deviations


@pytest.mark.parametrize(
    ("short", "size", "factor"), [(447, 224, 1), (448, 224, 2), (895, 224, 2), (896, 224, 4), (1792, 224, 8), (9, 1, 8)]
)
def test_the_largest_reduction_that_leaves_enough_pixels(short: int, size: int, factor: int) -> None:
    assert dct_factor((0, 0, short, 2 * short), size, size) == factor
    assert dct_factor((0, 0, 2 * short, short), size, size) == factor


@pytest.mark.parametrize("size", [150, 75, 37])  # reductions of 2, 4 and 8
def test_scaled_decoding_is_near_the_whole_on_aligned_crops(size: int) -> None:
    data = encoded(picture(642, 483), quality=90)
    pixels, factors = decode_pixels(data), set()
    for row in uniforms(6):
        box = random_crop(483, 642, row.tolist(), 0.5)
        factor = dct_factor(box, size, size)
        factors.add(factor)
        aligned = tuple(side // factor * factor for side in box)
        ours = train_image(data, size, row, Augmentation(0.5, dct_scaling=True))
        assert distance(ours, pillows(pixels, aligned, size)) <= 26
    assert max(factors) == {150: 2, 75: 4, 37: 8}[size]


def test_an_image_is_reduced_as_far_as_all_its_views_allow() -> None:
    data, rows = encoded(picture(642, 483)), [row.tolist() for row in uniforms(2)]
    scaled, whole = (Augmentation(0.9, dct_scaling=on) for on in (True, False))
    for views, factor in (
        ([View("a", 37, scaled), View("b", 75, scaled)], 4),
        ([View("a", 37, scaled), View("b", 400, scaled)], 1),
        ([View("a", 37, scaled), View("b", 75, whole)], 1),
    ):
        pixels, found, _ = decode_for(data, views, rows, 1_000_000)
        assert found == factor
        assert pixels.shape[:2] == (-(-483 // factor), -(-642 // factor))


@pytest.mark.parametrize("kind", ["small JPEG", "PNG", "odd JPEG", "CMYK JPEG"])
def test_scaled_decoding_leaves_other_pictures_alone(kind: str) -> None:
    """A crop with no pixels to spare, another format, and JPEGs that Pillow reads."""
    image = picture(160, 120)
    data = {
        "small JPEG": lambda: encoded(image.resize((80, 60))),
        "PNG": lambda: encoded(image, "PNG"),
        "odd JPEG": lambda: encoded(image).replace(b"\xff\xda", b"\x00\x11\x22\xff\xda"),
        "CMYK JPEG": lambda: encoded(image.convert("CMYK")),
    }[kind]()
    for row in uniforms(4):
        plain, scaled = (train_image(data, 32, row, Augmentation(0.8, dct_scaling=on)) for on in (False, True))
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale_min": 0.0},
        {"crop_scale_min": 1.5},
        {"flip": -0.1},
        {"jitter_probability": 1.1},
        {"grayscale": float("nan")},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
        {"jitter": (-0.1, 0.1, 0.1, 0.1)},
        {"jitter": (0.1, 0.1, 0.1)},
        {"crop_scale_max": 0.8},
        {"crop_scale_max": 1.1},
        {"blur": 1.1},
        {"solarise": -0.1},
    ],
)
def test_values_outside_their_range_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
        Augmentation(**{"crop_scale_min": 0.9, **wrong})


def images(n: int, side: int = 48) -> torch.Tensor:
    """uint8 [n, 3, side, side], cut from one picture; a third are dim, a third are pale."""
    pixels = torch.from_numpy(np.array(picture(side * 4, side * 4))).permute(2, 0, 1)
    places = np.random.default_rng(3).integers(0, side * 3, (n, 2))
    cut = [pixels[:, y : y + side, x : x + side] for y, x in places.tolist()]
    changed = [image // 3 if i % 3 == 1 else image // 4 + 180 if i % 3 == 2 else image for i, image in enumerate(cut)]
    return torch.stack(changed)


OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
UNTOUCHED = (0, 1, 2, 3, 0, 0, 0)  # an order; not grey, no blur, not solarised


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("strength", [-0.4, -0.13, 0.0, 0.2, 0.5])
def test_each_operation_is_torchvisions(operation: int, strength: float) -> None:
    batch, factors = images(6), list(NEUTRAL)
    factors[operation] += strength
    parameters = torch.tensor([[*factors, *UNTOUCHED]] * 6)
    theirs = OPERATIONS[operation](batch, factors[operation])
    assert distance(apply_colour(batch, parameters), theirs) <= 2
    assert torch.equal(theirs, batch) == (strength == 0)


def test_grayscale_is_torchvisions() -> None:
    batch = images(6)
    grey = torch.tensor([1.0, 0, 0, 1, 1, 0])
    parameters = torch.tensor([[*NEUTRAL, *UNTOUCHED]] * 6)
    parameters[:, 8] = grey
    ours = apply_colour(batch, parameters)
    assert torch.equal(ours[grey == 0], batch[grey == 0])
    assert distance(ours[grey == 1], tv.rgb_to_grayscale(batch[grey == 1], 3)) <= 1


def test_chains_in_every_order_are_torchvisions() -> None:
    """torchvision cuts to integers after every operation, we round once: at most 6 levels apart, mostly under 2."""
    orders = list(itertools.permutations(range(4)))
    batch = images(len(orders) * 3)
    random = np.random.default_rng(5)
    factors = np.stack(
        [random.uniform(0.6, 1.4, len(batch)) for _ in range(3)] + [random.uniform(-0.1, 0.1, len(batch))]
    )
    parameters, theirs = [], []
    for image, values, order in zip(batch, factors.T.tolist(), orders * 3, strict=True):
        parameters.append([*values, *order, 0, 0, 0])
        for operation in order:
            image = OPERATIONS[operation](image, values[operation])
        theirs.append(image)
    ours, theirs = apply_colour(batch, torch.tensor(parameters)), torch.stack(theirs)
    assert distance(ours, theirs) <= 6
    assert (ours.float() - theirs.float()).abs().mean() < 2


@pytest.mark.parametrize("side", [20, 96, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 2.0])
def test_blur_is_torchvisions(side: int, sigma: float) -> None:
    """Of the kernel that SimCLR's code takes: 23 pixels at 224, 9 at 96, at least 3."""
    batch = images(3, side)
    parameters = torch.tensor([[*NEUTRAL, 0, 1, 2, 3, 0, sigma, 0]] * 3)
    parameters[1, 9] = 0
    kernel = {20: 3, 96: 9, 224: 23}[side]
    theirs = tv2.gaussian_blur(batch, [kernel, kernel], [sigma, sigma])
    theirs[1] = batch[1]
    assert distance(apply_colour(batch, parameters), theirs) <= 1


def test_solarised_images_are_torchvisions() -> None:
    batch = images(6)
    assert {127, 128} <= set(batch.unique().tolist())
    parameters = torch.tensor([[*NEUTRAL, 0, 1, 2, 3, 0, 0, row % 2] for row in range(6)])
    theirs = batch.clone()
    theirs[1::2] = tv2.solarize(batch[1::2], 128)
    assert torch.equal(apply_colour(batch, parameters), theirs)


def test_blur_follows_grey_and_solarisation_follows_blur() -> None:
    batch = images(3)
    factors = (0.7, 1.3, 1.2, 0.1)
    ours = apply_colour(batch, torch.tensor([[*factors, 0, 1, 2, 3, 1, 1.5, 1]] * 3))
    theirs = batch
    for operation, factor in zip(OPERATIONS, factors):
        theirs = operation(theirs, factor)
    theirs = tv2.gaussian_blur(tv.rgb_to_grayscale(theirs, 3), [5, 5], [1.5, 1.5])
    near = (theirs.int() - 128).abs() <= 6  # a difference of rounding decides which side it falls on
    assert near.float().mean() < 0.2
    theirs = tv2.solarize(theirs, 128)
    assert distance(ours[~near], theirs[~near]) <= 6


def test_filters_are_drawn_as_the_papers_draw_them() -> None:
    """BYOL's second view: blur with probability 0.1, sigma in [0.1, 2.0], solarised with probability 0.2."""
    n = 4000
    drawn = colour_parameters(uniforms(n), Augmentation(0.08, blur=0.1, solarise=0.2))
    assert drawn is not None
    assert (drawn[:, :4] == torch.tensor(NEUTRAL)).all()
    assert not drawn[:, 8].any()
    sigma = drawn[drawn[:, 9] > 0, 9]
    assert abs(len(sigma) / n - 0.1) < 0.015  # three standard deviations
    assert abs(drawn[:, 10].mean() - 0.2) < 0.02
    assert kolmogorov_smirnov(sigma.numpy(), np.linspace(0.1, 2.0, 10_000)) < 1.95 / np.sqrt(len(sigma))
    both = ((drawn[:, 9] > 0) & (drawn[:, 10] > 0)).float().mean()
    assert abs(both - 0.02) < 0.007


def test_a_sample_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = images(70, side=30)
    monkeypatch.setattr("clipdist.data.augment._CPU_CHUNK", 64 * batch[0].numel())  # fewer are coloured at once
    augmentation = Augmentation(
        0.9, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.6, grayscale=0.2, blur=0.5, solarise=0.2
    )
    parameters = colour_parameters(uniforms(70), augmentation)
    assert parameters is not None
    before = batch.clone()
    together = apply_colour(batch, parameters)
    assert torch.equal(batch, before)
    assert together.shape == batch.shape
    assert together.dtype == torch.uint8
    for i in range(70):
        assert torch.equal(together[i], apply_colour(batch[i : i + 1], parameters[i : i + 1])[0])
    assert torch.equal(together, apply_colour(batch.to(memory_format=torch.channels_last), parameters))


def test_factors_are_drawn_as_colour_jitter_draws_them() -> None:
    n, jitter = 4000, (0.4, 1.5, 0.2, 0.1)
    augmentation = Augmentation(0.9, jitter=jitter, jitter_probability=0.8, grayscale=0.2)
    drawn = colour_parameters(uniforms(n), augmentation)
    assert drawn is not None
    assert drawn.shape == (n, 11)
    assert drawn.dtype == torch.float32
    left_alone = (drawn[:, :4] == torch.tensor(NEUTRAL)).all(1)
    assert abs(left_alone.float().mean() - 0.2) < 0.02
    assert abs(drawn[:, 8].mean() - 0.2) < 0.02
    assert not drawn[:, 9:].any()
    theirs = ColorJitter(*jitter)
    for i, bounds in enumerate((theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)):
        values = drawn[~left_alone, i]
        width = bounds[1] - bounds[0]
        assert bounds[0] <= values.min() < bounds[0] + 0.01 * width
        assert bounds[1] - 0.01 * width < values.max() <= bounds[1]
        assert abs(values.mean() - (bounds[0] + bounds[1]) / 2) < 0.02 * width
    orders, counts = drawn[:, 4:8].unique(dim=0, return_counts=True)
    assert orders.sort(dim=1).values.unique(dim=0).tolist() == [[0, 1, 2, 3]]
    assert len(orders) == 24
    assert counts.min() > n / 24 * 0.7


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(0.9), Augmentation(0.9, jitter=(0.4, 0.4, 0.4, 0.1)), Augmentation(0.9, jitter_probability=0.5)],
)
def test_nothing_to_colour_is_none(augmentation: Augmentation) -> None:
    assert colour_parameters(uniforms(3), augmentation) is None


@pytest.mark.gpu
def test_colours_on_cuda_are_those_of_the_cpu() -> None:
    batch = images(70)
    augmentation = Augmentation(0.9, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grayscale=0.2, blur=0.5)
    parameters = colour_parameters(uniforms(70), augmentation)
    assert parameters is not None
    there = apply_colour(batch.cuda(), parameters)
    assert there.is_cuda
    assert distance(there.cpu(), apply_colour(batch, parameters)) <= 1


def test_a_second_view_costs_no_second_decode(monkeypatch) -> None:
    from clipdist.data import augment

    decoded = []
    real = augment.decode_pixels
    monkeypatch.setattr(augment, "decode_pixels", lambda *words: decoded.append(1) or real(*words))
    data, rows = encoded(picture(90, 70)), uniforms(2)
    views = [View("image", 24, Augmentation(0.5, flip=0.5)), View("small", 16, Augmentation(0.1))]
    outs = [torch.empty(3, view.size, view.size, dtype=torch.uint8) for view in views]
    train_views(data, views, rows, outs)
    assert len(decoded) == 1
    for view, row, out in zip(views, rows, outs):
        assert torch.equal(out, train_image(data, view.size, row, view.augmentation))
