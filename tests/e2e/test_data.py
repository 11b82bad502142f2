"""Training on other sources than a local folder: remote shards through the cache, and mixtures; stopped and gone on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import records
from dist.launch import train
from pairs import write_pairs
from storage import Storage, Thing


@pytest.fixture
def storage() -> Iterator[Storage]:
    server = Storage()
    yield server
    server.close()


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def test_remote_shards_give_the_run_that_local_ones_give(shards, storage, tmp_path):
    for path in sorted((shards / "train").iterdir()):
        storage.things[f"/{path.name}"] = Thing(path.read_bytes())
    storage.things["/00001.tar"].statuses = [503, 503]
    storage.things["/00002.tar"].cut_at, storage.things["/00002.tar"].cuts = 20_000, 1
    common = [
        "optim.warmup_steps=0",
        "optim.min_lr=1e-3",
        "data.val=",
        f"run.root={tmp_path}",
        "data.streams=4",
        "data.window=20",
    ]
    remote = [
        "data.train=" + storage.url("/{00000..00003}.tar"),
        f"data.cache={tmp_path / 'cache'}",
        "data.cache_gb=0.1",
    ]
    local = train(2, *common, f"data.train={shards / 'train'}", "train.steps=6", "run.name=local")
    assert local.returncode == 0, local.stderr
    # Stopped in the second epoch and gone on, by two ranks that share the cache.
    for steps in (5, 6):
        ended = train(2, *common, *remote, f"train.steps={steps}", "run.name=remote")
        assert ended.returncode == 0, ended.stderr
    assert "goes on from" in ended.stdout
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    for name in ("00000.tar", "00003.tar"):
        assert storage.count(f"/{name}") == 1
    assert storage.count("/00001.tar") == 3


def test_an_address_without_an_index_is_bad_input(shards, storage, tmp_path):
    storage.things["/00000.tar"] = Thing((shards / "train" / "00000.tar").read_bytes())
    ended = train(1, f"data.train={storage.url('/00000.tar')}", "data.val=", f"run.root={tmp_path}")
    assert ended.returncode == 2
    assert "tools/index_shards.py" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_mixture_goes_on_where_it_was(shards, tmp_path):
    other = write_pairs(tmp_path / "other", 24)
    words = [f"data.train=[{shards / 'train'},{other}]", "data.weights=[3,1]", "data.val=", f"run.root={tmp_path}"]
    words += ["train.samples=95", "optim.warmup_steps=0", "optim.min_lr=1e-3"]  # a constant rate
    whole = train(2, *words, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    assert "6 steps of 16 pairs" in whole.stdout
    for samples in ("train.samples=48", "train.samples=96"):
        ended = train(1, *words, "run.name=parts", samples)
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    refused = train(1, *words, "run.name=parts", "train.samples=200", "data.weights=[1,1]")
    assert refused.returncode == 2
    assert "data.weights=[3, 1], here [1, 1]" in refused.stderr
    refused = train(1, *words, "run.name=new", "data.weights=[1]")
    assert "one for each of the 2 entries" in refused.stderr
