"""Write samples as tar shards, the same to the byte every time, with the side files that other readers look for.

A shard is USTAR; the members of a sample are neighbours; owner, mode and mtime are fixed. Beside the shards lie the
sample index (clipdist.data.index), open_clip's sizes.json, the wids index (index.json) and img2dataset-like statistics.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clipdist.data.index import index_from_members, index_path, stamped, write_index
from clipdist.errors import UserError, writing
from clipdist.storage import lock, replacing, write_text

MAX_SHARD_SIZE = 10_000  # img2dataset's keys count the samples of a shard with four digits
_STAGING = ".partial"  # folder of a run that has not ended


@dataclass(frozen=True)
class Sample:
    """One sample: {kind: bytes} in the order in which the members are written, and numbers for the index' columns."""

    key: str
    members: Mapping[str, bytes]
    columns: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFacts:
    name: str
    samples: int
    size_bytes: int
    md5: str


def shard_sizes(n: int, per_shard: int) -> list[int]:
    """Return the sizes of the fewest shards of at most `per_shard` samples; they differ by one at most.

    Raises:
        UserError: per_shard is not in 1 .. MAX_SHARD_SIZE.
    """
    if not 1 <= per_shard <= MAX_SHARD_SIZE:
        raise UserError(f"shard size {per_shard}: must lie in 1 .. {MAX_SHARD_SIZE}")
    count = -(-n // per_shard)
    return [n // count + (i < n % count) for i in range(count)]


def shard_name(shard: int) -> str:
    return f"{shard:05d}.tar"


def sample_key(shard: int, row: int) -> str:
    """Return img2dataset's nine digits: five of the shard, four of the sample in it."""
    return f"{shard:05d}{row:04d}"


def write_shard(path: str | Path, samples: Iterable[Sample]) -> ShardFacts:
    """Write one shard and its index. The same samples give the same bytes; the shard appears whole or not at all.

    Raises:
        UserError: a key that is empty, holds a dot or a slash, is too long for USTAR, or occurs twice.
    """
    path = Path(path)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    sums: dict[str, dict[str, int]] = {}
    columns: list[Mapping[str, int]] = []
    try:
        with replacing(path) as partial:
            with _TarWriter(partial) as tar:
                for sample in samples:
                    if not sample.key or set("./") & set(sample.key) or sample.key in places:
                        raise UserError(f"{path}: sample key {sample.key!r}: must be unique, without a dot or a slash")
                    places[sample.key] = {
                        kind: tar.add(f"{sample.key}.{kind}", data) for kind, data in sample.members.items()
                    }
                    sums[sample.key] = {kind: zlib.crc32(data) for kind, data in sample.members.items()}
                    columns.append(sample.columns)
            facts = ShardFacts(path.name, len(places), partial.stat().st_size, tar.md5.hexdigest())
            index_path(path).unlink(missing_ok=True)  # never a new shard beside an old index
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    names = columns[0] if columns else ()
    arrays = {name: np.array([row[name] for row in columns], dtype=np.int64) for name in names}
    write_index(stamped(replace(index_from_members(path, places, sums), columns=arrays)))
    return facts


class _TarWriter:
    """Write what tarfile would write: USTAR; mtime, uid and gid 0, no owner's name, mode 644.

    Attributes:
        md5: of all that has been written.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  closed on exit
        self._position = 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def __enter__(self) -> _TarWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            end = self._position + 2 * tarfile.BLOCKSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.close()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member. Return the offset of its data and their size.

        Raises:
            ValueError: the name is too long for USTAR.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset, len(data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.md5.update(data)
        self._position += len(data)


def write_side_files(folder: Path, name: str, shards: Sequence[ShardFacts]) -> None:
    """Write sizes.json, index.json and one NNNNN_stats.json per shard.

    `name` goes into the wids index; by it a later run recognises the folder as written here.
    """
    write_json(folder / "sizes.json", {shard.name: shard.samples for shard in shards})
    listed = [
        {"url": s.name, "nsamples": s.samples, "md5sum": s.md5, "filesize": s.size_bytes}
        for s in sorted(shards, key=lambda s: s.name)
    ]
    wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": listed}
    write_json(folder / "index.json", wids)
    for shard in shards:
        # Defective images are left out before the shards are cut; times would make every run's files differ.
        n = shard.samples
        stats: dict[str, object] = {"count": n, "successes": n, "failed_to_download": 0, "failed_to_resize": 0}
        stats |= {"status_dict": {"success": n}}
        write_json(folder / f"{Path(shard.name).stem}_stats.json", stats)


def write_json(path: Path, value: object) -> None:
    """Writes JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_own(path: Path, **mark: str) -> dict | None:
    """Return the JSON object of a file that has this mark, a key and its value; None where there is no file.

    Raises:
        UserError: there is one without the mark: something else wrote it.
    """
    if not path.exists():
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there = json.loads(path.read_text(encoding="utf-8"))
        if mark.items() <= there.items():
            return there
    raise UserError(f"{path}: was not written by this tool; move it away or choose another --out")


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds every shard that its wids index lists, in the size it lists."""
    try:
        listed = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shardlist"]
        return all((folder / shard["url"]).stat().st_size == shard["filesize"] for shard in listed)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def staging(out: Path, names: Mapping[str, str]) -> Iterator[Path]:
    """Give a folder in `out` to write the splits in; afterwards it is gone. What a killed run left is removed.

    Args:
        out: made if need be.
        names: {split folder: name that its wids index has}, of all the folders that publish may replace.

    Raises:
        UserError: `out` cannot be written, is being written by another run, or a split folder in it holds files that
            publish could not replace without deleting what is not ours.
    """
    with hold_folder(out):
        for split, name in names.items():
            _refuse_foreign_files(out / split, name)
        folder = out / _STAGING
        shutil.rmtree(folder, ignore_errors=True)
        with writing(f"--out {out}"):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Make `out` and keep it for this process.

    Raises:
        UserError: it cannot be written, or another run holds it.
    """
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            lock(descriptor, wait_s=0)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another run is writing there; wait for it or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def publish(staged: Path, splits: Sequence[str]) -> None:
    """Move the staged split folders to their place; the older ones go, those that are not written anew included."""
    out = staged.parent
    for split in splits:
        if (out / split).exists():
            (out / split).rename(staged / f"old-{split}")
        if (staged / split).exists():
            (staged / split).rename(out / split)


def _refuse_foreign_files(folder: Path, name: str) -> None:
    """Raise UserError for a folder that write_side_files did not describe under this name, or that holds more."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is no plain folder; move it away or choose another --out")
    if not folder.exists():
        return
    try:
        wids = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        listed = {shard["url"] for shard in wids["shardlist"]} if wids["name"] == name else set()
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    ours = {"sizes.json", "index.json"} if listed else set()
    for tar in listed:
        ours |= {tar, index_path(tar).name, f"{Path(tar).stem}_stats.json"}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if foreign:
        raise UserError(f"{folder / foreign[0]}: was not written by this tool; move it away or choose another --out")
