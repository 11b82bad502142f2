"""Values that no release may change: a running job continues from its checkpoint only while they stay as they are."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipdist.data.augment import filter_uniforms
from clipdist.data.catalog import Catalog
from clipdist.data.index import index_from_bytes, index_to_bytes, scan_shard
from clipdist.data.order import Order, OrderKey, sample_uniforms

FINGERPRINT = "49a5c02cee59fc5dcc31c166f2a2181bf02fe26067e92698a3dc709b3ab734bd"
DIGEST = "cb87106cdb3ae8a6c777434ef7dfc911"
INDEX_SHA256 = "7d26c8e78d842b313bde43b83374291a9ad2932c3da85229d7c038a12a0f0658"  # of all arrays, in their order
FILTERS = [0.5850081054164508, 0.8850934772633926, 0.7502902722393351]
STARTS = np.array([0, 30, 70, 100])
# fmt: off
ONE_SEQUENCE = [
    46, 44, 48, 43, 42, 1, 68, 4, 0, 67, 24, 28, 23, 29, 26, 93, 87, 89, 90, 92, 49, 45, 47, 53, 52,
    2, 69, 3, 10, 5, 22, 27, 25, 75, 70, 91, 94, 88, 32, 98, 54, 55, 56, 57, 51, 7, 11, 9, 6, 12,
]
MIXTURE = [
    18, 19, 17, 16, 86, 83, 38, 37, 40, 39, 94, 93, 55, 51, 57, 71, 67, 3, 0, 74, 22, 23, 21, 84, 85,
    34, 33, 36, 92, 52, 54, 50, 56, 73, 97, 2, 1, 69, 75, 77, 20, 27, 31, 89, 35, 44, 42, 91, 95, 53,
]
# fmt: on


def make_tars(folder: Path) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(3):
                for kind, data in (("jpg", bytes(range(10 + row + shard))), ("txt", f"caption {row}".encode())):
                    member = tarfile.TarInfo(f"{shard}{row}.{kind}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def test_the_first_samples_of_an_order() -> None:
    order = Order(STARTS, OrderKey(seed=3, global_batch=20, streams=4, window=8))
    mixture = Order(STARTS, OrderKey(seed=3, global_batch=20, streams=4, window=8, parts=(2, 1)), [(0, 2), (2, 3)])
    assert np.concatenate([order.ids(step) for step in range(3)]).tolist()[:50] == ONE_SEQUENCE
    assert np.concatenate([mixture.ids(step) for step in range(3)]).tolist()[:50] == MIXTURE


def test_the_random_numbers_of_samples() -> None:
    uniforms = sample_uniforms(3, np.array([0, 1]), np.array([5, 6]), 2)
    assert uniforms.tolist() == [[0.9815691110317682, 0.6381821330188538], [0.12106814469876126, 0.4898002796707841]]


def test_the_random_numbers_of_views() -> None:
    """Those of blur and solarisation have a key of their own: the others stay where they were."""
    epochs, ids = np.array([0, 1]), np.array([5, 6])
    drawn = filter_uniforms(3, epochs, ids, 2)
    assert drawn.shape == (2, 2, 3)
    assert drawn[1, 1].tolist() == FILTERS
    assert np.array_equal(drawn[:, :1], filter_uniforms(3, epochs, ids, 1))


def test_the_fingerprint_of_a_catalog(tmp_path: Path) -> None:
    make_tars(tmp_path)
    assert Catalog.open([str(tmp_path)]).fingerprint() == FINGERPRINT


def test_the_format_of_an_index(tmp_path: Path) -> None:
    make_tars(tmp_path)
    scanned = scan_shard(tmp_path / "00000.tar")
    assert scanned.digest().hex() == DIGEST
    crc = np.arange(6, dtype=np.uint32).reshape(3, 2)
    data = index_to_bytes(replace(scanned, tar_mtime_ns=1, crc=crc, columns={"width": np.arange(3.0)}))
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        assert file.files == ["version", "tar_stat", "kinds", "keys", "offset", "size", "crc", "column.width"]
        assert hashlib.sha256(b"".join(file[name].tobytes() for name in file.files)).hexdigest() == INDEX_SHA256
    read = index_from_bytes(data, scanned.tar)
    assert read is not None
    assert read.digest().hex() == DIGEST
