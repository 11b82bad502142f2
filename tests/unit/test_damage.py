"""Thousands of damaged samples, shards and index files: reported or right, never a crash, a hang, or silence."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
import torch
from damage import Case, Members, sample_case

from clipdist.config import Data
from clipdist.data.bad_sample import MAX_PIXELS, REASONS, BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import make_part, write_parts
from clipdist.data.decode import decode_pixels
from clipdist.data.index import index_from_bytes, index_path, load_index
from clipdist.data.loader import Batch, Loader, open_loader
from clipdist.data.order import OrderKey, sample_uniforms
from clipdist.data.reader import Reader
from clipdist.data.tokens import BPETokenizer, token_kind
from clipdist.data.views import image_view
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError

SEED = 0
PER_SHARD, PER_BATCH = 100, 20
SIZE = 24
CASE_S = 10  # a case takes milliseconds
MOST_GROWTH_KB = 400_000  # of the process' memory; the bombs say gigabytes
CFG = Data(threads=1, prefetch=1, max_pixels=1 << 20)
ODD = ("", "", " ", "é", "🐕", "#?%&", "\n", "'\"", "\x1b[31m", "-" * 60, "\\", "%s{0}")


class Hang(BaseException):
    """Not an Exception: nothing may take it for a damage."""


@contextmanager
def a_case(seed: int, number: int, name: str) -> Iterator[None]:
    """Bounds the time of a case; whatever fails in it names the case."""

    def expire(*_: object) -> None:
        raise Hang(f"took more than {CASE_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, CASE_S)
    try:
        yield
    except (Exception, Hang) as error:
        raise AssertionError(f"seed {seed}, case {number}, {name}: {error!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def nothing_is_executed_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    work = tmp_path / "working folder"
    work.mkdir()
    monkeypatch.chdir(work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert list(work.iterdir()) == []  # where an unpickled program would leave its mark
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KB


@lru_cache(maxsize=1)
def tokenizer() -> BPETokenizer:
    return BPETokenizer(2048, 16)


def key_of(case: int) -> str:
    return f"{case:06d}{ODD[case % len(ODD)]}"


def open_rows(folder: Path, rows: int) -> Loader:
    catalog = Catalog.open([str(folder)])
    return open_loader(
        catalog, OrderKey(0, rows, 1, 0), tokenizer(), CFG, views=[image_view(CFG, SIZE)], rank=0, world=1
    )


def captions_of(members: Members) -> list[str]:
    """What docs/pipeline.md promises of a sample without defects: the record's captions, else the text."""
    listed = json.loads(members.get("json") or b"{}").get("captions")
    listed = [listed] if isinstance(listed, str) else listed
    captions = [text for text in listed if isinstance(text, str) and text.strip()] if isinstance(listed, list) else []
    return captions or [members["txt"].decode().strip()]


def ids_of(members: Members, captions: list[str], chosen: int) -> list[int]:
    stored = np.frombuffer(members.get(token_kind(tokenizer()), b"")[: len(captions) * 64], dtype="u1")
    whole = len(members.get(token_kind(tokenizer()), b"")) == len(captions) * 64
    ids = stored.view("<i4").reshape(-1, 16)[chosen] if whole else np.array([-1])
    if ids.min() >= 0 and ids.max() < tokenizer().vocab_size:
        return ids.tolist()
    return tokenizer()([captions[chosen]])[0].tolist()


def check_row(case: Case, batch: Batch, place: int, reader: Reader) -> str:
    """Compares a row of a batch with what may become of the case. Returns the outcome."""
    sample_id = int(batch.sample_id[place])
    outcome = dict(batch.bad).get(sample_id, damage.VALID)
    assert outcome in case.outcomes, f"ends as {outcome!r}, not as one of {sorted(case.outcomes)}"
    assert bool(batch.valid["image"][place]) == (outcome == damage.VALID)
    if outcome != damage.VALID:
        assert not batch.images["image"][place].any()
        return outcome
    (uniform,) = sample_uniforms(CFG.seed, np.zeros(1, dtype=np.int64), np.array([sample_id]), 1)[0]
    captions = captions_of(case.members)
    assert batch.tokens[place].tolist() == ids_of(case.members, captions, int(uniform * len(captions)))
    pixels = decode_pixels(reader.sample(sample_id).image(), CFG.max_pixels)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.size <= 3 * CFG.max_pixels
    if case.same:
        assert np.array_equal(pixels, decode_pixels(case.original[damage.picture_kind(case.original)]))
    return outcome


