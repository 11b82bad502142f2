"""Describe what shards hold in numbers: members, image sizes, captions, repeats. Nothing is written."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog, Shard, name_shards
from clipdist.data.consolidated import Consolidated
from clipdist.data.fetch import Fetcher, is_remote
from clipdist.data.index import ShardIndex
from clipdist.data.members import DEFAULT_MEMBERS, Members
from clipdist.data.reader import Reader
from clipdist.data.texts import group_id
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


def open_shards(sources: Sequence[str], members: Members = DEFAULT_MEMBERS) -> OpenedShards:
    """Open shards as Catalog.open does, but a damaged local shard does not stop it, and no index is written.

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
    return OpenedShards(Catalog(shards, members=members), damaged, indexed)


def _in_memory(index: ShardIndex) -> Shard:
    return Shard(index.tar, len(index), index.digest(), lambda: index)


def describe_members(catalog: Catalog) -> dict[str, object]:
    """Return samples per shard, bytes, the share of samples that has each kind of member, checksums and token ids."""
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


def choose_samples(catalog: Catalog, samples: int) -> np.ndarray:
    """Return sample ids int64, ascending: all, or as many as asked for, the same every time."""
    if len(catalog) <= samples:
        return np.arange(len(catalog))
    return np.sort(np.random.default_rng(0).choice(len(catalog), samples, replace=False))


def describe_samples(reader: Reader, ids: np.ndarray, need_captions: bool = True) -> dict[str, object]:
    """Return image sizes and formats, captions, and repeats, of these samples; pixels are not decoded.

    Args:
        need_captions: whether a sample without a caption counts as unusable.
    """
    sizes: list[tuple[int, int]] = []
    formats: Counter[str] = Counter()
    images: Counter[bytes] = Counter()  # by a hash of their bytes
    captions: list[list[str]] = []  # of every sample
    sources: Counter[str] = Counter()  # of captions
    unusable: Counter[str] = Counter()
    for sample_id in tqdm(ids.tolist(), desc="samples", unit="sample", disable=None):
        sample = reader.sample(sample_id)
        try:
            data = sample.image()
        except BadSample as error:
            unusable[error.reason] += 1
        else:
            images[hashlib.blake2b(data, digest_size=16).digest()] += 1
            header = check_bytes(data, decode=False)
            if isinstance(header, ImageHeader):
                sizes.append((header.width, header.height))
                formats[header.kind] += 1
            else:
                unusable[header] += 1
        try:
            found = sample.find_captions()
            captions.append(found.texts)
            sources[found.source] += 1
        except BadSample as error:
            unusable[error.reason] += 1
    if not need_captions:
        del unusable["missing caption"]
    width, height = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    return {
        "looked_at": len(ids),
        "pictures": {
            "formats": dict(formats.most_common()),
            "width": _percentiles(width),
            "height": _percentiles(height),
            "aspect": _percentiles(np.maximum(width, height) / np.maximum(1, np.minimum(width, height))),
            "repeated": _repeats(images),
        },
        "captions": {"sources": dict(sources), **_describe_captions(captions)},
        "unusable": dict(unusable.most_common()),
    }


def _describe_captions(captions: list[list[str]]) -> dict[str, object]:
    """Return numbers of the captions of all samples."""
    every = [caption for own in captions for caption in own]
    words = []  # of every caption, their number
    vocabulary: Counter[str] = Counter()
    for caption in every:
        found = _WORD.findall(caption.lower())
        words.append(len(found))
        vocabulary.update(found)
    return {
        "count": len(every),
        "per_picture": _percentiles(np.array([len(own) for own in captions])),
        "words": _percentiles(np.array(words)),
        "characters": _percentiles(np.array([len(caption) for caption in every])),
        "vocabulary": len(vocabulary),
        "most_frequent": dict(vocabulary.most_common(TOP_WORDS)),
        "repeated": _repeats(Counter(map(group_id, every))),
    }


def _percentiles(values: np.ndarray, at: Sequence[int] = PERCENTILES) -> dict[str, float]:
    return {str(p): round(float(value), 3) for p, value in zip(at, np.percentile(values, at))} if len(values) else {}


def _repeats(counts: Counter) -> int:
    """Return how many are equal to an earlier one."""
    return counts.total() - len(counts)
