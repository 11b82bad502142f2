"""Index shards, with checksums, columns for filters, and the defects of samples.

Shards are not changed, and each process holds one at a time. Beside a shard its index keeps all samples, the defective
ones marked; a consolidated index holds the good samples that pass the filters.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from clipdist.data.bad_sample import REASONS, BadSample
from clipdist.data.consolidated import Consolidated, Part, make_part
from clipdist.data.fetch import Fetcher, is_remote, safe_name
from clipdist.data.filters import COLUMN_NAME, Condition
from clipdist.data.index import (
    ShardIndex,
    check_fresh,
    is_fresh,
    keep_facts,
    scan_whole_samples,
    stored_index,
    write_index,
)
from clipdist.data.members import DEFAULT_MEMBERS, Members
from clipdist.errors import Fault, UserError, writing

if TYPE_CHECKING:
    from clipdist.data.reader import Reader

DEFECTS = ("", *REASONS)  # the column `defect` of an index whose shard was verified holds places in this list
DEFECT = "defect"
MOST_NAMED = 20  # defective samples of a shard whose keys are told
_MOST_COLUMNS = 256  # a .json with other fields in every sample would fill the memory: later names are passed over
_WHOLE_NUMBERS = 2.0**53  # up to which float64 holds every integer

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardSource:
    """One shard, and the consolidated index that holds it already, if it was named by one."""

    tar: str
    book: str = ""
    number: int = 0


@dataclass(frozen=True)
class ShardTask:
    """What is to be done with every shard.

    Attributes:
        verify: read and decode everything.
        conditions: what samples must meet to be kept.
        output: write the index beside the shard, give it as a part of a consolidated one, or neither.
        salvage: of a damaged shard take the whole samples before the damage.
        force: pass over indices that are there.
        reread: verify again what was verified, by its checksums.
        folder: where remote shards lie while they are looked at.
        members: which members of a sample are image and captions.
        captions: whether a sample without a caption is defective.
    """

    verify: bool = False
    conditions: tuple[Condition, ...] = ()
    output: Literal["beside", "part", "nothing"] = "beside"
    salvage: bool = False
    force: bool = False
    reread: bool = False
    folder: Path = Path()
    members: Members = DEFAULT_MEMBERS
    captions: bool = True

    @property
    def columns(self) -> set[str]:
        """Those that the conditions ask for."""
        return {name for condition in self.conditions for name in condition.columns}


@dataclass(frozen=True)
class Examined:
    """What one shard turned out to be.

    Attributes:
        samples: in the shard, without those after a damage, whose number nobody knows.
        kept: without those that are defective or fail a condition.
        tar_bytes: size of the shard.
        kinds: of its members.
        columns: names of the numeric columns.
        passed: for each condition, how many of the samples without defects meet it; None: no such column.
        made: whether the index was made now; False: a fresh one was there.
        damage: "", or what is wrong with the shard.
        defects: how many samples have each defect.
        named: (key, defect) of the first of them.
        part: of the samples kept, where Task.output asks for it and there are any.
    """

    tar: str
    samples: int = 0
    kept: int = 0
    tar_bytes: int = 0
    kinds: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    passed: tuple[int | None, ...] = ()
    made: bool = True
    damage: str = ""
    defects: Counter[str] = field(default_factory=Counter)
    named: tuple[tuple[str, str], ...] = ()
    part: Part | None = None


def shard_sources(shards: Sequence[str]) -> list[ShardSource]:
    """Expand folders, patterns, lists and consolidated indices to single shards.

    Raises:
        UserError: no shards match, or one is named twice.
    """
    from clipdist.data.catalog import name_shards

    sources = []
    for part in [part for parts in name_shards(shards, "SHARDS", Fetcher()) for part in parts]:
        if isinstance(part, Consolidated):
            sources += [ShardSource(tar, part.name, number) for number, tar in enumerate(part.tars)]
        else:
            sources.append(ShardSource(part))
    return sources


def examine_shard(source: ShardSource, task: ShardTask) -> Examined:
    """Index one shard, or take the index that is there where it has all that is wanted.

    Raises:
        UserError, Fault: the index or the temporary copy cannot be written.
    """
    try:
        index, damage, made = _index_of(source, task)
    except Fault:
        raise
    except UserError as error:  # nothing of this shard can be used
        return Examined(source.tar, damage=str(error))
    if damage and not task.salvage:
        lost = Counter({"in a damaged shard": len(index)})
        return Examined(source.tar, len(index), tar_bytes=index.tar_bytes, damage=damage, defects=lost)
    if made and task.output == "beside":
        with writing(os.path.dirname(index.tar) or ".", "; write one file elsewhere with --out"):
            write_index(index)
    return _summed_up(index, task, damage, made)


def _index_of(source: ShardSource, task: ShardTask) -> tuple[ShardIndex, str, bool]:
    """Return the index with what the task wants, what is wrong with the shard, and whether it was made now."""
    stored = None if task.force and not source.book else _stored(source)
    if stored is not None and (source.book or is_fresh(stored)) and _has_all(stored, task):
        return stored, "", False
    with shard_at_hand(source.tar, task.folder) as path:
        if stored is not None and (source.book or is_fresh(stored)):
            index, damage = replace(stored, tar=str(path)), ""
        else:
            index, damage = scan_whole_samples(path)
            index, damage = keep_facts(index, stored), damage.replace(str(path), safe_name(source.tar))
        if not damage or task.salvage:
            index = _with_columns(index, task)
    if is_remote(source.tar):
        index = replace(index, tar_mtime_ns=0)
    return replace(index, tar=source.tar), damage, True


def read_index(tar: str | Path) -> tuple[ShardIndex, str, bool]:
    """Return the index beside a local shard where it is fresh, else what a scan gives of it.

    Returns:
        The index, what is wrong with the shard ("": nothing), and whether the index was there.

    Raises:
        UserError: the shard cannot be read.
    """
    stored = stored_index(tar)
    if stored is not None and is_fresh(stored):
        return stored, "", True
    return *scan_whole_samples(tar), False


def _stored(source: ShardSource) -> ShardIndex | None:
    if not source.book:
        return None if is_remote(source.tar) else stored_index(source.tar)
    index = _open_book(source.book).load(source.number)
    if not is_remote(source.tar):
        check_fresh(index)
    return index


@lru_cache(maxsize=4)
def _open_book(path: str) -> Consolidated:
    return Consolidated(path)


def _has_all(index: ShardIndex, task: ShardTask) -> bool:
    if DEFECT in index.columns and index.crc is not None:  # verified: a column that is not there is in no sample
        return not (task.verify and (task.force or task.reread))
    return not task.verify and task.columns <= index.columns.keys()


@contextlib.contextmanager
def shard_at_hand(tar: str, folder: Path) -> Iterator[str | Path]:
    """Give a local file with the shard's bytes; a remote one is fetched into `folder`, and gone afterwards.

    Raises:
        UserError: it cannot be had, for whatever reason.
        Fault: `folder` cannot be written.
    """
    if not is_remote(tar):
        yield tar
        return
    path = folder / f"{uuid.uuid4().hex}.tar"
    try:
        with writing(str(folder), "; name a larger place by --cache", Fault):
            try:
                Fetcher().fetch(tar, path)
            except UserError as error:  # one shard that cannot be had does not stop the others
                raise UserError(str(error)) from None
        yield path
    finally:
        path.unlink(missing_ok=True)


def _with_columns(index: ShardIndex, task: ShardTask) -> ShardIndex:
    if task.verify:
        return read_samples(index, True, task.members)
    return index if task.columns <= index.columns.keys() else read_samples(index, False, task.members)


def _summed_up(index: ShardIndex, task: ShardTask, damage: str, made: bool) -> Examined:
    defect = index.columns.get(DEFECT, np.zeros(len(index), dtype=np.int64)).astype(np.int64)
    if not task.captions:
        defect[defect == DEFECTS.index("missing caption")] = 0
    good = defect == 0
    keep, passed = good, []
    for condition in task.conditions:
        passes = condition.passes(index.columns)
        passed.append(None if passes is None else int((passes & good).sum()))
        keep = keep & (np.zeros_like(good) if passes is None else passes)
    bad = np.flatnonzero(~good)
    reasons = [DEFECTS[code] if 0 < code < len(DEFECTS) else "defect" for code in defect[bad].tolist()]
    return Examined(
        index.tar,
        len(index),
        int(keep.sum()),
        index.tar_bytes,
        index.kinds,
        tuple(index.columns),
        tuple(passed),
        made,
        damage,
        Counter(reasons),
        tuple(zip(index.keys[bad[:MOST_NAMED]].tolist(), reasons)),
        make_part(index.select(np.flatnonzero(keep))) if task.output == "part" and keep.any() else None,
    )


def read_samples(index: ShardIndex, decode: bool, members: Members = DEFAULT_MEMBERS) -> ShardIndex:
    """Return the index with what only the members' data tell, by the rules of training.

    Args:
        index: of a local shard. Checksums in it are compared, those that there are not are made where `decode` is True.
        decode: read every member and decode every image; else only images' headers, captions and .json.
        members: which members of a sample are image and captions.

    Returns:
        The index with columns [n]: every numeric field of the samples' .json; width and height of the image, pixels;
        caption_length, characters of the first caption; after decoding `defect`, a place in DEFECTS. NaN: not known.
        Columns that were there stay, unless they are read anew.

    Raises:
        UserError: the shard cannot be read.
    """
    # Comes with torch: seconds in every process, which a scan of headers need not wait for.
    from clipdist.data.catalog import Catalog, Shard
    from clipdist.data.reader import Reader

    columns: dict[str, np.ndarray] = {}
    crc = np.zeros(index.size.shape, dtype=np.uint32)
    reader = Reader(Catalog([Shard(index.tar, len(index), b"", lambda: index)], members=members))
    try:
        for row in range(len(index)):
            sums, numbers, defect = _look(reader, row, index.kinds if decode else (), decode)
            crc[row, : len(sums)] = sums
            numbers |= {DEFECT: DEFECTS.index(defect)} if decode else {}
            _fill(columns, len(index), row, numbers)
    except OSError as error:
        raise UserError(f"{index.tar}: cannot be read ({error.strerror or error})") from None
    finally:
        reader.close()
    narrow = {name: _narrowed(values) for name, values in columns.items()}
    old_crc = index.crc if index.crc is not None else (crc if decode else None)
    return replace(index, crc=old_crc, columns={**index.columns, **narrow})


def _look(reader: Reader, row: int, kinds: tuple[str, ...], decode: bool) -> tuple[list[int], dict[str, float], str]:
    """Return the CRC-32 of each member of a sample, its numbers, and the first thing that is wrong with it."""
    sample = reader.sample(row)
    reads = [_try(partial(sample.read, kind)) for kind in kinds]
    record, no_record = _try(sample.metadata)
    captions, no_caption = _try(sample.captions)
    size, no_image = _try(lambda: _image_size(sample.image(), decode))
    numbers = _numbers(record or {})
    numbers["width"], numbers["height"] = size or (math.nan, math.nan)
    numbers["caption_length"] = len(captions[0]) if captions else math.nan
    wrong = [*(defect for _, defect in reads), no_record, no_image, no_caption]
    crc = [0 if data is None else zlib.crc32(data) for data, _ in reads]
    return crc, numbers, next(filter(None, wrong), "")


def _try(read: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return what it gives, or the reason why it gives nothing."""
    try:
        return read(), ""
    except BadSample as error:
        return None, error.reason


