"""Shards in; what they hold in numbers out: members, image sizes, captions, repeats. Nothing is written."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from clipdist.data.catalog import Catalog, Shard, name_shards
from clipdist.data.consolidated import Consolidated
from clipdist.data.decode import BadSample
from clipdist.data.fetch import Fetcher, is_remote
from clipdist.data.index import ShardIndex
from clipdist.data.loader import group_id
from clipdist.data.reader import Reader
from clipdist.datasets.examine import read_index
from clipdist.datasets.images import ImageHeader, check_bytes
from clipdist.errors import UserError

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
TOP_WORDS = 10
_TOKENS = re.compile(r"[0-9a-f]{16}\.ids")  # the kind of members that hold token ids
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass
class OpenedShards:
    """A catalog of what can be read, and what was found on the way."""

    catalog: Catalog
    damaged: list[str]  # one line for each shard that is damaged; its whole samples are in the catalog
    indexed: int  # shards with a fresh index, beside them or in a consolidated file


def open_shards(sources: Sequence[str]) -> OpenedShards:
    """As Catalog.open, but a damaged local shard does not stop it, and no index is written.

    Raises:
        UserError: no shards match, or an address has no index.
    """
    shards: list[Shard] = []
    damaged: list[str] = []
    indexed = 0
    named = [part for parts in name_shards(sources, "SHARDS", Fetcher()) for part in parts]
    for part in tqdm(named, desc="open", unit="shard", disable=None):
        if isinstance(part, Consolidated) or is_remote(part):
            opened = Catalog.open([part.name if isinstance(part, Consolidated) else part], "SHARDS").shards
            shards += opened
            indexed += len(opened)
            continue
        try:
            index, damage, fresh = read_index(part)
        except UserError as error:
            damaged.append(str(error))
            continue
        indexed += fresh
        damaged += [damage] if damage else []
        shards.append(_in_memory(index))
    return OpenedShards(Catalog(shards), damaged, indexed)


def _in_memory(index: ShardIndex) -> Shard:
    return Shard(index.tar, len(index), index.digest(), lambda: index)


def describe_members(catalog: Catalog) -> dict[str, object]:
    """Samples per shard, bytes, the share of samples that has each kind of member, checksums and token ids."""
    kinds: Counter[str] = Counter()
    tar_bytes = checksums = 0
    for number in tqdm(range(len(catalog.shards)), desc="members", unit="shard", disable=None):
        index = catalog.table(number)
        tar_bytes += index.tar_bytes
        checksums += index.crc is not None
        kinds.update(dict(zip(index.kinds, (index.offset >= 0).sum(axis=0).tolist())))
    counts = np.diff(catalog.starts)
    return {
        "shards": len(catalog.shards),
        "samples": len(catalog),
        "bytes": tar_bytes,
        "samples_per_shard": _percentiles(counts, (0, 50, 100)),
        "kinds": {kind: 100 * count / max(1, len(catalog)) for kind, count in kinds.most_common()},
        "shards_with_checksums": checksums,
        "token_ids": sorted(kind for kind in kinds if _TOKENS.fullmatch(kind)),
    }


@dataclass
class _SampleStatistics:
    """What was gathered from samples that were read."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    images: Counter[bytes] = field(default_factory=Counter)  # by a hash of their bytes
    groups: Counter[int] = field(default_factory=Counter)  # captions, by group_id
    per_image: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    vocabulary: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)

    def add_image(self, data: bytes) -> None:
        self.images[hashlib.blake2b(data, digest_size=16).digest()] += 1
        header = check_bytes(data, decode=False)
        if isinstance(header, ImageHeader):
            self.sizes.append((header.width, header.height))
            self.formats[header.kind] += 1
        else:
            self.unusable[header] += 1

    def add_captions(self, captions: list[str]) -> None:
        self.per_image.append(len(captions))
        for caption in captions:
            words = _WORD.findall(caption.lower())
            self.groups[group_id(caption)] += 1
            self.words.append(len(words))
            self.characters.append(len(caption))
            self.vocabulary.update(words)


def choose_samples(catalog: Catalog, samples: int) -> np.ndarray:
    """Sample ids int64, ascending: all, or as many as asked for, the same every time."""
    if len(catalog) <= samples:
        return np.arange(len(catalog))
    return np.sort(np.random.default_rng(0).choice(len(catalog), samples, replace=False))


def describe_samples(reader: Reader, ids: np.ndarray) -> dict[str, object]:
    """Image sizes and formats, captions, and repeats, of these samples: headers are read, pixels are not decoded."""
    seen = _SampleStatistics()
    for sample_id in tqdm(ids.tolist(), desc="samples", unit="sample", disable=None):
        try:
            seen.add_image(reader.image(sample_id))
        except BadSample as error:
            seen.unusable[error.reason] += 1
        try:
            seen.add_captions(reader.captions(sample_id))
        except BadSample as error:
            seen.unusable[error.reason] += 1
    width, height = np.array(seen.sizes, dtype=np.float64).reshape(-1, 2).T
    return {
        "looked_at": len(ids),
        "pictures": {
            "formats": dict(seen.formats.most_common()),
            "width": _percentiles(width),
            "height": _percentiles(height),
            "aspect": _percentiles(np.maximum(width, height) / np.maximum(1, np.minimum(width, height))),
            "repeated": _repeats(seen.images),
        },
        "captions": {
            "count": len(seen.words),
            "per_picture": _percentiles(np.array(seen.per_image)),
            "words": _percentiles(np.array(seen.words)),
            "characters": _percentiles(np.array(seen.characters)),
            "vocabulary": len(seen.vocabulary),
            "most_frequent": dict(seen.vocabulary.most_common(TOP_WORDS)),
            "repeated": _repeats(seen.groups),
        },
        "unusable": dict(seen.unusable.most_common()),
    }


def _percentiles(values: np.ndarray, at: Sequence[int] = PERCENTILES) -> dict[str, float]:
    return {str(p): round(float(value), 3) for p, value in zip(at, np.percentile(values, at))} if len(values) else {}


def _repeats(counts: Counter) -> int:
    """How many are equal to an earlier one."""
    return counts.total() - len(counts)
