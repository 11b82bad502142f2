"""Shards as written: to the byte what tarfile writes, and an index that holds what a scan and a checksum would find."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import zlib
from pathlib import Path

import pytest

from clipdist.data.index import load_index, scan_shard
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError


def samples(seed: int) -> list[Sample]:
    """Keys short and long, some beyond ASCII; members of every length around the size of a block."""
    draw = random.Random(seed)
    made = []
    for number in range(60):
        letters = "abc012_-é" if number % 5 == 0 else "abc012_-"
        key = f"{number}" + "".join(draw.choice(letters) for _ in range(draw.choice([0, 8, 70])))
        sizes = draw.sample([0, 1, 511, 512, 513, 5000], 2)
        made.append(Sample(key, {"jpg": draw.randbytes(sizes[0]), "1234.ids": draw.randbytes(sizes[1])}))
    return made


def test_a_shard_is_what_tarfile_writes(tmp_path: Path) -> None:
    made = samples(0)
    facts = write_shard(tmp_path / "0.tar", made)
    with tarfile.open(tmp_path / "expected.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in made:
            for kind, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    written = (tmp_path / "0.tar").read_bytes()
    assert written == (tmp_path / "expected.tar").read_bytes()
    assert facts.md5 == hashlib.md5(written).hexdigest()
    assert facts.size_bytes == len(written)


def test_the_index_agrees_with_a_scan_and_holds_checksums(tmp_path: Path) -> None:
    made = samples(1)
    write_shard(tmp_path / "0.tar", made)
    index, scan = load_index(tmp_path / "0.tar"), scan_shard(tmp_path / "0.tar")
    assert index.digest() == scan.digest()
    assert (index.offset == scan.offset).all()
    assert index.crc is not None
    assert index.crc.tolist() == [[zlib.crc32(data) for data in sample.members.values()] for sample in made]


def test_a_name_too_long_for_ustar_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        write_shard(tmp_path / "0.tar", [Sample("k" * 300, {"jpg": b""})])
    assert not list(tmp_path.iterdir())
