"""Decoding and resizing against Pillow and open_clip's evaluation transform; damaged and hostile pictures."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image
from views import train_image

from clipdist.data.augment import UNIFORMS, Augmentation
from clipdist.data.bad_sample import REASONS, BadSample
from clipdist.data.decode import decode_jpeg, decode_pixels, eval_image, jpeg_shape, resize
from clipdist.data.transform import EvalTransform


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes: pictures as cameras make them, not noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((9, 14), (17, 11), (23, 8))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.to(torch.int16) - b.to(torch.int16)).abs().max())


def png(width: int, height: int, bits: int, colour_type: int, samples: np.ndarray) -> bytes:
    """A PNG of rows of big-endian samples: Pillow cannot write 16 bits of RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.tobytes() for row in samples.astype(">u2" if bits == 16 else "u1"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(64, 64), (120, 80), (50, 200), (33, 31), (32, 32)])
def test_eval_transform_is_open_clips_up_to_the_resize(size: tuple[int, int]) -> None:
    data = encoded(picture(*size), "JPEG", quality=95)
    plain = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = (plain(Image.open(io.BytesIO(data))) * 255).round().to(torch.uint8)
    ours = eval_image(data, EvalTransform(32))
    assert ours.shape == (3, 32, 32)
    assert ours.dtype == torch.uint8
    assert distance(ours, theirs) <= 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(61, 47), (5, 3), (1, 1)])
def test_jpeg_pixels_are_pillows(size: tuple[int, int], mode: str, options: dict) -> None:
    data = encoded(picture(*size, mode), "JPEG", quality=90, **options)
    assert jpeg_shape(data) == (size[1], size[0])
    assert np.array_equal(decode_pixels(data), opened(data))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("PNG", "LA", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("GIF", "L", {"transparency": 0}),
        ("BMP", "RGB", {}),
        ("JPEG", "CMYK", {}),
    ],
)
def test_other_kinds_are_converted_as_open_clip_does(kind: str, mode: str, options: dict) -> None:
    data = encoded(picture(40, 30, mode), kind, **options)
    pixels = decode_pixels(data)
    assert pixels.shape == (30, 40, 3)
    assert pixels.flags.writeable  # torch warns of arrays that are not
    assert np.array_equal(pixels, opened(data))
    assert eval_image(data, EvalTransform(16)).shape == (3, 16, 16)


def test_transparency_does_not_change_colours() -> None:
    image = picture(40, 30).convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(decode_pixels(encoded(image, "PNG")), np.asarray(picture(40, 30)))


