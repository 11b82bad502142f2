"""Divide the usable images of shards into a part to train on and a held-out part. No shard is changed or copied.

Each part is a consolidated index, which names samples of the shards. An image counts by its bytes: copies of
it, whatever their captions, are all in one part. Which images are held out depends on these bytes alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import SUFFIX, make_part, write_parts
from clipdist.data.reader import Reader, open_reader
from clipdist.datasets.images import check_bytes
from clipdist.errors import UserError

TRAIN, HELD_OUT = f"train{SUFFIX}", f"held_out{SUFFIX}"
SHARE, MOST = 0.1, 1000  # of the images that are held out
LEAST = 20  # captioned images that can be divided: fewer than two held out measure nothing


@dataclass(frozen=True)
class Parts:
    """What was divided, in numbers.

    Attributes:
        train, held_out: samples.
        images: distinct ones, of both parts.
        unusable: samples in neither part, by reason.
        in_both: samples that were given as training data, whose images are held out; in neither part.
        classes: names of labelled images, sorted; empty: captioned.
        captions: the least and the most of an image.
        pixels: the median of the images' shorter sides.
    """

    train: int
    held_out: int
    images: int
    unusable: dict[str, int]
    in_both: int
    classes: list[str]
    captions: tuple[int, int]
    pixels: int


class _Look(NamedTuple):
    """One usable sample: its image by a digest, the shorter side, captions, and its class ("" without one)."""

    image: bytes
    side: int
    captions: tuple[str, ...]
    label: str


def divide(catalog: Catalog, folder: Path) -> Parts:
    """Write folder/train.index.zip and folder/held_out.index.zip.

    Args:
        catalog: of one source, or of two, the second of which is held out as it is.

    Raises:
        UserError: too few images, or a class that would be missing in one of the parts.
    """
    looks, unusable = _look_at_all(catalog)
    classes = _classes(looks.values())
    given = int(catalog.starts[catalog.sources[1][0]]) if len(catalog.sources) > 1 else None
    if given is None:
        held = _choose(looks, classes)
    else:
        held = {look.image for number, look in looks.items() if number >= given}
    inside = np.array([number in looks and looks[number].image in held for number in range(len(catalog))], dtype=bool)
    train = np.array(
        [number in looks and looks[number].image not in held for number in range(len(catalog))], dtype=bool
    )
    copies = inside.copy()  # of held-out images among those that were given to train on
    copies[given if given is not None else 0 :] = False
    inside &= ~copies
    for part, name in ((train, "to train on"), (inside, "held out")):
        _require_all(part, name, looks, classes)
    for name, part in ((TRAIN, train), (HELD_OUT, inside)):
        _write_index(catalog, part, folder / name)
    counts = [len(look.captions) for look in looks.values()]
    return Parts(
        train=int(train.sum()),
        held_out=int(inside.sum()),
        images=len({look.image for look in looks.values()}),
        unusable=dict(unusable.most_common()),
        in_both=int(copies.sum()),
        classes=classes,
        captions=(min(counts), max(counts)),
        pixels=int(np.median([look.side for look in looks.values()])),
    )


def _look_at_all(catalog: Catalog) -> tuple[dict[int, _Look], Counter[str]]:
    """Read and decode every sample. Return the usable ones by number, and how many are not, by reason."""
    looks: dict[int, _Look] = {}
    unusable: Counter[str] = Counter()
    reader = open_reader(catalog)
    try:
        for number in tqdm(range(len(catalog)), desc="look at the images", unit="image", disable=None):
            try:
                looks[number] = _look(reader, number)
            except BadSample as error:
                unusable[error.reason] += 1
    finally:
        reader.close()
    if not looks:
        raise UserError(f"none of {len(catalog)} images can be used: {', '.join(unusable) or 'there are none'}")
    return looks, unusable


def _look(reader: Reader, number: int) -> _Look:
    sample = reader.sample(number)
    data = sample.image()
    header = check_bytes(data, decode=True)
    if isinstance(header, str):
        raise BadSample(header)
    captions = tuple(sample.captions())
    label = sample.metadata().get("class") if sample.read("json") else None
    digest = hashlib.sha256(data).digest()
    return _Look(digest, min(header.width, header.height), captions, label if isinstance(label, str) else "")


def _classes(looks: Collection[_Look]) -> list[str]:
    """Return the classes where every image has one and captions say no more than that; else none."""
    classes = {look.label for look in looks}
    said = {look.captions for look in looks}
    return sorted(classes) if "" not in classes and 1 < len(said) <= len(classes) else []


def _choose(looks: dict[int, _Look], classes: Sequence[str]) -> set[bytes]:
    """Return the digests of the held-out images: of labelled ones a share of every class, one at least."""
    by_class: defaultdict[str, set[bytes]] = defaultdict(set)
    for look in looks.values():
        by_class[look.label if classes else ""].add(look.image)
    total = sum(map(len, by_class.values()))
    if not classes and total < LEAST:
        raise UserError(
            f"{total} usable images: too few to hold some out for the evaluation; at least {LEAST} are needed"
        )
    share = min(SHARE, MOST / total)
    held: set[bytes] = set()
    for name, images in by_class.items():
        if len(images) < 2:
            raise UserError(
                f"class {name}: one usable image, of which none can be held out; add some, or remove the class"
            )
        held.update(sorted(images)[: max(1 if classes else 2, round(share * len(images)))])
    return held


def _require_all(part: np.ndarray, name: str, looks: dict[int, _Look], classes: Sequence[str]) -> None:
    """Raise UserError where a part is empty, or lacks a class."""
    numbers = np.flatnonzero(part).tolist()
    if not numbers:
        raise UserError(f"no image is left {name}")
    missing = sorted(set(classes) - {looks[number].label for number in numbers})
    if missing:
        raise UserError(f"class {missing[0]}: no image is left {name}, copies of held-out images left out; add some")


def _write_index(catalog: Catalog, part: np.ndarray, path: Path) -> None:
    """Write the consolidated index of the samples whose number is True in `part`, bool [N]."""
    chosen = np.split(part, catalog.starts[1:-1])
    parts = (make_part(catalog.table(shard).select(rows)) for shard, rows in enumerate(chosen) if rows.any())
    write_parts(path, parts, path.name.removesuffix(SUFFIX))
