"""Shards of drawn images with captions, for benchmarks that have no others."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clipdist.datasets import scenes
from clipdist.datasets.pool import in_order
from clipdist.datasets.shard_writer import Sample, ShardFacts, sample_key, shard_name, write_shard, write_side_files
from tools.bench.harness import say

SIDES = (128, 224)  # of an image of a scene, pixels
NOISE_SIZE = (640, 480)
FIELDS = 12  # of noise, from which all images are put together
SHAPES = 6
LUMA_CONTRAST, CHROMA_CONTRAST = (20, 40), 12  # grey levels; the first is drawn for every image
FALL_OFF = 1.35  # amplitude 1 / f^this: with it the files are as large as photographs of this size


DrawImage = Callable[[np.random.Generator], tuple[Image.Image, list[str]]]


def write_drawn_shards(folder: Path, name: str, sizes: Sequence[int], draw: DrawImage) -> list[ShardFacts]:
    """Write JPEGs, text and JSON into one shard per size, on all cores.

    Args:
        folder: made where it does not exist.
        name: of the data set.
        draw: (random numbers of one sample) to its image and captions. It can be pickled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    firsts = [end - size for end, size in zip(accumulate(sizes), sizes)]
    facts: list[ShardFacts] = []
    for shard in in_order(partial(_write_shard, folder, draw), [*zip(range(len(sizes)), firsts, sizes)], 0):
        facts.append(shard)
        say(f"{firsts[len(facts) - 1] + sizes[len(facts) - 1]} of {sum(sizes)} pictures")
    write_side_files(folder, name, facts)
    return facts


def _write_shard(folder: Path, draw: DrawImage, task: tuple[int, int, int]) -> ShardFacts:
    """Write one shard.

    Args:
        task: its number, the number of its first sample in the data set, how many samples it has.
    """
    shard, first, size = task
    samples = (_sample(sample_key(shard, row), *draw(np.random.default_rng(first + row))) for row in range(size))
    return write_shard(folder / shard_name(shard), samples)


def _sample(key: str, image: Image.Image, captions: list[str]) -> Sample:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=scenes.JPEG_QUALITY)
    record = json.dumps({"key": key, "captions": captions}).encode()
    members = {"jpg": file.getvalue(), "txt": captions[0].encode(), "json": record}
    return Sample(key, members, {"width": image.width, "height": image.height})


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """Draw a scene in a size of its own, with five captions."""
    scene = scenes.sample_scene(rng)
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    return scenes.render_scene(scene, rng, side), scenes.write_captions(scene, rng)


class PhotographLike:
    """Images whose JPEGs take as much time and space as photographs': noise of their spectrum, shapes over it."""

    def __init__(self) -> None:
        width, height = NOISE_SIZE
        f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        f[0, 0] = np.inf
        white = np.random.default_rng(0).standard_normal((FIELDS, height, width))
        fields = np.fft.irfft2(np.fft.rfft2(white) / f**FALL_OFF, s=(height, width))
        # float32 [n, 480, 640] of mean 0 and deviation 1, periodic
        self.fields = (fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)

    def draw(self, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
        """Draw noise in other places and mixtures every time, with shapes and five captions."""
        luma, *chroma = (
            np.roll(field, rng.integers(0, field.shape).tolist(), axis=(0, 1))
            for field in self.fields[rng.permutation(FIELDS)[:3]]
        )
        tints = CHROMA_CONTRAST * np.stack([chroma[0], -chroma[0] - chroma[1], chroma[1]], axis=-1)
        pixels = 128 + rng.uniform(*LUMA_CONTRAST) * luma[..., None] + tints
        image = draw_shapes(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), rng)
        return image, scenes.write_captions(scenes.sample_scene(rng), rng)


def draw_shapes(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw half transparent ellipses and boxes: edges, and areas of one colour."""
    over = image.copy()
    draw = ImageDraw.Draw(over)
    for number in range(SHAPES):
        x, y = (int(rng.integers(side)) for side in image.size)
        width, height = (int(rng.integers(20, side // 2)) for side in image.size)
        fill = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if number % 2 else draw.rectangle)((x, y, x + width, y + height), fill=fill)
    return Image.blend(image, over, 0.5)