def _image_size(data: bytes, decode: bool) -> tuple[int, int] | None:
    """Return width and height in pixels; None where the header does not tell them."""
    from clipdist.data.decode import decode_pixels
    from clipdist.datasets.images import ImageHeader, check_bytes

    if decode:
        height, width, _ = decode_pixels(data).shape
        return width, height
    header = check_bytes(data, decode=False)
    return (header.width, header.height) if isinstance(header, ImageHeader) else None


def _numbers(record: dict) -> dict[str, float]:
    numbers = {}
    for name, value in record.items():
        if isinstance(value, (int, float)) and COLUMN_NAME.fullmatch(name):
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                numbers[name] = float(value)
    return numbers


def _fill(columns: dict[str, np.ndarray], n: int, row: int, numbers: dict[str, float]) -> None:
    """Put a sample's numbers into columns [n], which appear as samples name them."""
    for name, value in numbers.items():
        own = name in ("width", "height", "caption_length", DEFECT)
        if name not in columns and (own or len(columns) < _MOST_COLUMNS):
            columns[name] = np.full(n, np.nan)
        if name in columns:
            columns[name][row] = value


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Return int64 where all are whole numbers, else float64."""
    whole = np.isfinite(values).all() and (np.abs(values) < _WHOLE_NUMBERS).all() and (values == np.floor(values)).all()
    return values.astype(np.int64) if whole else values
