"""Decoding, cropping and resizing against Pillow and open_clip's own transforms; damaged and hostile pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image

from clipdist.data.decode import BadSample, decode_pixels, eval_image, random_crop, train_image


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes: pictures as cameras make them, not noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((9, 14), (17, 11), (23, 8))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(64, 64), (120, 80), (50, 200), (33, 31)])
def test_eval_transform_is_open_clips_up_to_the_resize(size):
    data = encoded(picture(*size), "JPEG", quality=95)
    plain = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = (plain(Image.open(io.BytesIO(data))) * 255).round().to(torch.int16)
    ours = eval_image(data, 32).to(torch.int16)
    assert ours.shape == (3, 32, 32)
    assert (ours - theirs).abs().max() <= 3


def test_jpeg_pixels_are_pillows():
    data = encoded(picture(61, 47), "JPEG", quality=90)
    assert np.array_equal(decode_pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")],
)
def test_other_kinds_go_through(kind, mode):
    pixels = decode_pixels(encoded(picture(40, 30, mode), kind))
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int).mean() - np.asarray(picture(40, 30).convert("L")).mean()) < 30


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    assert decode_pixels(encoded(picture(40, 20), "JPEG", exif=exif)).shape == (20, 40, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
        (encoded(picture(64, 64), "JPEG")[:700], "truncated image"),
        (encoded(picture(64, 64), "PNG")[:700], "truncated image"),
        (b"\xff\xd8\xff" + b"\0" * 50, "not an image"),
    ],
)
def test_damage_has_a_name(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_pixels(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_pixel_limit_comes_before_decoding(kind):
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(encoded(picture(64, 64), kind), max_pixels=64 * 63)


def test_a_strip_that_would_fill_the_memory_is_refused():
    strip = encoded(Image.new("RGB", (20_000, 2)), "PNG")
    assert len(strip) < 1000
    with pytest.raises(BadSample, match="too many pixels"):
        eval_image(strip, 224)
    assert eval_image(encoded(Image.new("RGB", (400, 4)), "PNG"), 32).shape == (3, 32, 32)


def test_train_crops_follow_their_random_numbers():
    data = encoded(picture(90, 70), "JPEG")
    one, again, other = (train_image(data, 24, np.random.default_rng(s), 0.5) for s in (1, 1, 2))
    assert one.shape == (3, 24, 24)
    assert one.dtype == torch.uint8
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_crops_keep_area_and_aspect():
    random = np.random.default_rng(0)
    for _ in range(300):
        top, left, height, width = random_crop(100, 130, random, 0.4)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 130 - width
        assert 0.38 <= height * width / (100 * 130) <= 1.0
        assert 0.73 <= width / height <= 1.36


def test_a_strip_is_cropped_in_its_middle():
    assert random_crop(10, 400, np.random.default_rng(0), 0.9) == (0, 193, 10, 13)
