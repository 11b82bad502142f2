"""Write the images and captions of a list as a folder of shards; a run that was cut off can be finished.

A shard is a fixed range of the list, written by one process: the bytes depend neither on the number of processes nor on
interruptions. plan.json says what decides the bytes; shards.jsonl has one line for every shard that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipdist.data.index import index_path
from clipdist.datasets.images import check_bytes, shrink
from clipdist.datasets.pair_lists import Pair, PairSource, Skip
from clipdist.datasets.pool import AHEAD, in_order
from clipdist.datasets.shard_writer import (
    Sample,
    ShardFacts,
    read_own,
    sample_key,
    shard_name,
    write_json,
    write_shard,
    write_side_files,
)
from clipdist.errors import Fault, UserError, writing
from clipdist.storage import replacing

FORMAT = 1  # of what is written: raise it when the same list would give other bytes
MAX_SHARDS = 100_000  # img2dataset's keys count shards with five digits
MAX_IMAGE_BYTES = 1 << 28
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:\\")
_TOOL = "shard_pairs"

PackCaptions = Callable[[list[str]], bytes]


@dataclass(frozen=True)
class ShardPlan:
    """All that decides the bytes of the shards.

    Attributes:
        list: fingerprint of the list's content.
        columns: of the image, then those of captions, and what else is stored.
        images_root: where relative file names start.
        per_shard: images of the list per shard.
        shrink: pixels of the shorter side at most; 0: bytes untouched.
        verified: images are decoded before they are taken.
        tokens: kind of the member with token ids; "": none.
    """

    list: str
    columns: tuple[str, ...]
    images_root: str
    per_shard: int
    shrink: int
    verified: bool
    tokens: str


@dataclass(frozen=True)
class ShardDone:
    """A shard that is written; `facts` has 0 samples, and there is no file, where nothing of its range was usable."""

    shard: int
    captions: int
    facts: ShardFacts
    skipped: tuple[Skip, ...]


# --- one shard, in a worker process ---


@dataclass(frozen=True)
class _PairShardJob:
    out: Path
    shard: int
    entries: Sequence[Pair | Skip]
    tokens: Sequence[bytes]  # of every Pair; empty without Plan.tokens
    plan: ShardPlan


def _write(job: _PairShardJob) -> ShardDone:
    """
    Raises:
        Fault: the shard cannot be written (disk full, ...).
    """
    skipped = [entry for entry in job.entries if isinstance(entry, Skip)]
    pairs = [entry for entry in job.entries if isinstance(entry, Pair)]
    captions = 0

    def samples() -> Iterator[Sample]:
        nonlocal captions
        row = 0
        for number, pair in enumerate(pairs):
            data = _read_file(job.plan.images_root, pair.file) if pair.data is None else pair.data
            image = data if isinstance(data, str) else _stored_image(data, job.plan)
            if isinstance(image, str):
                skipped.append(Skip(pair.row, pair.file, image))
                continue
            yield _sample(sample_key(job.shard, row), pair, image, job, number)
            captions += len(pair.captions)
            row += 1

    path = job.out / shard_name(job.shard)
    with writing(str(path), "; the same command goes on later", Fault):
        facts = write_shard(path, samples())
        if not facts.samples:
            path.unlink()
            index_path(path).unlink()
    return ShardDone(job.shard, captions, facts, tuple(sorted(skipped, key=lambda skip: (skip.row, skip.file))))


@dataclass(frozen=True)
class _StoredImage:
    data: bytes
    kind: str
    sizes: dict[str, int]


def _read_file(root: str, name: str) -> bytes | str:
    """Return a file's bytes, or the reason why it cannot be used; a backslash in its name may be one of Windows."""
    path = os.path.join(root, name)
    if "\\" in name and not os.path.lexists(path):
        if _WINDOWS_DRIVE.match(name):
            return "path on a Windows drive"
        path = os.path.join(root, name.replace("\\", "/"))
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would never end
            return "not a file"
        if status.st_size > MAX_IMAGE_BYTES:
            return "file too large"
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        return "missing file"
    except OSError:
        return "unreadable file"