def test_inverted_four_colour_jpegs() -> None:
    """YCCK, inverted as Adobe's programs write it: the marker's last byte tells it from the CMYK that Pillow writes."""
    data = bytearray(encoded(picture(40, 30, "CMYK"), "JPEG"))
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data[marker + 11] = 2
    assert jpeg_shape(bytes(data)) is None
    assert np.array_equal(decode_pixels(bytes(data)), opened(bytes(data)))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = (np.arange(30 * 40).reshape(30, 40) * 54).astype(np.uint16)
    expected = np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert expected.max() > 250
    assert np.array_equal(decode_pixels(png(40, 30, 16, 0, deep)), expected)
    colours = np.stack([deep, deep[::-1], deep[:, ::-1]], axis=-1)
    assert np.array_equal(decode_pixels(png(40, 30, 16, 2, colours.reshape(30, -1))), (colours >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation(kind: str) -> None:
    first = Image.new("RGB", (20, 10), (200, 30, 40))
    data = encoded(first, kind, save_all=True, append_images=[Image.new("RGB", (20, 10), (0, 255, 0))], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(decode_pixels(data), np.asarray(first))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")])
def test_exif_rotation_is_not_applied(kind: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = encoded(picture(40, 20, mode), kind, exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert np.array_equal(decode_pixels(data), opened(data))
    assert decode_pixels(data).shape == (20, 40, 3)


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO", "TGA"])
def test_formats_outside_the_list_are_refused(kind: str) -> None:
    with pytest.raises(BadSample, match="not an image"):
        decode_pixels(encoded(picture(32, 32), kind))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"\xff\xd8", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
        (b"\xff\xd8\xff" + b"\0" * 50, "not an image"),
        (encoded(picture(64, 64), "JPEG")[:700], "truncated image"),
        (encoded(picture(64, 64), "JPEG")[:-200] + b"\xff\xd9", "truncated image"),
        (encoded(picture(64, 64), "JPEG", progressive=True)[:-200], "truncated image"),
        (encoded(picture(64, 64, "CMYK"), "JPEG")[:-200], "truncated image"),
        (encoded(picture(64, 64), "PNG")[:700], "truncated image"),
        (encoded(picture(64, 64), "GIF")[:1500], "truncated image"),
        (encoded(picture(64, 64), "BMP")[:1500], "truncated image"),
    ],
)
def test_damage_has_a_name(data: bytes, reason: str) -> None:
    assert reason in REASONS
    for use in (decode_pixels, lambda data: eval_image(data, EvalTransform(32))):
        with pytest.raises(BadSample) as caught:
            use(data)
        assert caught.value.reason == reason


def test_a_truncated_webp_is_refused() -> None:
    with pytest.raises(BadSample):  # its container says how long it is: cut off, it is none
        decode_pixels(encoded(picture(64, 64), "WEBP")[:500])


def test_harmless_oddities_of_jpegs_are_read() -> None:
    """Stray bytes before a marker: libjpeg warns, Pillow and open_clip read on."""
    data = encoded(picture(64, 64), "JPEG")
    odd = data.replace(b"\xff\xda", b"\x00\x11\x22\xff\xda")
    assert decode_jpeg(odd) is None
    assert np.array_equal(decode_pixels(odd), decode_pixels(data))


def test_a_jpeg_without_its_end_marker_is_pillows_to_judge() -> None:
    """Nothing but two bytes is missing: no pixel is."""
    data = encoded(picture(64, 64), "JPEG")
    assert decode_jpeg(data[:-2]) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_pixel_limit_comes_before_decoding(kind: str) -> None:
    data = encoded(picture(64, 64), kind)
    assert decode_pixels(data, max_pixels=64 * 64).shape == (64, 64, 3)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(data, max_pixels=64 * 64 - 1)


def declared(kind: str, side: int) -> bytes:
    """A small file whose header declares a picture of side x side."""
    data = bytearray(encoded(picture(16, 16), kind))
    if kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif kind == "PNG":
        return png(side, side, 8, 2, np.zeros((1, 48)))
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    else:
        canvas = struct.pack("<I", side - 1)[:3]
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas + canvas + b"ANIM\6\0\0\0" + bytes(6)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return bytes(data)


@pytest.mark.parametrize("side", [11_000, 60_000])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_bombs_are_refused_unopened(kind: str, side: int) -> None:
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(declared(kind, side))


def test_a_webp_bomb_is_refused() -> None:
    with pytest.raises(BadSample):
        decode_pixels(declared("WEBP", 60_000))


def test_a_gif_frame_beyond_its_screen_counts() -> None:
    data = bytearray(encoded(picture(16, 16), "GIF"))
    frame = data.index(b"\x2c\0\0\0\0\x10\0\x10\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(bytes(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_endless_scans_is_refused(mode: str) -> None:
    """Every scan of a progressive JPEG goes over all pixels, and an empty one takes a few bytes."""
    data = encoded(Image.new(mode, (1100, 1000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert decode_pixels(data).shape == (1000, 1100, 3)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(data[:-2] + last * 200 + data[-2:])


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    strip = encoded(Image.new("RGB", (20_000, 2)), "PNG")
    assert len(strip) < 1000
    with pytest.raises(BadSample, match="too many pixels"):
        eval_image(strip, EvalTransform(224))
    assert eval_image(encoded(Image.new("RGB", (400, 4)), "PNG"), EvalTransform(32)).shape == (3, 32, 32)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(160, 96), (161, 103)])
def test_reduced_jpegs_are_block_means(size: tuple[int, int], factor: int) -> None:
    data = encoded(picture(*size), "JPEG", quality=95)
    small = decode_jpeg(data, jpeg_shape(data), factor)
    assert small is not None
    width, height = size
    assert small.shape == (-(-height // factor), -(-width // factor), 3)
    whole = decode_pixels(data)[: height // factor * factor, : width // factor * factor].astype(np.float64)
    means = whole.reshape(height // factor, factor, width // factor, factor, 3).mean((1, 3))
    apart = np.abs(small[: height // factor, : width // factor] - means)
    assert apart.max() <= 26
    assert apart.mean() <= 3


@pytest.mark.parametrize("box", [(0, 0, 60, 80), (7, 5, 41, 66), (3, 9, 24, 24), (10, 20, 2, 50)])
def test_resizing_a_window_is_pillows_crop_and_resize(box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    pixels = np.array(picture(80, 60))
    window = pixels[top : top + height, left : left + width]
    theirs = Image.fromarray(window.copy()).resize((24, 24), Image.Resampling.BICUBIC)
    ours = resize(window, 24, 24)
    assert distance(ours, torch.from_numpy(np.array(theirs)).permute(2, 0, 1)) <= 2
    for layout in (torch.channels_last, torch.contiguous_format):
        batch = torch.zeros(2, 3, 24, 24, dtype=torch.uint8).to(memory_format=layout)
        assert resize(window, 24, 24, batch[1]).data_ptr() == batch[1].data_ptr()
        assert torch.equal(batch[1], ours)
        assert not batch[0].any()


MUTATED = {
    "JPEG": {"quality": 80},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
}


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Flips bits, overwrites, cuts, repeats or drops a stretch; half of it near the header."""
    bytes_ = bytearray(data)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(min(len(bytes_), 700) if random.random() < 0.5 else len(bytes_)))
        stretch = slice(place, place + int(random.integers(1, 12)))
        match random.integers(5):
            case 0:
                bytes_[place] ^= 1 << int(random.integers(8))
            case 1:
                bytes_[stretch] = random.bytes(len(bytes_[stretch]))
            case 2:
                bytes_[stretch] = bytes_[stretch] * 2
            case 3:
                bytes_[stretch] = b""
            case 4:
                bytes_ = bytes_[: max(place, 20)]
    return bytes(bytes_)


@pytest.mark.parametrize("kind", MUTATED)
def test_nothing_but_bad_sample_leaves_on_damaged_bytes(kind: str) -> None:
    random = np.random.default_rng(len(kind))
    good = encoded(picture(72, 56), kind, **MUTATED[kind])
    augmentation = Augmentation(0.5, dct_scaling=True, flip=0.5)
    uses: list[Callable[[bytes], object]] = [
        lambda data: decode_pixels(data, 200_000),
        lambda data: eval_image(data, EvalTransform(16), 200_000),
        lambda data: train_image(data, 16, random.random(UNIFORMS), augmentation, 200_000),
    ]
    outcomes = {"fine": 0, **dict.fromkeys(REASONS, 0)}
    for _ in range(150):
        data = mutate(good, random)
        for use in uses:
            try:
                use(data)
                outcomes["fine"] += 1
            except BadSample as error:
                outcomes[error.reason] += 1
    assert outcomes["fine"]
    assert outcomes["truncated image"]
    assert outcomes["not an image"]


def test_threads_decode_the_same_pixels() -> None:
    files = [encoded(picture(40 + i, 50), kind) for i in range(20) for kind in MUTATED]
    with ThreadPoolExecutor(4) as pool:
        for there, here in zip(pool.map(decode_pixels, files), map(decode_pixels, files), strict=True):
            assert np.array_equal(there, here)