def check_samples(folder: Path, seed: int, numbers: range) -> Counter[tuple[str, str]]:
    """Shards of samples that were damaged before they were written; every other shard is scanned. Counts outcomes."""
    counts: Counter[tuple[str, str]] = Counter()
    for first in numbers[::PER_SHARD]:
        cases = [sample_case(seed, n, token_kind(tokenizer())) for n in range(first, first + PER_SHARD)]
        tar = folder / "00000.tar"
        write_shard(tar, (Sample(key_of(first + row), case.members) for row, case in enumerate(cases)))
        if first // PER_SHARD % 2:
            index_path(tar).unlink()
        loader = open_rows(folder, PER_BATCH)
        for position in range(PER_SHARD // PER_BATCH):
            rows = loader.order.draws(position, 0, 1).ids.tolist()
            with a_case(seed, first, f"one of {[(first + row, cases[row].name) for row in rows]}"):
                batch = loader.next()
            for place, row in enumerate(rows):
                with a_case(seed, first + row, cases[row].name):
                    assert loader.reader.key(int(batch.sample_id[place])) == key_of(first + row)
                    counts[cases[row].name, check_row(cases[row], batch, place, loader.reader)] += 1
        loader.close()
    return counts


def test_damaged_samples_are_reported_and_others_are_right(tmp_path: Path) -> None:
    counts = check_samples(tmp_path, SEED, range(2000))
    assert {name for name, _ in counts} == {mutate.__name__ for mutate, _ in damage.SAMPLE_MUTATIONS} | {"none"}
    assert {reason for _, reason in counts} == {damage.VALID, *REASONS} - {
        "wrong checksum",
        "shard cut off",
        "too large",
    }


@dataclass(frozen=True)
class Base:
    """A whole shard of a few undamaged samples, its index, and a consolidated one, as bytes."""

    members: dict[str, Members]
    tar: bytes
    index: bytes
    book: bytes


@lru_cache(maxsize=8)
def base(seed: int, folder: Path, samples: int = 4) -> Base:
    folder.mkdir(exist_ok=True)
    rng = random.Random(f"base {seed}")
    members = {f"{row:04d}": damage.sample(rng) for row in range(samples)}
    tar = folder / "00000.tar"
    write_shard(tar, (Sample(key, own, {"width": damage.SIDE}) for key, own in members.items()))
    os.utime(tar, ns=(1, 1))
    write_parts(folder / "all.index.zip", map(make_part, [load_index(tar)]))
    return Base(members, tar.read_bytes(), index_path(tar).read_bytes(), (folder / "all.index.zip").read_bytes())


def put_index(tar: Path, index: bytes) -> Path:
    index_path(tar).write_bytes(index)
    return tar


def put(folder: Path, tar: bytes, index: bytes | None, book: bytes | None = None) -> Path:
    """The shard, with the time that its index knows, and its index file."""
    path = folder / "00000.tar"
    path.write_bytes(tar)
    os.utime(path, ns=(1, 1))
    if index is None:
        index_path(path).unlink(missing_ok=True)
    else:
        put_index(path, index)
    if book is not None:
        (folder / "all.index.zip").write_bytes(book)
    return path


def read_all(source: Path) -> dict[str, dict[str, bytes | str]] | UserError:
    """{key: {kind: bytes, or the reason that the reader gives}} of all samples, which are decoded too."""
    found: dict[str, dict[str, bytes | str]] = {}
    refusal = None
    try:
        reader = Reader(Catalog.open([str(source)]))
        for sample_id in range(len(reader.catalog)):
            kinds = reader.catalog.table(0).kinds
            sample = reader.sample(sample_id)
            members = {kind: tried(sample.read, kind) for kind in kinds}
            found[reader.key(sample_id)] = {kind: data for kind, data in members.items() if data is not None}
            # Members that are other ones than they were may be used or refused.
            captions, picture = tried(sample.captions), tried(sample.image)
            if not isinstance(captions, str):
                tokenizer()(captions)
            if not isinstance(picture, str):
                tried(decode_pixels, picture, CFG.max_pixels)
        reader.close()
    except UserError as error:
        refusal = error
    if refusal is None:
        return found
    assert "\n" not in str(refusal)
    assert str(refusal).startswith(f"{source.parent}/")  # names the file
    return refusal


def tried(function: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or the reason why it does not."""
    try:
        return function(*args)
    except BadSample as error:
        return error.reason


def is_told(found: dict[str, dict[str, bytes | str]] | UserError, members: dict[str, Members]) -> bool:
    """Whether every member is there, as it was or reported as bad; an empty one is none."""
    if isinstance(found, UserError):
        return True
    there = {key: {kind: data for kind, data in own.items() if data} for key, own in found.items()}
    return there.keys() == members.keys() and all(
        there[key].keys() == own.keys() and all(there[key][kind] in (data, *REASONS) for kind, data in own.items())
        for key, own in members.items()
    )


def is_refused_or_whole(found: dict[str, dict[str, bytes | str]] | UserError, members: dict[str, Members]) -> bool:
    return isinstance(found, UserError) or found == members


def check_tars(folder: Path, seed: int, numbers: range) -> Counter[tuple[str, str]]:
    """Shards whose tar is damaged, with their index (of the undamaged shard, the time unchanged) and without."""
    counts: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        rng = random.Random(f"tar {seed} {number}")
        whole = base(number % 8, folder / "base")
        mutate = rng.choice(damage.TAR_MUTATIONS)
        tar, index = mutate(rng, whole.tar, damage.tar_headers(whole.tar)), rng.choice((whole.index, None))
        with a_case(seed, number, mutate.__name__):
            found = read_all(put(folder, tar, index))
            if index is not None and len(tar) == len(whole.tar):
                assert is_told(found, whole.members), found
            elif mutate not in (damage.tar_absurd, damage.tar_extended):  # these can be sound headers of other members
                assert is_refused_or_whole(found, whole.members), found
        counts[mutate.__name__, "refused" if isinstance(found, UserError) else "read"] += 1
    return counts


def test_damaged_shards_are_refused_or_right(tmp_path: Path) -> None:
    counts = check_tars(tmp_path, SEED, range(400))
    assert {name for name, _ in counts} == {mutate.__name__ for mutate in damage.TAR_MUTATIONS}
    assert counts["tar_cut", "refused"] > counts["tar_cut", "read"]  # a cut in the padding takes nothing away
    assert counts["tar_repeated", "read"] == 0


def check_indices(folder: Path, seed: int, numbers: range) -> Counter[tuple[str, str]]:
    """Index files that are damaged, beside a shard and consolidated."""
    counts: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        rng = random.Random(f"index {seed} {number}")
        whole = base(number % 8, folder / "base")
        name, file = rng.choice((("index", whole.index), ("book", whole.book)))
        mutate = rng.choice((*damage.FILE_MUTATIONS, damage.arrays_changed, damage.arrays_changed))
        changed = changed_arrays(rng, file) if mutate is damage.arrays_changed else mutate(rng, file)
        with a_case(seed, number, f"{name} {mutate.__name__}"):
            if name == "index":
                found = read_all(put(folder, whole.tar, changed))
                assert not isinstance(found, UserError), found  # the shard is scanned instead
            else:
                put(folder, whole.tar, whole.index, changed)
                found = read_all(folder / "all.index.zip")
            assert is_told(found, whole.members), found
        counts[f"{name} {mutate.__name__}", "refused" if isinstance(found, UserError) else "read"] += 1
    return counts


def changed_arrays(rng: random.Random, file: bytes) -> bytes:
    """An index, or one of the two files within a consolidated one, with other arrays."""
    with np.load(io.BytesIO(file), allow_pickle=False) as opened:
        if "version" in opened.files:
            return packed(damage.arrays_changed(rng, dict(opened)))
    return damage.book_changed(rng, file, lambda part: changed_arrays(rng, part))


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez(out, allow_pickle=True, **arrays)
    return out.getvalue()


def test_damaged_index_files_are_replaced_or_refused(tmp_path: Path) -> None:
    counts = check_indices(tmp_path, SEED, range(600))
    assert len({name for name, _ in counts}) == 2 * (len(damage.FILE_MUTATIONS) + 1)
    assert counts["book file_cut", "read"] == 0


def check_checksums(folder: Path, seed: int, numbers: range) -> int:
    """Bytes of members changed in the shard, after it was indexed: exactly these samples are reported, all of them."""
    tar = folder / "00000.tar"
    for first in numbers[::PER_SHARD]:
        rng = random.Random(f"checksums {seed} {first}")
        kind = token_kind(tokenizer())
        members = [damage.sample(rng, kind if row % 2 else "") for row in range(PER_SHARD)]
        write_shard(tar, (Sample(key_of(row), own) for row, own in enumerate(members)))
        index, stat = load_index(tar), tar.stat()
        wanted = {}
        with open(tar, "r+b") as file:
            for row in rng.sample(range(PER_SHARD), PER_SHARD // 2):
                read = [column for column, kind in enumerate(index.kinds) if index.size[row, column] and kind != "txt"]
                column = rng.choice(read)
                damage.change_in_place(rng, file, int(index.offset[row, column]), int(index.size[row, column]))
                wanted[key_of(row)] = "wrong checksum"
        os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns + rng.randrange(2)))  # a copy has another time
        with a_case(seed, first, "checksums"):
            loader = open_rows(folder, PER_SHARD)
            batch = loader.next()
            reader = loader.reader
            assert {reader.shard_name(sample_id) for sample_id, _ in batch.bad} == {"00000.tar"}
            assert {reader.key(sample_id): reason for sample_id, reason in batch.bad} == wanted
            assert set(batch.sample_id[~batch.valid["image"]].tolist()) == {sample_id for sample_id, _ in batch.bad}
            loader.close()
    return len(numbers)


def test_with_checksums_every_change_is_reported_by_shard_and_key(tmp_path: Path) -> None:
    check_checksums(tmp_path, SEED, range(2000))


def test_a_shard_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    whole = base(0, tmp_path)
    loader = open_rows(tmp_path, len(whole.members))
    loader.reader.sample(0)  # opens it; a shard that was changed before is refused
    os.truncate(tmp_path / "00000.tar", len(whole.tar) // 2)
    batch = loader.next()
    assert {reason for _, reason in batch.bad} == {"shard cut off"}
    assert 0 < int(batch.valid["image"].sum()) < len(whole.members)
    loader.close()


def test_members_that_are_absurdly_large_are_not_read(tmp_path: Path) -> None:
    """A sparse shard, and an index that says what its members would be."""
    whole = base(1, tmp_path / "base")
    tar = put(tmp_path, whole.tar, None)
    os.truncate(tar, 300 << 20)
    os.utime(tar, ns=(1, 1))
    with np.load(io.BytesIO(whole.index)) as file:
        arrays = {**file, "tar_stat": np.array([300 << 20, 1])}
    kinds = arrays["kinds"].tolist()
    (picture,) = (kind for kind in whole.members["0001"] if kind not in ("txt", "json"))
    arrays["size"][0, kinds.index("json")] = 17 << 20
    arrays["size"][1, kinds.index(picture)] = 257 << 20
    found = read_all(put_index(tar, packed(arrays)))
    assert not isinstance(found, UserError)
    assert (found["0000"]["json"], found["0001"][picture]) == ("too large", "too large")


def test_an_index_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = base(0, tmp_path / "base")
    with np.load(io.BytesIO(whole.index)) as file:
        arrays = {**file, "keys": file["keys"].astype("<U1000000")}
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **arrays)
    bomb = out.getvalue()
    assert len(bomb) < 1 << 17
    book = damage.book_changed(random.Random(0), whole.book, lambda part: bomb)
    for limit, taken in ((1 << 25, True), (1 << 23, False)):
        monkeypatch.setattr("clipdist.data.index.MOST_INDEX_BYTES", limit)
        monkeypatch.setattr("clipdist.data.consolidated.MOST_INDEX_BYTES", limit)
        assert (index_from_bytes(bomb, "00000.tar") is not None) == taken
    put(tmp_path, whole.tar, None, book)
    monkeypatch.setattr("clipdist.data.consolidated.MOST_INDEX_BYTES", len(bomb) - 1)
    assert isinstance(read_all(tmp_path / "all.index.zip"), UserError)


def test_run_length_bitmaps_that_take_minutes_are_refused() -> None:
    with pytest.raises(BadSample, match="too many pixels"):
        decode_pixels(damage.bmp(8_000, 8_000), MAX_PIXELS)
    assert decode_pixels(damage.bmp(8, 1), MAX_PIXELS).shape == (1, 8, 3)


def test_nothing_is_written_but_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "00000.tar").write_bytes(damage.tar_with_paths_that_lead_outside())
    found = read_all(folder / "00000.tar")
    assert not isinstance(found, UserError)
    assert {"../../outside", "/tmp/outside"} <= found.keys()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["00000.tar", "00000.tar.idx.npz"]


def damaged_set(folder: Path) -> dict[str, str]:
    """Two shards of 40 samples each, every fourth damaged in a way that has one outcome: {key: reason}."""
    wanted = {}
    ways = (
        damage.no_picture,
        damage.no_caption,
        damage.broken_json,
        damage.wrong_utf8,
        damage.lfs_pointer,
        damage.dense_bomb,
    )
    for shard in range(2):
        rng = random.Random(f"set {shard}")
        samples = []
        for row in range(40):
            key, members = f"{shard}{row:04d}", damage.sample(rng)
            if row % 4 == 1:
                members, (wanted[key],) = ways[row // 4 % len(ways)](rng, members)
            samples.append(Sample(key, members))
        folder.mkdir(exist_ok=True)
        tar = folder / f"{shard:05d}.tar"
        write_shard(tar, samples)
        index = load_index(tar)
        with open(tar, "r+b") as file:  # one more, after it was indexed
            column = index.kinds.index("json")
            damage.change_in_place(rng, file, int(index.offset[0, column]), int(index.size[0, column]))
        wanted[f"{shard}0000"] = "wrong checksum"
    return wanted


def test_the_loader_masks_exactly_the_damaged_samples(tmp_path: Path) -> None:
    wanted = damaged_set(tmp_path)
    loader = open_rows(tmp_path, 80)
    batch, reader = loader.next(), loader.reader
    assert {reader.key(sample_id): reason for sample_id, reason in batch.bad} == wanted
    assert {reader.key(sample_id) for sample_id in batch.sample_id[~batch.valid["image"]].tolist()} == wanted.keys()
    assert all(reader.shard_name(sample_id) == f"0000{reader.key(sample_id)[0]}.tar" for sample_id, _ in batch.bad)
    assert torch.equal(batch.images["image"].flatten(1).any(1), batch.valid["image"])
    loader.close()


def test_a_run_counts_them_by_reason_and_names_them(tmp_path: Path) -> None:
    wanted = damaged_set(tmp_path / "shards")
    words = [f"data.train={tmp_path / 'shards'}", "data.val=", "data.max_bad_share=1", "train.global_batch=40"]
    words += ["train.steps=2", "device=cpu", f"run.root={tmp_path}", "run.name=run"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "clipdist/train.py", "--config", "configs/tiny.yaml", *words],
        cwd=root,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = [event for event in events if event.get("event") == "bad_sample"]
    assert {event["key"]: event["reason"] for event in named} == wanted  # two steps of 40 are one epoch
    assert all(event["shard"] == f"0000{event['key'][0]}.tar" for event in named)
    counts = [event["counts"] for event in events if event.get("event") == "bad_samples"]
    assert counts[-1] == Counter(wanted.values())
    assert f"note: {events_new(events)} samples could not be used" in ended.stdout + ended.stderr


def events_new(events: list[dict]) -> int:
    return next(event["new"] for event in events if event.get("event") == "bad_samples")