def _stored_image(data: bytes, plan: ShardPlan) -> _StoredImage | str:
    """Return the image as it is to be stored, or the reason why it is not."""
    header = check_bytes(data, plan.verified)
    if isinstance(header, str):
        return header
    sizes = {"width": header.width, "height": header.height}
    if not plan.shrink or min(header.width, header.height) <= plan.shrink:
        return _StoredImage(data, header.kind, sizes)
    data, width, height = shrink(data, plan.shrink)
    original = {f"original_{name}": pixels for name, pixels in sizes.items()}
    return _StoredImage(data, "jpg", {"width": width, "height": height, **original})


def _sample(key: str, pair: Pair, image: _StoredImage, job: _PairShardJob, number: int) -> Sample:
    record = {
        "filename": pair.file.encode(errors="replace").decode(),
        **pair.extra,  # a column may be named filename; what is measured here wins over columns
        "key": key,
        **({"caption": pair.captions[0], "captions": pair.captions} if pair.captions else {}),
        **image.sizes,
        "sha256": hashlib.sha256(image.data).hexdigest(),
    }
    members = {image.kind: image.data}
    if pair.captions:
        members["txt"] = pair.captions[0].encode()
    members["json"] = json.dumps(record, ensure_ascii=False, default=str).encode(errors="replace")
    if pair.label is not None:
        members["cls"] = str(pair.label).encode()
    if job.plan.tokens:
        members[job.plan.tokens] = job.tokens[number]
    size = {name: image.sizes[name] for name in ("width", "height")}
    return Sample(key, members, {**size, "captions": len(pair.captions)})


# --- all shards ---


def write_pairs(
    pairs: PairSource,
    images: int,
    out: Path,
    plan: ShardPlan,
    processes: int,
    pack: PackCaptions | None,
) -> dict[str, Any]:
    """Write the shards that `out` lacks, then the side files; skipped.jsonl names all that was left out.

    Args:
        images: in the list, as its survey counted.
        out: the folder, held by hold_folder.
        processes: as in_order takes them.
        pack: captions of an image -> the member named Plan.tokens; None where the plan has none.

    Returns:
        The counts of the tool's JSON object: samples, captions, shards, shards_written_now, bytes, skipped.

    Raises:
        UserError: `out` is of another plan or not ours, or nothing of the list is usable.
        Fault: a shard cannot be written, or a worker process was killed.
    """
    if -(-images // plan.per_shard) > MAX_SHARDS:
        raise UserError(f"--per-shard {plan.per_shard}: {images} pictures make more than {MAX_SHARDS} shards; raise it")
    _check_plan(out, plan)
    with writing(f"--out {out}"):
        journal = _ShardJournal(out)
    before = len(journal.done)
    jobs = _jobs(pairs, out, plan, pack, journal)

    def images_of(shard: int) -> int:
        return min(plan.per_shard, images - shard * plan.per_shard)

    with tqdm(total=images, desc="write", unit="picture", disable=None) as bar:
        bar.update(sum(map(images_of, journal.done)))
        # Images that the list holds go to the processes with their jobs: few are prepared.
        for done in in_order(_write, jobs, processes, ahead=1 if pairs.holds_images else AHEAD):
            journal.add(done)
            bar.update(images_of(done.shard))
    skipped = journal.write_skipped(out / "skipped.jsonl")
    written = [journal.done[shard] for shard in sorted(journal.done)]
    whole = [done.facts for done in written if done.facts.samples]
    if not whole:
        for name in ("plan.json", "shards.jsonl", "skipped.jsonl"):
            (out / name).unlink()
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common())
        raise UserError(
            f"{pairs.source}: no picture of it can be used: {reasons}; relative names start at {plan.images_root} "
            "(--images-root)"
        )
    write_side_files(out, pairs.source.absolute().stem, whole)
    return {
        "samples": sum(facts.samples for facts in whole),
        "captions": sum(done.captions for done in written),
        "shards": len(whole),
        "shards_written_now": len(written) - before,
        "bytes": sum(facts.size_bytes for facts in whole),
        "skipped": dict(sorted(skipped.items())),
    }


