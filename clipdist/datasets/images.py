"""Check captioned images of files or zips and write them as folders of shards, on all cores.

The bytes of an image stay as they are unless it is to be shrunk. No torch here: worker processes start quickly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import simplejpeg
from PIL import Image
from tqdm import tqdm

from clipdist.data.bad_sample import MAX_PIXELS
from clipdist.datasets.files import SourceFile
from clipdist.datasets.pool import in_order
from clipdist.datasets.shard_writer import (
    Sample,
    ShardFacts,
    sample_key,
    shard_name,
    shard_sizes,
    write_shard,
    write_side_files,
)
from clipdist.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JPEG_QUALITY = 95  # of images that are shrunk
# {Pillow's format: file extension}; for some other formats Pillow would start programs
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_JPEG_MARK = b"\xff\xd8\xff"
_CHUNK = 32  # images per task: small enough for a smooth progress bar


@dataclass(frozen=True)
class SourceImage:
    """An image's file name, where it lies, and what is said about it."""

    name: str
    file: SourceFile
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CheckedImage:
    """An image that can be decoded, with its width and height in pixels and the SHA-256 of its bytes."""

    source: SourceImage
    width: int
    height: int
    sha256: str


def check_images(images: Sequence[SourceImage], decode: bool, processes: int) -> list[CheckedImage | str]:
    """Look at every image: in place of one that cannot be used stands the reason.

    Args:
        decode: decode it wholly; else its header alone is read.
        processes: as in_order takes them.
    """
    chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
    checked: list[CheckedImage | str] = []
    with tqdm(total=len(images), desc="check", unit="picture", disable=None) as bar:
        for results in in_order(functools.partial(_check_chunk, decode=decode), chunks, processes):
            checked += results
            bar.update(len(results))
    return checked


def _check_chunk(images: Sequence[SourceImage], decode: bool) -> list[CheckedImage | str]:
    return [check_image(image, decode) for image in images]


def check_image(image: SourceImage, decode: bool = True) -> CheckedImage | str:
    """Return the image's facts, or the reason why it cannot be used."""
    try:
        data = image.file.read()
    except OSError:
        return "unreadable file"
    header = check_bytes(data, decode)
    if isinstance(header, str):
        return header
    return CheckedImage(image, header.width, header.height, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class ImageHeader:
    """Width and height in pixels, and the file extension of the format: jpg, png, webp, gif or bmp."""

    width: int
    height: int
    kind: str


def check_bytes(data: bytes, decode: bool) -> ImageHeader | str:
    """Return what an image's bytes say of it, or the reason why it cannot be used; `decode` as in check_images."""
    if data.startswith(LFS_POINTER):
        return "git-LFS pointer"
    if not decode and data.startswith(_JPEG_MARK):
        with contextlib.suppress(ValueError):  # what libjpeg does not know Pillow may still tell about
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)  # 2 us, Pillow's takes 100
            return ImageHeader(width, height, "jpg") if width * height <= MAX_PIXELS else "too many pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit on pixels follows
            image = Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
        width, height = image.size
        if width * height > MAX_PIXELS:
            return "too many pixels"
        if decode:
            image.draft(image.mode, (1, 1))  # an eighth of the side: all of the file is read, few pixels are made
            image.load()
    except Image.DecompressionBombError:
        return "too many pixels"
    except Exception:  # Pillow raises many kinds on damaged bytes
        is_jpeg, has_end = data.startswith(_JPEG_MARK), data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
        return "truncated picture" if is_jpeg and not has_end else "not a picture"
    return ImageHeader(width, height, _FORMATS[image.format or "JPEG"])


def shrink(data: bytes, side: int) -> tuple[bytes, int, int]:
    """Return the image with its shorter side cut to `side` pixels, as JPEG, and its width and height.

    One that is as small already keeps its bytes. EXIF orientation is neither applied nor kept: no reader applies it.
    """
    image = Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
    short = min(image.size)
    if short <= side:
        return data, *image.size
    width, height = round(image.width * side / short), round(image.height * side / short)
    file = io.BytesIO()
    image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), width, height


@dataclass(frozen=True)
class _ShardJob:
    folder: Path
    split: str
    shard: int
    images: Sequence[CheckedImage]
    side: int


def write_splits(
    folder: Path,
    splits: Mapping[str, Sequence[CheckedImage]],
    names: Mapping[str, str],
    per_shard: int,
    side: int,
    processes: int,
) -> dict[str, list[ShardFacts]]:
    """Write folder/SPLIT/00000.tar ... with the side files, for every split that has images.

    Args:
        names: {split: data set's name for the wids index}.
        per_shard: samples per shard at most; the shards of a split are equal, give or take one.
        side: pixels of the shorter side of an image at most; 0: bytes untouched.
        processes: as in_order takes them.

    Raises:
        UserError: an image has changed since it was checked.
    """
    jobs = []
    for split, images in splits.items():
        if images:
            (folder / split).mkdir()
        start = 0
        for shard, size in enumerate(shard_sizes(len(images), per_shard)):
            jobs.append(_ShardJob(folder / split, split, shard, images[start : start + size], side))
            start += size
    written: dict[str, list[ShardFacts]] = {split: [] for split in splits}
    with tqdm(total=sum(map(len, splits.values())), desc="write", unit="picture", disable=None) as bar:
        for job, facts in zip(jobs, in_order(_write_shard, jobs, processes)):
            written[job.split].append(facts)
            bar.update(facts.samples)
    for split, shards in written.items():
        if shards:
            write_side_files(folder / split, names[split], shards)
    return written


def _write_shard(job: _ShardJob) -> ShardFacts:
    samples = (_sample(image, sample_key(job.shard, row), job) for row, image in enumerate(job.images))
    return write_shard(job.folder / shard_name(job.shard), samples)


def _sample(checked: CheckedImage, key: str, job: _ShardJob) -> Sample:
    image, size = checked.source, {"width": checked.width, "height": checked.height}
    try:
        data = image.file.read()
    except OSError as error:
        raise UserError(f"{image.file}: cannot be read any more ({error}); run again") from None
    if hashlib.sha256(data).hexdigest() != checked.sha256:
        raise UserError(f"{image.file}: changed while it was being read; run again")
    record: dict[str, object] = {"key": key, "captions": image.captions, "filename": image.name, "split": job.split}
    sha256 = checked.sha256
    if job.side:
        data, width, height = shrink(data, job.side)
        record |= {"original_" + name: value for name, value in size.items()}
        size, sha256 = {"width": width, "height": height}, hashlib.sha256(data).hexdigest()
    record |= {**size, "sha256": sha256}
    members = {
        "jpg": data,
        "txt": image.captions[0].encode(),
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }
    return Sample(key, members, {**size, "captions": len(image.captions)})
