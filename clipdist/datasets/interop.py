"""Compare what webdataset's own pipeline reads from a shard with what clipdist reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdist.data.fetch import is_remote, safe_name
from clipdist.data.index import ShardIndex, scan_whole_samples
from clipdist.datasets.examine import ShardSource, read_index, shard_at_hand
from clipdist.errors import Fault, UserError

MOST_TOLD = 20  # differences of a shard that are described
_ADDED = ("__key__", "__url__", "__local_path__")  # to every sample, by webdataset


@dataclass(frozen=True)
class ReaderComparison:
    """What both readers found in one shard.

    Attributes:
        clipdist, webdataset: number of samples.
        differences: number of all differences.
        told: the first of them, a line each.
    """

    tar: str
    clipdist: int
    webdataset: int
    differences: int
    told: tuple[str, ...]


def compare_readers(source: ShardSource, folder: Path) -> ReaderComparison:
    """Read a shard by both readers and compare number, keys, members and bytes of the samples.

    clipdist reads by the index beside the shard where it is fresh, as training does, else by a scan. webdataset gets
    the open file and decodes nothing: it opens no address ("pipe:" would run a shell) and unpickles no member.

    Args:
        folder: where a remote shard lies meanwhile.

    Raises:
        Fault: the copy of a remote shard cannot be written.
    """
    name = safe_name(source.tar)
    try:
        with shard_at_hand(source.tar, folder) as path:
            index, damage = scan_whole_samples(path) if is_remote(source.tar) else read_index(path)[:2]
            differences = [f"clipdist refuses the shard: {damage.replace(str(path), name)}"] if damage else []
            samples = _compare_samples(path, index, differences)
    except Fault:
        raise
    except UserError as error:
        return ReaderComparison(name, 0, 0, 1, (f"clipdist reads nothing: {error}",))
    return ReaderComparison(name, len(index), samples, len(differences), tuple(differences[:MOST_TOLD]))


def _compare_samples(path: str | Path, index: ShardIndex, differences: list[str]) -> int:
    """Return the number of webdataset's samples; every difference is added to `differences`."""
    rows = {key: row for row, key in enumerate(index.keys.tolist())}
    seen: set[str] = set()
    count, last_row = 0, -1
    with open(path, "rb") as file:
        try:
            for sample in _webdataset_samples(path):
                count += 1
                key = sample["__key__"]
                members = {kind: data for kind, data in sample.items() if kind not in _ADDED}
                kinds = ", ".join(members)
                if key in seen:
                    differences.append(f"{key!r}: webdataset has a further sample of this key, with {kinds}")
                elif key not in rows:
                    differences.append(f"{key!r}: a sample of webdataset alone, with {kinds}")
                else:
                    if rows[key] < last_row:
                        differences.append(f"{key!r}: comes earlier for clipdist than for webdataset")
                    last_row = rows[key]
                    differences += _compare_members(file.fileno(), index, last_row, key, members)
                seen.add(key)
        except Exception as error:  # webdataset and tarfile raise many kinds on damaged tars
            differences.append(f"webdataset reads no further: {type(error).__name__}: {str(error)[:200]}")
    differences += [f"{key!r}: a sample of clipdist alone" for key in rows if key not in seen]
    return count


def _webdataset_samples(path: str | Path) -> Iterator[Mapping[str, Any]]:
    """Yield {"__key__", "__url__", kind: bytes} as webdataset groups them."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(path, "rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": os.fspath(path), "stream": stream}]))


def _compare_members(file: int, index: ShardIndex, row: int, key: str, members: Mapping[str, bytes]) -> list[str]:
    """Return how a sample's members differ; of those of one kind the first byte that does."""
    own = {kind: column for column, kind in enumerate(index.kinds) if index.offset[row, column] >= 0}
    found = [f"{key!r}: {kind}: a member of clipdist alone" for kind in own if kind not in members]
    found += [f"{key!r}: {kind}: a member of webdataset alone" for kind in members if kind not in own]
    for kind in own.keys() & members.keys():
        data = os.pread(file, int(index.size[row, own[kind]]), int(index.offset[row, own[kind]]))
        other = members[kind]
        if data != other:
            place = next(
                (i for i, pair in enumerate(zip(data, other)) if pair[0] != pair[1]), min(len(data), len(other))
            )
            sizes = f"{len(data)} bytes of clipdist, {len(other)} of webdataset"
            found.append(f"{key!r}: {kind}: differs from byte {place} on ({sizes})")
    return found