def _jobs(
    pairs: PairSource, out: Path, plan: ShardPlan, pack: PackCaptions | None, journal: _ShardJournal
) -> Iterator[_PairShardJob]:
    for shard, entries in enumerate(_ranges(pairs, plan.per_shard)):
        if shard not in journal.done:
            tokens = [pack(list(entry.captions)) for entry in entries if isinstance(entry, Pair)] if pack else []
            yield _PairShardJob(out, shard, entries, tokens, plan)


def _ranges(pairs: Iterable[Pair | Skip], per_shard: int) -> Iterator[list[Pair | Skip]]:
    """Yield runs of `per_shard` images; rows that name none ride along."""
    entries: list[Pair | Skip] = []
    images = 0
    for entry in pairs:
        if isinstance(entry, Pair):
            if images == per_shard:
                yield entries
                entries, images = [], 0
            images += 1
        entries.append(entry)
    yield entries


# --- what a run that was cut off left ---


def _check_plan(out: Path, plan: ShardPlan) -> None:
    """Note the plan in a new folder; in one that has a plan it must be this one."""
    path = out / "plan.json"
    said = json.loads(json.dumps({"tool": _TOOL, "format": FORMAT, **asdict(plan)}))
    there = read_own(path, tool=_TOOL)
    if there is not None:
        differ = [
            f"{name} was {there.get(name)!r}, now {said[name]!r}" for name in said if there.get(name) != said[name]
        ]
        if differ:
            raise UserError(
                f"--out {out}: was begun otherwise: {'; '.join(differ)}; choose another --out, or remove {out}"
            )
        return
    foreign = sorted(file.name for file in out.glob("*") if file.suffix in (".tar", ".json", ".jsonl"))
    if foreign:
        raise UserError(f"{out / foreign[0]}: was not written by this tool; move it away or choose another --out")
    with writing(f"--out {out}"):
        write_json(path, said)


class _ShardJournal:
    """shards.jsonl: a line for every shard that is done. In memory without the names of what was left out.

    Attributes:
        done: the shards whose files are there, whole, with their index.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out / "shards.jsonl"
        self.done: dict[int, ShardDone] = {}
        self._offset: dict[int, int] = {}
        end = 0
        with open(self._path, "ab+") as file:
            file.seek(0)
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut off
                for line in file:
                    done = _parse(line)
                    if self._is_there(done):
                        self._remember(done, end)
                    end += len(line)
            file.truncate(end)

    def _is_there(self, done: ShardDone) -> bool:
        path = self._out / done.facts.name
        try:
            whole = path.stat().st_size == done.facts.size_bytes and index_path(path).exists()
        except OSError:
            whole = False
        return whole or not done.facts.samples

    def _remember(self, done: ShardDone, offset: int) -> None:
        self.done[done.shard] = ShardDone(done.shard, done.captions, done.facts, ())
        self._offset[done.shard] = offset

    def add(self, done: ShardDone) -> None:
        with open(self._path, "ab") as file:
            offset = file.tell()
            file.write(json.dumps(asdict(done)).encode() + b"\n")
        self._remember(done, offset)

    def write_skipped(self, path: Path) -> Counter[str]:
        """Write what was left out, in the list's order; counts it by reason."""
        counts: Counter[str] = Counter()
        with (
            replacing(path) as partial,
            open(self._path, "rb") as journal,
            open(partial, "w", encoding="utf-8", errors="replace") as file,
        ):
            for shard in sorted(self._offset):
                journal.seek(self._offset[shard])
                for skip in _parse(journal.readline()).skipped:
                    counts[skip.reason] += 1
                    where = {"row": skip.row} if skip.row else {}
                    file.write(
                        json.dumps({**where, "file": skip.file, "reason": skip.reason}, ensure_ascii=False) + "\n"
                    )
        return counts


def _parse(line: bytes) -> ShardDone:
    said = json.loads(line)
    skipped = tuple(Skip(**skip) for skip in said["skipped"])
    return ShardDone(said["shard"], said["captions"], ShardFacts(**said["facts"]), skipped)
