"""tools/bench/data.py: the images that it makes, its clock, and what it refuses; test_bench_gpu.py runs it."""

from __future__ import annotations

import io
import os
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from clipdist.data.catalog import Catalog
from clipdist.data.reader import Reader
from clipdist.datasets.shard_writer import Sample, write_shard
from tools.bench import data_sides
from tools.bench.peers.data import LoadingJob

pytest.importorskip("open_clip_train")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """136 pictures of 48x40 in 2 shards."""
    folder = tmp_path_factory.mktemp("bench")
    for shard in range(2):
        write_shard(folder / f"{shard:05d}.tar", [small_sample(f"{shard}{row:03d}") for row in range(68)])
    return folder


def small_sample(key):
    file = io.BytesIO()
    pixels = np.random.default_rng(int(key)).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return Sample(key, {"jpg": file.getvalue(), "txt": f"picture {key} of a test".encode()})


def test_made_pictures_are_as_large_as_photographs_and_all_different(bench, tmp_path):
    folder = tmp_path / "new/pictures"
    assert "18 pictures in 6 shards" in bench("data --pictures 18 --make-640x480", folder).stdout
    reader = Reader(Catalog.open([str(folder)]))
    assert len(reader.catalog) == 18
    files = [reader.sample(sample_id).image() for sample_id in range(18)]
    reader.close()
    assert 60_000 < np.mean([len(data) for data in files]) < 100_000
    assert len(set(files)) == 18
    assert {Image.open(io.BytesIO(data)).size for data in files} == {(640, 480)}


def test_a_batch_counts_only_when_the_prepared_ones_are_used_up(monkeypatch):
    """A clock that advances with every batch: the rate is that of the window alone, in whole rounds of the workers."""
    clock = {"now": 0.0}
    sizes = iter([1000] * 3 + [8] * 100)  # the prepared ones must not count

    def take() -> int:
        clock["now"] += 1.0
        return next(sizes)

    monkeypatch.setattr(data_sides.time, "perf_counter", lambda: clock["now"])
    assert data_sides.steady_rate(take, 5.0, skip=3, at_once=4) == 8
    assert clock["now"] == 3 + 8  # two rounds of four


def test_all_samples_of_a_batch_count(shards, monkeypatch):
    tars = tuple(str(tar) for tar in sorted(shards.glob("*.tar")))
    job = LoadingJob(tars, 136, output=32, dct=False, threads=1, batch=16, seconds=0.1, webdataset=None)
    monkeypatch.setattr(data_sides, "steady_rate", lambda take, *_: take())
    side = data_sides.ClipdistLoading(job)
    assert side.window() == 16
    side.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "SHARDS: no shards match nowhere"),
        (["SHARDS", "--batch", "137"], "136 samples, fewer than --batch 137"),
        (["SHARDS/00000.tar", "--batch", "8"], "68 samples; 128 are needed"),
        (["SHARDS", "--peer-webdataset", "-r"], "expected one argument"),
        (["SHARDS", "--batch", "8", "--peer-webdataset", "new"], "must be a version"),
        (["SHARDS", "--threads", "0"], "--threads 0: must lie in 1 .. 1024"),
        ([], "SHARDS: name some"),
    ],
)
def test_bad_input_is_told(refused, shards, words, says):
    assert says in refused("data", *(word.replace("SHARDS", str(shards)) for word in words))


def test_a_picture_that_cannot_be_decoded_is_named(bench, tmp_path):
    samples = [small_sample(f"{row:03d}") for row in range(128)]
    samples[7] = Sample("007", {**samples[7].members, "jpg": b"no picture"})
    write_shard(tmp_path / "00000.tar", samples)
    installed = ["--peer-webdataset", version("webdataset")]
    ended = bench("data --seconds 0.1 --batch 8 --output 32", tmp_path, *installed)
    assert ended.returncode == 2
    assert ended.stderr == ("error: SHARDS: 00000.tar: 007: not an image; measure with samples that can all be used\n")


def test_a_folder_that_holds_something_is_not_written_to(refused, tmp_path):
    (tmp_path / "mine").write_text("")
    assert "is not empty" in refused("data", "--make-640x480", tmp_path)
    assert os.listdir(tmp_path) == ["mine"]
