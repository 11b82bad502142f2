"""Data for tests: coloured squares with captions, as a folder of shards. No renderer, no codec that could change."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipdist.datasets.shard_writer import Sample, sample_key, shard_name, shard_sizes, write_shard

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}
PLACES = {"left": (0, 12), "right": (20, 12), "top": (12, 0), "bottom": (12, 20)}


def write_pairs(
    folder: Path,
    count: int,
    per_shard: int = 20,
    bad: dict[int, bytes] | None = None,
    without_caption: Collection[int] = (),
    more: Mapping[int, dict[str, Any]] | None = None,
) -> Path:
    """Writes `count` samples of 32 x 32 pixels, PNG (lossless: the same pixels everywhere), two captions each.

    Args:
        bad: sample number -> bytes to stand in place of the picture.
        without_caption: numbers of samples that have a picture alone.
        more: sample number -> fields of its .json, such as other captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(shard_sizes(count, per_shard)):
        samples = []
        for row in range(size):
            picture, captions = draw_pair(number)
            picture = (bad or {}).get(number, picture)
            record = {"key": sample_key(shard, row), "captions": captions, "filename": f"{number}.png"}
            record |= (more or {}).get(number, {})
            members = {"png": picture, "txt": captions[0].encode(), "json": json.dumps(record).encode()}
            if number in without_caption:
                members = {"png": picture}
            samples.append(Sample(sample_key(shard, row), members))
            number += 1
        write_shard(folder / shard_name(shard), samples)
    return folder


def draw_pair(number: int) -> tuple[bytes, list[str]]:
    random = np.random.default_rng(number)
    colours, places = list(COLOURS), list(PLACES)
    ground, square = (colours[i] for i in random.permutation(len(colours))[:2])
    place = places[int(random.integers(len(places)))]
    pixels = np.full((32, 32, 3), COLOURS[ground], dtype=np.int64)
    x, y = PLACES[place]
    pixels[y : y + 12, x : x + 12] = COLOURS[square]
    pixels += random.integers(-12, 13, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue(), [
        f"a {square} square at the {place} of a {ground} field",
        f"{ground} with {square}, {place}",
    ]


class Lengths:
    """A tokenizer whose two ids are the length of the text and the sum of its letters."""

    context_length, vocab_size = 2, 1 << 20

    def __init__(self, name: str = "0123456789abcdef") -> None:
        self.name, self.texts = name, 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.texts += len(texts)
        return torch.tensor([[len(text), sum(map(ord, text))] for text in texts], dtype=torch.int64).view(-1, 2)

    def fingerprint(self) -> str:
        return self.name
