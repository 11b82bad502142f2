"""Names of shards in (folders, brace patterns, globs, tars), one numbered sequence of samples out."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from clipdist.data.index import ShardIndex, load_index
from clipdist.errors import UserError

_HOW_TO_MAKE = "make them with e.g. `python tools/shard_flickr8k.py SOURCE --out DIR`"
_OPEN_THREADS = 8  # opening an index is mostly waiting for the file system


class Catalog:
    """All samples of several shards, numbered 0 .. N-1 in the order of the shards.

    Attributes:
        shards: the S shard indices.
        starts: int64 [S+1], number of the first sample of every shard, and N at the end.
    """

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self.shards = list(shards)
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])]).astype(np.int64)

    @classmethod
    def open(cls, sources: Sequence[str], what: str = "data.train") -> Catalog:
        """Opens shards named by folders (all their *.tar, sorted), brace patterns, globs or single tars.

        Args:
            sources: taken in this order; one that matches nothing is an error, as is a shard named twice.
            what: the setting that an error message shall name.

        Raises:
            UserError: no shards match, a shard is named twice, or one is damaged.
        """
        if not sources:
            raise UserError(f"{what}: no shards are named; {_HOW_TO_MAKE}")
        tars: list[Path] = []
        for source in sources:
            tars += _expand(os.fspath(source), what)
        _refuse_twice(tars, what)
        with ThreadPoolExecutor(_OPEN_THREADS) as pool:
            return cls(list(pool.map(load_index, tars)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """The shard's number and the row in it.

        Raises:
            IndexError: not in 0 .. N-1.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])

    def fingerprint(self) -> str:
        """Hex digits that name this sequence of samples: shard names, counts, keys and member sizes.

        Folders and mtimes do not enter, so that a copy on another machine continues the same order.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            by_name = sorted(range(len(shard.kinds)), key=lambda i: shard.kinds[i])
            head = [shard.tar.name, str(len(shard)), *(shard.kinds[i] for i in by_name)]
            digest.update("\n".join([*head, *shard.keys.tolist(), ""]).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(shard.size[:, by_name], dtype="<i8").tobytes())
        return digest.hexdigest()


def _expand(source: str, what: str) -> list[Path]:
    """The tars that one source names, in order; a part of a brace pattern that matches nothing is an error too."""
    if Path(source).exists():  # a plain name wins over a pattern that it may look like
        return _tars_of(Path(source), what)
    try:
        patterns = list(braceexpand(source))
    except ValueError as error:
        raise UserError(f"{what}: {source}: not a brace pattern: {error}") from None
    tars: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            part = "" if pattern == source else f" ({pattern} is missing)"
            raise UserError(f"{what}: no shards match {source}{part}; {_HOW_TO_MAKE}")
        for path in found:
            tars += _tars_of(Path(path), what)
    return tars


def _tars_of(path: Path, what: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    tars = sorted(path.glob("*.tar"))
    if not tars:
        below = sorted({tar.parent.name for tar in path.glob("*/*.tar")})
        hint = f"its folders {', '.join(below)} do: name one of them" if below else _HOW_TO_MAKE
        raise UserError(f"{what}: no shards match {path}: the folder holds no *.tar; {hint}")
    return tars


def _refuse_twice(tars: list[Path], what: str) -> None:
    seen: set[Path] = set()
    for tar in tars:
        place = tar.resolve()
        if place in seen:
            raise UserError(f"{what}: {tar} is named twice; every shard may come once")
        seen.add(place)
